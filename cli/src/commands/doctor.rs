//! `capsule doctor`: can this host build and run applications, and does a server answer?

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use capsule_builder::{Settings, Toolchains};
use capsule_runtime::{Limits, Network, ProcessRuntime, Spec, Writes, has_project_quotas, unenforced};
use serde::Serialize;

use crate::client::Client;
use crate::server::outdated_ingress;
use crate::terminal::{Failure, Terminal};

#[derive(Debug, Serialize)]
struct Finding {
    name: &'static str,
    /// `ok`, `warning` or `problem`.
    state: &'static str,
    text: String,
}

fn finding(name: &'static str, state: &'static str, text: impl Into<String>) -> Finding {
    Finding { name, state, text: text.into() }
}

pub fn doctor(client: anyhow::Result<Client>, directory: &Path, terminal: Terminal) -> anyhow::Result<ExitCode> {
    let mut findings =
        vec![server(client), sandbox(), limits(), layers(directory), quotas(directory), network(), space(directory)];
    findings.extend(outdated_ingress(directory).map(|outdated| finding("ingress", "warning", outdated)));
    findings.extend(toolchains());
    let broken = findings.iter().any(|finding| finding.state == "problem");
    terminal.show(&findings, |findings| {
        let mark = |state: &str| match state {
            "ok" => "✓",
            "warning" => "!",
            _ => "✗",
        };
        let lines = findings.iter().map(|finding| format!("{} {:<10} {}", mark(finding.state), finding.name, finding.text));
        lines.collect::<Vec<_>>().join("\n")
    })?;
    if broken {
        terminal.report(&Failure::new("problems_found", "This host cannot build and run applications as it is."));
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn server(client: anyhow::Result<Client>) -> Finding {
    let asked = client.and_then(|mut client| {
        let user: capsule_contracts::identity::User = client.get("/auth/me")?;
        Ok((client.name().to_owned(), user.email))
    });
    match asked {
        Ok((name, email)) => finding("server", "ok", format!("{name} answers, and you are {email}")),
        Err(error) => finding("server", "problem", format!("{error:#}").replace('\n', "; ")),
    }
}

/// The sandbox is tried, not guessed at.
fn sandbox() -> Finding {
    match try_sandbox("true", &std::env::temp_dir()) {
        Ok(0) => finding("sandbox", "ok", "processes can be run in a sandbox of their own"),
        Ok(code) => finding("sandbox", "problem", format!("a process in a sandbox ended with {code} instead of 0")),
        Err(error) => finding("sandbox", "problem", format!("processes cannot be run in a sandbox: {error:#}")),
    }
}

fn try_sandbox(command: &str, within: &Path) -> anyhow::Result<i32> {
    let folder = tempfile::tempdir_in(within)?;
    let runtime = ProcessRuntime::new(folder.path().join("run"), std::env::current_exe()?)?;
    let app = folder.path().join("app");
    std::fs::create_dir(&app)?;
    let spec = Spec {
        id: "doctor".into(),
        command: command.into(),
        directory: app,
        writes: Writes::Layer,
        layers: Some(folder.path().join("layers")),
        mounts: Vec::new(),
        environment: BTreeMap::new(),
        uid: 65534,
        limits: Limits { seconds: Some(10), ..Limits::default() },
        network: Network::Isolated,
        once: true,
        grace_seconds: 1,
        run_directory: runtime.run_directory().into(),
        log_directory: folder.path().join("log"),
        masked: Vec::new(),
        relaxations: Vec::new(),
    };
    let asynchronous = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    asynchronous.block_on(async { Ok(runtime.run_once(&spec).await?.wait().await?.code) })
}

fn limits() -> Finding {
    match unenforced().join("; ") {
        missing if missing.is_empty() => finding("limits", "ok", "memory, CPU and processes are limited by control groups"),
        missing => finding("limits", "warning", missing),
    }
}

/// Whether `/app` is a layer above the release.
fn layers(directory: &Path) -> Finding {
    let look = "while read -r line; do case $line in *' /app '*' - overlay '*) exit 0;; esac; done </proc/self/mountinfo; exit 3";
    // Tried where the data lies: not every file system may be a layer.
    let tried = try_sandbox(look, existing(directory)).or_else(|_| try_sandbox(look, &std::env::temp_dir()));
    match tried {
        Ok(0) => finding("layers", "ok", "applications write into an overlay above their release, which stays as it was built"),
        _ => finding(
            "layers",
            "warning",
            "overlays cannot be mounted here: each instance gets a copy of its release to write into",
        ),
    }
}

fn quotas(directory: &Path) -> Finding {
    if has_project_quotas(existing(directory)) {
        finding("quotas", "ok", "disk limits are enforced by project quotas")
    } else {
        finding("quotas", "ok", "disk limits are measured every two seconds: the file system has no project quotas in force")
    }
}

/// The nearest folder above that is there.
fn existing(directory: &Path) -> &Path {
    directory.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}

fn network() -> Finding {
    if !rustix::process::geteuid().is_root() {
        let tun = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun").is_ok();
        return match (["slirp4netns", "nft"].into_iter().find(|program| !on_path(program)), tun) {
            (None, true) => {
                finding("network", "ok", "applications reach the world outside by slirp4netns, through a packet filter")
            }
            (Some(missing), _) => finding(
                "network",
                "problem",
                format!(
                    "`{missing}` is missing: applications and builds cannot reach the world outside; `apt-get install slirp4netns nftables`"
                ),
            ),
            (None, false) => finding(
                "network",
                "problem",
                "/dev/net/tun cannot be opened: applications and builds cannot reach the world outside",
            ),
        };
    }
    match ["ip", "nft"].into_iter().find(|program| !on_path(program)) {
        Some(missing) => finding(
            "network",
            "problem",
            format!("`{missing}` is missing: applications cannot reach the world outside; `apt-get install iproute2 nftables`"),
        ),
        None => finding("network", "ok", "applications can be given a network of their own, behind a packet filter"),
    }
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]).any(|folder| folder.join(program).is_file())
}

fn space(directory: &Path) -> Finding {
    match rustix::fs::statvfs(existing(directory)) {
        Ok(space) => {
            let gib = (space.f_bavail * space.f_frsize) >> 30;
            let state = if gib < 2 { "warning" } else { "ok" };
            finding("disk", state, format!("{gib} GiB free for {}", directory.display()))
        }
        Err(error) => finding("disk", "warning", format!("free space of {} is not known: {error}", directory.display())),
    }
}

fn toolchains() -> Vec<Finding> {
    let Ok(folder) = tempfile::tempdir() else { return Vec::new() };
    let Ok(toolchains) = Toolchains::discover(folder.path(), Settings::default()) else { return Vec::new() };
    [("node", "node"), ("python", "python3"), ("go", "go"), ("rust", "cargo"), ("java", "java"), ("maven", "mvn")]
        .into_iter()
        .map(|(name, program)| match toolchains.find(program) {
            Some(path) => finding(name, "ok", path.display().to_string()),
            None => finding(name, "warning", "not on this host: such applications cannot be built here"),
        })
        .collect()
}
