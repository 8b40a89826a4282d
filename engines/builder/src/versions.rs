//! Detects the versions of the host's toolchains, in a sandbox as a build sees them, and caches them until their programs
//! change.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use capsule_buildplan::{Plan, VersionMismatch, mismatches};
use capsule_runtime::logs::Reader;
use capsule_runtime::{Limits, Network, Spec, Writes};

use crate::steps::Builder;
use crate::toolchains::wrapper_version;
use crate::{NOBODY_UID, trees};

/// The name of a tool in plans, its program, the argument that prints the version, and the text before the version.
const PROBES: [(&str, &str, &str, &str); 18] = [
    ("node", "node", "--version", "v"),
    ("python", "python3", "--version", "Python "),
    ("go", "go", "version", "go version go"),
    ("rust", "rustc", "--version", "rustc "),
    ("java", "java", "-version", "version \""),
    ("ruby", "ruby", "--version", "ruby "),
    ("php", "php", "--version", "PHP "),
    ("dotnet", "dotnet", "--version", ""),
    ("elixir", "elixir", "--version", "Elixir "),
    ("swift", "swift", "--version", "Swift version "),
    ("dart", "dart", "--version", "version: "),
    ("crystal", "crystal", "--version", "Crystal "),
    ("zig", "zig", "version", ""),
    ("ghc", "ghc", "--numeric-version", ""),
    ("julia", "julia", "--version", "julia version "),
    ("gleam", "gleam", "--version", "gleam "),
    ("deno", "deno", "--version", "deno "),
    ("bun", "bun", "--version", ""),
];

/// Finds the version in the output of a tool.
fn version_in(marker: &str, printed: &str) -> Option<String> {
    let at = printed.find(marker)? + marker.len();
    let rest = printed[at..].trim_start();
    let end = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(rest.len());
    let channel = ["-nightly", "-beta"].into_iter().find(|channel| rest[end..].starts_with(channel)).unwrap_or_default();
    (end > 0 && end < 40).then(|| format!("{}{channel}", rest[..end].trim_end_matches('.')))
}

/// The tools for which a plan requests a version.
fn requested(plan: &Plan) -> impl Iterator<Item = &'static (&'static str, &'static str, &'static str, &'static str)> {
    PROBES.iter().filter(|(tool, ..)| plan.detection.versions.contains_key(*tool))
}

/// Compares the versions that a plan requests with the programs on the `PATH` of this process. Runs nothing from the
/// repository.
#[must_use]
pub fn local_mismatches(plan: &Plan) -> Vec<VersionMismatch> {
    let folders: Vec<PathBuf> = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).collect();
    let running = |tool: &str| {
        let (_, program, argument, marker) = PROBES.iter().find(|(known, ..)| *known == tool)?;
        // A relative folder may be in the repository.
        let found = folders
            .iter()
            .filter(|folder| folder.is_absolute())
            .map(|folder| folder.join(program))
            .find(|file| file.is_file())?;
        let printed = Command::new(found).arg(argument).current_dir("/").stdin(Stdio::null()).output().ok()?;
        let printed = [printed.stdout, printed.stderr].concat();
        version_in(marker, &String::from_utf8_lossy(&printed))
    };
    mismatches(plan, running)
}

/// A program at the time its version was detected.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Program {
    path: PathBuf,
    modified: Option<SystemTime>,
}

impl Program {
    fn at(path: PathBuf) -> Self {
        let modified = std::fs::metadata(&path).and_then(|kind| kind.modified()).ok();
        Self { path, modified }
    }
}

