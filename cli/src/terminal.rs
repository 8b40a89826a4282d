//! Output and prompts. Results go to standard output, everything else to standard error. With `--json`, results are
//! JSON on standard output, and an error is one JSON object on the last line of standard error. Only this module prints:
//! it removes control characters that could take over the terminal.
#![expect(clippy::disallowed_methods, reason = "only this module prints and prompts")]

mod failure;
mod progress;
mod text;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use anyhow::bail;
use serde::Serialize;

pub use failure::{Failure, Report};
pub use progress::{Progress, bytes};
pub use text::{counted, table};
use text::{escape_json, sanitize, sanitize_line, sanitize_output, sanitize_output_lines};

/// How results and errors are printed.
#[derive(Clone, Copy, Debug)]
pub struct Terminal {
    pub json: bool,
}

impl Terminal {
    /// Prints a result: as JSON, or as the result of `text`.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn show<T: Serialize>(self, result: &T, text: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
        let text = if self.json { escape_json(&serde_json::to_string_pretty(result)?) } else { sanitize(&text(result)) };
        out(text.trim_end())
    }

    /// Prints a note on standard error.
    pub fn note(self, text: &str) {
        error_line(&sanitize(text));
    }

    /// Prints one of many results: a line of JSON, or a line that a program printed, with its colours.
    ///
    /// # Errors
    /// When standard output cannot be written, for instance because the pipe is closed.
    pub fn item<T: Serialize>(self, item: &T, source: &str, text: &str) -> anyhow::Result<()> {
        let line = if self.json {
            escape_json(&serde_json::to_string(item)?)
        } else {
            format!("{} {}", sanitize_line(source), sanitize_output(text))
        };
        let mut out = std::io::stdout().lock();
        Ok(writeln!(out, "{line}").and_then(|()| out.flush())?)
    }

    /// Prints an event on standard error: a line of JSON, or text with its colours.
    pub fn event<T: Serialize>(self, event: &T, text: &str) {
        let line =
            if self.json { escape_json(&serde_json::to_string(event).unwrap_or_default()) } else { sanitize_output_lines(text) };
        error_line(&line);
    }

    /// Prints the message that ends a command: with `--json` as an error with its code, otherwise as a note.
    pub fn notify(self, failure: &Failure) {
        if self.json {
            self.report(failure);
        } else {
            self.note(&failure.to_string());
        }
    }

    /// Prints an error with `--json` only, where the result already shows it to people.
    pub fn report(self, failure: &Failure) {
        if self.json {
            self.print_report(&Report::from(failure));
        }
    }

    /// Prints an error. Returns the exit status of the process.
    pub fn fail(self, error: &anyhow::Error) -> ExitCode {
        let report = Report::from(error);
        self.print_report(&report);
        ExitCode::from(report.exit_status)
    }

    fn print_report(self, report: &Report) {
        if self.json {
            return error_line(&escape_json(&serde_json::to_string(report).unwrap_or_default()));
        }
        let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        let (red, plain) = if colour { ("\u{1b}[31m", "\u{1b}[0m") } else { ("", "") };
        error_line(&format!("{red}error:{plain} {}", sanitize(&report.text())));
    }

    /// Prints a usage error, or the help that was requested. Returns the exit status of the process.
    pub fn usage(self, error: &clap::Error) -> ExitCode {
        let status = u8::try_from(error.exit_code()).unwrap_or(2);
        let rendered = error.render();
        if self.json && error.use_stderr() {
            let text = rendered.to_string();
            let (message, hint) = text.split_once("\n\n").unwrap_or((text.as_str(), ""));
            let hint = Some(hint.trim().to_owned()).filter(|hint| !hint.is_empty());
            let message = message.trim_start_matches("error: ").trim().to_owned();
            self.print_report(&Report { code: "usage".into(), message, hint, exit_status: status, correlation_id: None });
            return ExitCode::from(status);
        }
        let plain = std::env::var_os("NO_COLOR").is_some();
        if error.use_stderr() {
            // The error repeats what was typed, so print it without control characters.
            error_line(sanitize(&rendered.to_string()).trim_end());
        } else {
            let coloured = std::io::stdout().is_terminal() && !plain;
            let text =
                if coloured { sanitize_output_lines(&rendered.ansi().to_string()) } else { sanitize(&rendered.to_string()) };
            let _ = out(text.trim_end());
        }
        ExitCode::from(status)
    }
}

