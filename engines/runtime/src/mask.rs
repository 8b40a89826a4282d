//! Masks secret values in text.

use std::borrow::Cow;
use std::ops::Range;

use aho_corasick::{AhoCorasick, AhoCorasickKind, MatchKind};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};

use crate::logs::LINE_BYTES;

/// Shorter values are not masked: they occur in ordinary text.
const MIN_VALUE_BYTES: usize = 4;
/// Shorter encoded forms are not masked, for the same reason.
const MIN_ENCODED_BYTES: usize = 8;
/// The bytes of input for one line of output of the tool `base64`.
const BASE64_LINE_BYTES: usize = 57;
/// The replacement of a value.
const MASKED: &[u8] = b"***";

/// A set of secret values to mask.
#[derive(Clone, Debug, Default)]
pub struct Mask {
    patterns: Option<AhoCorasick>,
    /// The length of the longest pattern, in bytes.
    longest: usize,
}

impl Mask {
    /// Masks these values in plain form, in their JSON and URL encodings, and in base64. Each line of a multi-line value is
    /// masked by itself, since output arrives line by line.
    #[must_use]
    pub fn new<T: AsRef<str>>(values: impl IntoIterator<Item = T>) -> Self {
        let mut patterns: Vec<Vec<u8>> = Vec::new();
        for value in values {
            let value = value.as_ref().trim();
            patterns
                .extend(value.lines().map(|line| line.trim().as_bytes().to_vec()).filter(|line| line.len() >= MIN_VALUE_BYTES));
            if value.len() >= MIN_ENCODED_BYTES {
                patterns.extend(encoded(value).into_iter().filter(|form| form.len() >= MIN_ENCODED_BYTES));
            }
        }
        patterns.sort_unstable();
        patterns.dedup();
        let longest = patterns.iter().map(Vec::len).max().unwrap_or_default();
        let build = |patterns: &[Vec<u8>]| {
            let built =
                AhoCorasick::builder().kind(Some(AhoCorasickKind::ContiguousNFA)).match_kind(MatchKind::Standard).build(patterns);
            built.expect("an environment is far smaller than what an automaton can index")
        };
        Self { patterns: (!patterns.is_empty()).then(|| build(&patterns)), longest }
    }

    /// The ranges of the text that values cover, in order. Adjacent and overlapping ranges are merged.
    fn ranges(&self, text: &[u8]) -> Vec<Range<usize>> {
        let Some(patterns) = &self.patterns else { return Vec::new() };
        let mut found: Vec<_> = patterns.find_overlapping_iter(text).map(|found| (found.start(), found.end())).collect();
        found.sort_unstable();
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for (from, to) in found {
            match ranges.last_mut() {
                Some(last) if from <= last.end => last.end = last.end.max(to),
                _ => ranges.push(from..to),
            }
        }
        ranges
    }

    /// Replaces every range of bytes that values cover by `***`.
    #[must_use]
    pub fn bytes<'a>(&self, text: &'a [u8]) -> Cow<'a, [u8]> {
        let ranges = self.ranges(text);
        if ranges.is_empty() { text.into() } else { replace(text, &ranges).into() }
    }

    /// Like [`Mask::bytes`], for a string.
    #[must_use]
    pub fn text<'a>(&self, text: &'a str) -> Cow<'a, str> {
        match self.bytes(text.as_bytes()) {
            Cow::Borrowed(_) => text.into(),
            Cow::Owned(masked) => String::from_utf8_lossy(&masked).into_owned().into(),
        }
    }

    /// Creates a masker for output that arrives in parts.
    #[must_use]
    pub fn output(&self) -> MaskedOutput {
        MaskedOutput { mask: self.clone(), line: Vec::new(), covered: 0, is_continued: false }
    }
}

fn replace(text: &[u8], ranges: &[Range<usize>]) -> Vec<u8> {
    let (mut masked, mut seen) = (Vec::with_capacity(text.len()), 0);
    for range in ranges {
        masked.extend_from_slice(&text[seen..range.start]);
        masked.extend_from_slice(MASKED);
        seen = range.end;
    }
    masked.extend_from_slice(&text[seen..]);
    masked
}

/// Masks lines of output, independently of the boundaries of reads and of partial lines.
#[derive(Debug)]
pub struct MaskedOutput {
    mask: Mask,
    /// The bytes of the present line that are not written yet.
    line: Vec<u8>,
    /// The number of its first bytes that belong to a value whose beginning is already written as `***`.
    covered: usize,
    /// Whether a part of the line is already written.
    is_continued: bool,
}

