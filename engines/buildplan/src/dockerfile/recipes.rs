//! The recipe of each language's image: base images, files for installing dependencies, cache folders, and run-time files.

use super::{WORK, node, php};
use crate::plan::{Kind, Plan};
use crate::tree::Repo;

/// The recipe of a language's image.
#[derive(Default)]
pub struct Recipe {
    /// Names of the base images of the build stage and of the final stage.
    pub build: &'static str,
    pub run: &'static str,
    pub version: Option<String>,
    pub run_version: Option<String>,
    /// Whether the build's base image has a user other than root.
    pub has_user: bool,
    /// Debian packages in the plan.
    pub system_packages: Vec<String>,
    /// Packages for the build stage, and for the final stage.
    pub build_packages: Vec<String>,
    pub run_packages: Vec<String>,
    /// Commands before the sources are copied, such as installing a package manager.
    pub prepare: Vec<String>,
    /// Files that the install command reads.
    pub manifests: Vec<&'static str>,
    /// Cache folders, kept between builds.
    pub caches: Vec<&'static str>,
    /// Commands after the build, such as removing development dependencies.
    pub prune: Vec<String>,
    /// Paths that are copied to the final stage; the whole folder if empty.
    pub artifacts: Vec<&'static str>,
    pub environment: Vec<(&'static str, String)>,
    /// Variables of the final stage only.
    pub run_environment: Vec<(&'static str, String)>,
    /// A prefix of the start command.
    pub prefix: &'static str,
}

/// The first `most` numbers of a version or of where a range begins: `>=18.2 <21` is `18`.
fn numbers(version: Option<&String>, most: usize) -> Option<String> {
    let whole = version?.replace("< ", "<").replace("<= ", "<=").replace("!= ", "!=");
    let begins = |part: &&str| part.contains(|c: char| c.is_ascii_digit()) && !part.starts_with(['<', '!']);
    let version = whole.split([',', ' ', '|']).find(begins)?;
    let start = version.find(|c: char| c.is_ascii_digit())?;
    let end = version[start..].find(|c: char| !(c.is_ascii_digit() || c == '.')).map_or(version.len(), |end| start + end);
    let parts: Vec<&str> = version[start..end].split('.').filter(|part| !part.is_empty()).take(most).collect();
    Some(parts.join(".")).filter(|text| !text.is_empty())
}

/// Installs yarn 1.
const YARN: &str = "npm install --global yarn@1.22.22";

/// What brings a program that steps call where the image of their language has none: packages, and a command.
const PROGRAMS: [(&str, &[&str], &str); 9] = [
    ("make", &["make"], ""),
    ("hugo", &["hugo"], ""),
    ("jekyll", &["build-essential"], "gem install jekyll:4.4.1"),
    (
        "meteor",
        &["ca-certificates", "curl"],
        "METEOR_ALLOW_SUPERUSER=1 npm install --global meteor@3.5.2 --foreground-scripts && ln -s /root/.meteor/meteor /usr/local/bin/meteor",
    ),
    ("trunk", &[], "rustup target add wasm32-unknown-unknown && cargo install --locked trunk@0.21.14"),
    ("dx", &["pkg-config", "libssl-dev"], "rustup target add wasm32-unknown-unknown && cargo install --locked dioxus-cli@0.7.10"),
    ("mdbook", &[], "cargo install --locked mdbook@0.5.4"),
    ("zola", &["ca-certificates", "g++", "git"], "cargo install --locked --git https://github.com/getzola/zola --tag v0.20.0"),
    (
        "zig",
        &["python3-pip"],
        r#"pip install --no-cache-dir --break-system-packages ziglang==0.13.0 && printf '#!/bin/sh\nexec python3 -m ziglang "$@"\n' >/usr/local/bin/zig && chmod +x /usr/local/bin/zig"#,
    ),
];

/// The recipe of a plan, with the programs that its steps call.
pub fn recipe(repo: &Repo<'_>, language: &str, plan: &Plan) -> Recipe {
    let mut recipe = of_language(repo, language, plan);
    recipe.system_packages.clone_from(&plan.system_packages);
    if language == "php" {
        php::extend(&mut recipe);
    }
    if language == "javascript" {
        node::extend(&mut recipe);
    }
    let steps: Vec<&str> =
        [&plan.build.install, &plan.build.build].into_iter().flatten().flat_map(|step| programs(step)).collect();
    let calls = |program: &str| steps.contains(&program);
    let mut add = |packages: &[&str], command: &str| {
        recipe.build_packages.extend(packages.iter().map(|package| (*package).to_owned()));
        if !command.is_empty() && recipe.prepare.iter().all(|known| known != command) {
            recipe.prepare.push(command.to_owned());
        }
    };
    if !matches!(recipe.build, "node" | "bun") && ["npm", "npx", "node", "yarn", "pnpm"].into_iter().any(calls) {
        let manager = if calls("yarn") {
            YARN
        } else if calls("pnpm") {
            "npm install --global pnpm@9.15.9"
        } else {
            ""
        };
        add(&["nodejs", "npm"], manager);
    }
    for (program, packages, command) in PROGRAMS {
        if calls(program) {
            add(packages, command);
        }
    }
    let runs = plan.processes.values().chain(&plan.build.release).flat_map(|command| programs(command));
    for (_, packages, _) in runs.flat_map(|program| PROGRAMS.iter().filter(move |row| row.0 == program && row.2.is_empty())) {
        recipe.run_packages.extend(packages.iter().map(|package| (*package).to_owned()));
    }
    if steps.contains(&"cargo") && plan.build.build.as_deref().is_some_and(|build| build.contains("cargo leptos ")) {
        add(
            &["pkg-config", "libssl-dev"],
            "rustup target add wasm32-unknown-unknown && cargo install --locked cargo-leptos@0.3.11",
        );
    }
    recipe
}

/// The commands of a step.
pub fn commands(step: &str) -> impl Iterator<Item = &str> {
    step.split(['&', '|', ';', '\n', '(', ')']).map(str::trim)
}

/// The programs that a step calls: the first word of each of its commands.
fn programs(step: &str) -> impl Iterator<Item = &str> {
    commands(step).filter_map(|command| command.split_whitespace().find(|word| !word.contains('=')))
}

fn of_language(repo: &Repo<'_>, language: &str, plan: &Plan) -> Recipe {
    let version = |name: &str, most| numbers(plan.detection.versions.get(name), most);
    let strings = |all: &[&str]| all.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    let manager = plan.detection.package_manager.as_deref().unwrap_or_default();
    let path = |folder: &str| ("PATH", format!("{WORK}/{folder}:$PATH"));
    let calls =
        |tools: &[&str]| plan.processes.values().flat_map(|command| programs(command)).any(|program| tools.contains(&program));
    let has_javascript = plan.detection.languages.iter().any(|name| name == "javascript");
    match language {
        "javascript" if manager == "bun" && calls(&["bun", "bunx"]) => Recipe {
            build: "bun",
            run: "bun",
            version: version("bun", 3),
            manifests: vec!["package.json", "bun.lock", "bun.lockb", "bunfig.toml"],
            caches: vec!["/root/.bun/install/cache"],
            environment: vec![("NODE_ENV", "production".into()), path("node_modules/.bin")],
            ..Recipe::default()
        },
        "javascript" => {
            let exact = plan
                .detection
                .versions
                .get(manager)
                .map_or(String::new(), |version| format!("@{}", version.trim_start_matches(['^', '~', '>', '=', 'v'])));
            let (prepare, cache, prune) = match manager {
                "pnpm" => (
                    vec![format!("npm install --global pnpm{}", if exact.is_empty() { "@9" } else { &exact })],
                    "/root/.local/share/pnpm/store",
                    "pnpm prune --prod",
                ),
                "yarn" if !exact.is_empty() && !exact.starts_with("@1") || repo.has(".yarnrc.yml") => (
                    vec![format!("npm install --global @yarnpkg/cli-dist{}", if exact.is_empty() { "@4.9.2" } else { &exact })],
                    "/root/.yarn/berry/cache",
                    // Before the fourth version, a plugin of its own does that.
                    if exact.starts_with("@2") || exact.starts_with("@3") {
                        ""
                    } else {
                        "yarn workspaces focus --all --production"
                    },
                ),
                "yarn" => (
                    vec![format!("command -v yarn >/dev/null || {YARN}")],
                    "/usr/local/share/.cache/yarn",
                    "yarn install --production --ignore-scripts --prefer-offline",
                ),
                "bun" => (vec!["npm install --global bun@1.4.5".to_owned()], "/root/.bun/install/cache", ""),
                _ => (Vec::new(), "/root/.npm", "npm prune --omit=dev"),
            };
            Recipe {
                build: "node",
                run: "node",
                version: version("node", 1),
                prepare,
                manifests: vec![
                    "package.json",
                    "package-lock.json",
                    "npm-shrinkwrap.json",
                    "yarn.lock",
                    "pnpm-lock.yaml",
                    "pnpm-workspace.yaml",
                    "bun.lock",
                    "bun.lockb",
                    ".npmrc",
                    ".yarnrc.yml",
                    ".yarnrc",
                    ".yarn/releases",
                    ".yarn/patches",
                    ".pnp.cjs",
                    "patches",
                    "prisma",
                ],
                caches: vec![cache],
                prune: strings(&[prune])
                    .into_iter()
                    .filter(|prune| !prune.is_empty() && plan.kind != Kind::Static && node::drops_development(repo, plan))
                    .collect(),
                environment: vec![("NODE_ENV", "production".into()), path("node_modules/.bin")],
                ..Recipe::default()
            }
        }
        "deno" => Recipe { build: "deno", run: "deno", version: version("deno", 3), ..Recipe::default() },
        // The environment brings a Python of its own.
        "python" if manager == "conda" => Recipe {
            build: "conda",
            run: "debian",
            run_version: Some("bookworm".into()),
            run_packages: strings(&["ca-certificates"]),
            manifests: vec!["environment.yml", "environment.yaml"],
            caches: vec!["/opt/conda/pkgs"],
            environment: vec![("PYTHONUNBUFFERED", "1".into()), ("PYTHONDONTWRITEBYTECODE", "1".into()), path(".venv/bin")],
            ..Recipe::default()
        },
        "python" => {
            let tool = match manager {
                "uv" => "pip install --no-cache-dir uv==0.13.9",
                "poetry" => "pip install --no-cache-dir poetry==2.5.1",
                "pdm" => "pip install --no-cache-dir pdm==2.22.4 hishel==0.0.33 httpx==0.27.2 unearth==0.17.5",
                "pipenv" => "pip install --no-cache-dir pipenv==2026.10.3",
                _ => "",
            };
            Recipe {
                build: "python",
                run: "python",
                version: version("python", 2).filter(|version| version.contains('.')),
                prepare: strings(&[tool]).into_iter().filter(|line| !line.is_empty()).collect(),
                manifests: vec![
                    "requirements.txt",
                    "requirements",
                    "pyproject.toml",
                    "uv.lock",
                    "poetry.lock",
                    "poetry.toml",
                    "pdm.lock",
                    "Pipfile",
                    "Pipfile.lock",
                    "package.json",
                    "package-lock.json",
                ],
                caches: vec!["/root/.cache"],
                environment: vec![("PYTHONUNBUFFERED", "1".into()), ("PYTHONDONTWRITEBYTECODE", "1".into()), path(".venv/bin")],
                ..Recipe::default()
            }
        }
        "go" => Recipe {
            build: "go",
            run: "debian",
            version: version("go", 2),
            run_version: Some("bookworm".into()),
            run_packages: strings(&["ca-certificates"]),
            manifests: vec!["go.mod", "go.sum", "go.work", "go.work.sum"],
            caches: vec!["/go/pkg/mod", "/root/.cache/go-build"],
            // What the program reads beside itself stays there; what it was made of does not.
            prune: strings(&["find . -name '*.go' -delete && rm -rf vendor"]),
            ..Recipe::default()
        },
        "rust" => Recipe {
            build: "rust",
            run: "debian",
            version: version("rust", 2),
            run_version: Some("bookworm".into()),
            run_packages: strings(&["ca-certificates"]),
            caches: vec!["/usr/local/cargo/registry", "/app/target"],
            prune: strings(&[
                "find . -path ./target -prune -o -type f -name '*.rs' -exec rm {} + && rm -f .crates.toml .crates2.json",
            ]),
            ..Recipe::default()
        },
        "java" | "kotlin" | "scala" | "groovy" | "clojure" => {
            let (build, cache): (&str, &str) = match manager {
                "maven" => ("maven", "/root/.m2"),
                "gradle" => ("gradle", "/root/.gradle"),
                "sbt" | "mill" => ("sbt", "/root/.cache"),
                "leiningen" => ("leiningen", "/root/.m2"),
                "clojure" => ("clojure", "/root/.m2"),
                _ => ("jdk", "/root/.cache"),
            };
            let version = version("java", 1).filter(|_| build != "sbt");
            // What is started by the tool takes the tool, and what it has fetched.
            if calls(&["clojure", "lein", "sbt", "mvn", "gradle"]) {
                let home = [("JAVA_TOOL_OPTIONS", format!("-Duser.home={WORK}")), ("CLJ_CONFIG", format!("{WORK}/.clojure"))];
                return Recipe { build, run: build, version, environment: home.into(), ..Recipe::default() };
            }
            Recipe {
                build,
                run: "jre",
                version: version.clone(),
                run_version: version.or_else(|| Some("21".into())),
                caches: vec![cache],
                prune: strings(&[
                    r"find . -type f \( -name '*.java' -o -name '*.kt' -o -name '*.scala' -o -name '*.groovy' \) -delete && rm -rf .gradle",
                ]),
                ..Recipe::default()
            }
        }
        "ruby" => Recipe {
            build: "ruby",
            run: "ruby",
            version: version("ruby", 2),
            build_packages: strings(&["build-essential", "git", "libyaml-dev", "pkg-config"])
                .into_iter()
                .chain(strings(&["nodejs", "npm"]).into_iter().filter(|_| has_javascript))
                .collect(),
            // The assets' tools are called by Rails itself.
            prepare: strings(&[YARN]).into_iter().filter(|_| has_javascript && repo.has("yarn.lock")).collect(),
            manifests: vec!["Gemfile", "Gemfile.lock", ".ruby-version"],
            environment: vec![("BUNDLE_APP_CONFIG", format!("{WORK}/.bundle"))],
            ..Recipe::default()
        },
        "php" => Recipe {
            build: "php",
            run: "php",
            version: version("php", 2),
            build_packages: strings(&["ca-certificates", "curl", "git", "unzip"]),
            prepare: if manager == "composer" {
                strings(&[
                    "command -v composer >/dev/null || curl -fsSL https://getcomposer.org/installer | php -- --install-dir=/usr/local/bin --filename=composer",
                ])
            } else {
                Vec::new()
            },
            caches: vec!["/root/.composer/cache"],
            ..Recipe::default()
        },
        "elixir" => {
            // A release brings all that it takes.
            let release = "_build/prod/rel";
            let is_release = plan.processes.values().chain(&plan.build.release).all(|command| command.starts_with(release));
            Recipe {
                build: "elixir",
                run: if is_release { "debian" } else { "elixir" },
                version: version("elixir", 2),
                run_version: Some("bookworm".into()).filter(|_| is_release),
                build_packages: strings(&["build-essential", "git"]),
                run_packages: strings(&["ca-certificates", "libncurses6", "libstdc++6", "libssl3"]),
                artifacts: if is_release { vec![release] } else { Vec::new() },
                // Mix looks for what fetches packages when it only runs, too.
                environment: vec![
                    ("LANG", "C.UTF-8".into()),
                    ("MIX_HOME", format!("{WORK}/.mix")),
                    ("HEX_HOME", format!("{WORK}/.hex")),
                ],
                ..Recipe::default()
            }
        }
        "erlang" => Recipe {
            build: "erlang",
            run: "erlang",
            version: version("erlang", 1),
            build_packages: strings(&["git"]),
            ..Recipe::default()
        },
        "gleam" => Recipe { build: "gleam", run: "gleam", version: version("gleam", 3), ..Recipe::default() },
        "dotnet" => Recipe {
            build: "dotnet-sdk",
            run: "dotnet",
            version: version("dotnet", 2).filter(|version| version.contains('.')),
            caches: vec!["/root/.nuget/packages"],
            artifacts: vec!["out"],
            environment: vec![("DOTNET_CLI_TELEMETRY_OPTOUT", "1".into())],
            ..Recipe::default()
        },
        "swift" => Recipe {
            build: "swift",
            run: "swift-runtime",
            version: version("swift", 2),
            prune: strings(&["find . -type f -name '*.swift' -delete && rm -rf .build"]),
            ..Recipe::default()
        },
        "haskell" => Recipe {
            build: "haskell",
            run: "debian",
            version: version("ghc", 2),
            run_version: Some("bookworm".into()),
            run_packages: strings(&["ca-certificates", "libgmp10"]),
            prune: strings(&["find . -type f -name '*.hs' -delete && rm -rf dist-newstyle .stack-work"]),
            ..Recipe::default()
        },
        "dart" if plan.kind == Kind::Static => {
            Recipe { build: "flutter", run: "static", version: version("flutter", 3), ..Recipe::default() }
        }
        "dart" => Recipe {
            build: "dart",
            run: "debian",
            version: version("dart", 2),
            run_version: Some("bookworm".into()),
            run_packages: strings(&["ca-certificates"]),
            prune: strings(&["find . -type f -name '*.dart' -delete && rm -rf .dart_tool"]),
            ..Recipe::default()
        },
        "crystal" => Recipe {
            build: "crystal",
            run: "debian",
            version: version("crystal", 2),
            run_version: Some("bookworm".into()),
            run_packages: strings(&["ca-certificates", "libevent-2.1-7", "libgc1", "libpcre2-8-0", "libssl3"]),
            prune: strings(&["find . -type f -name '*.cr' -delete && rm -rf lib"]),
            ..Recipe::default()
        },
        "ocaml" => Recipe {
            build: "ocaml",
            run: "debian",
            has_user: true,
            run_version: Some("bookworm".into()),
            run_packages: strings(&["ca-certificates", "libev4", "libgmp10", "libssl3"]),
            environment: vec![("OPAMROOTISOK", "1".into()), ("OPAMROOT", "/home/opam/.opam".into())],
            ..Recipe::default()
        },
        "perl" => Recipe {
            build: "perl",
            run: "perl",
            version: version("perl", 2),
            build_packages: strings(&["build-essential"]),
            manifests: vec!["cpanfile", "cpanfile.snapshot"],
            environment: vec![path("local/bin")],
            ..Recipe::default()
        },
        "r" => Recipe {
            build: "r",
            run: "r",
            version: version("r", 3),
            manifests: vec!["renv.lock", ".Rprofile", "renv"],
            ..Recipe::default()
        },
        "julia" => Recipe {
            build: "julia",
            run: "julia",
            version: version("julia", 2),
            environment: vec![("JULIA_DEPOT_PATH", format!("{WORK}/.julia"))],
            ..Recipe::default()
        },
        "c" | "cpp" => Recipe {
            build: "debian",
            run: "debian",
            build_packages: strings(&["build-essential"]),
            run_packages: strings(&["ca-certificates"]),
            prune: strings(&["find . -name '*.o' -delete"]),
            ..Recipe::default()
        },
        "cobol" => Recipe {
            build: "debian",
            run: "debian",
            build_packages: strings(&["gnucobol"]),
            run_packages: strings(&["libcob4"]),
            ..Recipe::default()
        },
        "lua" => Recipe {
            build: "debian",
            run: if calls(&["lapis", "openresty"]) { "openresty" } else { "debian" },
            build_packages: strings(&["build-essential", "lua5.1", "luarocks"]),
            run_packages: strings(&["lua5.1"]),
            environment: vec![path("lua_modules/bin")],
            ..Recipe::default()
        },
        // Haunt is a package since that release.
        "scheme" => Recipe { build: "debian", run: "static", version: Some("forky".into()), ..Recipe::default() },
        _ => Recipe { build: "debian", run: "debian", run_packages: strings(&["ca-certificates"]), ..Recipe::default() },
    }
}

/// Adds OpenTelemetry instrumentation, if the language supports it without code changes.
pub fn instrument(language: &str, recipe: &mut Recipe) {
    match language {
        "javascript" => {
            recipe.prune.push(
                "npm install --no-save --no-audit @opentelemetry/api@1.10.0 @opentelemetry/auto-instrumentations-node@0.82.0"
                    .into(),
            );
            recipe.run_environment.push(("NODE_OPTIONS", "--require @opentelemetry/auto-instrumentations-node/register".into()));
        }
        "python" => {
            recipe.prune.push(".venv/bin/python -m pip install opentelemetry-distro opentelemetry-exporter-otlp && .venv/bin/opentelemetry-bootstrap --action install".into());
            recipe.prefix = "opentelemetry-instrument ";
        }
        "java" | "kotlin" | "scala" | "groovy" | "clojure" => {
            let agent = "https://repo1.maven.org/maven2/io/opentelemetry/javaagent/opentelemetry-javaagent/2.10.0/opentelemetry-javaagent-2.10.0.jar";
            recipe.prune.push(format!("curl -fsSL -o opentelemetry-javaagent.jar {agent}"));
            recipe.run_environment.push(("JAVA_TOOL_OPTIONS", format!("-javaagent:{WORK}/opentelemetry-javaagent.jar")));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::{numbers, recipe};
    use crate::dockerfile::IMAGES;
    use crate::plan::Plan;
    use crate::tree::{Memory, Repo};

    #[test]
    fn every_recipe_names_images_of_the_table() {
        let tree = Memory::new([("Makefile", "")]);
        let (languages, managers) = (
            "javascript deno python go rust java kotlin scala groovy clojure ruby php elixir erlang gleam dotnet swift haskell \
             dart crystal ocaml perl r julia c cpp cobol lua scheme shell",
            "npm bun conda maven gradle sbt mill leiningen clojure other",
        );
        for language in languages.split_whitespace() {
            for manager in managers.split_whitespace() {
                let mut plan = Plan::default();
                plan.detection.package_manager = Some(manager.to_owned());
                plan.processes.insert("web".into(), "bun run server.ts".into());
                let recipe = recipe(&Repo::new(&tree), language, &plan);
                for name in [recipe.build, recipe.run] {
                    assert!(IMAGES.iter().any(|(known, ..)| *known == name), "{name} of {language} with {manager}");
                }
            }
        }
    }

    #[test]
    fn a_range_gives_a_version() {
        let of = |text: &str, most| numbers(Some(&text.to_owned()), most);
        assert_eq!(of(">=18.2 <21", 1).as_deref(), Some("18"));
        assert_eq!(of("^3.11", 2).as_deref(), Some("3.11"));
        assert_eq!(of("3.12.4", 2).as_deref(), Some("3.12"));
        assert_eq!(of("<4, >=3.9", 2).as_deref(), Some("3.9"));
        assert_eq!(of("lts/*", 1), None);
        assert_eq!(of("< 4", 1), None, "where it ends says not what there is");
    }
}
