//! What a person at a terminal sees, and is asked. Results go to standard output, all else to
//! standard error; with `--json`, results are JSON.

use std::io::{IsTerminal, Write};

use anyhow::bail;
use serde::Serialize;

/// How results are shown.
#[derive(Clone, Copy, Debug)]
pub struct Terminal {
    pub json: bool,
}

impl Terminal {
    /// Shows a result: as JSON, or as `text` has it for people.
    pub fn show<T: Serialize>(self, result: &T, text: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
        let text = if self.json { serde_json::to_string_pretty(result)? } else { text(result) };
        let mut out = std::io::stdout().lock();
        match writeln!(out, "{}", text.trim_end()) {
            // The reader has seen enough.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            written => Ok(written?),
        }
    }

    /// A remark on the way to a result.
    pub fn say(self, text: &str) {
        eprintln!("{text}");
    }
}

/// Whether there is somebody to ask.
pub fn can_ask() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// Asks for a text. Where nobody can be asked, `default` is taken, or `otherwise` says what to give.
pub fn ask(question: &str, default: Option<&str>, otherwise: &str) -> anyhow::Result<String> {
    if !can_ask() {
        return match default {
            Some(default) => Ok(default.into()),
            None => bail!("{otherwise}"),
        };
    }
    let mut prompt = inquire::Text::new(question);
    if let Some(default) = default {
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
    let prompt = inquire::Password::new(question);
    Ok(if again { prompt.prompt()? } else { prompt.without_confirmation().prompt()? })
}

/// Asks for a yes. Without anybody to ask, `--yes` must have been given.
pub fn confirm(question: &str, yes: bool) -> anyhow::Result<bool> {
    if yes {
        return Ok(true);
    }
    if !can_ask() {
        bail!("{question} Give --yes to say so.");
    }
    Ok(inquire::Confirm::new(question).with_default(false).prompt()?)
}

/// A line that a program of a user printed, without the control sequences that could take a terminal
/// over. Colours stay.
pub fn harmless(line: &str) -> String {
    let mut clean = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(c) = rest.chars().next() {
        if let Some(sequence) = rest.strip_prefix("\u{1b}[") {
            let end = sequence.find(|c: char| !c.is_ascii_digit() && c != ';').unwrap_or(sequence.len());
            let whole = 2 + end + usize::from(end < sequence.len());
            if sequence[end..].starts_with('m') {
                clean.push_str(&rest[..whole]);
                rest = &rest[whole..];
                continue;
            }
        }
        if c == '\t' || !c.is_control() {
            clean.push(c);
        }
        rest = &rest[c.len_utf8()..];
    }
    clean
}

/// Columns, aligned, under a heading.
pub fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = heading.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: Vec<&str>| {
        let padded = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect::<Vec<_>>();
        padded.join("  ").trim_end().to_owned()
    };
    let heading = line(heading.to_vec());
    let rows = rows.iter().map(|row| line(row.iter().map(String::as_str).collect()));
    std::iter::once(heading).chain(rows).collect::<Vec<_>>().join("\n")
}

/// An error, for people: what was wrong, then why.
pub fn complain(error: &anyhow::Error) {
    let mut text = String::new();
    for (index, cause) in error.chain().enumerate() {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text.push_str(if index == 0 { "" } else { ": " });
            text.push_str(&cause);
        }
    }
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let (red, plain) = if colour { ("\u{1b}[31m", "\u{1b}[0m") } else { ("", "") };
    eprintln!("{red}error:{plain} {text}");
}

#[cfg(test)]
mod tests {
    use super::harmless;

    #[test]
    fn only_colours_and_text_reach_the_terminal() {
        for (line, shown) in [
            ("plain\ttext – ü", "plain\ttext – ü"),
            ("\u{1b}[1;31mred\u{1b}[0m", "\u{1b}[1;31mred\u{1b}[0m"),
            ("\u{1b}[2Jcleared", "[2Jcleared"),
            ("\u{1b}]0;title\u{7}x", "]0;titlex"),
            ("back\u{8}\r\u{9b}2J", "back2J"),
            ("\u{1b}[", "["),
            ("\u{1b}[3", "[3"),
        ] {
            assert_eq!(harmless(line), shown, "{line:?}");
        }
    }
}
