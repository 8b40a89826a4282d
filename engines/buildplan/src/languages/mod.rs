//! One module per language. Each looks for its own marker files and says what it found.

mod go;
mod java;
mod node;
mod python;
mod rust;
mod sites;

use crate::plan::{Draft, PlanError};
use crate::tree::Tree;

/// A language's detector: whether its files are there, and what they mean.
struct Language {
    name: &'static str,
    is_there: fn(&dyn Tree) -> Option<&'static str>,
    detect: fn(&dyn Tree, &mut Draft) -> Result<(), PlanError>,
}

/// In the order in which they are preferred where several are there.
const LANGUAGES: [Language; 6] = [
    Language { name: "python", is_there: python::is_there, detect: python::detect },
    Language { name: "go", is_there: |tree| first_of(tree, &[go::FILE]), detect: go::detect },
    Language { name: "rust", is_there: |tree| first_of(tree, &[rust::FILE]), detect: rust::detect },
    Language { name: "java", is_there: |tree| first_of(tree, &[java::FILE]), detect: java::detect },
    Language { name: "javascript", is_there: |tree| first_of(tree, &[node::FILE]), detect: node::detect },
    Language { name: "static", is_there: sites::is_there, detect: sites::detect },
];

/// Detects the language that the main process is written in; others that are there become a question.
pub fn detect(tree: &dyn Tree, draft: &mut Draft) -> Result<(), PlanError> {
    let mut there: Vec<(&Language, &str)> =
        LANGUAGES.iter().filter_map(|language| (language.is_there)(tree).map(|file| (language, file))).collect();
    // A page beside a program belongs to the program.
    if there.len() > 1 {
        there.retain(|(language, _)| language.name != "static");
    }
    let Some((main, _)) = there.first() else {
        return Ok(());
    };
    (main.detect)(tree, draft)?;
    let others: Vec<&str> = there.iter().skip(1).map(|(language, _)| language.name).collect();
    if !others.is_empty() {
        draft.plan.detection.languages.extend(others.iter().map(|&name| name.to_owned()));
        let files: Vec<&str> = there.iter().map(|(_, file)| *file).collect();
        draft.ask(
            "processes.web",
            &format!("several languages are here ({}); {} was taken for the main one", files.join(", "), main.name),
            "[processes]\nweb = \"the command that starts it\"",
        );
    }
    Ok(())
}

/// A file that decides: it is there, and must be text.
fn required(tree: &dyn Tree, file: &str) -> Result<String, PlanError> {
    tree.read(file).ok_or_else(|| PlanError { file: file.into(), line: None, message: "it cannot be read as text".into() })
}

/// A TOML file that decides.
fn toml_table(file: &str, text: &str) -> Result<toml::Table, PlanError> {
    text.parse().map_err(|error: toml::de::Error| PlanError {
        message: format!("it is not valid TOML: {}", error.message()),
        ..PlanError::toml(file, text, &error)
    })
}

/// The first of these files that is there.
fn first_of(tree: &dyn Tree, files: &[&'static str]) -> Option<&'static str> {
    files.iter().copied().find(|file| tree.has(file))
}
