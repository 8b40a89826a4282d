//! The dependencies in manifests, with their lines, and the services and system packages that they imply (tables
//! `needs.txt` and `packages.txt`).

use std::sync::LazyLock;

use crate::plan::{Draft, Source};

/// Dependencies of a repository that are read.
const MAX_DEPENDENCIES: usize = 20_000;
/// Bytes of a name. Longer names are ignored.
const MAX_NAME_BYTES: usize = 256;

/// One dependency.
#[derive(Clone, Debug)]
pub struct Dependency {
    pub name: String,
    pub file: String,
    pub line: Option<usize>,
}

/// All dependencies.
#[derive(Clone, Debug, Default)]
pub struct Dependencies(pub Vec<Dependency>);

impl Dependencies {
    /// Adds a dependency, within the limits.
    pub fn add(&mut self, name: &str, file: &str, line: Option<usize>) {
        if self.0.len() >= MAX_DEPENDENCIES || name.len() > MAX_NAME_BYTES {
            return;
        }
        self.0.push(Dependency { name: name.to_owned(), file: file.to_owned(), line });
    }

    /// The dependency of this name: as it is, its part before a `/` or `:`, or its part behind a `:`.
    /// Capitals do not matter.
    pub fn find(&self, name: &str) -> Option<&Dependency> {
        let fits = |known: &str| match known.len().checked_sub(name.len()) {
            None => false,
            Some(0) => known.eq_ignore_ascii_case(name),
            Some(more) => {
                let begins = known.is_char_boundary(name.len())
                    && matches!(known.as_bytes()[name.len()], b'/' | b':')
                    && known[..name.len()].eq_ignore_ascii_case(name);
                let ends = known.is_char_boundary(more)
                    && known.as_bytes()[more - 1] == b':'
                    && known[more..].eq_ignore_ascii_case(name);
                begins || ends
            }
        };
        self.0.iter().find(|dependency| fits(&dependency.name))
    }

    /// Whether there is a dependency of this name.
    pub fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// Adds the services and system packages that the dependencies imply.
    pub fn conclude(&self, language: &str, draft: &mut Draft) {
        for (table, is_need) in [(&*NEEDS, true), (&*PACKAGES, false)] {
            for row in table.iter().filter(|row| row.language == language) {
                let Some(found) = row.names.iter().find_map(|name| self.find(name)) else { continue };
                let source = Source { file: &found.file, line: found.line };
                let reason = format!("dependency \"{}\"", found.name);
                for follows in &row.follows {
                    if is_need {
                        draft.need(follows, source, &reason);
                    } else {
                        draft.system_package(follows, source, &reason);
                    }
                }
            }
        }
    }
}

/// Any of these names implies all of these items.
struct Row {
    language: &'static str,
    names: Vec<&'static str>,
    follows: Vec<&'static str>,
}

static NEEDS: LazyLock<Vec<Row>> = LazyLock::new(|| rows(include_str!("needs.txt")));
static PACKAGES: LazyLock<Vec<Row>> = LazyLock::new(|| rows(include_str!("packages.txt")));

fn rows(text: &'static str) -> Vec<Row> {
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .filter_map(|line| {
            let mut cells = line.split('|').map(str::trim);
            let language = cells.next()?;
            let names = cells.next()?.split_whitespace().collect();
            Some(Row { language, names, follows: cells.next()?.split_whitespace().collect() })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{Dependencies, NEEDS, PACKAGES};

    #[test]
    fn names_are_found_whole_or_by_a_part() {
        let mut all = Dependencies::default();
        for name in ["github.com/labstack/echo/v4", "org.springframework.boot:spring-boot-starter-web", "Flask"] {
            all.add(name, "f", None);
        }
        for there in ["github.com/labstack/echo", "org.springframework.boot", "spring-boot-starter-web", "flask"] {
            assert!(all.has(there), "{there}");
        }
        for other in ["github.com/labstack/ech", "boot", "echo", "flas", "flask-login"] {
            assert!(!all.has(other), "{other}");
        }
    }

    #[test]
    fn the_tables_are_complete() {
        for row in NEEDS.iter().chain(PACKAGES.iter()) {
            assert!(!row.names.is_empty() && !row.follows.is_empty(), "{}: {:?}", row.language, row.names);
        }
    }
}
