//! Probes each web candidate through the ingress, as a visitor would, until it is healthy. Other processes are healthy
//! when they have run for a second.

use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

use capsule_builder::log_line;
use capsule_runtime::logs::{Reader, Stream, is_partial};
use capsule_runtime::{Mask, ShimState, ShimStatus};
use capsule_store::Scope;

use super::Failure;
use crate::deployments::Row;
use crate::instances::WEB;
use crate::service_environments::ServiceEnvironment;
use crate::{DeployService, instances, texts};

/// The time after which a process that serves no requests is healthy.
const MIN_WORKER_UPTIME: Duration = Duration::from_secs(1);
/// The maximum number of restarts during the health check.
const MAX_RESTARTS: u32 = 2;
/// The number of log lines shown of a candidate that failed.
const LINES_SHOWN: usize = 20;
/// The number of log entries read for them: a long line has several entries.
const LINES_READ: usize = 200;

pub async fn run(
    service: &DeployService,
    scope: &impl Scope,
    service_environment: &ServiceEnvironment,
    row: &Row,
) -> Result<(), Failure> {
    let path = row.plan()?.networking.health_check;
    for candidate in instances::candidates(service, scope, service_environment, row).await? {
        let outcome = wait_until_healthy(service, scope, &candidate, path.as_deref()).await?;
        if let Err(why) = outcome {
            log_last_output(service, row, &candidate);
            return Err(Failure::Failed(format!("the {} process did not become healthy: {why}", candidate.process)));
        }
    }
    Ok(())
}

async fn wait_until_healthy(
    service: &DeployService,
    scope: &impl Scope,
    candidate: &instances::Row,
    path: Option<&str>,
) -> Result<Result<(), String>, Failure> {
    let deadline = Instant::now() + Duration::from_secs(service.options.health_seconds);
    let mut pause = Duration::from_millis(20);
    let mut last = String::from("it did not answer");
    loop {
        let Some(status) = service.runtime.status(&candidate.id).await else {
            instances::start(service, scope, candidate).await?;
            continue;
        };
        if status.restarts > MAX_RESTARTS {
            return Ok(Err(format!("it keeps crashing ({})", status.last_exit.unwrap_or_else(|| "ended".into()))));
        }
        if candidate.process == WEB {
            match service.ingress.probe(&candidate.id, path.unwrap_or("/")).await {
                // A configured path must succeed; without one, any status below 500 is healthy.
                Ok(Ok(code)) if code < 400 || (path.is_none() && code < 500) => return Ok(Ok(())),
                Ok(Ok(code)) => last = format!("{} was answered with status {code}", path.unwrap_or("/")),
                Ok(Err(why)) => last = format!("port {}: {why}", candidate.port),
                Err(error) => last = error.detail,
            }
        } else if is_steady(&status) {
            return Ok(Ok(()));
        }
        if Instant::now() > deadline {
            let hint = if candidate.process == WEB { "; it must listen on the port in the variable PORT" } else { "" };
            return Ok(Err(format!("{last}, after {} s{hint}", service.options.health_seconds)));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(250));
    }
}

fn is_steady(status: &ShimStatus) -> bool {
    let now = capsule_contracts::Timestamp::now().0;
    status.state == ShimState::Running
        && now - status.started_at >= i64::try_from(MIN_WORKER_UPTIME.as_micros()).unwrap_or(i64::MAX)
}

/// Copies the last output of a candidate into the deployment's log. Secrets are masked, because more users can read that log
/// than the instance's; also secrets across the entries of one line.
fn log_last_output(service: &DeployService, row: &Row, candidate: &instances::Row) {
    let log = service.build_log(row.id);
    for line in last_output(&service.instance_log(&candidate.id), &texts::mask(service, row)) {
        let _ = log_line(&log, &texts::without_paths(service, &format!("{}: {line}", candidate.process)));
    }
}

fn last_output(log: &Path, mask: &Mask) -> Vec<String> {
    let Ok((mut reader, _)) = Reader::tail(log, LINES_READ) else { return Vec::new() };
    let _ = reader.stop_at_end();
    let mut outputs = [Stream::Stdout, Stream::Stderr, Stream::Capsule].map(|stream| (stream, mask.output()));
    let mut shown = VecDeque::new();
    let mut show = |text: &[u8]| {
        shown.push_back(String::from_utf8_lossy(text).trim_end().to_owned());
        if shown.len() > LINES_SHOWN {
            shown.pop_front();
        }
    };
    loop {
        let lines = reader.read(64 << 10).unwrap_or_default();
        if lines.is_empty() {
            break;
        }
        for line in lines {
            let Some((_, output)) = outputs.iter_mut().find(|(stream, _)| *stream == line.stream) else { continue };
            output.push(line.text.as_bytes(), &mut show);
            if !is_partial(&line) {
                output.end(&mut show);
            }
        }
    }
    for (_, output) in &mut outputs {
        output.end(&mut show);
    }
    shown.into()
}

#[cfg(test)]
mod tests {
    use super::{LINES_SHOWN, last_output};
    use capsule_runtime::Mask;
    use capsule_runtime::logs::{LINE_BYTES, Stream, Writer};

    #[test]
    fn secrets_are_masked_in_the_output_of_a_candidate_wherever_its_log_divides_a_line() {
        let mask = Mask::new(["hunter22-größer"]);
        for at in [0, 100, LINE_BYTES - 17, LINE_BYTES - 16, LINE_BYTES - 9, LINE_BYTES - 1, LINE_BYTES, 3 * LINE_BYTES - 5] {
            let folder = tempfile::tempdir().expect("a folder");
            let mut writer = Writer::open(folder.path()).expect("opens");
            let line = format!("{}hunter22-größer{}", "x".repeat(at), "y".repeat(30));
            writer.write(Stream::Stderr, line.as_bytes()).expect("written");
            writer.write(Stream::Stdout, b"short").expect("written");
            let shown = last_output(folder.path(), &mask).concat();
            assert!(!shown.contains("hunter22") && !shown.contains("er22-gr") && !shown.contains("größer"), "at {at}");
            assert!(shown.contains(&"y".repeat(30)) && shown.contains("short"), "at {at}");
        }
        let folder = tempfile::tempdir().expect("a folder");
        let mut writer = Writer::open(folder.path()).expect("opens");
        writer.write_part(Stream::Stdout, b"a short piece: hunter22", true).expect("written");
        writer.write_part(Stream::Stdout, "-größer and more\n".as_bytes(), false).expect("written");
        assert_eq!(last_output(folder.path(), &mask), ["a short piece: *** and more"]);
        for n in 0..500 {
            writer.write(Stream::Stdout, format!("line {n}").as_bytes()).expect("written");
        }
        let shown = last_output(folder.path(), &mask);
        assert_eq!((shown.len(), shown[LINES_SHOWN - 1].as_str()), (LINES_SHOWN, "line 499"));
    }
}
