//! A workload's output: lines in numbered segment files, written by its shim, read by anybody.
//!
//! A line of a segment is `<microseconds since the epoch>\t<o|e|c>\t<text>`: stdout, stderr, or what
//! Capsule says itself. Each is written by one call, so a reader never takes a half line for a whole.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// A segment is closed when it has grown to this many bytes.
const SEGMENT_BYTES: u64 = 4 << 20;
/// So many segments are kept of an instance; the oldest goes first.
const SEGMENTS: usize = 8;
/// A longer line is cut into pieces of this many bytes.
pub const LINE_BYTES: usize = 16 << 10;

/// Who said a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
    Capsule,
}

impl Stream {
    /// The name that the API uses.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
            Self::Capsule => "capsule",
        }
    }
}

/// One line of output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Microseconds since the Unix epoch.
    pub at: i64,
    pub stream: Stream,
    pub text: String,
}

/// Appends lines to the newest segment of a directory.
#[derive(Debug)]
pub struct Writer {
    directory: PathBuf,
    file: File,
    number: u64,
    bytes: u64,
}

impl Writer {
    /// Goes on after what the directory holds, in a new segment.
    ///
    /// # Errors
    /// When the directory or the file cannot be made.
    pub fn open(directory: &Path) -> std::io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        let number = segments(directory)?.last().map_or(1, |last| last + 1);
        let file = create(directory, number)?;
        Ok(Self { directory: directory.into(), file, number, bytes: 0 })
    }

    /// Writes one line. What is not UTF-8 is shown as the replacement character.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn write(&mut self, stream: Stream, text: &[u8]) -> std::io::Result<()> {
        let tag = match stream {
            Stream::Stdout => 'o',
            Stream::Stderr => 'e',
            Stream::Capsule => 'c',
        };
        let text = String::from_utf8_lossy(text);
        let line = format!("{}\t{tag}\t{}\n", now(), text.trim_end_matches(['\r', '\n']));
        if self.bytes + line.len() as u64 > SEGMENT_BYTES && self.bytes > 0 {
            self.rotate()?;
        }
        self.file.write_all(line.as_bytes())?;
        self.bytes += line.len() as u64;
        Ok(())
    }

    fn rotate(&mut self) -> std::io::Result<()> {
        self.number += 1;
        self.file = create(&self.directory, self.number)?;
        self.bytes = 0;
        let all = segments(&self.directory)?;
        for old in all.iter().take(all.len().saturating_sub(SEGMENTS)) {
            std::fs::remove_file(path(&self.directory, *old))?;
        }
        Ok(())
    }
}

/// Reads a directory's lines in order, and goes on where it stopped when more were written.
#[derive(Debug)]
pub struct Reader {
    directory: PathBuf,
    number: u64,
    offset: u64,
}

impl Reader {
    /// Begins with the oldest line kept.
    #[must_use]
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.into(), number: 0, offset: 0 }
    }

    /// Up to `most` lines written since the last call. Where segments were dropped before they were
    /// read, a line says so.
    ///
    /// # Errors
    /// When a segment cannot be read.
    pub fn read(&mut self, most: usize) -> std::io::Result<Vec<Line>> {
        let mut lines = Vec::new();
        let all = match segments(&self.directory) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(lines),
            all => all?,
        };
        for number in all {
            if number < self.number {
                continue;
            }
            if self.number != 0 && number > self.number + 1 {
                let text = format!("{} log segments were dropped before they were read", number - self.number - 1);
                lines.push(Line { at: now(), stream: Stream::Capsule, text });
            }
            if number != self.number {
                (self.number, self.offset) = (number, 0);
            }
            self.read_segment(most, &mut lines)?;
            if lines.len() >= most {
                break;
            }
        }
        Ok(lines)
    }

    fn read_segment(&mut self, most: usize, lines: &mut Vec<Line>) -> std::io::Result<()> {
        let mut file = match File::open(path(&self.directory, self.number)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            file => file?,
        };
        file.seek(SeekFrom::Start(self.offset))?;
        let mut file = BufReader::new(file);
        let mut bytes = Vec::new();
        while lines.len() < most {
            bytes.clear();
            let read = file.by_ref().take(1 << 20).read_until(b'\n', &mut bytes)?;
            if bytes.last() != Some(&b'\n') {
                break;
            }
            self.offset += read as u64;
            lines.extend(parse(&String::from_utf8_lossy(&bytes)));
        }
        Ok(())
    }
}

fn parse(line: &str) -> Option<Line> {
    let mut parts = line.trim_end_matches('\n').splitn(3, '\t');
    let at = parts.next()?.parse().ok()?;
    let stream = match parts.next()? {
        "o" => Stream::Stdout,
        "e" => Stream::Stderr,
        _ => Stream::Capsule,
    };
    Some(Line { at, stream, text: parts.next()?.into() })
}

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
}

fn path(directory: &Path, number: u64) -> PathBuf {
    directory.join(format!("{number:08}.log"))
}

fn create(directory: &Path, number: u64) -> std::io::Result<File> {
    OpenOptions::new().create_new(true).append(true).open(path(directory, number))
}

fn segments(directory: &Path) -> std::io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let name = entry?.file_name();
        if let Some(number) = name.to_str().and_then(|name| name.strip_suffix(".log")).and_then(|name| name.parse().ok()) {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::{Reader, SEGMENTS, Stream, Writer, segments};

    #[test]
    fn a_reader_sees_each_line_once_and_goes_on_where_it_stopped() {
        let directory = tempfile::tempdir().expect("tempdir");
        let mut writer = Writer::open(directory.path()).expect("opens");
        let mut reader = Reader::new(directory.path());
        writer.write(Stream::Stdout, b"one\n").expect("writes");
        writer.write(Stream::Stderr, b"tab\tand \xff byte").expect("writes");
        let lines = reader.read(100).expect("reads");
        let texts: Vec<_> = lines.iter().map(|line| (line.stream, line.text.as_str())).collect();
        assert_eq!(texts, [(Stream::Stdout, "one"), (Stream::Stderr, "tab\tand \u{fffd} byte")]);
        assert!(reader.read(100).expect("reads").is_empty());
        drop(writer);
        let mut writer = Writer::open(directory.path()).expect("opens again");
        writer.write(Stream::Capsule, b"two").expect("writes");
        assert_eq!(reader.read(100).expect("reads").len(), 1);
    }

    #[test]
    fn old_segments_go_and_a_reader_who_was_too_slow_is_told() {
        let directory = tempfile::tempdir().expect("tempdir");
        let mut writer = Writer::open(directory.path()).expect("opens");
        let mut reader = Reader::new(directory.path());
        writer.write(Stream::Stdout, b"first").expect("writes");
        assert_eq!(reader.read(10).expect("reads").len(), 1);
        let line = vec![b'x'; 1 << 20];
        for _ in 0..60 {
            writer.write(Stream::Stdout, &line).expect("writes");
        }
        assert_eq!(segments(directory.path()).expect("lists").len(), SEGMENTS);
        let lines = reader.read(1).expect("reads");
        assert_eq!(lines[0].stream, Stream::Capsule);
        assert!(lines[0].text.contains("dropped"), "{}", lines[0].text);
    }
}
