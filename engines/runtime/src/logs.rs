//! The log of a workload: lines in numbered segment files, written by its shim.
//!
//! A line of a segment is `<microseconds since the epoch>\t<o|e|c>\t<text>`: stdout, stderr, or a message of Capsule. An
//! upper-case letter marks a partial line, which the next line of the same stream continues. Each line is written by one
//! system call, so that a reader never takes half a line for a whole one.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// A segment is closed when it has grown to this many bytes.
const SEGMENT_BYTES: u64 = 4 << 20;
/// The most segments that are kept of an instance; the oldest is removed first.
const SEGMENTS: usize = 8;
/// A longer line is split into partial lines of this many bytes.
pub const LINE_BYTES: usize = 16 << 10;
/// The most bytes of a line in a segment: a text of [`LINE_BYTES`] and its prefix.
const RECORD_BYTES: u64 = 64 << 10;
/// Segments are searched from their end in blocks of this size.
const BLOCK_BYTES: usize = 64 << 10;

/// The source of a line.
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
    /// Whether it is marked as partial: the next line of the same stream continues it.
    is_partial: bool,
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
    /// Opens a new segment after those in the directory.
    ///
    /// # Errors
    /// When the directory or the file cannot be created.
    pub fn open(directory: &Path) -> std::io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        let number = segments(directory)?.last().map_or(1, |last| last + 1);
        let file = create(directory, number)?;
        Ok(Self { directory: directory.into(), file, number, bytes: 0 })
    }

    /// Writes one line, or several partial ones if it is long. Invalid UTF-8 is replaced.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&mut self, stream: Stream, text: &[u8]) -> std::io::Result<()> {
        self.write_part(stream, text, false)
    }

    /// Like [`Writer::write`]. If `is_partial`, the next text of the same stream continues the line.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_part(&mut self, stream: Stream, text: &[u8], is_partial: bool) -> std::io::Result<()> {
        let text = String::from_utf8_lossy(text);
        let mut rest = text.trim_end_matches(['\r', '\n']);
        loop {
            let (piece, after) = rest.split_at(floor_char_boundary(rest, LINE_BYTES));
            self.write_piece(stream, piece, is_partial || !after.is_empty())?;
            if after.is_empty() {
                return Ok(());
            }
            rest = after;
        }
    }

    fn write_piece(&mut self, stream: Stream, text: &str, is_partial: bool) -> std::io::Result<()> {
        let tag = match (stream, is_partial) {
            (Stream::Stdout, false) => 'o',
            (Stream::Stdout, true) => 'O',
            (Stream::Stderr, false) => 'e',
            (Stream::Stderr, true) => 'E',
            (Stream::Capsule, false) => 'c',
            (Stream::Capsule, true) => 'C',
        };
        // The text must not add a line to the file.
        let line = format!("{}\t{tag}\t{}\n", now(), text.replace('\n', " "));
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

/// Whether the next line of the same stream continues this one. Shims of earlier versions do not mark partial lines; those
/// are recognized by their length.
#[must_use]
pub fn is_partial(line: &Line) -> bool {
    line.is_partial || line.text.len() > LINE_BYTES - 4
}

/// Reads the lines of a directory in order. Each call continues where the last one stopped.
#[derive(Debug)]
pub struct Reader {
    directory: PathBuf,
    number: u64,
    offset: u64,
    /// The segment and the offset in it to stop at.
    end: Option<(u64, u64)>,
    /// Whether it skips the rest of a line that is too long.
    is_skipping: bool,
}

impl Reader {
    /// Creates a reader that begins with the oldest line.
    #[must_use]
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.into(), number: 0, offset: 0, end: None, is_skipping: false }
    }

    /// Creates a reader that begins with the last `lines` lines, or the oldest line if there are fewer. Also returns how many
    /// there are.
    ///
    /// # Errors
    /// When a segment cannot be read.
    pub fn tail(directory: &Path, lines: usize) -> std::io::Result<(Self, usize)> {
        let mut reader = Self::new(directory);
        let mut found = 0;
        for number in list(directory)?.into_iter().rev() {
            let mut file = match File::open(path(directory, number)) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => break,
                file => file?,
            };
            let mut block = vec![0; BLOCK_BYTES];
            let mut at = file.metadata()?.len();
            while at > 0 {
                let bytes = usize::try_from(at).unwrap_or(BLOCK_BYTES).min(BLOCK_BYTES);
                at -= bytes as u64;
                file.seek(SeekFrom::Start(at))?;
                file.read_exact(&mut block[..bytes])?;
                for place in (0..bytes).rev().filter(|place| block[*place] == b'\n') {
                    // The newline before the first of the lines.
                    if found == lines {
                        (reader.number, reader.offset) = (number, at + place as u64 + 1);
                        return Ok((reader, found));
                    }
                    found += 1;
                }
            }
            (reader.number, reader.offset) = (number, 0);
        }
        Ok((reader, found))
    }

    /// Makes the reader stop at the present end of the log.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn stop_at_end(&mut self) -> std::io::Result<()> {
        let last = list(&self.directory)?.last().copied().unwrap_or_default();
        let bytes = std::fs::metadata(path(&self.directory, last)).map_or(0, |kind| kind.len());
        self.end = Some((last, bytes));
        Ok(())
    }

    /// Returns lines written since the last call: about `max_bytes` of them, and at least one if there is any. If segments
    /// were removed before they were read, a line of [`Stream::Capsule`] reports that.
    ///
    /// # Errors
    /// When a segment cannot be read.
    pub fn read(&mut self, max_bytes: usize) -> std::io::Result<Vec<Line>> {
        let mut lines = Vec::new();
        let mut left = max_bytes;
        for number in list(&self.directory)? {
            if number < self.number {
                continue;
            }
            if self.end.is_some_and(|(last, _)| number > last) {
                break;
            }
            if self.number != 0 && number > self.number + 1 {
                let text = format!("{} log segments were removed before they were read", number - self.number - 1);
                lines.push(Line { at: now(), stream: Stream::Capsule, text, is_partial: false });
            }
            if number != self.number {
                (self.number, self.offset, self.is_skipping) = (number, 0, false);
            }
            self.read_segment(&mut left, &mut lines)?;
            if left == 0 {
                break;
            }
        }
        Ok(lines)
    }

    fn read_segment(&mut self, left: &mut usize, lines: &mut Vec<Line>) -> std::io::Result<()> {
        let mut file = match File::open(path(&self.directory, self.number)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            file => file?,
        };
        let end = match self.end {
            Some((last, bytes)) if last == self.number => bytes,
            _ => u64::MAX,
        };
        file.seek(SeekFrom::Start(self.offset))?;
        let mut file = BufReader::new(file);
        let mut bytes = Vec::new();
        while *left > 0 && self.offset < end {
            bytes.clear();
            let read = file.by_ref().take(RECORD_BYTES).read_until(b'\n', &mut bytes)?;
            let is_whole = bytes.last() == Some(&b'\n');
            // A writer never writes a longer line. Skip the rest of it.
            if !is_whole && (read as u64) < RECORD_BYTES {
                break;
            }
            self.offset += read as u64;
            if !std::mem::replace(&mut self.is_skipping, !is_whole) {
                *left = left.saturating_sub(read);
                lines.extend(parse(&String::from_utf8_lossy(&bytes)));
            }
        }
        Ok(())
    }
}

