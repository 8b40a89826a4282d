//! Suggests known names for an unknown one.

use strsim::{damerau_levenshtein, jaro_winkler};

/// The known names that are near `name`, nearest first: within a third of its letters by edit distance, or beginning
/// with it.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let folded = name.to_lowercase();
    let max_distance = (folded.chars().count() / 3).max(1);
    let mut near: Vec<(usize, &str)> = known
        .into_iter()
        .filter_map(|known| {
            let distance = damerau_levenshtein(&folded, &known.to_lowercase());
            let is_prefix = folded.chars().count() >= 3 && known.to_lowercase().starts_with(&folded);
            (distance <= max_distance || is_prefix).then_some((distance, known))
        })
        .collect();
    let similarity = |known: &str| jaro_winkler(&folded, known);
    near.sort_by(|a, b| a.0.cmp(&b.0).then(similarity(b.1).total_cmp(&similarity(a.1))).then(a.1.cmp(b.1)));
    near.into_iter().map(|(_, known)| known).collect()
}

/// ` Did you mean …?` with the nearest name, or an empty string if none is near.
pub fn did_you_mean<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    nearest(name, known).first().map_or_else(String::new, |near| format!(" Did you mean {near}?"))
}

#[cfg(test)]
mod tests {
    use super::{did_you_mean, nearest};

    #[test]
    fn a_typo_finds_the_nearest_name_and_another_word_finds_nothing() {
        let environments = ["production", "staging", "dev"];
        for (typed, expected) in [
            ("prdouction", "production"),
            ("productoin", "production"),
            ("prod", "production"),
            ("stagign", "staging"),
            ("Staging", "staging"),
            ("dve", "dev"),
        ] {
            assert_eq!(nearest(typed, environments).first(), Some(&expected), "{typed}");
        }
        assert!(nearest("customers", environments).is_empty());
        assert_eq!(did_you_mean("prdouction", environments), " Did you mean production?");
        assert_eq!(did_you_mean("x", []), "");
    }
}