impl MaskedOutput {
    /// Adds output. Calls `write` with each complete line, and with parts of a long one.
    pub fn push(&mut self, output: &[u8], mut write: impl FnMut(&[u8])) {
        for part in output.split_inclusive(|byte| *byte == b'\n') {
            for part in part.chunks(LINE_BYTES) {
                self.line.extend_from_slice(part);
                while self.line.len() > LINE_BYTES + self.mask.longest {
                    self.write_piece(&mut write);
                }
            }
            if self.line.last() == Some(&b'\n') {
                self.end(&mut write);
            }
        }
    }

    /// Writes the rest of the line.
    pub fn end(&mut self, mut write: impl FnMut(&[u8])) {
        let is_nothing = self.line.is_empty() || (self.is_continued && self.line == b"\n");
        if !is_nothing {
            let ranges = self.ranges();
            write(&replace(&self.line, &ranges));
        }
        self.clear();
    }

    /// Drops the rest of the line.
    pub fn clear(&mut self) {
        self.line.clear();
        (self.covered, self.is_continued) = (0, false);
    }

    fn ranges(&self) -> Vec<Range<usize>> {
        let mut ranges = self.mask.ranges(&self.line);
        if self.covered > 0 {
            let mut first = 0..self.covered;
            ranges.retain(|range| {
                let touches = range.start <= first.end;
                if touches {
                    first.end = first.end.max(range.end);
                }
                !touches
            });
            ranges.insert(0, first);
        }
        ranges
    }

    /// Writes the beginning of the line, up to where a value could begin that is not complete yet.
    fn write_piece(&mut self, write: &mut impl FnMut(&[u8])) {
        // A value that begins before the cut ends within the line.
        let most = (self.line.len() - self.mask.longest.saturating_sub(1)).min(LINE_BYTES);
        // A UTF-8 character has at most three continuation bytes.
        let is_boundary = |at: &usize| self.line.get(*at).is_none_or(|byte| byte & 0xc0 != 0x80);
        let mut cut = (most.saturating_sub(3)..=most).rev().find(is_boundary).filter(|at| *at > 0).unwrap_or(most);
        let mut ranges = self.ranges();
        let mut covered = 0;
        if let Some(across) = ranges.iter().find(|range| range.start < cut && cut < range.end) {
            if across.start > 0 {
                cut = across.start;
            } else {
                covered = across.end - cut;
            }
        }
        ranges.retain(|range| range.start < cut);
        if let Some(last) = ranges.last_mut() {
            last.end = last.end.min(cut);
        }
        write(&replace(&self.line[..cut], &ranges));
        self.line.drain(..cut);
        (self.covered, self.is_continued) = (covered, true);
    }
}

/// The forms that a value takes in JSON, in URLs and in base64.
fn encoded(value: &str) -> Vec<Vec<u8>> {
    let json = serde_json::to_string(value).unwrap_or_default();
    let json = json.strip_prefix('"').and_then(|json| json.strip_suffix('"')).unwrap_or_default();
    let mut forms = vec![json.as_bytes().to_vec()];
    for escape in [|byte| format!("%{byte:02X}"), |byte| format!("%{byte:02x}")] as [fn(u8) -> String; 2] {
        let url = |byte: u8| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => (byte as char).to_string(),
            _ => escape(byte),
        };
        let url: String = value.bytes().map(url).collect();
        forms.push(url.replace("%20", "+").into_bytes());
        forms.push(url.into_bytes());
    }
    for engine in [&STANDARD_NO_PAD, &URL_SAFE_NO_PAD] {
        // Base64 encodes groups of three bytes. Where in a group a value begins depends on the bytes before it.
        for before in 0..3 {
            let mut bytes = vec![0; before];
            bytes.extend_from_slice(value.as_bytes());
            let text = engine.encode(&bytes);
            // Without the digits that also encode bits of neighbouring bytes.
            let (first, last) = ((before * 8).div_ceil(6), bytes.len() * 8 / 6);
            forms.push(text.as_bytes()[first..last].to_vec());
        }
        forms.extend(value.as_bytes().chunks(BASE64_LINE_BYTES).map(|line| engine.encode(line).into_bytes()));
    }
    forms
}

#[cfg(test)]
mod tests {
    use super::{LINE_BYTES, Mask};

    #[test]
    fn values_are_masked_wherever_they_stand() {
        let mask = Mask::new(["hunter22", "abc", "one line\n  and another", "er2244", "aaaa", "größer"]);
        for (line, expected) in [
            ("it is hunter22hunter22, hunter2 and abc", "it is ***, hunter2 and abc"),
            ("one line", "***"),
            ("\tand another\n", "\t***\n"),
            ("hunter2244!", "***!"),
            ("er2244 hunter22", "*** ***"),
            ("aaaaaa b", "*** b"),
            ("noch größer", "noch ***"),
            ("nothing", "nothing"),
            ("", ""),
        ] {
            assert_eq!(mask.text(line), expected, "{line}");
        }
        assert_eq!(*mask.bytes(b"\xffhunter22\xff"), *b"\xff***\xff");
        assert_eq!(Mask::default().text("hunter22"), "hunter22");
    }

