//! Writes the Dockerfile of a plan: two stages, dependencies in a layer of their own, no build tools in the image, no root,
//! no secret in a layer.

mod node;
mod php;
mod recipes;
mod site;

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::frameworks::build_cache_folders;
use crate::plan::{Kind, Plan};
use crate::tree::{Repo, Tree};
use recipes::{Recipe, instrument, recipe};

/// Options of a Dockerfile.
#[derive(Clone, Debug)]
pub struct ImageOptions {
    /// Base images by name, in place of the defaults ([`IMAGES`]); `{version}` stands for the version in the plan. A digest (`name@sha256:…`) pins one.
    pub images: BTreeMap<String, String>,
    /// Whether `BuildKit` builds it, which supports cache mounts and secret mounts.
    pub buildkit: bool,
    /// Plans with the same scope share caches: that of an organization or an application.
    pub scope: String,
    /// Names of build secrets. They are in no layer.
    pub secrets: Vec<String>,
    /// Names of build arguments.
    pub arguments: Vec<String>,
    /// Whether the program is instrumented for `OpenTelemetry`, if its language supports that without code changes.
    pub opentelemetry: bool,
}

impl Default for ImageOptions {
    fn default() -> Self {
        Self {
            images: BTreeMap::new(),
            buildkit: true,
            scope: String::new(),
            secrets: Vec::new(),
            arguments: Vec::new(),
            opentelemetry: false,
        }
    }
}

/// The files that build an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    pub dockerfile: String,
    pub dockerignore: String,
}

/// The default base images: name, image, and the version if the plan has none.
pub const IMAGES: [(&str, &str, &str); 34] = [
    ("node", "node:{version}-bookworm-slim", "22"),
    ("bun", "oven/bun:{version}-debian", "1"),
    ("deno", "denoland/deno:debian-{version}", "2.1.4"),
    ("python", "python:{version}-slim-bookworm", "3.12"),
    ("conda", "condaforge/miniforge3:{version}", "26.1.0-0"),
    ("go", "golang:{version}-bookworm", "1.23"),
    ("rust", "rust:{version}-slim-bookworm", "1.88"),
    ("maven", "maven:3-eclipse-temurin-{version}", "21"),
    ("gradle", "gradle:8-jdk{version}", "21"),
    ("jdk", "eclipse-temurin:{version}-jdk", "21"),
    ("jre", "eclipse-temurin:{version}-jre", "21"),
    ("sbt", "sbtscala/scala-sbt:eclipse-temurin-{version}", "21.0.5_11_1.10.7_3.6.2"),
    ("clojure", "clojure:temurin-{version}-tools-deps-bookworm", "21"),
    ("leiningen", "clojure:temurin-{version}-lein-bookworm", "21"),
    ("ruby", "ruby:{version}-slim-bookworm", "3.3"),
    ("php", "php:{version}-cli-bookworm", "8.3"),
    ("elixir", "elixir:{version}-slim", "1.17"),
    ("erlang", "erlang:{version}-slim", "27"),
    ("gleam", "ghcr.io/gleam-lang/gleam:v{version}-erlang-slim", "1.6.3"),
    ("dotnet-sdk", "mcr.microsoft.com/dotnet/sdk:{version}", "8.0"),
    ("dotnet", "mcr.microsoft.com/dotnet/aspnet:{version}", "8.0"),
    ("swift", "swift:{version}-bookworm", "6.0"),
    ("swift-runtime", "swift:{version}-bookworm-slim", "6.0"),
    ("haskell", "haskell:{version}-slim", "9.8"),
    ("dart", "dart:{version}", "3.6"),
    ("flutter", "ghcr.io/cirruslabs/flutter:{version}", "stable"),
    ("crystal", "crystallang/crystal:{version}", "1.14"),
    ("ocaml", "ocaml/opam:debian-12-ocaml-{version}", "5.2"),
    ("openresty", "openresty/openresty:{version}", "bookworm"),
    ("perl", "perl:{version}-slim", "5.40"),
    ("r", "rocker/r-ver:{version}", "4.4.2"),
    ("julia", "julia:{version}-bookworm", "1.11"),
    ("debian", "debian:{version}-slim", "bookworm"),
    ("static", "nginxinc/nginx-unprivileged:{version}-bookworm", "1.27"),
];

