//! The workload's output on its way into the log: masked, throttled, line by line.

use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Instant;

use super::{Shared, thread};
use crate::logs::{LINE_BYTES, Stream, Writer};
use crate::throttle::{GAP_DURATION, Throttle};

/// The log, and the limit of what is written to it.
pub struct Log {
    writer: Writer,
    throttle: Throttle,
}

impl Log {
    pub fn new(writer: Writer) -> Self {
        Self { writer, throttle: Throttle::new(Instant::now()) }
    }

    /// Ends a gap in the output with a line that reports how much was dropped. On a full disk, output is lost: that must not
    /// stop the workload.
    fn reopen(&mut self, at_once: bool) {
        if let Some(gap) = self.throttle.reopen(Instant::now(), at_once) {
            let _ = self.writer.write(Stream::Capsule, gap.to_string().as_bytes());
        }
    }
}

impl Shared {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a masked line of output, or a part of one, unless the workload exceeds its output limit. Returns whether it
    /// was written.
    fn print(self: &Arc<Self>, stream: Stream, text: &[u8], is_partial: bool) -> bool {
        let mut log = self.log();
        log.reopen(false);
        let was_closed = log.throttle.is_closed();
        if log.throttle.admit(text.len(), Instant::now()) {
            let _ = log.writer.write_part(stream, text, is_partial);
            return true;
        }
        drop(log);
        if !was_closed {
            // The gap is reported even if there is no more output. If no thread can be started, with the next line.
            let shared = self.clone();
            let _ = thread(move || {
                std::thread::sleep(GAP_DURATION);
                shared.log().reopen(false);
            });
        }
        false
    }

    pub fn log_line(&self, text: &str) {
        let _ = self.log().writer.write(Stream::Capsule, &self.mask.bytes(text.as_bytes()));
    }

    pub fn read(
        self: &Arc<Self>,
        pipe: impl Read + Send + 'static,
        stream: Stream,
    ) -> Result<std::thread::JoinHandle<()>, String> {
        let shared = self.clone();
        thread(move || {
            let mut pipe = BufReader::with_capacity(LINE_BYTES, pipe);
            let mut output = shared.mask.output();
            let mut is_printed = true;
            loop {
                let (end, is_whole) = match pipe.fill_buf() {
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    Ok([]) | Err(_) => break,
                    Ok(read) => {
                        let newline = read.iter().position(|byte| *byte == b'\n');
                        let end = newline.map_or(read.len(), |at| at + 1);
                        output.push(&read[..end], |line| is_printed = shared.print(stream, line, !line.ends_with(b"\n")));
                        (end, newline.is_some())
                    }
                };
                pipe.consume(end);
                if !std::mem::replace(&mut is_printed, true) {
                    // The rest of the line is dropped, too.
                    output.clear();
                    if shared.skip(&mut pipe, is_whole).is_err() {
                        break;
                    }
                }
            }
            output.end(|line| {
                shared.print(stream, line, false);
            });
            shared.log().reopen(true);
        })
    }

    /// Drops output while the throttle is closed, up to the end of a line: the rest of a line could show a part of a secret.
    fn skip(&self, pipe: &mut impl BufRead, mut at_start: bool) -> std::io::Result<()> {
        loop {
            let buffer = match pipe.fill_buf() {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                buffer => buffer?,
            };
            let mut log = self.log();
            log.reopen(false);
            if buffer.is_empty() || (at_start && !log.throttle.is_closed()) {
                return Ok(());
            }
            let open_again = !log.throttle.is_closed();
            let end = if open_again {
                buffer.iter().position(|byte| *byte == b'\n').map_or(buffer.len(), |at| at + 1)
            } else {
                buffer.len()
            };
            at_start = buffer[end - 1] == b'\n';
            log.throttle.count_dropped(buffer[..end].iter().filter(|byte| **byte == b'\n').count(), end);
            drop(log);
            pipe.consume(end);
        }
    }
}
