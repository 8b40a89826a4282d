//! The host's toolchains in sandboxes: mounted directories, `PATH` and other variables.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use capsule_buildplan::Plan;
use capsule_runtime::Mount;

/// The system folders in the `PATH` of every sandbox.
const SYSTEM_PATH: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// The path in a sandbox of the operator's certificate authorities.
const CA_BUNDLE: &str = "/opt/capsule/bin/ca-bundle.crt";

/// Folders below a home directory in which version managers and installers keep toolchains.
const VERSION_MANAGER_FOLDERS: [&str; 9] =
    [".pyenv", ".nvm", ".volta", ".asdf", ".sdkman", ".bun", ".deno", ".rbenv", ".local/share/mise"];

/// Wrapper scripts for programs that the host does not have. They install package managers on first use, with the
/// language's own tools; `python` calls `python3`.
const WRAPPERS: [(&str, &str); 9] = [
    ("python", "#!/bin/sh\nexec python3 \"$@\"\n"),
    ("pnpm", "#!/bin/sh\nexec npx --yes pnpm@9.15.9 \"$@\"\n"),
    (
        "yarn",
        "#!/bin/sh\nif [ -e .yarnrc.yml ]; then exec npx --yes @yarnpkg/cli-dist@4.9.2 \"$@\"; fi\nexec npx --yes yarn@1.22.22 \"$@\"\n",
    ),
    (
        "uv",
        "#!/bin/sh\nset -e\n[ -x /cache/tools/uv/bin/uv ] || { python3 -m venv /cache/tools/uv; /cache/tools/uv/bin/pip install --quiet uv; }\nexec /cache/tools/uv/bin/uv \"$@\"\n",
    ),
    (
        "pdm",
        // Pinned with its dependencies: newer releases fail with the latest versions of these.
        "#!/bin/sh\nset -e\n[ -x /cache/tools/pdm/bin/pdm ] || { python3 -m venv /cache/tools/pdm; /cache/tools/pdm/bin/pip install --quiet pdm==2.22.4 'hishel<0.1' 'httpx<0.28' 'unearth<0.18'; }\nexec /cache/tools/pdm/bin/pdm \"$@\"\n",
    ),
    (
        "pipenv",
        "#!/bin/sh\nset -e\n[ -x /cache/tools/pipenv/bin/pipenv ] || { python3 -m venv /cache/tools/pipenv; /cache/tools/pipenv/bin/pip install --quiet pipenv; }\nexec /cache/tools/pipenv/bin/pipenv \"$@\"\n",
    ),
    // Runtimes are kept in the release, which needs them to start.
    (
        "bun",
        "#!/bin/sh\nset -e\nat=/app/.capsule/bun\n[ -x $at/node_modules/.bin/bun ] || npm install --silent --no-audit --prefix $at bun@1.4.5 >&2\nexec $at/node_modules/.bin/bun \"$@\"\n",
    ),
    (
        "deno",
        "#!/bin/sh\nset -e\nat=/app/.capsule/deno\n[ -x $at/node_modules/.bin/deno ] || npm install --silent --no-audit --prefix $at deno@2.9.6 >&2\nexec $at/node_modules/.bin/deno \"$@\"\n",
    ),
    (
        "poetry",
        "#!/bin/sh\nset -e\n[ -x /cache/tools/poetry/bin/poetry ] || { python3 -m venv /cache/tools/poetry; /cache/tools/poetry/bin/pip install --quiet poetry; }\nexec /cache/tools/poetry/bin/poetry \"$@\"\n",
    ),
];

/// The version that the wrapper of a runtime installs.
pub fn wrapper_version(tool: &str) -> Option<&'static str> {
    let (_, script) = WRAPPERS.iter().find(|(name, _)| *name == tool)?;
    let (_, rest) = script.split_once(&format!(" {tool}@"))?;
    rest.split_whitespace().next()
}

/// Settings of the operator for builds.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// A bundle of additional certificate authorities.
    pub ca_bundle: Option<PathBuf>,
    /// Variables for every build, such as the URL of a registry mirror.
    pub environment: BTreeMap<String, String>,
}

/// The toolchains of this host.
#[derive(Clone, Debug)]
pub struct Toolchains {
    path: Vec<PathBuf>,
    mounts: Vec<Mount>,
    environment: BTreeMap<String, String>,
    settings: Settings,
}