fn parse(line: &str) -> Option<Line> {
    let mut parts = line.trim_end_matches('\n').splitn(3, '\t');
    let at = parts.next()?.parse().ok()?;
    let (stream, is_partial) = match parts.next()? {
        "o" => (Stream::Stdout, false),
        "O" => (Stream::Stdout, true),
        "e" => (Stream::Stderr, false),
        "E" => (Stream::Stderr, true),
        "C" => (Stream::Capsule, true),
        _ => (Stream::Capsule, false),
    };
    Some(Line { at, stream, text: parts.next()?.into(), is_partial })
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

/// The segments of a directory, which may not exist yet.
fn list(directory: &Path) -> std::io::Result<Vec<u64>> {
    match segments(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        all => all,
    }
}

/// The last boundary between characters at or before a byte.
fn floor_char_boundary(text: &str, byte: usize) -> usize {
    if byte >= text.len() {
        return text.len();
    }
    (0..=byte).rev().find(|at| text.is_char_boundary(*at)).unwrap_or_default()
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
    use super::{LINE_BYTES, Reader, SEGMENTS, Stream, Writer, is_partial, segments};

    #[test]
    fn a_reader_returns_each_line_once_and_continues_where_it_stopped() {
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
    fn old_segments_are_removed_and_a_slow_reader_gets_a_line_about_it() {
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
        assert!(lines[0].text.contains("removed"), "{}", lines[0].text);
    }

    #[test]
    fn a_read_and_a_line_are_limited_in_bytes() {
        let directory = tempfile::tempdir().expect("tempdir");
        let mut writer = Writer::open(directory.path()).expect("opens");
        writer.write(Stream::Stdout, "ö".repeat(40 * LINE_BYTES).as_bytes()).expect("writes");
        writer.write(Stream::Stdout, b"two\nlines").expect("writes");
        let mut reader = Reader::new(directory.path());
        let mut text = String::new();
        loop {
            let lines = reader.read(50_000).expect("reads");
            let bytes: usize = lines.iter().map(|line| line.text.len()).sum();
            assert!(bytes <= 50_000 + LINE_BYTES, "{bytes} bytes at a time");
            let Some(last) = lines.last() else { break };
            assert_eq!(is_partial(&lines[0]), lines[0].text.len() >= LINE_BYTES);
            text.extend(lines.iter().map(|line| line.text.as_str()));
            assert!(last.text.len() <= LINE_BYTES);
        }
        assert_eq!(text, format!("{}two lines", "ö".repeat(40 * LINE_BYTES)));
    }

    #[test]
    fn a_partial_line_is_marked_whatever_its_length() {
        let directory = tempfile::tempdir().expect("tempdir");
        let mut writer = Writer::open(directory.path()).expect("opens");
        writer.write_part(Stream::Stderr, b"first half, ", true).expect("writes");
        writer.write_part(Stream::Stderr, b"second half\n", false).expect("writes");
        // Each byte becomes a character of three.
        writer.write(Stream::Stdout, &[0xff; 8000]).expect("writes");
        std::fs::write(directory.path().join("00000002.log"), "1\to\told\n").expect("written");
        let lines = Reader::new(directory.path()).read(1 << 20).expect("reads");
        assert_eq!(lines.iter().map(is_partial).collect::<Vec<_>>(), [true, false, true, false, false]);
        let streams: Vec<_> = lines.iter().map(|line| line.stream.name()).collect();
        assert_eq!(streams, ["stderr", "stderr", "stdout", "stdout", "stdout"]);
    }

    #[test]
    fn a_line_without_end_is_not_read_into_memory() {
        let directory = tempfile::tempdir().expect("tempdir");
        let mut content = b"1\to\tfirst\n2\to\t".to_vec();
        content.extend(vec![b'x'; 5 << 20]);
        content.extend(b"\n3\to\tlast\n");
        std::fs::write(directory.path().join("00000001.log"), content).expect("written");
        let mut reader = Reader::new(directory.path());
        let lines = reader.read(1 << 20).expect("reads");
        let lengths: Vec<_> = lines.iter().map(|line| line.text.len()).collect();
        assert!(lengths[0] == 5 && lengths[1] < 100_000 && lengths[2..] == [4], "{lengths:?}");
    }

    #[test]
    fn the_last_lines_are_found_from_the_end() {
        let directory = tempfile::tempdir().expect("tempdir");
        let mut writer = Writer::open(directory.path()).expect("opens");
        for n in 0..30_000 {
            writer.write(Stream::Stdout, format!("{n:0300}").as_bytes()).expect("writes");
        }
        assert!(segments(directory.path()).expect("lists").len() > 1);
        let read_all = |reader: &mut Reader| {
            let mut read: Vec<u32> = Vec::new();
            loop {
                let lines = reader.read(1 << 20).expect("reads");
                if lines.is_empty() {
                    return read;
                }
                read.extend(lines.iter().map(|line| line.text.parse::<u32>().expect("a number")));
            }
        };
        for most in [0, 1, 7, 20_000, 29_999, 30_000, 40_000] {
            let (mut reader, found) = Reader::tail(directory.path(), most).expect("found");
            assert_eq!(found, most.min(30_000));
            assert_eq!(read_all(&mut reader), (30_000 - u32::try_from(found).expect("few")..30_000).collect::<Vec<_>>());
        }
        let mut reader = Reader::new(directory.path());
        reader.stop_at_end().expect("ends");
        writer.write(Stream::Stdout, b"30000").expect("writes");
        assert_eq!(read_all(&mut reader).len(), 30_000);
    }
}
