//! Progress of long operations.

use std::io::{IsTerminal, Read, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::text::{sanitize_line, sanitize_output};

/// A progress line. It is shown only on a terminal.
#[derive(Clone, Debug)]
pub struct Progress(ProgressBar);

impl Progress {
    /// A progress bar for `total` bytes.
    pub fn bytes(total: u64, activity: &str) -> Self {
        let bar = ProgressBar::new(total);
        bar.set_style(style(&format!("{{spinner}} {activity} {{bytes}} of {{total_bytes}} {{wide_bar}}")));
        Self(bar)
    }

    /// A spinner, for an operation of unknown length.
    pub fn spinner(message: &str) -> Self {
        let bar = ProgressBar::new_spinner();
        bar.set_style(style("{spinner} {msg} {elapsed}"));
        let progress = Self(bar);
        progress.message(message);
        progress.0.enable_steady_tick(Duration::from_millis(120));
        progress
    }

    pub fn message(&self, text: &str) {
        self.0.set_message(sanitize_line(text));
    }

    /// Prints a line above the progress line, with its colours.
    pub fn log_line(&self, text: &str) {
        let line = sanitize_output(text);
        if std::io::stderr().is_terminal() {
            self.0.println(line);
        } else {
            let _ = writeln!(std::io::stderr(), "{line}");
        }
    }

    pub fn read<R: Read>(&self, reader: R) -> impl Read + use<R> {
        self.0.wrap_read(reader)
    }

    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}

/// A number of bytes as text, such as `9.79 KiB`.
pub fn bytes(count: u64) -> String {
    indicatif::HumanBytes(count).to_string()
}