    #[test]
    fn encoded_values_are_masked_whatever_surrounds_them() {
        use base64::Engine;
        use base64::engine::general_purpose::{STANDARD, URL_SAFE};
        let secret = "p\"ss/w rd?ü+\\and\nmore";
        let mask = Mask::new([secret]);
        for before in ["", "u:", "user:", "name:"] {
            for after in ["", "x", "@host"] {
                let text = format!("{before}{secret}{after}");
                for form in [STANDARD.encode(&text), URL_SAFE.encode(&text)] {
                    let masked = mask.text(&form).into_owned();
                    let shown = masked.replace("***", "").len();
                    assert!(masked.contains("***") && shown <= before.len() * 2 + after.len() * 2 + 8, "{form}: {masked}");
                }
            }
        }
        assert_eq!(mask.text(r#"{"a":"p\"ss/w rd?ü+\\and\nmore"}"#), r#"{"a":"***"}"#);
        assert_eq!(mask.text("?p=p%22ss%2Fw%20rd%3F%C3%BC%2B%5Cand%0Amore&x"), "?p=***&x");
        assert_eq!(mask.text("?p=p%22ss%2Fw+rd%3F%C3%BC%2B%5Cand%0Amore&x"), "?p=***&x");
        let long = "0123456789abcdef".repeat(20);
        let wrapped = STANDARD.encode(&long);
        let wrapped = wrapped.trim_end_matches('=');
        let mask = Mask::new([&long]);
        for line in wrapped.as_bytes().chunks(76) {
            assert_eq!(*mask.bytes(line), *b"***");
        }
    }

    /// What is written of these reads, as one text per line.
    fn written(mask: &Mask, reads: &[&[u8]]) -> Vec<String> {
        let mut output = mask.output();
        let mut lines = Vec::new();
        let mut write = |line: &[u8]| lines.push(String::from_utf8(line.to_vec()).expect("whole characters"));
        reads.iter().for_each(|read| output.push(read, &mut write));
        output.end(&mut write);
        lines
    }

    #[test]
    fn a_secret_is_masked_across_every_boundary_of_a_long_line() {
        let secrets = ["hunter22-größer", "r22-gr", "hunter22-größer-and-longer"];
        let mask = Mask::new(secrets);
        let secret = secrets[2];
        for at in (0..40).chain(LINE_BYTES - 60..LINE_BYTES + 80).chain(2 * LINE_BYTES - 60..2 * LINE_BYTES + 80) {
            let text = format!("{}{secret}{}\nnext\n", "x".repeat(at), "y".repeat(LINE_BYTES));
            let lines = written(&mask, &[text.as_bytes()]);
            let expected = format!("{}***{}\nnext\n", "x".repeat(at), "y".repeat(LINE_BYTES));
            assert_eq!(lines.concat(), expected, "at {at}");
            assert!(lines.iter().all(|line| line.len() <= LINE_BYTES + 200), "a piece is bounded");
        }
    }

    #[test]
    fn a_secret_is_masked_wherever_a_read_ends() {
        let mask = Mask::new(["größer-22", "22-more", "line one\nline two"]);
        let text = "x größer-22-more 22-mor größer\nline one\n  line two and\nlast".as_bytes();
        let expected = ["x *** 22-mor größer\n", "***\n", "  *** and\n", "last"];
        for split in 0..text.len() {
            assert_eq!(written(&mask, &[&text[..split], &text[split..]]), expected, "split at {split}");
        }
        let bytes: Vec<&[u8]> = text.chunks(1).collect();
        assert_eq!(written(&mask, &bytes), expected);
    }

    #[test]
    fn a_line_of_nothing_but_secrets_takes_bounded_memory_and_shows_nothing() {
        let mask = Mask::new(["aaaaa"]);
        let lines = written(&mask, &[&vec![b'a'; 5 * LINE_BYTES], b"b\n"]);
        assert!(lines.len() > 3, "it is written in pieces");
        assert_eq!(lines.concat().replace("***", ""), "b\n");
        let lines = written(&Mask::default(), &[&vec![b'z'; 2 * LINE_BYTES], b"\n", b"\n"]);
        assert_eq!(lines.iter().map(String::len).collect::<Vec<_>>(), [LINE_BYTES, LINE_BYTES, 1]);
    }

    #[test]
    fn output_that_is_no_text_is_written_in_large_pieces() {
        let mut output = Mask::default().output();
        let mut pieces = Vec::new();
        output.push(&[0x80; 4 * LINE_BYTES], |piece| pieces.push(piece.len()));
        output.end(|piece| pieces.push(piece.len()));
        assert_eq!(pieces, [LINE_BYTES; 4]);
    }
}
