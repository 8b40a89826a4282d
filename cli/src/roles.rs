//! The roles in which the server starts this binary: shims, sandboxes, uplinks, planners and the ingress. They are not
//! commands for users.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Runs the role that the first argument names. `None` if it names none.
pub fn run_if_role() -> Option<ExitCode> {
    match std::env::args_os().nth(1).as_ref().and_then(|role| role.to_str()) {
        Some("shim") => Some(run_isolated(capsule_runtime::shim::run)),
        Some("sandbox") => Some(run_isolated(capsule_runtime::sandbox::run)),
        Some("uplink") => Some(run_isolated(capsule_runtime::uplink::run)),
        Some(capsule_builder::planner::ROLE) => Some(run_isolated(capsule_builder::planner::run)),
        Some("ingress") => Some(run_isolated(|| match ingress() {
            Ok(()) => 0,
            Err(error) => {
                crate::terminal::log_error(&error.to_string());
                1
            }
        })),
        _ => None,
    }
}

/// Runs a role after closing inherited file descriptors: these processes outlive the server, or start programs of users.
fn run_isolated(role: impl FnOnce() -> i32) -> ExitCode {
    let status = match capsule_runtime::descriptors::close_inherited() {
        Ok(()) => role(),
        Err(error) => {
            crate::terminal::log_error(&format!("cannot close inherited file descriptors: {error}"));
            126
        }
    };
    ExitCode::from(u8::try_from(status).unwrap_or(1))
}

/// How long an application may take to start its response after the request was sent.
const BACKEND_TIMEOUT: Duration = Duration::from_secs(60);

/// Concurrent requests to one backend. Each takes two open files, and one backend may take at most an eighth of
/// `open_files`, so that the ingress can still serve the others.
fn requests_per_backend(open_files: u64) -> usize {
    usize::try_from(open_files / 16).unwrap_or(usize::MAX).clamp(256, 4096)
}

/// Raises the limit of open files to the maximum for this process, and returns it.
fn raise_open_files_limit() -> u64 {
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
        return Err(std::io::Error::other("`capsule ingress` needs --data and --listen; `capsule server` starts it"));
    };
    // A session of its own, so that closing the server's terminal does not end the ingress.
    let _ = rustix::process::setsid();
    let run = data.join("run");
    let options = capsule_ingress::Options {
        listen,
        control: run.join("ingress.sock"),
        instances: run.join("i"),
        gateways: run.join("gateways"),
        table: data.join("routes.json"),
        max_in_flight: requests_per_backend(raise_open_files_limit()),
        response_timeout: BACKEND_TIMEOUT,
    };
    capsule_ingress::run(options)
}
