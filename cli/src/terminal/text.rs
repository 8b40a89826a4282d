//! Text that is safe to print. Names, errors, variables and output come from servers, files and programs that
//! may be hostile; a terminal obeys what is in them.

/// Whether a terminal obeys a character, or shows the text around it in another order or not at all.
fn is_dangerous(c: char) -> bool {
    c.is_control()
        || matches!(c,
            // Directions (UAX #9): marks, embeddings, overrides, isolates.
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
            // Line and paragraph separators, and what is never visible. Joiners stay: scripts and emoji take them.
            | '\u{2028}' | '\u{2029}' | '\u{200b}' | '\u{2060}'..='\u{2065}' | '\u{206a}'..='\u{206f}' | '\u{180e}'
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}')
}

/// A text of any number of lines without dangerous characters. What a control sequence has behind its first
/// character stays, as text.
pub fn clean(text: &str) -> String {
    text.chars().filter(|c| matches!(c, '\n' | '\t') || !is_dangerous(*c)).collect()
}

/// As [`clean`], on one line.
pub fn clean_line(text: &str) -> String {
    let spaced = text.trim_end_matches(['\r', '\n']).chars().map(|c| if matches!(c, '\n' | '\t') { ' ' } else { c });
    spaced.filter(|c| !is_dangerous(*c)).collect()
}

/// A line that a program of a user printed, without dangerous characters. Colours stay, and end with the line.
pub fn harmless(line: &str) -> String {
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

/// As [`harmless`], line by line.
pub fn harmless_lines(text: &str) -> String {
    text.split('\n').map(harmless).collect::<Vec<_>>().join("\n")
}

/// JSON whose strings hold no dangerous character as such: it is escaped, so nothing is lost.
pub fn escape_json(json: &str) -> String {
    let mut escaped = String::with_capacity(json.len());
    for c in json.chars() {
        // Between values JSON has no control characters but these; within strings they are escaped already.
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

/// Columns, aligned, under a heading. A row is one line, whatever its cells hold.
pub fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|cell| clean_line(cell)).collect()).collect();
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
    use super::{clean, clean_line, escape_json, harmless, table};

    #[test]
    fn only_colours_and_text_of_a_program_reach_the_terminal() {
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
            assert_eq!(harmless(line), shown, "{line:?}");
        }
    }

    #[test]
    fn no_control_character_and_no_change_of_direction_is_printed() {
        for code in (0..0x20).chain(0x7f..0xa0).chain([0x61c, 0x200b, 0x202e, 0x2028, 0x2066, 0x2069, 0xfeff, 0xe0041]) {
            let c = char::from_u32(code).expect("a character");
            let text = format!("a{c}b");
            let kept = matches!(c, '\n' | '\t');
            assert_eq!(clean(&text), if kept { text.clone() } else { "ab".into() }, "{code:x}");
            let line = clean_line(&text);
            assert!(line == "ab" || line == "a b", "{code:x}: {line:?}");
            let json = serde_json::to_string(&text).expect("JSON");
            let escaped = escape_json(&json);
            assert!(!escaped.contains(c), "{code:x}: {escaped}");
            assert_eq!(serde_json::from_str::<String>(&escaped).expect("JSON"), text, "nothing is lost");
        }
        assert_eq!(clean("\u{1b}]8;;http://x\u{1b}\\link"), "]8;;http://x\\link");
        // 👩‍💻 takes a joiner, which stays.
        assert_eq!(clean("👩\u{200d}💻 é"), "👩\u{200d}💻 é");
    }

    #[test]
    fn a_cell_cannot_begin_another_row() {
        let text =
            table(&["NAME", "VALUE"], &[vec!["A\nFAKE  row".into(), "\u{1b}[31mx\ry".into()], vec!["B".into(), "z".into()]]);
        assert_eq!(text.lines().count(), 3, "{text}");
        assert_eq!(text.lines().nth(2), Some("B            z"), "{text}");
    }
}
