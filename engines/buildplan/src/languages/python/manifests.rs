//! What manifests of Python ask for: requirements files, `pyproject.toml`, `setup.py`, conda's environments.

use super::super::Pin;
use super::{CONDA, PYPROJECT};
use crate::dependencies::Dependencies;
use crate::tree::{Repo, line_of};

/// Names compare as PEP 503 says.
pub fn normal(name: &str) -> String {
    name.trim().to_lowercase().replace('_', "-")
}

/// One line of a requirements file.
pub fn requirement(all: &mut Dependencies, line: &str, file: &str, number: Option<usize>) {
    if line.is_empty() || line.starts_with(['#', '-', '.', '/']) {
        return;
    }
    let end = line.find(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))).unwrap_or(line.len());
    let name = &line[..end];
    if name.is_empty() || name.contains("://") {
        return;
    }
    all.add(&normal(name), file, number);
}

/// What `pyproject.toml` asks for, in any of its dialects.
pub fn declared(table: &toml::Table, text: &str, all: &mut Dependencies) {
    let at = |name: &str| {
        line_of(text, &format!("\"{name}")).or_else(|| line_of(text, &format!("'{name}"))).or_else(|| line_of(text, name))
    };
    let lists = [table.get("project").and_then(|project| project.get("dependencies"))].into_iter().flatten();
    for item in lists.filter_map(toml::Value::as_array).flatten().filter_map(toml::Value::as_str) {
        let name = item.split(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))).next().unwrap_or_default();
        requirement(all, item, PYPROJECT, at(name));
    }
    let poetry = table.get("tool").and_then(|tool| tool.get("poetry")?.get("dependencies")?.as_table());
    for name in poetry.into_iter().flat_map(|all| all.keys()).filter(|name| *name != "python") {
        all.add(&normal(name), PYPROJECT, at(name));
    }
    let optional = table.get("project").and_then(|project| project.get("optional-dependencies")?.as_table());
    for (group, items) in
        optional.into_iter().flatten().filter(|(group, _)| matches!(group.as_str(), "prod" | "production" | "server"))
    {
        for item in items.as_array().into_iter().flatten().filter_map(toml::Value::as_str) {
            requirement(all, item, PYPROJECT, at(group));
        }
    }
}

/// `install_requires` of a `setup.py` or `setup.cfg`, without running it.
pub fn setup(text: &str, file: &str, all: &mut Dependencies) {
    let mut within = false;
    for (index, line) in text.lines().enumerate() {
        let trimmed = line.trim();
        if trimmed.starts_with("install_requires") {
            within = true;
            if let Some((_, rest)) = trimmed.split_once('[') {
                for item in rest.split(',') {
                    requirement(all, item.trim().trim_matches(['"', '\'', ']', ')', ' ']), file, Some(index + 1));
                }
                within = !rest.contains(']');
            }
            continue;
        }
        if within {
            let ends = trimmed.starts_with([']', '[']) || (file == "setup.cfg" && !line.starts_with([' ', '\t']));
            if ends {
                within = false;
            } else {
                requirement(all, trimmed.trim_matches(['"', '\'', ',']), file, Some(index + 1));
            }
        }
    }
}

/// The Python that a conda environment names: `python=3.11`, or with a build behind it.
pub fn conda_version(repo: &Repo<'_>) -> Option<Pin> {
    CONDA.iter().find_map(|file| {
        let text = repo.read(file)?;
        text.lines().enumerate().find_map(|(index, line)| {
            let item = line.trim().strip_prefix("- ")?.trim_matches(['"', '\'']);
            let wanted = item.strip_prefix("python")?.trim();
            let exact = wanted.trim_start_matches('=');
            let wanted = if exact == wanted { wanted } else { exact.split('=').next().unwrap_or(exact) };
            let is_version = wanted.starts_with(|c: char| c.is_ascii_digit() || "<>~".contains(c));
            is_version.then(|| Pin::new(wanted, file, Some(index + 1)))
        })
    })
}
