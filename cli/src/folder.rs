//! What a folder says of where it is deployed to, in `capsule.toml`, and that it is remembered there.

use std::path::Path;

use anyhow::{Context, anyhow, bail};
use capsule_buildplan::Declared;
use capsule_contracts::message::{is_label, to_label};
use toml_edit::DocumentMut;

use crate::arguments::{At, Names};
use crate::terminal;

/// A service in an environment, by names.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub organization: Option<String>,
    pub project: String,
    pub service: String,
    pub environment: String,
}

/// What the folder's `capsule.toml` says; nothing, if there is none.
pub fn declared(folder: &Path) -> anyhow::Result<Declared> {
    let path = folder.join(Declared::FILE);
    match std::fs::read_to_string(&path) {
        Ok(text) => Declared::parse(&text).map_err(|error| anyhow!("{}/{error}", folder.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Declared::default()),
        Err(error) => Err(error).with_context(|| format!("{} cannot be read", path.display())),
    }
}

/// The service that a command is about; everything about it must be known.
pub fn known(at: &At) -> anyhow::Result<Wanted> {
    let declared = declared(&at.folder)?;
    let missing = |what: &str| {
        anyhow!(
            "which {what}? There is no capsule.toml in {} that says so: go to the application's folder, or give --{what}",
            at.folder.display()
        )
    };
    let project = at.names.project.clone().or(declared.project).ok_or_else(|| missing("project"))?;
    let service = at.names.service.clone().or(declared.service).ok_or_else(|| missing("service"))?;
    Ok(wanted(&at.names, project, service, declared.environment))
}

/// As [`known`], but what is missing is asked for, with the folder's name as the proposal.
pub fn known_or_asked(at: &At, yes: bool) -> anyhow::Result<Wanted> {
    if !at.folder.is_dir() {
        bail!("there is no folder {}", at.folder.display());
    }
    let declared = declared(&at.folder)?;
    let path = at.folder.canonicalize()?;
    let proposal = to_label(&path.file_name().unwrap_or_default().to_string_lossy(), "app");
    let ask = |what: &str, proposal: &str| {
        let answer = if yes { proposal.to_owned() } else { terminal::ask(what, Some(proposal), "")? };
        label(what, &answer)
    };
    let project = match at.names.project.clone().or(declared.project) {
        Some(project) => label("project", &project)?,
        None => ask("Project", &proposal)?,
    };
    let service = match at.names.service.clone().or(declared.service) {
        Some(service) => label("service", &service)?,
        None => ask("Service", &proposal)?,
    };
    Ok(wanted(&at.names, project, service, declared.environment))
}

fn wanted(names: &Names, project: String, service: String, environment: Option<String>) -> Wanted {
    let environment = names.environment.clone().or(environment).unwrap_or_else(|| "production".into());
    Wanted { organization: names.organization.clone(), project, service, environment }
}

fn label(what: &str, name: &str) -> anyhow::Result<String> {
    if is_label(name) {
        return Ok(name.into());
    }
    bail!("`{name}` is no name for a {}: use a-z, 0-9 and -, at most 40; {} would do", what.to_lowercase(), to_label(name, "app"))
}

/// Writes project and service into the folder's `capsule.toml`, leaving the rest of it as it is.
/// Returns whether anything had to be written.
pub fn remember(folder: &Path, wanted: &Wanted) -> anyhow::Result<bool> {
    let path = folder.join(Declared::FILE);
    let before = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error).with_context(|| format!("{} cannot be read", path.display())),
    };
    let mut document: DocumentMut = before.parse().with_context(|| format!("{} is malformed", path.display()))?;
    for (name, value) in [("project", &wanted.project), ("service", &wanted.service)] {
        if document.get(name).is_none() {
            document[name] = toml_edit::value(value.as_str());
        }
    }
    let after = document.to_string();
    if after == before {
        return Ok(false);
    }
    std::fs::write(&path, after).with_context(|| format!("{} cannot be written", path.display()))?;
    Ok(true)
}

/// The line before what was found.
const FOUND: &str = "# What `capsule plan` found. Take the # away to say it otherwise.";

/// Adds what a plan found to the folder's `capsule.toml`, as comments; once, and not where something of it is
/// said already. Returns whether anything had to be written.
pub fn annotate(folder: &Path, found: &str) -> anyhow::Result<bool> {
    let path = folder.join(Declared::FILE);
    let before = std::fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))?;
    let is_said =
        before.contains(FOUND) || ["build", "processes", "networking"].iter().any(|name| before.contains(&format!("[{name}")));
    if is_said || found.is_empty() {
        return Ok(false);
    }
    let comments: String =
        found.lines().map(|line| if line.is_empty() { "#\n".to_owned() } else { format!("# {line}\n") }).collect();
    std::fs::write(&path, format!("{before}\n{FOUND}\n#\n{comments}"))
        .with_context(|| format!("{} cannot be written", path.display()))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::{Wanted, annotate, known, remember};
    use crate::arguments::{At, Names};

    #[test]
    fn what_was_asked_is_remembered_and_nothing_else_changes() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("capsule.toml");
        let own = "# mine\n[build]\nbuild = \"make\" # this way\n";
        std::fs::write(&file, own).expect("written");
        let wanted =
            Wanted { organization: None, project: "shop".into(), service: "web".into(), environment: "production".into() };
        assert!(remember(folder.path(), &wanted).expect("remembered"));
        assert!(!remember(folder.path(), &wanted).expect("nothing to do"));
        let text = std::fs::read_to_string(&file).expect("there");
        assert!(text.contains("# mine") && text.contains("build = \"make\" # this way"), "{text}");
        let at = At { folder: folder.path().into(), names: Names::default() };
        assert!(!annotate(folder.path(), "[build]\ninstall = \"x\"").expect("nothing to do"), "it is said already");
        let known = known(&at).expect("known");
        assert_eq!((known.project.as_str(), known.service.as_str(), known.environment.as_str()), ("shop", "web", "production"));
    }

    #[test]
    fn without_a_capsule_toml_the_missing_name_is_told() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = At { folder: folder.path().into(), names: Names { project: Some("shop".into()), ..Names::default() } };
        assert!(known(&at).expect_err("no service").to_string().contains("--service"));
    }
}
