//! Named values in SQL, checked and numbered at compile time.
//!
//! `:name` stands for a value, `:tenant` for the organization of the grant, and `:columns` for the columns of the row
//! type. Quoted text and casts (`::int`) are not names.

/// Stands for the columns of the row type. Replaced when the statement runs.
pub const COLUMNS: &str = ":columns";

/// The length of the statement in bytes, once names are numbers. Panics, at compile time, unless `sql` contains exactly
/// these names.
#[must_use]
pub const fn length(sql: &str, names: &[&str]) -> usize {
    let bytes = sql.as_bytes();
    let mut used = [false; 64];
    assert!(names.len() <= used.len(), "a statement has at most 64 values");
    let (mut at, mut length) = (0, bytes.len());
    while let Some((start, end)) = next(bytes, at) {
        if !is_word(bytes, start, end, COLUMNS.as_bytes()) {
            let Some(index) = position(names, bytes, start, end) else {
                panic!("the statement contains a name without a value");
            };
            used[index] = true;
            length = length - (end - start) + 1 + digits(index + 1);
        }
        at = end;
    }
    let mut index = 0;
    while index < names.len() {
        if !used[index] {
            if equal(names[index].as_bytes(), b"tenant") {
                panic!("a statement on tenant data must contain :tenant");
            }
            panic!("the statement does not contain the name of a value");
        }
        index += 1;
    }
    length
}

/// Replaces each name by its number after `marker`: `?1` for `SQLite`, `$1` for `PostgreSQL`.
#[must_use]
pub const fn number<const LENGTH: usize>(marker: u8, sql: &str, names: &[&str]) -> [u8; LENGTH] {
    let bytes = sql.as_bytes();
    let mut text = [0; LENGTH];
    let (mut from, mut at, mut to) = (0, 0, 0);
    loop {
        let (start, end) = match next(bytes, at) {
            Some(word) => word,
            None => (bytes.len(), bytes.len()),
        };
        let is_columns = is_word(bytes, start, end, COLUMNS.as_bytes());
        while from < if is_columns { end } else { start } {
            text[to] = bytes[from];
            from += 1;
            to += 1;
        }
        if start == bytes.len() {
            return text;
        }
        if !is_columns {
            let Some(index) = position(names, bytes, start, end) else {
                panic!("the statement contains a name without a value");
            };
            let number = index as u8 + 1;
            text[to] = marker;
            to += 1;
            if number >= 10 {
                text[to] = b'0' + number / 10;
                to += 1;
            }
            text[to] = b'0' + number % 10;
            to += 1;
        }
        (from, at) = (end, end);
    }
}

/// The result of [`number`] as text.
#[must_use]
pub const fn text(bytes: &[u8]) -> &str {
    match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(_) => panic!("names are replaced as a whole"),
    }
}

/// The start (its colon) and the end of the first `:name` at or after `at`.
const fn next(sql: &[u8], mut at: usize) -> Option<(usize, usize)> {
    while at < sql.len() {
        match sql[at] {
            quote @ (b'\'' | b'"') => {
                at += 1;
                while at < sql.len() && sql[at] != quote {
                    at += 1;
                }
                at += 1;
            }
            b':' if at + 1 < sql.len() && sql[at + 1] == b':' => at += 2,
            b':' if at + 1 < sql.len() && (sql[at + 1].is_ascii_alphabetic() || sql[at + 1] == b'_') => {
                let mut end = at + 1;
                while end < sql.len() && (sql[end].is_ascii_alphanumeric() || sql[end] == b'_') {
                    end += 1;
                }
                return Some((at, end));
            }
            b'$' | b'?' => panic!("values have names, such as `:id`, not numbers"),
            _ => at += 1,
        }
    }
    None
}

/// The index of the name that `sql[start..end]` is, without its colon.
const fn position(names: &[&str], sql: &[u8], start: usize, end: usize) -> Option<usize> {
    let mut index = 0;
    while index < names.len() {
        if is_word(sql, start + 1, end, names[index].as_bytes()) {
            return Some(index);
        }
        index += 1;
    }
    None
}

const fn is_word(sql: &[u8], start: usize, end: usize, word: &[u8]) -> bool {
    if end < start || end - start != word.len() {
        return false;
    }
    let mut at = 0;
    while at < word.len() {
        if sql[start + at] != word[at] {
            return false;
        }
        at += 1;
    }
    true
}

const fn equal(one: &[u8], other: &[u8]) -> bool {
    is_word(one, 0, one.len(), other)
}

const fn digits(number: usize) -> usize {
    if number < 10 { 1 } else { 2 }
}

#[cfg(test)]
mod tests {
    use super::{length, number, text};

    #[test]
    fn names_become_numbers_outside_of_quotes_and_casts() {
        const SQL: &str =
            "SELECT :columns, ':x''\"', \":y\" FROM t WHERE a = :a AND b::int = :a AND c = :long_name AND d[1:2] = :j";
        const NAMES: &[&str] = &["long_name", "a", "c", "d", "e", "f", "g", "h", "i", "j"];
        const USED: &[&str] = &["long_name", "a", "j"];
        const LENGTH: usize = length(SQL, USED);
        assert_eq!(
            text(&number::<LENGTH>(b'?', SQL, USED)),
            "SELECT :columns, ':x''\"', \":y\" FROM t WHERE a = ?2 AND b::int = ?2 AND c = ?1 AND d[1:2] = ?3"
        );
        assert!(std::panic::catch_unwind(|| length(SQL, NAMES)).is_err(), "a surplus name");
        assert!(std::panic::catch_unwind(|| length(SQL, &["a"])).is_err(), "a missing name");
        assert!(std::panic::catch_unwind(|| length("SELECT $1", &[])).is_err(), "a number");
        const MANY: &str = ":a :b :c :d :e :f :g :h :i :j :k";
        const LETTERS: &[&str] = &["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k"];
        const MANY_LENGTH: usize = length(MANY, LETTERS);
        assert_eq!(text(&number::<MANY_LENGTH>(b'$', MANY, LETTERS)), "$1 $2 $3 $4 $5 $6 $7 $8 $9 $10 $11");
        assert_eq!(text(&number::<0>(b'$', "", &[])), "");
    }
}