/// The versions of this host's toolchains that were detected so far.
#[derive(Debug, Default)]
pub struct Versions(Mutex<HashMap<&'static str, (Program, String)>>);

impl Versions {
    /// Compares the versions that a plan requests with those of the host. `directory` is created for that and removed.
    pub async fn mismatches(&self, builder: &Builder, plan: &Plan, directory: &Path) -> Vec<VersionMismatch> {
        let mut unknown = Vec::new();
        for (tool, program, argument, marker) in requested(plan) {
            let Some(program_path) = builder.toolchains.find(program) else { continue };
            let program_now = Program::at(program_path);
            if self.known().get(tool).is_none_or(|(before, _)| *before != program_now) {
                unknown.push((*tool, *program, *argument, *marker, program_now));
            }
        }
        if !unknown.is_empty() {
            let commands = unknown.iter().map(|(tool, program, argument, ..)| {
                format!("echo \"@{tool} $({program} {argument} 2>&1 | head -c 500 | tr '\\n' ' ')\"\n")
            });
            let printed = run_probes(builder, &commands.collect::<String>(), directory).await;
            for (tool, _, _, marker, program) in unknown {
                let line = printed.iter().find_map(|line| line.strip_prefix(&format!("@{tool} ")));
                if let Some(version) = line.and_then(|line| version_in(marker, line)) {
                    self.known().insert(tool, (program, version));
                }
            }
        }
        let running = |tool: &str| {
            let known = self.known().get(tool).map(|(_, version)| version.clone());
            known.or_else(|| wrapper_version(tool).filter(|_| builder.toolchains.find(tool).is_none()).map(str::to_owned))
        };
        mismatches(plan, running)
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<&'static str, (Program, String)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs a script in an empty sandbox and returns the lines it prints; none if the sandbox cannot start.
async fn run_probes(builder: &Builder, script: &str, directory: &Path) -> Vec<String> {
    let (folder, log) = (directory.join("app"), directory.join("log"));
    let made = std::fs::create_dir_all(&folder).and_then(|()| {
        let root = rustix::process::geteuid().is_root();
        if root { std::os::unix::fs::chown(&folder, Some(NOBODY_UID), Some(NOBODY_UID)) } else { Ok(()) }
    });
    let name = directory.file_name().map(|name| name.to_string_lossy().replace('-', "")).unwrap_or_default();
    let spec = Spec {
        id: format!("v{}", &name[name.len().saturating_sub(15)..]),
        command: script.into(),
        directory: folder,
        mounts: builder.toolchains.mounts().to_vec(),
        environment: builder.toolchains.environment(),
        uid: NOBODY_UID,
        limits: Limits { seconds: Some(30), ..builder.limits },
        network: Network::Isolated,
        once: true,
        grace_seconds: 1,
        run_directory: builder.runtime.run_directory().into(),
        log_directory: log.clone(),
        masked: Vec::new(),
        relaxations: Vec::new(),
        layers: None,
        writes: Writes::Directory,
    };
    let mut printed = Vec::new();
    if made.is_ok()
        && let Ok(mut running) = builder.runtime.run_once(&spec).await
        && running.wait().await.is_ok()
    {
        printed = Reader::new(&log).read(1000).unwrap_or_default().into_iter().map(|line| line.text).collect();
    }
    let directory = directory.to_owned();
    let _ = tokio::task::spawn_blocking(move || trees::remove(&directory)).await;
    printed
}

#[cfg(test)]
mod tests {
    use super::{PROBES, version_in};

    #[test]
    fn versions_are_found_in_what_tools_print() {
        for (tool, printed, version) in [
            ("node", "v20.19.2 ", Some("20.19.2")),
            ("python", "Python 3.11.2", Some("3.11.2")),
            ("go", "go version go1.22.2 linux/amd64", Some("1.22.2")),
            ("rust", "rustc 1.75.0 (82e1608df 2023-12-21)", Some("1.75.0")),
            ("rust", "rustc 1.80.0-nightly (ab12)", Some("1.80.0-nightly")),
            ("java", "openjdk version \"17.0.9\" 2023-10-17 OpenJDK", Some("17.0.9")),
            ("java", "openjdk version \"1.8.0_392\"", Some("1.8.0")),
            ("ruby", "ruby 3.1.2p20 (2022-04-12 revision 4491bb740a)", Some("3.1.2")),
            ("php", "PHP 8.2.7 (cli) (built: Jun  9 2023)", Some("8.2.7")),
            ("elixir", "Erlang/OTP 25 [erts-13.1.5]  Elixir 1.14.0 (compiled with Erlang/OTP 24)", Some("1.14.0")),
            ("dart", "Dart SDK version: 3.2.0 (stable)", Some("3.2.0")),
            ("zig", "0.11.0", Some("0.11.0")),
            ("node", "sh: 1: node: not found", None),
        ] {
            let marker = PROBES.iter().find(|(known, ..)| *known == tool).expect("a tool").3;
            assert_eq!(version_in(marker, printed).as_deref(), version, "{printed}");
        }
    }
}