impl Toolchains {
    /// Detects the toolchains on the `PATH` of this process. Writes wrapper scripts to `directory`.
    ///
    /// # Errors
    /// When the wrappers cannot be written.
    pub fn discover(directory: &Path, settings: Settings) -> std::io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        for (name, script) in WRAPPERS {
            let file = directory.join(name);
            std::fs::write(&file, script)?;
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755))?;
        }
        let mut found = Self { path: Vec::new(), mounts: Vec::new(), environment: BTreeMap::new(), settings };
        for entry in std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()) {
            found.add_path_entry(&entry);
        }
        found.path.extend(SYSTEM_PATH.map(PathBuf::from));
        if let Some(home) = std::env::var_os("JAVA_HOME").map(PathBuf::from)
            && home.is_dir()
        {
            if !home.starts_with("/usr") {
                found.mount(&home);
            }
            found.environment.insert("JAVA_HOME".into(), home.display().to_string());
        }
        found.mounts.push(Mount { source: directory.into(), target: "/opt/capsule/bin".into(), writable: false });
        if let Some(bundle) = &found.settings.ca_bundle {
            // A copy that every sandbox may read.
            let copy = directory.join("ca-bundle.crt");
            std::fs::write(&copy, std::fs::read(bundle)?)?;
            std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o644))?;
        }
        found.path.push("/opt/capsule/bin".into());
        Ok(found)
    }

    fn add_path_entry(&mut self, entry: &Path) {
        if !entry.is_absolute() || !entry.is_dir() || self.path.iter().any(|known| known == entry) {
            return;
        }
        if entry.starts_with("/usr") {
            if !SYSTEM_PATH.iter().any(|system| entry == Path::new(system)) {
                self.path.push(entry.into());
            }
        } else if entry.ends_with(".cargo/bin") {
            let home = entry.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
            let rustup = std::env::var_os("RUSTUP_HOME").map_or_else(|| home.join(".rustup"), PathBuf::from);
            // Not all of `.cargo`: it holds the operator's credentials.
            self.mount(entry);
            if rustup.is_dir() {
                self.mount(&rustup);
                self.environment.insert("RUSTUP_HOME".into(), rustup.display().to_string());
            }
            self.path.push(entry.into());
        } else if let Some(root) = toolchain_root(entry) {
            self.mount(&root);
            self.path.push(entry.into());
        }
    }

    fn mount(&mut self, path: &Path) {
        if !self.mounts.iter().any(|known| path.starts_with(&known.source)) {
            self.mounts.push(Mount { source: path.into(), target: path.into(), writable: false });
        }
    }

    /// Finds a program on the host.
    #[must_use]
    pub fn find(&self, program: &str) -> Option<PathBuf> {
        self.path.iter().map(|folder| folder.join(program)).find(|file| file.is_file())
    }

    /// The mounts of every sandbox.
    #[must_use]
    pub fn mounts(&self) -> &[Mount] {
        &self.mounts
    }

    /// The base environment of every sandbox.
    #[must_use]
    pub fn environment(&self) -> BTreeMap<String, String> {
        let mut all = self.environment.clone();
        let own = ["/app/node_modules/.bin", "/app/.venv/bin", "/app/lua_modules/bin"].map(PathBuf::from);
        let path = std::env::join_paths(own.iter().chain(&self.path)).unwrap_or_default();
        all.insert("PATH".into(), path.to_string_lossy().into_owned());
        all.insert("LANG".into(), "C.UTF-8".into());
        if self.settings.ca_bundle.is_some() {
            for name in [
                "SSL_CERT_FILE",
                "NODE_EXTRA_CA_CERTS",
                "REQUESTS_CA_BUNDLE",
                "PIP_CERT",
                "CURL_CA_BUNDLE",
                "CARGO_HTTP_CAINFO",
                "GIT_SSL_CAINFO",
            ] {
                all.insert(name.into(), CA_BUNDLE.into());
            }
        }
        all
    }

    /// The environment of a build: the base environment, cache folders, and the operator's variables.
    #[must_use]
    pub fn build_environment(&self) -> BTreeMap<String, String> {
        let mut all = self.environment();
        for (name, value) in [
            ("HOME", "/cache/home"),
            ("CI", "true"),
            ("npm_config_cache", "/cache/npm"),
            ("npm_config_prefer_offline", "true"),
            ("npm_config_audit", "false"),
            ("npm_config_fund", "false"),
            ("npm_config_update_notifier", "false"),
            ("YARN_CACHE_FOLDER", "/cache/yarn"),
            ("NEXT_TELEMETRY_DISABLED", "1"),
            ("PIP_CACHE_DIR", "/cache/pip"),
            ("PIP_DISABLE_PIP_VERSION_CHECK", "1"),
            ("PIP_PROGRESS_BAR", "off"),
            ("UV_CACHE_DIR", "/cache/uv"),
            ("UV_PYTHON_DOWNLOADS", "never"),
            ("POETRY_CACHE_DIR", "/cache/poetry"),
            ("GOPATH", "/cache/go"),
            ("GOCACHE", "/cache/go-build"),
            ("CARGO_HOME", "/cache/cargo"),
            ("CARGO_TARGET_DIR", "/cache/cargo-target"),
            ("MAVEN_OPTS", "-Dmaven.repo.local=/cache/maven"),
            ("GRADLE_USER_HOME", "/cache/gradle"),
            ("YARN_ENABLE_GLOBAL_CACHE", "true"),
            ("YARN_GLOBAL_FOLDER", "/cache/yarn-berry"),
            ("YARN_ENABLE_TELEMETRY", "0"),
            ("BUN_INSTALL_CACHE_DIR", "/cache/bun"),
            ("PIPENV_CACHE_DIR", "/cache/pipenv"),
            ("PDM_CACHE_DIR", "/cache/pdm"),
            ("PDM_CHECK_UPDATE", "0"),
            ("COMPOSER_HOME", "/cache/composer"),
            ("BUNDLE_USER_CACHE", "/cache/bundle"),
        ] {
            all.insert(name.into(), value.into());
        }
        all.extend(self.settings.environment.clone());
        all
    }

    /// Returns a message if a plan needs a program that this host does not have.
    #[must_use]
    pub fn missing(&self, plan: &Plan) -> Option<String> {
        let needed: &[(&str, &str)] = match plan.detection.language.as_deref() {
            _ if plan.build.install.is_none() && plan.build.build.is_none() && plan.processes.is_empty() => &[],
            Some("javascript" | "deno") => {
                &[("node", "`apt-get install nodejs npm`, or https://nodejs.org"), ("npm", "`apt-get install npm`")]
            }
            Some("python") => &[("python3", "`apt-get install python3 python3-venv`")],
            Some("go") => &[("go", "`apt-get install golang-go`, or https://go.dev/dl")],
            Some("rust") => &[("cargo", "https://rustup.rs"), ("cc", "`apt-get install gcc`")],
            Some("java" | "kotlin" | "scala" | "groovy" | "clojure") => match plan.detection.package_manager.as_deref() {
                Some("maven") => &[("java", "`apt-get install default-jdk-headless`"), ("mvn", "`apt-get install maven`")],
                Some("gradle") => &[
                    ("java", "`apt-get install default-jdk-headless`"),
                    ("gradle", "https://gradle.org/install, or commit `gradlew`"),
                ],
                Some("sbt") => {
                    &[("java", "`apt-get install default-jdk-headless`"), ("sbt", "https://www.scala-sbt.org/download")]
                }
                Some("leiningen") => {
                    &[("java", "`apt-get install default-jdk-headless`"), ("lein", "`apt-get install leiningen`")]
                }
                Some("clojure") => &[
                    ("java", "`apt-get install default-jdk-headless`"),
                    ("clojure", "https://clojure.org/guides/install_clojure"),
                ],
                _ => &[("javac", "`apt-get install default-jdk-headless`")],
            },
            Some("ruby") if plan.build.install.is_some() => {
                &[("ruby", "`apt-get install ruby-full`"), ("bundle", "`apt-get install ruby-bundler`")]
            }
            Some("ruby") => &[("ruby", "`apt-get install ruby-full`")],
            Some("php") if plan.build.install.is_some() => {
                &[("php", "`apt-get install php-cli`"), ("composer", "`apt-get install composer`")]
            }
            Some("php") => &[("php", "`apt-get install php-cli`")],
            Some("elixir") => &[("mix", "`apt-get install elixir`")],
            Some("erlang") => &[("rebar3", "`apt-get install rebar3`")],
            Some("gleam") => &[("gleam", "https://gleam.run/getting-started/installing")],
            Some("dotnet") => &[("dotnet", "https://learn.microsoft.com/dotnet/core/install/linux")],
            Some("swift") => &[("swift", "https://www.swift.org/install/linux")],
            Some("dart") if plan.detection.framework.as_deref() == Some("flutter") => {
                &[("flutter", "https://docs.flutter.dev/get-started/install/linux")]
            }
            Some("dart") => &[("dart", "https://dart.dev/get-dart")],
            Some("haskell") if plan.detection.package_manager.as_deref() == Some("stack") => {
                &[("stack", "`apt-get install haskell-stack`")]
            }
            Some("haskell") => &[("cabal", "`apt-get install cabal-install ghc`")],
            Some("crystal") => &[("shards", "https://crystal-lang.org/install")],
            Some("zig") => &[("zig", "https://ziglang.org/download")],
            Some("c" | "cpp") => match plan.detection.build_tool.as_deref() {
                Some("cmake") => &[("cmake", "`apt-get install cmake`"), ("c++", "`apt-get install build-essential`")],
                Some("meson") => &[("meson", "`apt-get install meson`"), ("c++", "`apt-get install build-essential`")],
                Some("make") => &[("make", "`apt-get install build-essential`"), ("cc", "`apt-get install build-essential`")],
                _ => &[("cc", "`apt-get install build-essential`")],
            },
            Some("cobol") => &[("cobc", "`apt-get install gnucobol`")],
            Some("ocaml") => &[("opam", "`apt-get install opam`")],
            Some("lua") => &[("lua", "`apt-get install lua5.4`")],
            Some("perl") => &[("perl", "`apt-get install perl`")],
            Some("r") => &[("Rscript", "`apt-get install r-base`")],
            Some("julia") => &[("julia", "https://julialang.org/install")],
            _ => &[],
        };
        let wrapper = plan.build.build.as_deref().is_some_and(|command| command.contains("mvnw") || command.contains("gradlew"));
        needed.iter().filter(|(program, _)| !(matches!(*program, "mvn" | "gradle") && wrapper)).find(|(program, _)| self.find(program).is_none()).map(
            |(program, how)| {
                let language = plan.detection.language.as_deref().unwrap_or_default();
                format!("building {language} needs `{program}`, which the server does not have. Install it on the server ({how}) and deploy again")
            },
        )
    }
}