/// Packages for the build, and the packages that the program needs instead at run time.
const DEVELOPMENT: &[(&str, &str)] = &[
    ("default-libmysqlclient-dev", "libmariadb3"),
    (
        "libboost-all-dev",
        "libboost-atomic1.74.0 libboost-chrono1.74.0 libboost-context1.74.0 libboost-coroutine1.74.0 libboost-date-time1.74.0 libboost-filesystem1.74.0 libboost-locale1.74.0 libboost-log1.74.0 libboost-program-options1.74.0 libboost-regex1.74.0 libboost-serialization1.74.0 libboost-system1.74.0 libboost-thread1.74.0",
    ),
    ("libcairo2-dev", "libcairo2"),
    ("libcpp-httplib-dev", "libcpp-httplib0.11"),
    ("libcurl4-openssl-dev", "libcurl4"),
    ("libffi-dev", "libffi8"),
    ("libgdal-dev", "libgdal32"),
    ("libjsoncpp-dev", "libjsoncpp25"),
    ("libldap2-dev", "libldap-2.5-0"),
    ("libmagickwand-dev", "libmagickwand-6.q16-6"),
    ("libmemcached-dev", "libmemcached11 libmemcachedutil2"),
    ("libmicrohttpd-dev", "libmicrohttpd12"),
    ("libpq-dev", "libpq5"),
    ("libsasl2-dev", "libsasl2-2"),
    ("libsqlite3-dev", "libsqlite3-0"),
    ("libssl-dev", "libssl3"),
    ("libvips-dev", "libvips42"),
    ("libyaml-dev", "libyaml-0-2"),
    ("nlohmann-json3-dev", ""),
    ("portaudio19-dev", "libportaudio2"),
    ("unixodbc-dev", "unixodbc"),
    ("uuid-dev", "libuuid1"),
    ("zlib1g-dev", "zlib1g"),
    ("libbz2-dev", ""),
    ("libevent-dev", "libevent-2.1-7 libevent-openssl-2.1-7"),
    ("libfreetype-dev", "libfreetype6"),
    ("libgmp-dev", "libgmp10"),
    ("libicu-dev", "libicu72"),
    ("libjpeg62-turbo-dev", "libjpeg62-turbo"),
    ("libpng-dev", "libpng16-16"),
    ("librabbitmq-dev", "librabbitmq4"),
    ("librdkafka-dev", "librdkafka1"),
    ("libssh2-1-dev", "libssh2-1"),
    ("libtidy-dev", "libtidy5deb1"),
    ("libwebp-dev", "libwebp7"),
    ("libxml2-dev", "libxml2"),
    ("libxslt1-dev", "libxslt1.1"),
    ("libzip-dev", "libzip4"),
];
const TOOLS: [&str; 11] =
    ["gcc", "g++", "make", "cmake", "meson", "pkg-config", "libc6-dev", "gnucobol", "haunt", "ninja-build", "build-essential"];

/// The user of the finished image.
const UID: &str = "10001:10001";
const WORK: &str = "/app";
/// The shell of build steps.
const SHELL: &[&str] = &["/bin/bash", "-o", "pipefail", "-c"];

/// Writes the Dockerfile of a plan, and the `.dockerignore` that goes with it.
///
/// # Errors
/// When there is nothing to run, a name is invalid, or there are secrets without `BuildKit`; the text is for the user.
pub fn dockerfile(tree: &dyn Tree, plan: &Plan, options: &ImageOptions) -> Result<Image, String> {
    if let Some(file) = &plan.build.dockerfile {
        return Err(format!("the repository has {file}, which is used as it is"));
    }
    if plan.processes.is_empty() && plan.kind != Kind::Static {
        let why = plan.questions.first().map_or_else(|| "there is nothing to run".to_owned(), |question| question.text.clone());
        return Err(format!("{why}; set it in capsule.toml"));
    }
    if !options.secrets.is_empty() && !options.buildkit {
        return Err("build secrets need BuildKit: the classic builder would keep them in a layer".into());
    }
    if let Some(name) = options.secrets.iter().chain(&options.arguments).find(|name| !is_name(name)) {
        return Err(format!("`{name}` is not a valid variable name: use letters, digits and _, and do not begin with a digit"));
    }
    let repo = Repo::new(tree);
    let language = plan.detection.language.as_deref().unwrap_or("shell");
    let mut recipe = recipe(&repo, language, plan);
    if options.opentelemetry {
        instrument(language, &mut recipe);
    }
    let mut text = String::from("# Written by `capsule plan --dockerfile`.\n");
    let writer = Writer { plan, options, recipe: &recipe };
    if plan.kind == Kind::Static && plan.build.install.is_none() && plan.build.build.is_none() {
        writer.site(&mut text, None);
    } else {
        writer.build_stage(&repo, &mut text);
        if plan.kind == Kind::Static {
            writer.site(&mut text, Some("build"));
        } else {
            writer.run_stage(&mut text);
        }
    }
    Ok(Image { dockerfile: text, dockerignore: ignored(&repo) })
}