/// Prints lines to standard output. A closed pipe is not an error.
fn out(text: &str) -> anyhow::Result<()> {
    match writeln!(std::io::stdout().lock(), "{text}") {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

/// Prints a line to standard error. Failures are ignored.
fn error_line(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Prints text to standard output, with or without `--json`.
///
/// # Errors
/// When standard output cannot be written.
pub fn print(text: &str) -> anyhow::Result<()> {
    out(sanitize(text).trim_end())
}

/// Prints the error that ends a role process, such as a shim.
pub fn log_error(text: &str) {
    error_line(&sanitize(text));
}

/// Prints a warning on standard error.
pub fn warn(text: &str) {
    error_line(&format!("warning: {}", sanitize(text)));
}

/// Whether standard output is a terminal.
pub fn is_stdout_terminal() -> bool {
    std::io::stdout().is_terminal()
}

/// Whether the user can be prompted: standard input and standard error are terminals.
pub fn can_prompt() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// Prompts for text.
///
/// # Errors
/// `alternative`, without a terminal: it states which option to use.
pub fn prompt(question: &str, default: Option<&str>, alternative: &str) -> anyhow::Result<String> {
    if !can_prompt() {
        bail!("{alternative}");
    }
    let (question, default) = (sanitize_line(question), default.map(sanitize_line));
    let mut prompt = inquire::Text::new(&question);
    if let Some(default) = &default {
        prompt = prompt.with_default(default);
    }
    Ok(prompt.prompt()?)
}

/// Prompts for a password without echo, twice if `confirm` is set. Without a terminal, reads a line of standard input.
///
/// # Errors
/// When none is given.
pub fn prompt_password(question: &str, confirm: bool) -> anyhow::Result<String> {
    if !can_prompt() {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line)?;
        let line = line.trim_end_matches(['\n', '\r']).to_owned();
        if line.is_empty() {
            bail!("No password given. Pipe it to standard input, or run this in a terminal.");
        }
        return Ok(line);
    }
    let question = sanitize_line(question);
    let prompt = inquire::Password::new(&question);
    Ok(if confirm { prompt.prompt()? } else { prompt.without_confirmation().prompt()? })
}

/// Prompts for an optional secret without echo. With `stdin`, reads the next line of standard input instead.
///
/// # Errors
/// When it cannot be read.
pub fn prompt_secret(question: &str, stdin: bool) -> anyhow::Result<String> {
    if stdin {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line)?;
        return Ok(line);
    }
    Ok(inquire::Password::new(&sanitize_line(question)).without_confirmation().prompt()?)
}

/// Prompts for a name to confirm an action. Returns whether it is `name`.
///
/// # Errors
/// When the prompt is aborted.
pub fn confirm_by_name(question: &str, name: &str) -> anyhow::Result<bool> {
    let question = sanitize_line(question);
    Ok(inquire::Text::new(&question).prompt()?.trim() == name)
}

/// Asks for confirmation, unless `yes` is set.
///
/// # Errors
/// Without a terminal and without `yes`.
pub fn confirm(question: &str, yes: bool) -> anyhow::Result<bool> {
    if yes {
        return Ok(true);
    }
    let question = sanitize_line(question);
    if !can_prompt() {
        bail!("{question} Use --yes to confirm.");
    }
    Ok(inquire::Confirm::new(&question).with_default(false).prompt()?)
}