/// The root folder of the toolchain that an entry of `PATH` belongs to.
fn toolchain_root(entry: &Path) -> Option<PathBuf> {
    let text = entry.to_str()?;
    for home in VERSION_MANAGER_FOLDERS {
        if let Some(at) = text.find(&format!("/{home}")) {
            return Some(PathBuf::from(&text[..=at + home.len()]));
        }
    }
    let mut parts = entry.strip_prefix("/opt").ok()?.components();
    Some(Path::new("/opt").join(parts.next()?))
}

#[cfg(test)]
mod tests {
    use super::{Settings, Toolchains, toolchain_root};
    use capsule_buildplan::{Memory, plan};
    use std::collections::BTreeMap;
    use std::path::{Path, PathBuf};

    #[test]
    fn a_missing_toolchain_is_named_with_an_install_command() {
        let none =
            Toolchains { path: Vec::new(), mounts: Vec::new(), environment: BTreeMap::new(), settings: Settings::default() };
        for (file, content, program, how) in [
            ("package.json", "{\"scripts\":{\"start\":\"node a.js\"}}", "`node`", "apt-get install nodejs"),
            ("requirements.txt", "flask", "`python3`", "apt-get install python3"),
            ("go.mod", "module a\n", "`go`", "https://go.dev/dl"),
            ("Cargo.toml", "[package]\nname = \"a\"\n[[bin]]\nname = \"a\"\n", "`cargo`", "https://rustup.rs"),
            ("pom.xml", "<project><artifactId>a</artifactId><version>1</version></project>", "`java`", "default-jdk-headless"),
        ] {
            let plan = plan(&Memory::new([(file, content)])).expect("a plan");
            let told = none.missing(&plan).unwrap_or_else(|| panic!("nothing is missing for {file}: {plan:?}"));
            assert!(told.contains(program) && told.contains(how), "{told}");
        }
        let pages = plan(&Memory::new([("index.html", "hi")])).expect("a plan");
        assert_eq!(none.missing(&pages), None);
    }

    #[test]
    fn the_root_of_a_toolchain_is_found_and_other_folders_are_not_mounted() {
        for (entry, root) in [
            ("/home/ada/.pyenv/versions/3.12.1/bin", Some("/home/ada/.pyenv")),
            ("/home/ada/.nvm/versions/node/v22/bin", Some("/home/ada/.nvm")),
            ("/opt/node/bin", Some("/opt/node")),
            ("/home/ada/bin", None),
            ("/root/go/bin", None),
        ] {
            assert_eq!(toolchain_root(Path::new(entry)), root.map(PathBuf::from), "{entry}");
        }
    }
}
