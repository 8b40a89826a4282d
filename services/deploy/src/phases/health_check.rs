//! Asks each candidate through the ingress, as a visitor would, until it answers well. Processes
//! that take no requests are well when they have run for a moment.

use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

use capsule_builder::say;
use capsule_runtime::logs::{Reader, Stream, goes_on};
use capsule_runtime::{Mask, ShimState, ShimStatus};

use super::Failure;
use crate::deployments::Row;
use crate::instances::WEB;
use crate::placements::Placement;
use crate::{Deploys, instances, texts};

/// A process that takes no requests has to run this long.
const STEADY: Duration = Duration::from_secs(1);
/// After this many ends by itself, an instance is not waited for any longer.
const MOST_RESTARTS: u32 = 2;
/// So many lines of a candidate that failed are shown, of so many that are read: a long line has many pieces.
const LINES_SHOWN: usize = 20;
const LINES_READ: usize = 200;

pub async fn run(deploys: &Deploys, placement: &Placement, row: &Row) -> Result<(), Failure> {
    let path = row.plan()?.networking.health_check;
    for candidate in instances::candidates(deploys, placement, row).await? {
        let outcome = wait_for(deploys, &candidate, path.as_deref()).await?;
        if let Err(why) = outcome {
            show_output(deploys, row, &candidate);
            return Err(Failure::Failed(format!("the {} process did not become healthy: {why}", candidate.process)));
        }
    }
    Ok(())
}

async fn wait_for(deploys: &Deploys, candidate: &instances::Row, path: Option<&str>) -> Result<Result<(), String>, Failure> {
    let deadline = Instant::now() + Duration::from_secs(deploys.options.health_seconds);
    let mut pause = Duration::from_millis(20);
    let mut last = String::from("it did not answer");
    loop {
        let Some(status) = deploys.runtime.status(&candidate.id).await else {
            instances::start(deploys, candidate).await?;
            continue;
        };
        if status.restarts > MOST_RESTARTS {
            return Ok(Err(format!("it {} again and again", status.last_exit.unwrap_or_else(|| "ended".into()))));
        }
        if candidate.process == WEB {
            match deploys.ingress.probe(&candidate.id, path.unwrap_or("/")).await {
                // A path that was named must be answered well; otherwise any answer but a failure will do.
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
            return Ok(Err(format!("{last}, for {} s{hint}", deploys.options.health_seconds)));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(250));
    }
}

fn is_steady(status: &ShimStatus) -> bool {
    let now = capsule_contracts::Timestamp::now().0;
    status.state == ShimState::Running && now - status.started_at >= i64::try_from(STEADY.as_micros()).unwrap_or(i64::MAX)
}

/// Puts the last of what a candidate printed into the deployment's log, where its user looks. More people read that
/// than the candidate's own log: secrets are masked, also those that a boundary between pieces of a line divides.
fn show_output(deploys: &Deploys, row: &Row, candidate: &instances::Row) {
    let log = deploys.build_log(row.id);
    for line in last_output(&deploys.instance_log(&candidate.id), &texts::mask(deploys, row)) {
        let _ = say(&log, &texts::without_paths(deploys, &format!("{}: {line}", candidate.process)));
    }
}

fn last_output(log: &Path, mask: &Mask) -> Vec<String> {
    let Ok((mut reader, _)) = Reader::at_last(log, LINES_READ) else { return Vec::new() };
    let _ = reader.end_here();
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
            if !goes_on(&line) {
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
    fn output_of_a_candidate_is_shown_without_secrets_wherever_its_log_divides_a_line() {
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
