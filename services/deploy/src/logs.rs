//! Streams of output: of a build, and of a service's instances. Read from the files that the shims write, a piece
//! at a time: a reader who is slow, or a log that is long, costs no memory.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use capsule_bus::{Call, Items};
use capsule_contracts::deploy::{LogLine, StreamDeploymentLog, StreamServiceLog};
use capsule_contracts::{Problem, Timestamp};
use capsule_runtime::logs::{Line, Reader};

use crate::{Deploys, deployments, instances, placements};

/// Files are looked at this often while somebody follows.
const POLL: Duration = Duration::from_millis(100);
/// Instances are looked for this often while somebody follows.
const LOOK: Duration = Duration::from_secs(1);
/// Bytes taken from one file at a time.
const BATCH_BYTES: usize = 32 << 10;

fn show(line: Line, source: &str) -> LogLine {
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
    deploys: Arc<Deploys>,
    call: Call<StreamDeploymentLog>,
    items: Items<LogLine>,
) -> Result<(), Problem> {
    let id = call.message.id;
    let (mut reader, _) = open(&deploys.build_log(id), None, call.message.follow).await;
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
            tokio::select! {
                () = items.closed() => return Ok(()),
                () = tokio::time::sleep(POLL) => {}
            }
        }
    }
}

/// Opens a log at its last `tail` lines, or its beginning; tells how many lines there are from there on. Who does
/// not follow reads what is there now.
async fn open(directory: &Path, tail: Option<u32>, follow: bool) -> (Reader, usize) {
    let directory = directory.to_owned();
    let opened = tokio::task::spawn_blocking(move || {
        let (mut reader, lines) = match tail {
            Some(tail) => Reader::at_last(&directory, tail as usize).unwrap_or_else(|_| (Reader::new(&directory), 0)),
            None => (Reader::new(&directory), 0),
        };
        if !follow {
            let _ = reader.end_here();
        }
        (reader, lines)
    });
    opened.await.unwrap_or_else(|_| (Reader::new(Path::new("/nonexistent")), 0))
}

pub async fn stream_service_log(
    deploys: Arc<Deploys>,
    call: Call<StreamServiceLog>,
    items: Items<LogLine>,
) -> Result<(), Problem> {
    let message = &call.message;
    let mut merged = Merged { follow: message.follow, ..Merged::default() };
    let mut tail = message.tail;
    let mut looked: Option<Instant> = None;
    loop {
        if looked.is_none_or(|looked| message.follow && looked.elapsed() > LOOK) {
            if let Some(placement) = placements::by_name(&deploys, &call.proof, message.id, &message.environment).await? {
                let rows = instances::of(&deploys, &placement).await?;
                merged.retain(&rows.iter().map(|row| row.id.as_str()).collect());
                for row in rows {
                    merged.add(&row.id, &row.process, &deploys.instance_log(&row.id), tail).await;
                }
                if let Some(tail) = tail.take() {
                    merged.skip = merged.skip.saturating_sub(tail as usize);
                }
            }
            looked = Some(Instant::now());
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
                () = tokio::time::sleep(POLL) => {}
            },
        }
    }
}

/// The logs of several instances as one, in the order of time. Holds a piece of each.
#[derive(Default)]
struct Merged {
    follow: bool,
    /// So many lines are left out before the first that is shown.
    skip: usize,
    /// By instance.
    sources: BTreeMap<String, Source>,
}

struct Source {
    name: String,
    /// Taken while it reads, and for good once there is nothing more to come.
    reader: Option<Reader>,
    lines: VecDeque<Line>,
    /// It had nothing then.
    empty_at: Option<Instant>,
}

impl Source {
    async fn fill(&mut self, follow: bool) {
        if !self.lines.is_empty() || self.empty_at.is_some_and(|at| at.elapsed() < POLL) {
            return;
        }
        let Some(reader) = self.reader.take() else { return };
        let (reader, lines) = read(reader).await;
        self.empty_at = lines.is_empty().then(Instant::now);
        self.lines = lines.into();
        // Who does not follow is at the end of this one.
        self.reader = Some(reader).filter(|_| follow || !self.lines.is_empty());
    }
}

impl Merged {
    async fn add(&mut self, instance: &str, process: &str, directory: &Path, tail: Option<u32>) {
        if self.sources.contains_key(instance) {
            return;
        }
        let (reader, lines) = open(directory, tail, self.follow).await;
        self.skip += lines;
        let name = format!("{process}.{instance}");
        self.sources.insert(instance.into(), Source { name, reader: Some(reader), lines: VecDeque::new(), empty_at: None });
    }

    /// Drops those whose instances are not on record any more.
    fn retain(&mut self, instances: &HashSet<&str>) {
        self.sources.retain(|instance, source| instances.contains(instance.as_str()) || !source.lines.is_empty());
    }

    /// The next line; `None` if there is none now.
    async fn next(&mut self) -> Option<LogLine> {
        loop {
            for source in self.sources.values_mut() {
                source.fill(self.follow).await;
            }
            let oldest = self.sources.values_mut().filter(|source| !source.lines.is_empty());
            let oldest = oldest.min_by_key(|source| source.lines.front().map(|line| line.at))?;
            let line = oldest.lines.pop_front()?;
            if self.skip == 0 {
                return Some(show(line, &oldest.name));
            }
            self.skip -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{BATCH_BYTES, Merged};
    use capsule_runtime::logs::{LINE_BYTES, Stream, Writer};
    use std::path::Path;

    async fn merged(folder: &Path, follow: bool, tail: Option<u32>) -> Merged {
        let mut merged = Merged { follow, ..Merged::default() };
        for instance in ["a", "b", "c"] {
            merged.add(instance, "web", &folder.join(instance), tail).await;
        }
        merged.skip = merged.skip.saturating_sub(tail.map_or(0, |tail| tail as usize));
        merged
    }

    /// Lines in turn of three instances, the last of which never wrote.
    fn written(folder: &Path, lines: usize, width: usize) {
        let mut writers = ["a", "b"].map(|name| Writer::open(&folder.join(name)).expect("opens"));
        for n in 0..lines {
            writers[n % 2].write(Stream::Stdout, format!("{n:0width$}").as_bytes()).expect("writes");
            // The clock of a line has microseconds: two lines of one are in any order.
            std::thread::sleep(std::time::Duration::from_micros(2));
        }
    }

    #[tokio::test]
    async fn lines_of_all_instances_come_in_order_and_little_of_them_is_held() {
        let folder = tempfile::tempdir().expect("a folder");
        written(folder.path(), 4000, 3000);
        let mut all = merged(folder.path(), false, None).await;
        let mut read = 0;
        while let Some(line) = all.next().await {
            assert_eq!(line.text.trim_start_matches('0').parse().unwrap_or(0), read);
            read += 1;
            let held: usize = all.sources.values().flat_map(|source| &source.lines).map(|line| line.text.len()).sum();
            assert!(held <= 3 * (BATCH_BYTES + LINE_BYTES), "{held} bytes are held");
        }
        assert_eq!(read, 4000);
    }

    #[tokio::test]
    async fn the_tail_is_that_of_all_instances_together() {
        let folder = tempfile::tempdir().expect("a folder");
        written(folder.path(), 1000, 10);
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
    async fn who_does_not_follow_comes_to_an_end_however_much_is_written_meanwhile() {
        let folder = tempfile::tempdir().expect("a folder");
        written(folder.path(), 10, 10);
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
