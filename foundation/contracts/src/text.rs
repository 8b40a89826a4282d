//! Texts that may hold what a client or a file gave: names and lines of any length.

/// Bytes of a text that is answered, stored or logged for people to read.
pub const MOST_TEXT: usize = 2000;

/// A text for people, cut at a length that they read.
#[must_use]
pub fn shortened(mut text: String) -> String {
    if text.len() > MOST_TEXT {
        text.truncate(text.floor_char_boundary(MOST_TEXT));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{MOST_TEXT, shortened};
    use crate::Problem;

    #[test]
    fn long_texts_are_cut_between_characters() {
        assert_eq!(shortened("short".into()), "short");
        let cut = shortened("é".repeat(MOST_TEXT));
        assert!(cut.len() <= MOST_TEXT + 3 && cut.ends_with("é…"));
    }

    #[test]
    fn no_problem_is_longer_than_people_read() {
        let name = "n".repeat(64 << 20);
        for problem in [
            Problem::bad_request(name.clone()),
            Problem::invalid_field("name", name.clone()),
            Problem::conflict("x").hint(name.clone()),
            Problem::not_found(&name),
        ] {
            let size = serde_json::to_string(&problem).expect("JSON").len();
            assert!(size < 3 * MOST_TEXT + 500, "{size}");
        }
    }
}
