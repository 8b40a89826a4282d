//! Limits the output of a workload, in lines and bytes per second after a burst. Output beyond the limit is dropped and
//! counted; the workload is neither stopped nor blocked.

use std::time::{Duration, Instant};

/// The size of the token buckets: how much output is allowed at once.
const BURST_BYTES: f64 = 8.0 * 1024.0 * 1024.0;
const BURST_LINES: f64 = 20_000.0;
/// The rate at which the token buckets are filled.
const BYTES_PER_SECOND: f64 = 1024.0 * 1024.0;
const LINES_PER_SECOND: f64 = 5_000.0;
/// How long all output is dropped once some is: one gap in the log is easier to read than a thousand.
pub const GAP_DURATION: Duration = Duration::from_secs(1);

/// Two token buckets, and a count of the output that was dropped while they were empty.
#[derive(Debug)]
pub struct Throttle {
    filled_at: Instant,
    bytes: f64,
    lines: f64,
    gap: Option<Gap>,
}

/// Output that was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    since: Instant,
    pub lines: u64,
    pub bytes: u64,
}

impl std::fmt::Display for Gap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} lines ({} bytes) of output were dropped: the limit is {LINES_PER_SECOND} lines and {} KiB per second",
            self.lines,
            self.bytes,
            BYTES_PER_SECOND / 1024.0
        )
    }
}

impl Throttle {
    /// Creates a throttle with full buckets.
    pub fn new(now: Instant) -> Self {
        Self { filled_at: now, bytes: BURST_BYTES, lines: BURST_LINES, gap: None }
    }

    /// Whether output is being dropped.
    pub fn is_closed(&self) -> bool {
        self.gap.is_some()
    }

    /// Takes a line of this many bytes from the buckets. Returns whether the line may be written: a line that empties a bucket
    /// may, the next begins a gap, which [`Throttle::reopen`] ends.
    pub fn admit(&mut self, bytes: usize, now: Instant) -> bool {
        if self.is_closed() {
            self.count_dropped(1, bytes);
            return false;
        }
        self.fill(now);
        if self.lines < 1.0 || self.bytes < 1.0 {
            self.gap = Some(Gap { since: now, lines: 0, bytes: 0 });
            self.count_dropped(1, bytes);
            return false;
        }
        self.lines -= 1.0;
        self.bytes -= bytes as f64;
        true
    }

    /// Counts output that was not written.
    pub fn count_dropped(&mut self, lines: usize, bytes: usize) {
        if let Some(gap) = &mut self.gap {
            gap.lines += lines as u64;
            gap.bytes += bytes as u64;
        }
    }

    /// Ends the gap if it has lasted for [`GAP_DURATION`], or in any case with `at_once`. Returns the gap that ended.
    pub fn reopen(&mut self, now: Instant, at_once: bool) -> Option<Gap> {
        let ended = self.gap.take_if(|gap| at_once || now.duration_since(gap.since) >= GAP_DURATION);
        self.fill(now);
        ended
    }

    fn fill(&mut self, now: Instant) {
        let seconds = now.duration_since(self.filled_at).as_secs_f64();
        self.filled_at = now;
        self.bytes = (self.bytes + seconds * BYTES_PER_SECOND).min(BURST_BYTES);
        self.lines = (self.lines + seconds * LINES_PER_SECOND).min(BURST_LINES);
    }
}

#[cfg(test)]
mod tests {
    use super::{BURST_BYTES, BURST_LINES, GAP_DURATION, LINES_PER_SECOND, Throttle};
    use std::time::{Duration, Instant};

    #[test]
    fn a_burst_is_written_and_a_flood_is_limited_to_the_rate() {
        let started_at = Instant::now();
        let mut throttle = Throttle::new(started_at);
        let mut now = started_at;
        let (mut printed, mut dropped) = (0_u64, 0);
        // Ten seconds of a hundred thousand lines each.
        for step in 0..1_000_000_u64 {
            now = started_at + Duration::from_micros(10 * step);
            dropped += throttle.reopen(now, false).map_or(0, |gap| gap.lines);
            printed += u64::from(throttle.admit(2, now));
        }
        let rest = throttle.reopen(now, true).map_or(0, |gap| gap.lines);
        assert_eq!(printed + dropped + rest, 1_000_000, "each line is printed or counted");
        let most = BURST_LINES + 11.0 * LINES_PER_SECOND;
        assert!(printed as f64 >= BURST_LINES && printed as f64 <= most, "{printed}");
    }

    #[test]
    fn long_lines_are_bounded_by_their_bytes() {
        let now = Instant::now();
        let mut throttle = Throttle::new(now);
        let printed = (0..2000).filter(|_| throttle.admit(16 << 10, now)).count();
        assert_eq!(printed, BURST_BYTES as usize / (16 << 10));
        throttle.count_dropped(3, 10);
        assert!(throttle.reopen(now, false).is_none(), "a gap lasts");
        let gap = throttle.reopen(now + GAP_DURATION, false).expect("it has ended");
        assert_eq!((gap.lines, gap.bytes), (2000 - 512 + 3, (2000 - 512) * (16 << 10) + 10));
        assert!(gap.to_string().starts_with("1491 lines (24379402 bytes) of output were dropped"), "{gap}");
        assert!(throttle.admit(1, now + GAP_DURATION));
    }
}
