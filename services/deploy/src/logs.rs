//! Log streams of builds and of a service's instances. The log files are read in batches, so that a slow client or a
//! long log needs little memory.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use capsule_bus::{Call, StreamSink};
use capsule_contracts::deploy::{LogLine, StreamDeploymentLog, StreamServiceLog};
use capsule_contracts::{Problem, Timestamp};
use capsule_runtime::logs::{Line, Reader};

use crate::{DeployService, deployments, instances, service_environments};

/// The interval between reads of a log that is followed.
const POLL_PERIOD: Duration = Duration::from_millis(100);
/// The interval between searches for new instances of a log that is followed.
const INSTANCES_PERIOD: Duration = Duration::from_secs(1);
/// The maximum number of bytes read from one file at a time.
const BATCH_BYTES: usize = 32 << 10;

fn to_log_line(line: Line, source: &str) -> LogLine {
    LogLine { at: Timestamp(line.at), stream: line.stream.name().into(), source: source.into(), text: line.text }
}

async fn read(mut reader: Reader) -> (Reader, Vec<Line>) {
    let joined = tokio::task::spawn_blocking(move || {
        let lines = reader.read(BATCH_BYTES).unwrap_or_default();
        (reader, lines)
    });
    joined.await.unwrap_or_else(|_| (Reader::new(Path::new("/nonexistent")), Vec::new()))
}

pub async fn stream_deployment_log(
    service: Arc<DeployService>,
    call: Call<StreamDeploymentLog>,
    items: StreamSink<LogLine>,
) -> Result<(), Problem> {
    let id = call.message.id;
    let (mut reader, _) = open(&service.build_log(id), None, call.message.follow).await;
    loop {
        // Read before the log, so that everything written until the deployment settled is sent.
        let is_settled = deployments::get(&service, &call.grant, id).await?.finished_at.is_some();
        let lines;
        (reader, lines) = read(reader).await;
        let is_at_end = lines.is_empty();
        for line in lines {
            if !items.send(&to_log_line(line, "build")).await {
                return Ok(());
            }
        }
        if is_at_end {
            if is_settled || !call.message.follow {
                return Ok(());
            }
            tokio::select! {
                () = items.closed() => return Ok(()),
                () = tokio::time::sleep(POLL_PERIOD) => {}
            }
        }
    }
}

/// Opens a log at its last `tail` lines, or at its beginning. Returns the number of lines of the tail. Without `follow`, the
/// reader ends at the present end of the log.
async fn open(directory: &Path, tail: Option<u32>, follow: bool) -> (Reader, usize) {
    let directory = directory.to_owned();
    let opened = tokio::task::spawn_blocking(move || {
        let (mut reader, lines) = match tail {
            Some(tail) => Reader::tail(&directory, tail as usize).unwrap_or_else(|_| (Reader::new(&directory), 0)),
            None => (Reader::new(&directory), 0),
        };
        if !follow {
            let _ = reader.stop_at_end();
        }
        (reader, lines)
    });
    opened.await.unwrap_or_else(|_| (Reader::new(Path::new("/nonexistent")), 0))
}

pub async fn stream_service_log(
    service: Arc<DeployService>,
    call: Call<StreamServiceLog>,
    items: StreamSink<LogLine>,
) -> Result<(), Problem> {
    let message = &call.message;
    let mut merged = MergedLog { follow: message.follow, ..MergedLog::default() };
    let mut tail = message.tail;
    let mut listed_at: Option<Instant> = None;
    loop {
        if listed_at.is_none_or(|at| message.follow && at.elapsed() > INSTANCES_PERIOD) {
            if let Some(service_environment) =
                service_environments::by_name(&service, &call.grant, message.id, &message.environment).await?
            {
                let rows = instances::of(&service, &service_environment).await?;
                merged.retain(&rows.iter().map(|row| row.id.as_str()).collect());
                for row in rows {
                    merged.add(&row.id, &row.process, &service.instance_log(&row.id), tail).await;
                }
                if let Some(tail) = tail.take() {
                    merged.skip = merged.skip.saturating_sub(tail as usize);
                }
            }
            listed_at = Some(Instant::now());
        }
        match merged.next().await {
            Some(line) => {
                if !items.send(&line).await {
                    return Ok(());
                }
            }
            None if !message.follow => return Ok(()),
            None => tokio::select! {
                () = items.closed() => return Ok(()),
                () = tokio::time::sleep(POLL_PERIOD) => {}
            },
        }
    }
}

/// The logs of several instances merged by time. Buffers a batch of each.
#[derive(Default)]
struct MergedLog {
    follow: bool,
    /// The number of lines to skip.
    skip: usize,
    /// By the instance's id.
    sources: BTreeMap<String, Source>,
}

struct Source {
    name: String,
    /// `None` while a read is in progress, and at the end of a log that is not followed.
    reader: Option<Reader>,
    lines: VecDeque<Line>,
    /// The time of the last read that returned nothing.
    empty_at: Option<Instant>,
}

