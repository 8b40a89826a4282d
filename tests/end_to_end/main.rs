//! End-to-end tests with the built binary. Each test has a new data directory. A test that cannot run on this machine is
//! counted as ignored, and its name says why.

mod access;
mod accounts;
mod attacks;
mod backups;
mod cluster;
mod commands;
mod crashes;
mod deployments;
mod examples;
mod faults;
mod images;
mod load;
mod operations;
mod packaging;
mod postgres;
mod tenants;
mod uploads;
mod websocket;

use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use capsule_tests::Docker;
use libtest_mimic::{Arguments, Trial, run};

/// The durations of the tests that passed.
static DURATIONS: Mutex<Vec<(Duration, String)>> = Mutex::new(Vec::new());

/// A test that needs only the server.
fn test(name: &str, work: impl FnOnce() + Send + 'static) -> Trial {
    let label = name.to_owned();
    Trial::test(name, move || {
        let start = Instant::now();
        work();
        DURATIONS.lock().unwrap_or_else(PoisonError::into_inner).push((start.elapsed(), label));
        Ok(())
    })
}

/// Writes the durations, longest first, to `target/end_to_end_durations.txt`: in seconds, then the test's name.
fn write_durations() -> std::io::Result<()> {
    let mut durations = std::mem::take(&mut *DURATIONS.lock().unwrap_or_else(PoisonError::into_inner));
    durations.sort_by(|one, other| other.cmp(one));
    let lines = durations.iter().map(|(duration, name)| format!("{:7.1} {name}\n", duration.as_secs_f64()));
    std::fs::write(capsule_tests::root().join("target/end_to_end_durations.txt"), lines.collect::<String>())
}

/// A test that needs these programs on this machine.
fn test_with(name: &str, programs: &[&str], work: impl FnOnce() + Send + 'static) -> Trial {
    let missing: Vec<&str> = programs.iter().copied().filter(|program| !is_there(program)).collect();
    if missing.is_empty() {
        return test(name, work);
    }
    test(&format!("{name} (skipped: no {} here)", missing.join(", ")), || {}).with_ignored_flag(true)
}

/// A test with running applications, which needs Python and root.
fn test_of_processes(name: &str, work: impl FnOnce() + Send + 'static) -> Trial {
    test_with(name, &["python3"], work)
}

/// A test with running applications that starts the server with a failpoint.
fn test_of_failpoints(name: &str, work: impl FnOnce() + Send + 'static) -> Trial {
    with_failpoints(test_of_processes(name, work))
}

/// Marks a test that needs failpoints: scripts/test "[failpoint]" selects these tests. They are ignored if `CAPSULE_BIN`
/// names a release build, which has none.
fn with_failpoints(trial: Trial) -> Trial {
    let ignored = trial.has_ignored_flag() || (std::env::var_os("CAPSULE_BIN").is_some() && !capsule_tests::has_failpoints());
    trial.with_kind("failpoint").with_ignored_flag(ignored)
}

/// A test with containers.
fn test_of_containers(name: &str, work: impl FnOnce() + Send + 'static) -> Trial {
    match Docker::missing_requirement() {
        None => test(name, work),
        Some(why) => test(&format!("{name} (skipped: {why})"), || {}).with_ignored_flag(true),
    }
}

/// A source archive of a site with one page.
fn archive_of_page(content: &str) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    archive.append_data(&mut header, "index.html", content.as_bytes()).expect("appended");
    archive.into_inner().expect("finished")
}

fn is_there(program: &str) -> bool {
    std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).any(|folder| folder.join(program).is_file())
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Each trial has its own server and applications, and spends half of its time waiting for them.
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    arguments.test_threads = arguments.test_threads.or(Some((2 * cores).clamp(2, 8)));
    let suites = [
        access::trials(),
        accounts::trials(),
        attacks::trials(),
        backups::trials(),
        cluster::trials(),
        commands::trials(),
        crashes::trials(),
        deployments::trials(),
        examples::trials(),
        faults::trials(),
        images::trials(),
        operations::trials(),
        packaging::trials(),
        postgres::trials(),
        tenants::trials(),
        uploads::trials(),
        websocket::trials(),
    ];
    let conclusion = run(&arguments, suites.into_iter().flatten().collect());
    capsule_tests::stop_shared_servers();
    if let Err(error) = write_durations() {
        eprintln!("Cannot write target/end_to_end_durations.txt: {error}");
    }
    conclusion.exit_code()
}
