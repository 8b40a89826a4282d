//! What the repository says of itself: `Procfile`, and above all `capsule.toml`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::plan::{Draft, Kind, PlanError, Source};
use crate::tree::Tree;

/// `capsule.toml`: whatever it says goes before anything found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Declared {
    /// What the CLI remembers: where this folder is deployed to.
    pub project: Option<String>,
    pub service: Option<String>,
    pub environment: Option<String>,
    /// `web`, `api`, `worker` or `static`.
    pub kind: Option<Kind>,
    pub build: DeclaredBuild,
    pub processes: BTreeMap<String, String>,
    pub networking: DeclaredNetworking,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DeclaredBuild {
    pub install: Option<String>,
    pub build: Option<String>,
    pub release: Option<String>,
    pub output: Option<String>,
    pub env: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DeclaredNetworking {
    pub port: Option<u16>,
    pub health_check: Option<String>,
    pub single_page: Option<bool>,
}

impl Declared {
    /// The name of the file.
    pub const FILE: &'static str = "capsule.toml";

    /// Understands the file's text.
    ///
    /// # Errors
    /// With the line, and what is wrong there.
    pub fn parse(text: &str) -> Result<Self, PlanError> {
        let declared: Self = toml::from_str(text).map_err(|error| PlanError::toml(Self::FILE, text, &error))?;
        for name in declared.processes.keys() {
            check_process_name(name, Self::FILE, crate::tree::line_of(text, name))?;
        }
        if let Some(path) = &declared.networking.health_check
            && !path.starts_with('/')
        {
            return Err(PlanError {
                file: Self::FILE.into(),
                line: crate::tree::line_of(text, "health_check"),
                message: format!("health_check must be a path that begins with /, not `{path}`"),
            });
        }
        if let Some(output) = &declared.build.output
            && (output.starts_with('/') || output.split('/').any(|part| part == ".."))
        {
            return Err(PlanError {
                file: Self::FILE.into(),
                line: crate::tree::line_of(text, "output"),
                message: format!("output must be a folder of the repository, not `{output}`"),
            });
        }
        Ok(declared)
    }
}

fn check_process_name(name: &str, file: &str, line: Option<usize>) -> Result<(), PlanError> {
    let fits = (1..=30).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_');
    if fits {
        return Ok(());
    }
    Err(PlanError { file: file.into(), line, message: format!("`{name}` is no process type: use a-z, 0-9, - and _, at most 30") })
}

/// Takes over what `capsule.toml` says.
pub fn capsule_toml(tree: &dyn Tree, draft: &mut Draft) -> Result<(), PlanError> {
    let Some(text) = tree.read(Declared::FILE) else {
        return Ok(());
    };
    let declared = Declared::parse(&text)?;
    let source = |needle: &str| Source::line(Declared::FILE, &text, needle);
    const WHY: &str = "capsule.toml says so";
    if let Some(command) = &declared.build.install {
        draft.install(command, source("install"), WHY);
    }
    if let Some(command) = &declared.build.build {
        draft.build(command, source("build ="), WHY);
    }
    if let Some(command) = &declared.build.release {
        draft.release(command, source("release"), WHY);
    }
    if let Some(output) = &declared.build.output {
        draft.output(output, source("output"), WHY, 1.0);
    }
    draft.plan.build.env.extend(declared.build.env);
    for (name, command) in &declared.processes {
        draft.process(name, command, source(&format!("{name} ")), WHY, 1.0);
    }
    if let Some(port) = declared.networking.port {
        draft.port(port, source("port"), WHY, 1.0);
    }
    if let Some(path) = declared.networking.health_check {
        draft.because("networking.health_check", &path, source("health_check"), WHY, 1.0);
        draft.plan.networking.health_check = Some(path.clone());
        draft.plan.networking.readiness_probe = Some(path);
    }
    if let Some(single_page) = declared.networking.single_page {
        draft.plan.networking.single_page = single_page;
        draft.because("networking.single_page", &single_page.to_string(), source("single_page"), WHY, 1.0);
    }
    if let Some(kind) = declared.kind {
        draft.kind(kind);
        if kind == Kind::Static {
            draft.plan.processes.clear();
            draft.plan.evidence.retain(|evidence| !evidence.field.starts_with("processes."));
        }
    }
    Ok(())
}

/// Takes over the process types of a `Procfile`; they replace those found. `release` is the release
/// command.
pub fn procfile(tree: &dyn Tree, draft: &mut Draft) -> Result<(), PlanError> {
    const FILE: &str = "Procfile";
    let Some(text) = tree.read(FILE) else {
        return Ok(());
    };
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let number = Some(index + 1);
        let malformed = || PlanError { file: FILE.into(), line: number, message: format!("`{line}` is not `type: command`") };
        let (name, command) = line.split_once(':').ok_or_else(malformed)?;
        let (name, command) = (name.trim(), command.trim());
        if command.is_empty() {
            return Err(malformed());
        }
        check_process_name(name, FILE, number)?;
        found.push((name.to_owned(), command.to_owned(), Source { file: FILE, line: number }));
    }
    if found.iter().any(|(name, ..)| name != "release") {
        draft.plan.processes.clear();
        draft.plan.evidence.retain(|evidence| !evidence.field.starts_with("processes."));
    }
    for (name, command, source) in found {
        if name == "release" {
            draft.release(&command, source, "the Procfile says so");
        } else {
            draft.process(&name, &command, source, "the Procfile says so", 1.0);
        }
    }
    Ok(())
}