impl Source {
    async fn fill(&mut self, follow: bool) {
        if !self.lines.is_empty() || self.empty_at.is_some_and(|at| at.elapsed() < POLL_PERIOD) {
            return;
        }
        let Some(reader) = self.reader.take() else { return };
        let (reader, lines) = read(reader).await;
        self.empty_at = lines.is_empty().then(Instant::now);
        self.lines = lines.into();
        // Without `follow`, an empty read is the end of the log.
        self.reader = Some(reader).filter(|_| follow || !self.lines.is_empty());
    }
}

impl MergedLog {
    async fn add(&mut self, instance: &str, process: &str, directory: &Path, tail: Option<u32>) {
        if self.sources.contains_key(instance) {
            return;
        }
        let (reader, lines) = open(directory, tail, self.follow).await;
        self.skip += lines;
        let name = format!("{process}.{instance}");
        self.sources.insert(instance.into(), Source { name, reader: Some(reader), lines: VecDeque::new(), empty_at: None });
    }

    /// Removes the logs of instances without a row, once their buffer is empty.
    fn retain(&mut self, instances: &HashSet<&str>) {
        self.sources.retain(|instance, source| instances.contains(instance.as_str()) || !source.lines.is_empty());
    }

    /// Returns the next line, or `None` if there is none at present.
    async fn next(&mut self) -> Option<LogLine> {
        loop {
            for source in self.sources.values_mut() {
                source.fill(self.follow).await;
            }
            let oldest = self.sources.values_mut().filter(|source| !source.lines.is_empty());
            let oldest = oldest.min_by_key(|source| source.lines.front().map(|line| line.at))?;
            let line = oldest.lines.pop_front()?;
            if self.skip == 0 {
                return Some(to_log_line(line, &oldest.name));
            }
            self.skip -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{BATCH_BYTES, MergedLog};
    use capsule_runtime::logs::{LINE_BYTES, Stream, Writer};
    use std::path::Path;

    async fn merged(folder: &Path, follow: bool, tail: Option<u32>) -> MergedLog {
        let mut merged = MergedLog { follow, ..MergedLog::default() };
        for instance in ["a", "b", "c"] {
            merged.add(instance, "web", &folder.join(instance), tail).await;
        }
        merged.skip = merged.skip.saturating_sub(tail.map_or(0, |tail| tail as usize));
        merged
    }

    /// Writes lines alternately to the logs of two instances; a third has no log.
    fn write_logs(folder: &Path, lines: usize, width: usize) {
        let mut writers = ["a", "b"].map(|name| Writer::open(&folder.join(name)).expect("opens"));
        for n in 0..lines {
            writers[n % 2].write(Stream::Stdout, format!("{n:0width$}").as_bytes()).expect("writes");
            // Times have microseconds: two lines with the same time have no defined order.
            std::thread::sleep(std::time::Duration::from_micros(2));
        }
    }

    #[tokio::test]
    async fn lines_of_all_instances_are_in_order_and_the_buffer_is_small() {
        let folder = tempfile::tempdir().expect("a folder");
        write_logs(folder.path(), 4000, 3000);
        let mut all = merged(folder.path(), false, None).await;
        let mut read = 0;
        while let Some(line) = all.next().await {
            assert_eq!(line.text.trim_start_matches('0').parse().unwrap_or(0), read);
            read += 1;
            let buffered: usize = all.sources.values().flat_map(|source| &source.lines).map(|line| line.text.len()).sum();
            assert!(buffered <= 3 * (BATCH_BYTES + LINE_BYTES), "{buffered} bytes are buffered");
        }
        assert_eq!(read, 4000);
    }

    #[tokio::test]
    async fn a_tail_is_counted_over_all_instances() {
        let folder = tempfile::tempdir().expect("a folder");
        write_logs(folder.path(), 1000, 10);
        for tail in [0, 1, 2, 777, 5000] {
            let mut all = merged(folder.path(), false, Some(tail)).await;
            let mut lines = Vec::new();
            while let Some(line) = all.next().await {
                lines.push(line.text.parse::<u32>().expect("a number"));
            }
            let expected: Vec<u32> = (1000_u32.saturating_sub(tail)..1000).collect();
            assert_eq!(lines, expected, "tail {tail}");
        }
    }

    #[tokio::test]
    async fn a_stream_without_follow_ends_however_much_is_written_meanwhile() {
        let folder = tempfile::tempdir().expect("a folder");
        write_logs(folder.path(), 10, 10);
        let mut all = merged(folder.path(), false, None).await;
        let mut writer = Writer::open(&folder.path().join("a")).expect("opens");
        let mut read = 0;
        while all.next().await.is_some() {
            writer.write(Stream::Stdout, b"more").expect("writes");
            read += 1;
        }
        assert_eq!(read, 10);
        let mut following = merged(folder.path(), true, None).await;
        for _ in 0..20 {
            assert!(following.next().await.is_some());
        }
        assert!(following.next().await.is_none());
    }
}
