//! Text without the values that are not to be seen in it.

use std::borrow::Cow;

/// Shorter values would mask half of what is printed.
const LEAST: usize = 4;
/// What stands in the place of a value.
const MASKED: &[u8] = b"***";

/// Values that are not to be seen. Made once, and used for every line.
#[derive(Clone, Debug, Default)]
pub struct Mask(Vec<Vec<u8>>);

impl Mask {
    /// Of a value with several lines, each line is masked: output comes line by line.
    #[must_use]
    pub fn new<T: AsRef<str>>(values: impl IntoIterator<Item = T>) -> Self {
        let lines = |value: T| value.as_ref().lines().map(|line| line.trim().as_bytes().to_vec()).collect::<Vec<_>>();
        Self(values.into_iter().flat_map(lines).filter(|line| line.len() >= LEAST).collect())
    }

    /// The line with `***` for every stretch that one value covers, or several do together.
    #[must_use]
    pub fn bytes<'a>(&self, line: &'a [u8]) -> Cow<'a, [u8]> {
        let mut stretches: Vec<(usize, usize)> = Vec::new();
        for value in &self.0 {
            let places = line.windows(value.len()).enumerate().filter(|(_, part)| part == value);
            stretches.extend(places.map(|(at, _)| (at, at + value.len())));
        }
        if stretches.is_empty() {
            return line.into();
        }
        stretches.sort_unstable();
        let (mut masked, mut seen) = (Vec::with_capacity(line.len()), 0);
        for (from, to) in stretches {
            // One that touches the stretch before it is part of that.
            if from > seen || masked.is_empty() {
                masked.extend_from_slice(&line[seen..from]);
                masked.extend_from_slice(MASKED);
            }
            seen = seen.max(to);
        }
        masked.extend_from_slice(&line[seen..]);
        masked.into()
    }

    /// The same of text.
    #[must_use]
    pub fn text<'a>(&self, text: &'a str) -> Cow<'a, str> {
        match self.bytes(text.as_bytes()) {
            Cow::Borrowed(_) => text.into(),
            Cow::Owned(masked) => String::from_utf8_lossy(&masked).into_owned().into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Mask;

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
}
