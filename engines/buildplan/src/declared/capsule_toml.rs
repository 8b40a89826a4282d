//! `capsule.toml`, which overrides everything that was detected.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{check_process_name, too_many_processes};
use crate::bounds::{MAX_PROCESSES, is_http_path, truncate_to};
use crate::plan::{Draft, Kind, PlanError, Source};
use crate::tree::Repo;

/// `capsule.toml`, which overrides everything that was detected.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Declared {
    /// Where the CLI deploys this folder to. The organization is a slug.
    pub organization: Option<String>,
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
    /// The folder to deploy, of a monorepo.
    pub root: Option<String>,
    /// The Dockerfile to build with; `none` ignores the one in the repository.
    pub dockerfile: Option<String>,
    /// Debian packages that the application needs.
    pub packages: Vec<String>,
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

    /// Reads the file of a repository, if it exists; returns its text, too.
    pub(crate) fn of(repo: &Repo<'_>) -> Result<Option<(Self, std::rc::Rc<str>)>, PlanError> {
        let Some(text) = repo.read(Self::FILE) else { return Ok(None) };
        Ok(Some((Self::parse(&text)?, text)))
    }

    /// Parses the text of the file.
    ///
    /// # Errors
    /// When the text is malformed, with the line.
    pub fn parse(text: &str) -> Result<Self, PlanError> {
        let declared: Self = toml::from_str(text).map_err(|error| PlanError::toml(Self::FILE, text, &error))?;
        if declared.processes.len() > MAX_PROCESSES {
            return Err(too_many_processes(Self::FILE, crate::tree::line_of(text, "[processes]")));
        }
        for name in declared.processes.keys() {
            check_process_name(name, Self::FILE, crate::tree::line_of(text, name))?;
        }
        if let Some(path) = &declared.networking.health_check
            && !is_http_path(path)
        {
            return Err(PlanError {
                file: Self::FILE.into(),
                line: crate::tree::line_of(text, "health_check"),
                message: format!("health_check must be a path that begins with /, not `{}`", truncate_to(path, 200)),
            });
        }
        let build = &declared.build;
        for (name, path) in [("output", &build.output), ("root", &build.root), ("dockerfile", &build.dockerfile)] {
            if let Some(path) = path
                && (path.starts_with('/') || path.split('/').any(|part| part == ".."))
            {
                return Err(PlanError {
                    file: Self::FILE.into(),
                    line: crate::tree::line_of(text, name),
                    message: format!("{name} must lie within the repository, not at `{path}`"),
                });
            }
        }
        Ok(declared)
    }
}

/// Applies `capsule.toml` to the draft.
pub fn capsule_toml(declared: Declared, text: &str, draft: &mut Draft) {
    let source = |needle: &str| Source::line(Declared::FILE, text, needle);
    const WHY: &str = "set in capsule.toml";
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
    for package in &declared.build.packages {
        draft.system_package(package, source(package), WHY);
    }
    draft.plan.build.env.extend(declared.build.env);
    for (name, command) in &declared.processes {
        draft.process(name, command, source(&format!("{name} ")), WHY, 1.0);
    }
    if let Some(port) = declared.networking.port {
        draft.port(port, source("port"), WHY, 1.0);
    }
    if let Some(path) = declared.networking.health_check {
        draft.add_evidence("networking.health_check", &path, source("health_check"), WHY, 1.0);
        draft.plan.networking.health_check = Some(path.clone());
        draft.plan.networking.readiness_probe = Some(path);
    }
    if let Some(single_page) = declared.networking.single_page {
        draft.plan.networking.single_page = single_page;
        draft.add_evidence("networking.single_page", &single_page.to_string(), source("single_page"), WHY, 1.0);
    }
    if let Some(kind) = declared.kind {
        draft.kind(kind);
        let value = serde_json::to_value(kind).ok().and_then(|kind| kind.as_str().map(str::to_owned)).unwrap_or_default();
        draft.add_evidence("kind", &value, source("kind"), WHY, 1.0);
        if kind == Kind::Static {
            draft.plan.processes.clear();
            draft.plan.evidence.retain(|evidence| !evidence.field.starts_with("processes."));
        }
    }
}
