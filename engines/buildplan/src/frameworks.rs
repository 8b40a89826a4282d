//! The table of frameworks (`frameworks.txt`), and how one is found.

use std::sync::LazyLock;

use crate::dependencies::{Dependencies, Dependency};
use crate::plan::{Plan, Source};
use crate::tree::Repo;

/// What kind of thing a framework makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// Pages made by a server.
    Ssr,
    Web,
    Api,
    Worker,
    /// Files, of which unknown paths get `index.html`.
    Spa,
    /// Files.
    Site,
    /// No application by itself.
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
    /// Alternatives, each of which takes all of its parts.
    pub signs: Vec<Vec<&'static str>>,
    pub kind: Type,
    pub start: Option<&'static str>,
    pub output: Option<&'static str>,
    pub port: Option<u16>,
    /// Folders that a next build of the same application is quicker with.
    pub kept: Vec<&'static str>,
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
            kept: cell().split_whitespace().collect(),
        });
    }
    rows
});

/// The folders of a plan's application that a next build of it is quicker with. They hold nothing that the
/// application itself needs.
#[must_use]
pub fn kept(plan: &Plan) -> Vec<&'static str> {
    // Where a build of JavaScript is, its tools keep what they may use again there.
    let usual = plan.build.build.is_some() && plan.detection.languages.iter().any(|language| language == "javascript");
    let framework = TABLE.iter().find(|row| Some(row.name) == plan.detection.framework.as_deref());
    usual.then_some("node_modules/.cache").into_iter().chain(framework.iter().flat_map(|row| row.kept.iter().copied())).collect()
}

/// A framework, and what gave it away.
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

/// The first framework of a language that is there.
pub fn find(language: &str, dependencies: &Dependencies, repo: &Repo<'_>) -> Option<Found> {
    let of_language = TABLE.iter().filter(|row| row.language == language);
    let found = of_language.flat_map(|row| row.signs.iter().map(move |sign| (row, sign))).find_map(|(framework, parts)| {
        let (mut at, mut all) = (None, true);
        for part in parts {
            let (wanted, part) = part.strip_prefix('!').map_or((true, *part), |part| (false, part));
            let there = look(part, dependencies, repo);
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

/// Where one part of a sign is, and how that is told.
fn look(part: &str, dependencies: &Dependencies, repo: &Repo<'_>) -> Option<(String, Option<usize>, String)> {
    if let Some(path) = part.strip_prefix("file:") {
        let there = repo.has(path) || repo.has_folder(path);
        return there.then(|| (path.to_owned(), None, format!("{path} is there")));
    }
    let Dependency { name, file, line, .. } = dependencies.find(part)?;
    Some((file.clone(), *line, format!("dependency \"{name}\"")))
}