/// The lines of the `.dockerignore`: paths that no build needs, and the repository's own lines.
fn ignored(repo: &Repo<'_>) -> String {
    let usual = [
        ".git",
        ".github",
        ".gitlab",
        ".env",
        ".env.*",
        "!.env.example",
        "*.log",
        ".DS_Store",
        ".idea",
        ".vscode",
        "node_modules",
        ".venv",
        "venv",
        "__pycache__",
        "*.pyc",
        "target",
        "vendor/bundle",
        "_build",
        "deps",
        ".next",
        ".nuxt",
        ".output",
        "bin/app",
        "coverage",
        ".capsule",
        "Dockerfile",
        ".dockerignore",
        "compose.yaml",
        "docker-compose.yml",
    ];
    let own = repo.text(".dockerignore");
    let own: Vec<&str> = own.lines().filter(|line| !line.trim().is_empty()).collect();
    let mut lines: Vec<&str> = usual.iter().copied().filter(|line| *line != "deps" || repo.has("mix.exs")).collect();
    lines.extend(own.iter().filter(|line| !usual.contains(line)));
    lines.join("\n") + "\n"
}

struct Writer<'a> {
    plan: &'a Plan,
    options: &'a ImageOptions,
    recipe: &'a Recipe,
}

impl Writer<'_> {
    fn image(&self, name: &str, version: Option<&str>) -> String {
        // A test checks that all names in recipes are in the table.
        let (usual, otherwise) = IMAGES.iter().find(|(known, ..)| *known == name).map_or((name, ""), |image| (image.1, image.2));
        let image = self.options.images.get(name).map_or(usual, String::as_str);
        image.replace("{version}", version.unwrap_or(otherwise))
    }

    fn build_stage(&self, repo: &Repo<'_>, text: &mut String) {
        let recipe = self.recipe;
        let _ = writeln!(text, "FROM {} AS build", self.image(recipe.build, recipe.version.as_deref()));
        if recipe.has_user {
            let _ = writeln!(text, "# hadolint ignore=DL3002\nUSER root");
        }
        let _ = writeln!(text, "SHELL {}", serde_json::to_string(SHELL).unwrap_or_default());
        let packages = recipe.system_packages.iter().filter(|package| is_for_build(package));
        apt(text, packages.chain(&recipe.build_packages));
        let _ = writeln!(text, "WORKDIR {WORK}");
        for line in &recipe.prepare {
            let _ = writeln!(text, "RUN {line}");
        }
        for name in &self.options.arguments {
            let _ = writeln!(text, "ARG {name}");
        }
        self.environment(text, true);
        let manifests: Vec<&str> =
            recipe.manifests.iter().copied().filter(|file| repo.has(file) || repo.has_folder(file)).collect();
        let is_whole =
            self.plan.build.install.as_deref().is_some_and(|install| install.contains("cd ") || needs_sources(install));
        let layered = !manifests.is_empty() && !is_whole && self.plan.members.is_empty();
        if layered && let Some(install) = &self.plan.build.install {
            let (folders, files): (Vec<&str>, Vec<&str>) = manifests.into_iter().partition(|name| repo.has_folder(name));
            if !files.is_empty() {
                let _ = writeln!(text, "COPY {} ./", files.join(" "));
            }
            for folder in folders {
                let _ = writeln!(text, "COPY {folder} ./{folder}");
            }
            self.run(text, install);
        }
        let _ = writeln!(text, "COPY . .");
        if !layered && let Some(install) = &self.plan.build.install {
            self.run(text, install);
        }
        let kept: Vec<String> = build_cache_folders(self.plan).iter().map(|folder| format!("{WORK}/{folder}")).collect();
        if let Some(build) = &self.plan.build.build {
            self.run_with(text, build, &kept);
        }
        for command in &recipe.prune {
            self.run(text, command);
        }
        // Without BuildKit, these folders are part of the image.
        let caches = recipe.caches.iter().copied().filter(|folder| folder.starts_with(WORK));
        let folders: Vec<&str> = caches.chain(kept.iter().map(String::as_str)).collect();
        if !self.options.buildkit && !folders.is_empty() {
            let _ = writeln!(text, "RUN rm -rf {}", folders.join(" "));
        }
        text.push('\n');
    }

    /// Writes a step, with the recipe's cache mounts and the secret mounts.
    fn run(&self, text: &mut String, command: &str) {
        self.run_with(text, command, &[]);
    }

    /// Writes a step, with cache mounts for `kept` as well.
    fn run_with(&self, text: &mut String, command: &str, kept: &[String]) {
        let mut mounts = String::new();
        let mut variables = String::new();
        if self.options.buildkit {
            let plain = |text: &str| text.replace(|c: char| !c.is_ascii_alphanumeric(), "-").trim_matches('-').to_owned();
            for folder in self.recipe.caches.iter().copied().chain(kept.iter().map(String::as_str)) {
                let id = plain(&format!("capsule-{}-{folder}", self.options.scope));
                let _ = write!(mounts, "--mount=type=cache,id={id},target={folder} ");
            }
            for name in &self.options.secrets {
                let _ = write!(mounts, "--mount=type=secret,id={name} ");
                let _ = write!(variables, "{name}=\"$(cat /run/secrets/{name})\" && export {name} && ");
            }
        }
        let command = format!("{variables}{command}");
        let command = if command.contains('\n') {
            // Several lines are one script of the shell.
            serde_json::to_string(&[SHELL, &[&command]].concat()).unwrap_or_default()
        } else {
            command
        };
        let _ = writeln!(text, "RUN {mounts}{command}");
    }

    fn environment(&self, text: &mut String, is_build: bool) {
        let mut all: Vec<(String, String)> =
            self.recipe.environment.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        all.extend(
            self.plan
                .build
                .env
                .iter()
                .filter(|(name, _)| is_name(name.as_str()))
                .map(|(name, value)| (name.clone(), value.clone())),
        );
        if !is_build {
            all.extend(self.recipe.run_environment.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
        } else {
            all.push(("CI".into(), "true".into()));
            // These could keep the build from installing what it needs.
            all.retain(|(name, _)| !matches!(name.as_str(), "NODE_ENV" | "PORT"));
        }
        if !all.is_empty() {
            let lines: Vec<String> = all.iter().map(|(name, value)| format!("{name}={}", quoted(value))).collect();
            let _ = writeln!(text, "ENV {}", lines.join(" \\\n    "));
        }
    }

    fn run_stage(&self, text: &mut String) {
        let recipe = self.recipe;
        let _ = writeln!(text, "FROM {}", self.image(recipe.run, recipe.run_version.as_deref().or(recipe.version.as_deref())));
        let mut packages: Vec<String> = vec!["tini".into()];
        for package in &recipe.system_packages {
            match DEVELOPMENT.iter().find(|(development, _)| development == package) {
                Some((_, left)) => packages.extend(left.split_whitespace().map(str::to_owned)),
                None if !is_for_build(package) => packages.push(package.clone()),
                None => {}
            }
        }
        packages.extend(recipe.run_packages.clone());
        apt(text, packages.iter());
        let _ = writeln!(text, "RUN groupadd --gid 10001 app && useradd --uid 10001 --gid app --no-log-init --create-home app");
        let _ = writeln!(text, "WORKDIR {WORK}");
        if recipe.artifacts.is_empty() {
            let _ = writeln!(text, "COPY --from=build --chown={UID} {WORK} {WORK}");
        }
        for path in &recipe.artifacts {
            let target = if path.starts_with('/') { (*path).to_owned() } else { format!("{WORK}/{path}") };
            let owner = if target.starts_with(WORK) { format!("--chown={UID} ") } else { String::new() };
            let _ = writeln!(text, "COPY --from=build {owner}{target} {target}");
        }
        self.environment(text, false);
        let port = self.plan.networking.port;
        if let Some(port) = port {
            let _ = writeln!(text, "ENV PORT={port}\nEXPOSE {port}");
        }
        let _ = writeln!(text, "USER {UID}");
        let web = self.plan.processes.get("web");
        if web.is_some() && port.is_some() {
            let path = self.plan.networking.health_check.as_deref();
            health_check(text, "$PORT", path.unwrap_or("/"), if path.is_some() { "[23]" } else { "[234]" });
        }
        let _ = writeln!(text, "ENTRYPOINT [\"/usr/bin/tini\", \"--\"]");
        if let Some(command) = web.or_else(|| self.plan.processes.values().next()) {
            let _ = writeln!(text, "CMD {}", exec(&format!("{}{command}", recipe.prefix)));
        }
    }
}

