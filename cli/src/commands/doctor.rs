//! `capsule doctor`: checks whether this host can build and run applications, and whether a server answers.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use capsule_builder::{Settings, Toolchains};
use capsule_runtime::{Limits, Network, ProcessRuntime, Spec, Writes, has_project_quotas, unenforced_limits};
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
        terminal.report(&Failure::new(
            "problems_found",
            "This host cannot build or run applications until the problems above are fixed.",
        ));
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn server(client: anyhow::Result<Client>) -> Finding {
    let result = client.and_then(|mut client| {
        let user: capsule_contracts::identity::User = client.get("/auth/me")?;
        Ok((client.name().to_owned(), user.email))
    });
    match result {
        Ok((name, email)) => finding("server", "ok", format!("{name} answers; signed in as {email}")),
        Err(error) => finding("server", "problem", format!("{error:#}").replace('\n', "; ")),
    }
}

/// Runs a process in a sandbox.
fn sandbox() -> Finding {
    match try_sandbox("true", &std::env::temp_dir()) {
        Ok(0) => finding("sandbox", "ok", "processes can run in a sandbox"),
        Ok(code) => finding("sandbox", "problem", format!("a process in a sandbox exited with status {code} instead of 0")),
        Err(error) => finding("sandbox", "problem", format!("processes cannot run in a sandbox: {error:#}")),
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
    match unenforced_limits().join("; ") {
        missing if missing.is_empty() => finding("limits", "ok", "control groups limit memory, CPU and processes"),
        missing => finding("limits", "warning", missing),
    }
}

/// Checks whether `/app` is an overlay above the release.
fn layers(directory: &Path) -> Finding {
    let probe =
        "while read -r line; do case $line in *' /app '*' - overlay '*) exit 0;; esac; done </proc/self/mountinfo; exit 3";
    // In the data directory: not every file system can be a layer of an overlay.
    let exit_code = try_sandbox(probe, nearest_existing(directory)).or_else(|_| try_sandbox(probe, &std::env::temp_dir()));
    match exit_code {
        Ok(0) => finding("layers", "ok", "applications write into an overlay above their release, which does not change"),
        _ => finding("layers", "warning", "overlays cannot be mounted: each instance writes into its own copy of the release"),
    }
}

fn quotas(directory: &Path) -> Finding {
    if has_project_quotas(nearest_existing(directory)) {
        finding("quotas", "ok", "project quotas enforce disk limits")
    } else {
        finding("quotas", "ok", "disk usage is measured every two seconds: project quotas are not enabled on this file system")
    }
}

/// The nearest directory above that exists.
fn nearest_existing(directory: &Path) -> &Path {
    directory.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}

fn network() -> Finding {
    if !rustix::process::geteuid().is_root() {
        let tun = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun").is_ok();
        return match (["slirp4netns", "nft"].into_iter().find(|program| !on_path(program)), tun) {
            (None, true) => finding("network", "ok", "applications reach the internet through slirp4netns and a packet filter"),
            (Some(missing), _) => finding(
                "network",
                "problem",
                format!(
                    "`{missing}` is missing, so applications and builds cannot reach the internet. Install it: `apt-get install slirp4netns nftables`"
                ),
            ),
            (None, false) => finding(
                "network",
                "problem",
                "/dev/net/tun cannot be opened, so applications and builds cannot reach the internet",
            ),
        };
    }
    match ["ip", "nft"].into_iter().find(|program| !on_path(program)) {
        Some(missing) => finding(
            "network",
            "problem",
            format!(
                "`{missing}` is missing, so applications cannot reach the internet. Install it: `apt-get install iproute2 nftables`"
            ),
        ),
        None => finding("network", "ok", "each application gets its own network behind a packet filter"),
    }
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]).any(|folder| folder.join(program).is_file())
}

fn space(directory: &Path) -> Finding {
    match rustix::fs::statvfs(nearest_existing(directory)) {
        Ok(space) => {
            let gib = (space.f_bavail * space.f_frsize) >> 30;
            let state = if gib < 2 { "warning" } else { "ok" };
            finding("disk", state, format!("{gib} GiB free for {}", directory.display()))
        }
        Err(error) => finding("disk", "warning", format!("cannot read the free space of {}: {error}", directory.display())),
    }
}

fn toolchains() -> Vec<Finding> {
    let Ok(folder) = tempfile::tempdir() else { return Vec::new() };
    let Ok(toolchains) = Toolchains::discover(folder.path(), Settings::default()) else { return Vec::new() };
    [("node", "node"), ("python", "python3"), ("go", "go"), ("rust", "cargo"), ("java", "java"), ("maven", "mvn")]
        .into_iter()
        .map(|(name, program)| match toolchains.find(program) {
            Some(path) => finding(name, "ok", path.display().to_string()),
            None => finding(name, "warning", "not found on this host: its applications cannot be built here"),
        })
        .collect()
}
