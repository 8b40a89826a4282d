//! The table of frameworks (`frameworks.txt`), and their detection.

use std::sync::LazyLock;

use crate::dependencies::{Dependencies, Dependency};
use crate::plan::{Plan, Source};
use crate::tree::Repo;

/// What a framework makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// Pages made by a server.
    Ssr,
    Web,
    Api,
    Worker,
    /// Static files, with `index.html` for unknown paths.
    Spa,
    /// Static files.
    Site,
    /// Not an application by itself.
    Tool,
}

impl Type {
    fn parse(word: &str) -> Self {
        match word {
            "ssr" => Self::Ssr,
            "web" => Self::Web,
            "api" => Self::Api,
            "worker" => Self::Worker,
            "spa" => Self::Spa,
            "site" => Self::Site,
            _ => Self::Tool,
        }
    }

    /// Whether what it makes is served as files.
    pub fn is_files(self) -> bool {
        matches!(self, Self::Spa | Self::Site)
    }
}

/// A row of the table.
#[derive(Clone, Debug)]
pub struct Framework {
    pub language: &'static str,
    pub name: &'static str,
    pub title: &'static str,
    /// Alternative signs. Each matches if all of its parts do.
    pub signs: Vec<Vec<&'static str>>,
    pub kind: Type,
    pub start: Option<&'static str>,
    pub output: Option<&'static str>,
    pub port: Option<u16>,
    /// Folders that make the next build of the application faster.
    pub cache_folders: Vec<&'static str>,
}

/// All rows, in their order.
pub static TABLE: LazyLock<Vec<Framework>> = LazyLock::new(|| {
    let (mut rows, mut language) = (Vec::new(), "");
    for line in include_str!("frameworks.txt").lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(name) = line.strip_prefix('[') {
            language = name.trim_end_matches(']');
            continue;
        }
        let mut cells = line.split('|').chain(std::iter::repeat("")).map(str::trim);
        let mut cell = || cells.next().unwrap_or_default();
        let given = |text: &'static str| Some(text).filter(|text| !text.is_empty());
        rows.push(Framework {
            language,
            name: cell(),
            title: cell(),
            signs: cell().split_whitespace().map(|sign| sign.split('+').collect()).collect(),
            kind: Type::parse(cell()),
            start: given(cell()),
            output: given(cell()),
            port: cell().parse().ok(),
            cache_folders: cell().split_whitespace().collect(),
        });
    }
    rows
});

/// The folders of an application to keep for its next build, which they make faster. The application itself does not need
/// them.
#[must_use]
pub fn build_cache_folders(plan: &Plan) -> Vec<&'static str> {
    // Build tools of JavaScript keep their caches there.
    let usual = plan.build.build.is_some() && plan.detection.languages.iter().any(|language| language == "javascript");
    let framework = TABLE.iter().find(|row| Some(row.name) == plan.detection.framework.as_deref());
    usual
        .then_some("node_modules/.cache")
        .into_iter()
        .chain(framework.iter().flat_map(|row| row.cache_folders.iter().copied()))
        .collect()
}

/// A detected framework, with its evidence.
#[derive(Clone, Debug)]
pub struct Found {
    pub framework: &'static Framework,
    pub file: String,
    pub line: Option<usize>,
    pub reason: String,
}

impl Found {
    pub fn source(&self) -> Source<'_> {
        Source { file: &self.file, line: self.line }
    }
}

/// Detects the first framework of a language whose signs match.
pub fn find(language: &str, dependencies: &Dependencies, repo: &Repo<'_>) -> Option<Found> {
    let of_language = TABLE.iter().filter(|row| row.language == language);
    let found = of_language.flat_map(|row| row.signs.iter().map(move |sign| (row, sign))).find_map(|(framework, parts)| {
        let (mut at, mut all) = (None, true);
        for part in parts {
            let (wanted, part) = part.strip_prefix('!').map_or((true, *part), |part| (false, part));
            let there = find_sign(part, dependencies, repo);
            all &= there.is_some() == wanted;
            if wanted && at.is_none() {
                at = there;
            }
        }
        all.then_some((framework, at?))
    });
    let (framework, (file, line, reason)) = found?;
    Some(Found { framework, file, line, reason })
}

/// Finds one part of a sign: file, line and reason.
fn find_sign(part: &str, dependencies: &Dependencies, repo: &Repo<'_>) -> Option<(String, Option<usize>, String)> {
    if let Some(path) = part.strip_prefix("file:") {
        let there = repo.has(path) || repo.has_folder(path);
        return there.then(|| (path.to_owned(), None, format!("{path} exists")));
    }
    let Dependency { name, file, line, .. } = dependencies.find(part)?;
    Some((file.clone(), *line, format!("dependency \"{name}\"")))
}