/// Whether an install command needs the sources.
fn needs_sources(install: &str) -> bool {
    install.ends_with("pip install .") || install.starts_with("opam install") || install.starts_with("deno cache")
}

fn is_for_build(package: &str) -> bool {
    package.ends_with("-dev") || TOOLS.contains(&package)
}

fn apt<'p>(text: &mut String, packages: impl Iterator<Item = &'p String>) {
    let plain = |package: &&String| {
        !package.is_empty() && package.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '+' | '_'))
    };
    let mut all: Vec<&String> = packages.filter(plain).collect();
    all.sort();
    all.dedup();
    if !all.is_empty() {
        let list: Vec<&str> = all.iter().map(|package| package.as_str()).collect();
        let _ = writeln!(
            text,
            "RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends {} && rm -rf /var/lib/apt/lists/*",
            list.join(" ")
        );
    }
}

/// Whether a name is valid for a variable.
fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Writes a health check: the image's shell sends a request, and a response with one of the statuses is healthy. The shell
/// expands `port`.
fn health_check(text: &mut String, port: &str, path: &str, good: &str) {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~?&=%:@,+".contains(&byte);
    let path: String =
        path.bytes().map(|byte| if is_plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect();
    let script = format!(
        r"exec 3<>/dev/tcp/127.0.0.1/{port} && printf 'GET {} HTTP/1.0\r\nHost: localhost\r\n\r\n' >&3 && head -n1 <&3 | grep -Eq ' {good}[0-9][0-9]'",
        path.replace('%', "%%")
    );
    let words = serde_json::to_string(&["/bin/bash", "-c", &script]).unwrap_or_default();
    let _ = writeln!(text, "HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD {words}");
}

fn quoted(value: &str) -> String {
    let plain = !value.is_empty() && value.chars().all(|c| c.is_alphanumeric() || "-_./:,@%+=$".contains(c));
    if plain { value.to_owned() } else { format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', " ")) }
}

/// Formats a command so that it receives signals itself: as words if it is simple, otherwise with `exec` in a shell.
fn exec(command: &str) -> String {
    let words = |words: &[&str]| serde_json::to_string(words).unwrap_or_default();
    if !command.contains(['$', '|', '&', ';', '<', '>', '(', ')', '`', '\\', '"', '\'', '*', '?', '[', '~', '#', '=']) {
        return words(&command.split_whitespace().collect::<Vec<_>>());
    }
    let (before, last) = command.rsplit_once("&& ").map_or(("", command), |(before, last)| (before, last));
    let is_plain = !last.contains(['|', ';', '&']);
    let assigns = last.split_whitespace().take_while(|word| word.contains('=') && !word.starts_with('-')).count();
    let last = if !is_plain {
        last.to_owned()
    } else if assigns > 0 {
        format!("exec env {last}")
    } else {
        format!("exec {last}")
    };
    let whole = if before.is_empty() { last } else { format!("{before}&& {last}") };
    words(&["/bin/sh", "-c", &whole])
}

#[cfg(test)]
mod tests {
    use super::{ImageOptions, dockerfile, exec};
    use crate::tree::Memory;

    #[test]
    fn a_step_keeps_its_lines() {
        let declared =
            "[build]\nbuild = \"\"\"\necho one\nif true; then\n  echo \\\"two\\\"\nfi\n\"\"\"\n[processes]\nweb = \"true\"\n";
        let tree = Memory::new([("capsule.toml", declared), ("a.sh", "")]);
        let plan = crate::plan(&tree).expect("a plan");
        let text = dockerfile(&tree, &plan, &ImageOptions::default()).expect("a Dockerfile").dockerfile;
        let expected = r#"RUN ["/bin/bash","-o","pipefail","-c","echo one\nif true; then\n  echo \"two\"\nfi\n"]"#;
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn commands_receive_signals_themselves() {
        for (command, expected) in [
            ("node server.js", r#"["node","server.js"]"#),
            ("uvicorn main:app --port $PORT", r#"["/bin/sh","-c","exec uvicorn main:app --port $PORT"]"#),
            ("cd api && node a.js", r#"["/bin/sh","-c","cd api && exec node a.js"]"#),
            ("A=$PORT java -jar a.jar", r#"["/bin/sh","-c","exec env A=$PORT java -jar a.jar"]"#),
            ("a | b", r#"["/bin/sh","-c","a | b"]"#),
        ] {
            assert_eq!(exec(command), expected);
        }
    }
}
