//! Limits the length of texts that contain input of clients or files.

/// The largest length of a text in a reply, a database or a log, in bytes.
pub const MAX_TEXT_BYTES: usize = 2000;

/// Truncates a text to [`MAX_TEXT_BYTES`], with `…` at its end.
#[must_use]
pub fn truncated(mut text: String) -> String {
    if text.len() > MAX_TEXT_BYTES {
        text.truncate(text.floor_char_boundary(MAX_TEXT_BYTES));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{MAX_TEXT_BYTES, truncated};
    use crate::Problem;

    #[test]
    fn long_texts_are_truncated_between_characters() {
        assert_eq!(truncated("short".into()), "short");
        let cut = truncated("é".repeat(MAX_TEXT_BYTES));
        assert!(cut.len() <= MAX_TEXT_BYTES + 3 && cut.ends_with("é…"));
    }

    #[test]
    fn every_problem_has_a_limited_length() {
        let name = "n".repeat(64 << 20);
        for problem in [
            Problem::bad_request(name.clone()),
            Problem::invalid_field("name", name.clone()),
            Problem::conflict("x").hint(name.clone()),
            Problem::not_found(&name),
        ] {
            let size = serde_json::to_string(&problem).expect("JSON").len();
            assert!(size < 3 * MAX_TEXT_BYTES + 500, "{size}");
        }
    }
}
