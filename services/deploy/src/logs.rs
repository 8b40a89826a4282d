//! Streams of output: of a build, and of a service's instances. Read from the files that the shims
//! write; the reader's pace is the stream's.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use capsule_bus::{Call, Items};
use capsule_contracts::deploy::{LogLine, StreamDeploymentLog, StreamServiceLog};
use capsule_contracts::{Problem, Timestamp};
use capsule_runtime::logs::{Line, Reader};

use crate::{Deploys, deployments, instances, placements};

/// Files are looked at this often while somebody follows.
const POLL: Duration = Duration::from_millis(100);
/// Lines taken from one file at a time.
const BATCH: usize = 500;

fn show(line: Line, source: &str) -> LogLine {
    LogLine { at: Timestamp(line.at), stream: line.stream.name().into(), source: source.into(), text: line.text }
}

async fn read(mut reader: Reader) -> (Reader, Vec<Line>) {
    let joined = tokio::task::spawn_blocking(move || {
        let lines = reader.read(BATCH).unwrap_or_default();
        (reader, lines)
    });
    joined.await.unwrap_or_else(|_| (Reader::new(std::path::Path::new("/nonexistent")), Vec::new()))
}

pub async fn stream_deployment_log(
    deploys: Arc<Deploys>,
    call: Call<StreamDeploymentLog>,
    items: Items<LogLine>,
) -> Result<(), Problem> {
    let id = call.message.id;
    let mut reader = Reader::new(&deploys.build_log(id));
    loop {
        // Asked before the files are read: what was written until it settled is then read for sure.
        let settled = deployments::get(&deploys, &call.proof, id).await?.finished_at.is_some();
        let lines;
        (reader, lines) = read(reader).await;
        let read_none = lines.is_empty();
        for line in lines {
            if !items.send(&show(line, "build")).await {
                return Ok(());
            }
        }
        if read_none {
            if settled || !call.message.follow {
                return Ok(());
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

pub async fn stream_service_log(
    deploys: Arc<Deploys>,
    call: Call<StreamServiceLog>,
    items: Items<LogLine>,
) -> Result<(), Problem> {
    let message = &call.message;
    let mut readers: HashMap<String, Option<Reader>> = HashMap::new();
    let mut first = true;
    loop {
        let mut batch = Vec::new();
        if let Some(placement) = placements::by_name(&deploys, &call.proof, message.id, &message.environment).await? {
            for instance in instances::of(&deploys, &placement).await? {
                let slot =
                    readers.entry(instance.id.clone()).or_insert_with(|| Some(Reader::new(&deploys.instance_log(&instance.id))));
                let Some(mut reader) = slot.take() else { continue };
                loop {
                    let lines;
                    (reader, lines) = read(reader).await;
                    let whole = lines.len() >= BATCH;
                    batch.extend(lines.into_iter().map(|line| show(line, &format!("{}.{}", instance.process, instance.id))));
                    if !whole || !first {
                        break;
                    }
                    // Only so much is held while the beginning is skipped.
                    if let Some(tail) = message.tail {
                        let spare = batch.len().saturating_sub(tail as usize);
                        batch.drain(..spare);
                    }
                }
                *slot = Some(reader);
            }
        }
        batch.sort_by_key(|line| line.at);
        if first && let Some(tail) = message.tail {
            let spare = batch.len().saturating_sub(tail as usize);
            batch.drain(..spare);
        }
        let idle = batch.is_empty();
        for line in &batch {
            if !items.send(line).await {
                return Ok(());
            }
        }
        if !message.follow && (first || idle) {
            return Ok(());
        }
        first = false;
        if idle {
            tokio::select! {
                () = items.closed() => return Ok(()),
                () = tokio::time::sleep(POLL) => {}
            }
        }
    }
}
