//! Makes text safe to print. Names, errors, variables and output come from servers, files and programs that may be
//! hostile, and a terminal executes control characters in them.

/// Whether a character controls the terminal, is invisible, or changes the order of the text around it.
fn is_dangerous(c: char) -> bool {
    c.is_control()
        || matches!(c,
            // Directions (UAX #9): marks, embeddings, overrides, isolates.
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
            // Line and paragraph separators, and invisible characters. Joiners stay: scripts and emoji need them.
            | '\u{2028}' | '\u{2029}' | '\u{200b}' | '\u{2060}'..='\u{2065}' | '\u{206a}'..='\u{206f}' | '\u{180e}'
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}')
}

/// Removes dangerous characters from text of any number of lines. The rest of a control sequence stays, as text.
pub fn sanitize(text: &str) -> String {
    text.chars().filter(|c| matches!(c, '\n' | '\t') || !is_dangerous(*c)).collect()
}

/// Like [`sanitize`], and joins the lines with spaces.
pub fn sanitize_line(text: &str) -> String {
    let spaced = text.trim_end_matches(['\r', '\n']).chars().map(|c| if matches!(c, '\n' | '\t') { ' ' } else { c });
    spaced.filter(|c| !is_dangerous(*c)).collect()
}

/// Removes dangerous characters from a line that a user's program printed. Colours stay, and are reset at the end.
pub fn sanitize_output(line: &str) -> String {
    let mut clean = String::with_capacity(line.len());
    let mut rest = line;
    let mut is_coloured = false;
    while let Some(c) = rest.chars().next() {
        if let Some(sequence) = rest.strip_prefix("\u{1b}[") {
            let end = sequence.find(|c: char| !c.is_ascii_digit() && c != ';').unwrap_or(sequence.len());
            let whole = 2 + end + usize::from(end < sequence.len());
            if sequence[end..].starts_with('m') {
                clean.push_str(&rest[..whole]);
                is_coloured = !matches!(&sequence[..end], "" | "0");
                rest = &rest[whole..];
                continue;
            }
        }
        if c == '\t' || !is_dangerous(c) {
            clean.push(c);
        }
        rest = &rest[c.len_utf8()..];
    }
    if is_coloured {
        clean.push_str("\u{1b}[0m");
    }
    clean
}

/// Like [`sanitize_output`], for each line.
pub fn sanitize_output_lines(text: &str) -> String {
    text.split('\n').map(sanitize_output).collect::<Vec<_>>().join("\n")
}

/// Escapes dangerous characters in the strings of a JSON text. The values do not change.
pub fn escape_json(json: &str) -> String {
    let mut escaped = String::with_capacity(json.len());
    for c in json.chars() {
        // JSON has these control characters only between values; in strings they are escaped already.
        if matches!(c, '\n' | '\t') || !is_dangerous(c) {
            escaped.push(c);
        } else {
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                escaped.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    escaped
}

/// A number with its noun: `1 secret`, `2 secrets`.
pub fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// A table with aligned columns and a heading. Each row is one line, whatever its cells contain.
pub fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|cell| sanitize_line(cell)).collect()).collect();
    let mut widths: Vec<usize> = heading.iter().map(|cell| cell.chars().count()).collect();
    for row in &rows {
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

#[cfg(test)]
mod tests {
    use super::{escape_json, sanitize, sanitize_line, sanitize_output, table};

    #[test]
    fn only_text_and_colours_of_a_program_are_printed() {
        for (line, shown) in [
            ("plain\ttext – ü", "plain\ttext – ü"),
            ("\u{1b}[1;31mred\u{1b}[0m", "\u{1b}[1;31mred\u{1b}[0m"),
            ("\u{1b}[2Jcleared", "[2Jcleared"),
            ("\u{1b}]0;title\u{7}x", "]0;titlex"),
            ("back\u{8}\r\u{9b}2J", "back2J"),
            ("\u{1b}[", "["),
            ("\u{1b}[3", "[3"),
            ("\u{1b}[8mhidden", "\u{1b}[8mhidden\u{1b}[0m"),
            ("a\u{202e}b", "ab"),
        ] {
            assert_eq!(sanitize_output(line), shown, "{line:?}");
        }
    }

    #[test]
    fn control_characters_and_changes_of_direction_are_not_printed() {
        for code in (0..0x20).chain(0x7f..0xa0).chain([0x61c, 0x200b, 0x202e, 0x2028, 0x2066, 0x2069, 0xfeff, 0xe0041]) {
            let c = char::from_u32(code).expect("a character");
            let text = format!("a{c}b");
            let kept = matches!(c, '\n' | '\t');
            assert_eq!(sanitize(&text), if kept { text.clone() } else { "ab".into() }, "{code:x}");
            let line = sanitize_line(&text);
            assert!(line == "ab" || line == "a b", "{code:x}: {line:?}");
            let json = serde_json::to_string(&text).expect("JSON");
            let escaped = escape_json(&json);
            assert!(!escaped.contains(c), "{code:x}: {escaped}");
            assert_eq!(serde_json::from_str::<String>(&escaped).expect("JSON"), text, "nothing is lost");
        }
        assert_eq!(sanitize("\u{1b}]8;;http://x\u{1b}\\link"), "]8;;http://x\\link");
        // 👩‍💻 contains a joiner, which stays.
        assert_eq!(sanitize("👩\u{200d}💻 é"), "👩\u{200d}💻 é");
    }

    #[test]
    fn a_cell_cannot_start_another_row() {
        let text =
            table(&["NAME", "VALUE"], &[vec!["A\nFAKE  row".into(), "\u{1b}[31mx\ry".into()], vec!["B".into(), "z".into()]]);
        assert_eq!(text.lines().count(), 3, "{text}");
        assert_eq!(text.lines().nth(2), Some("B            z"), "{text}");
    }
}
