//! What a person at a terminal sees, and is asked. Results go to standard output, all else to standard error;
//! with `--json`, results are JSON on standard output, and an error is one JSON object on the last line of
//! standard error. This is the only place that prints: whatever it prints cannot take the terminal over.
#![expect(clippy::disallowed_methods, reason = "this is the one place that prints and asks")]

mod failure;
mod progress;
mod text;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use anyhow::bail;
use serde::Serialize;

pub use failure::{Failure, Report};
pub use progress::{Progress, bytes};
pub use text::table;
use text::{clean, clean_line, escape_json, harmless, harmless_lines};

/// How results are shown.
#[derive(Clone, Copy, Debug)]
pub struct Terminal {
    pub json: bool,
}

impl Terminal {
    /// Shows a result: as JSON, or as `text` has it for people.
    pub fn show<T: Serialize>(self, result: &T, text: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
        let text = if self.json { escape_json(&serde_json::to_string_pretty(result)?) } else { clean(&text(result)) };
        out(text.trim_end())
    }

    /// A remark on the way to a result.
    pub fn say(self, text: &str) {
        error_line(&clean(text));
    }

    /// One of many results, as soon as it is there: a line of JSON, or what a program printed, with its colours.
    /// Fails when nobody reads any more.
    pub fn item<T: Serialize>(self, item: &T, source: &str, text: &str) -> anyhow::Result<()> {
        let line = if self.json {
            escape_json(&serde_json::to_string(item)?)
        } else {
            format!("{} {}", clean_line(source), harmless(text))
        };
        let mut out = std::io::stdout().lock();
        Ok(writeln!(out, "{line}").and_then(|()| out.flush())?)
    }

    /// What happens meanwhile: a line of JSON, or of text with its colours, on standard error.
    pub fn event<T: Serialize>(self, event: &T, text: &str) {
        let line = if self.json { escape_json(&serde_json::to_string(event).unwrap_or_default()) } else { harmless_lines(text) };
        error_line(&line);
    }

    /// A remark that ends the command: for programs an error with its code.
    pub fn tell(self, failure: &Failure) {
        if self.json {
            self.report(failure);
        } else {
            self.say(&failure.to_string());
        }
    }

    /// Tells a program why the command fails, where people see it in the result.
    pub fn report(self, failure: &Failure) {
        if self.json {
            self.print_report(&Report::from(failure));
        }
    }

    /// An error; returns what the process ends with.
    pub fn complain(self, error: &anyhow::Error) -> ExitCode {
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
        error_line(&format!("{red}error:{plain} {}", clean(&report.text())));
    }

    /// A command line that was not understood, or a page of help; returns what the process ends with.
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
            // It repeats what was typed: only its text is printed.
            error_line(clean(&rendered.to_string()).trim_end());
        } else {
            let coloured = std::io::stdout().is_terminal() && !plain;
            let text = if coloured { harmless_lines(&rendered.ansi().to_string()) } else { clean(&rendered.to_string()) };
            let _ = out(text.trim_end());
        }
        ExitCode::from(status)
    }
}

/// Prints lines to standard output. That the reader has seen enough is no error.
fn out(text: &str) -> anyhow::Result<()> {
    match writeln!(std::io::stdout().lock(), "{text}") {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

/// A closed standard error is no reason to fail.
fn error_line(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Prints a text for people or shells, whatever `--json` says.
pub fn print(text: &str) -> anyhow::Result<()> {
    out(clean(text).trim_end())
}

/// Tells why a process that is not a command ends.
pub fn log_error(text: &str) {
    error_line(&clean(text));
}

/// Tells a person of a danger.
pub fn warn(text: &str) {
    error_line(&format!("warning: {}", clean(text)));
}

/// Whether a person sees standard output.
pub fn is_watched() -> bool {
    std::io::stdout().is_terminal()
}

/// Whether there is somebody to ask.
pub fn can_ask() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// Asks for a text. Where nobody can be asked, `otherwise` says what to give.
pub fn ask(question: &str, default: Option<&str>, otherwise: &str) -> anyhow::Result<String> {
    if !can_ask() {
        bail!("{otherwise}");
    }
    let (question, default) = (clean_line(question), default.map(clean_line));
    let mut prompt = inquire::Text::new(&question);
    if let Some(default) = &default {
        prompt = prompt.with_default(default);
    }
    Ok(prompt.prompt()?)
}

/// Asks for a password, which is not shown; from a pipe, a line is read.
pub fn ask_password(question: &str, again: bool) -> anyhow::Result<String> {
    if !can_ask() {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line)?;
        let line = line.trim_end_matches(['\n', '\r']).to_owned();
        if line.is_empty() {
            bail!("no password was given; pipe it in, or run this at a terminal");
        }
        return Ok(line);
    }
    let question = clean_line(question);
    let prompt = inquire::Password::new(&question);
    Ok(if again { prompt.prompt()? } else { prompt.without_confirmation().prompt()? })
}

/// Asks for a secret that may be left out; with `stdin`, the next line of standard input is it.
pub fn ask_secret(question: &str, stdin: bool) -> anyhow::Result<String> {
    if stdin {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line)?;
        return Ok(line);
    }
    Ok(inquire::Password::new(&clean_line(question)).without_confirmation().prompt()?)
}

/// Asks for a name to be typed; says whether it was this one.
pub fn type_name(question: &str, name: &str) -> anyhow::Result<bool> {
    let question = clean_line(question);
    Ok(inquire::Text::new(&question).prompt()?.trim() == name)
}

/// Asks for a yes. Without anybody to ask, `--yes` must have been given.
pub fn confirm(question: &str, yes: bool) -> anyhow::Result<bool> {
    if yes {
        return Ok(true);
    }
    let question = clean_line(question);
    if !can_ask() {
        bail!("{question} Give --yes to confirm.");
    }
    Ok(inquire::Confirm::new(&question).with_default(false).prompt()?)
}
