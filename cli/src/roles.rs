//! What the server starts this binary as: shims, sandboxes, uplinks, planners, the ingress. Not for people.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Takes the role that the first argument names, if it names one.
pub fn take() -> Option<ExitCode> {
    match std::env::args_os().nth(1).as_ref().and_then(|role| role.to_str()) {
        Some("shim") => Some(alone(capsule_runtime::shim::run)),
        Some("sandbox") => Some(alone(capsule_runtime::sandbox::run)),
        Some("uplink") => Some(alone(capsule_runtime::uplink::run)),
        Some(capsule_builder::planner::ROLE) => Some(alone(capsule_builder::planner::run)),
        Some("ingress") => Some(alone(|| match ingress() {
            Ok(()) => 0,
            Err(error) => {
                crate::terminal::log_error(&error.to_string());
                1
            }
        })),
        _ => None,
    }
}

/// Runs a role without what the server's own caller left open: these processes outlive the server, or start programs of
/// others.
fn alone(role: impl FnOnce() -> i32) -> ExitCode {
    let status = match capsule_runtime::descriptors::close_inherited() {
        Ok(()) => role(),
        Err(error) => {
            crate::terminal::log_error(&format!("inherited descriptors cannot be closed: {error}"));
            126
        }
    };
    ExitCode::from(u8::try_from(status).unwrap_or(1))
}

/// How long an application may take to begin its response, once the request has been sent.
const BACKEND_TIMEOUT: Duration = Duration::from_secs(60);

/// Of the files that the ingress may open, one backend takes an eighth at the most, two for each request: the
/// others' visitors still find it open.
fn requests_per_backend(files: u64) -> usize {
    usize::try_from(files / 16).unwrap_or(usize::MAX).clamp(256, 4096)
}

/// Takes as many open files as the system allows this process, and returns the number.
fn raise_open_files() -> u64 {
    let limits = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limits.maximum, maximum: limits.maximum };
    match rustix::process::setrlimit(rustix::process::Resource::Nofile, raised) {
        Ok(()) => limits.maximum.unwrap_or(u64::MAX),
        Err(_) => limits.current.unwrap_or(u64::MAX),
    }
}

/// `capsule ingress --data DIR --listen ADDR`
fn ingress() -> std::io::Result<()> {
    let mut data = None;
    let mut listen = None;
    let mut arguments = std::env::args_os().skip(2);
    while let Some(name) = arguments.next() {
        match name.to_str() {
            Some("--data") => data = arguments.next().map(PathBuf::from),
            Some("--listen") => listen = arguments.next().and_then(|address| address.to_str()?.parse().ok()),
            _ => {}
        }
    }
    let (Some(data), Some(listen)) = (data, listen) else {
        return Err(std::io::Error::other("the ingress is started by `capsule server`"));
    };
    // A session of its own: what ends the server's terminal does not end the ingress.
    let _ = rustix::process::setsid();
    let run = data.join("run");
    let options = capsule_ingress::Options {
        listen,
        control: run.join("ingress.sock"),
        instances: run.join("i"),
        gateways: run.join("gateways"),
        table: data.join("routes.json"),
        requests: requests_per_backend(raise_open_files()),
        timeout: BACKEND_TIMEOUT,
    };
    capsule_ingress::run(options)
}
