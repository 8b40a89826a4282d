//! The plan, as `capsule plan --json` prints it, and the draft that detectors fill.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::bounds::{MAX_EVIDENCE, MAX_LIST_ITEMS, MAX_PROCESSES, MAX_QUESTIONS, is_http_path, truncate};
use crate::frameworks::{Found, Type};
use crate::versions::VersionMismatch;

/// What a repository deploys as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Web,
    Api,
    Worker,
    Cron,
    Static,
    Monorepo,
    Library,
    #[default]
    Unknown,
}

/// How to build and run a repository. Unknown values are null.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub kind: Kind,
    pub detection: Detection,
    pub build: Build,
    /// Process types and their start commands.
    pub processes: BTreeMap<String, String>,
    pub resources: Resources,
    pub scaling: Scaling,
    pub networking: Networking,
    /// Services that the application needs, such as `postgresql`.
    pub needs: Vec<String>,
    pub system_packages: Vec<String>,
    pub members: Vec<Member>,
    pub evidence: Vec<Evidence>,
    pub questions: Vec<Question>,
    /// Toolchains that run in another version than requested, as far as that is known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mismatches: Vec<VersionMismatch>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Detection {
    pub language: Option<String>,
    pub languages: Vec<String>,
    pub framework: Option<String>,
    pub package_manager: Option<String>,
    pub build_tool: Option<String>,
    pub versions: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Build {
    /// The command that installs the dependencies.
    pub install: Option<String>,
    /// The command that builds the application.
    pub build: Option<String>,
    /// The command that runs once per deployment before the new instances start, such as migrations.
    pub release: Option<String>,
    /// The folder with the files of a static site.
    pub output: Option<String>,
    /// The repository's Dockerfile.
    #[serde(default)]
    pub dockerfile: Option<String>,
    /// The repository's compose file.
    #[serde(default)]
    pub compose: Option<String>,
    pub env: BTreeMap<String, String>,
}

/// A request and a limit, as quantities of Kubernetes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    pub request: String,
    pub limit: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    pub cpu: Range,
    pub memory: Range,
    #[serde(default)]
    pub disk: Disk,
}

/// Disk space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    pub size: String,
    #[serde(rename = "type")]
    pub kind: String,
}

impl Default for Disk {
    fn default() -> Self {
        Self { size: "1Gi".into(), kind: "ssd".into() }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Scaling {
    pub min_replicas: u32,
    pub max_replicas: u32,
    /// CPU usage in percent of the request above which a replica is added.
    pub target_cpu: u32,
    /// Memory usage in percent of the request above which a replica is added.
    pub target_memory: u32,
}

impl Default for Scaling {
    fn default() -> Self {
        Self { min_replicas: 1, max_replicas: 1, target_cpu: 80, target_memory: 80 }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Networking {
    pub port: Option<u16>,
    pub protocol: Option<String>,
    /// A path whose response has a status below 500 if the application is healthy.
    pub health_check: Option<String>,
    pub readiness_probe: Option<String>,
    /// Whether a site responds to unknown paths with its `index.html`.
    #[serde(default)]
    pub single_page: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    pub path: String,
    pub name: String,
    pub kind: Kind,
}

/// The source of a value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    pub field: String,
    pub value: String,
    pub file: String,
    pub line: Option<usize>,
    pub reason: String,
    /// 1 is certain.
    pub confidence: f64,
}

/// An ambiguous value, and how to set it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    pub field: String,
    pub text: String,
    /// Lines for `capsule.toml`.
    pub answer_with: String,
}

/// A malformed file, or a repository that exceeds a limit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanError {
    pub file: String,
    pub line: Option<usize>,
    pub message: String,
}

impl PlanError {
    /// Converts an error of the TOML file `file`, with the line in `text`.
    pub(crate) fn toml(file: &str, text: &str, error: &toml::de::Error) -> Self {
        let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        Self { file: file.into(), line, message: error.message().into() }
    }

    /// Truncates the texts, which may come from the file.
    pub(crate) fn truncated(self) -> Self {
        Self { file: truncate(&self.file), line: self.line, message: truncate(&self.message) }
    }
}

impl std::fmt::Display for PlanError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file, self.message),
            None => write!(f, "{}: {}", self.file, self.message),
        }
    }
}

impl std::error::Error for PlanError {}

/// A plan that is being made. Each value is set together with its evidence.
#[derive(Debug, Default)]
pub struct Draft {
    pub plan: Plan,
}

/// A place in the repository.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    pub file: &'a str,
    pub line: Option<usize>,
}

impl<'a> Source<'a> {
    /// A file as a whole.
    pub fn file(file: &'a str) -> Self {
        Self { file, line: None }
    }

    /// The first line of `text`, the content of `file`, that contains `needle`.
    pub fn line(file: &'a str, text: &str, needle: &str) -> Self {
        Self { file, line: crate::tree::line_of(text, needle) }
    }
}

impl Draft {
    /// Records why `field` has `value`. Replaces earlier evidence for the field, unless the field is a list.
    pub fn add_evidence(&mut self, field: &str, value: &str, source: Source<'_>, reason: &str, confidence: f64) {
        let grows = matches!(field, "needs" | "system_packages" | "members");
        let value = truncate(value);
        self.plan.evidence.retain(|known| known.field != field || (grows && known.value != value));
        if self.plan.evidence.len() < MAX_EVIDENCE {
            self.plan.evidence.push(Evidence {
                field: truncate(field),
                value,
                file: truncate(source.file),
                line: source.line,
                reason: truncate(reason),
                confidence,
            });
        }
    }

    pub fn language(&mut self, language: &str, source: Source<'_>) {
        self.plan.detection.language = Some(language.into());
        self.plan.detection.languages.push(language.into());
        self.add_evidence("detection.language", language, source, "file exists", 1.0);
    }

    pub fn framework(&mut self, framework: &str, source: Source<'_>, reason: &str) {
        self.plan.detection.framework = Some(framework.into());
        self.add_evidence("detection.framework", framework, source, reason, 1.0);
    }

    pub fn package_manager(&mut self, manager: &str, source: Source<'_>, reason: &str) {
        self.plan.detection.package_manager = Some(manager.into());
        self.add_evidence("detection.package_manager", manager, source, reason, 1.0);
    }

    pub fn version(&mut self, of: &str, version: &str, source: Source<'_>) {
        self.plan.detection.versions.insert(of.into(), version.into());
        self.add_evidence(&format!("detection.versions.{of}"), version, source, "requested in this file", 1.0);
    }

    pub fn install(&mut self, command: &str, source: Source<'_>, reason: &str) {
        self.plan.build.install = Some(command.into());
        self.add_evidence("build.install", command, source, reason, 1.0);
    }

    pub fn build(&mut self, command: &str, source: Source<'_>, reason: &str) {
        self.plan.build.build = Some(command.into());
        self.add_evidence("build.build", command, source, reason, 1.0);
    }

    pub fn release(&mut self, command: &str, source: Source<'_>, reason: &str) {
        self.plan.build.release = Some(command.into());
        self.add_evidence("build.release", command, source, reason, 1.0);
    }

    pub fn output(&mut self, folder: &str, source: Source<'_>, reason: &str, confidence: f64) {
        self.plan.build.output = Some(folder.into());
        self.add_evidence("build.output", folder, source, reason, confidence);
    }

    /// Sets the command of a process type. Beyond the limit, further types are ignored; files that declare them are refused.
    pub fn process(&mut self, name: &str, command: &str, source: Source<'_>, reason: &str, confidence: f64) {
        if self.plan.processes.len() >= MAX_PROCESSES && !self.plan.processes.contains_key(name) {
            return;
        }
        self.plan.processes.insert(name.into(), command.into());
        self.add_evidence(&format!("processes.{name}"), command, source, reason, confidence);
    }

    /// Adds a service that the application needs, with the first evidence for it.
    pub fn need(&mut self, need: &str, source: Source<'_>, reason: &str) {
        if !self.plan.needs.iter().any(|known| known == need) {
            self.plan.needs.push(need.into());
            self.add_evidence("needs", need, source, reason, 0.7);
        }
    }

    /// Adds a Debian package that the application needs.
    pub fn system_package(&mut self, package: &str, source: Source<'_>, reason: &str) {
        let packages = &self.plan.system_packages;
        if packages.len() < MAX_LIST_ITEMS && package.len() < 128 && !packages.iter().any(|known| known == package) {
            self.plan.system_packages.push(package.into());
            self.add_evidence("system_packages", package, source, reason, 0.8);
        }
    }

    pub fn build_tool(&mut self, tool: &str, source: Source<'_>, reason: &str) {
        self.plan.detection.build_tool = Some(tool.into());
        self.add_evidence("detection.build_tool", tool, source, reason, 1.0);
    }

    /// Sets the health check; ignored if it is not a URL path.
    pub fn health_check(&mut self, path: &str, source: Source<'_>, reason: &str, confidence: f64) {
        if !is_http_path(path) {
            return;
        }
        self.plan.networking.health_check = Some(path.into());
        self.plan.networking.readiness_probe = Some(path.into());
        self.add_evidence("networking.health_check", path, source, reason, confidence);
    }

    /// Sets the framework, and the kind that follows from it.
    pub fn found(&mut self, found: &Found) {
        self.framework(found.framework.name, found.source(), &found.reason);
        match found.framework.kind {
            Type::Ssr | Type::Web => self.kind(Kind::Web),
            Type::Api => self.kind(Kind::Api),
            Type::Worker => self.kind(Kind::Worker),
            Type::Spa | Type::Site => self.kind(Kind::Static),
            Type::Tool => {}
        }
    }

    /// Sets the output folder of a framework that builds static files.
    pub fn files(&mut self, found: &Found, folder: &str) {
        self.kind(Kind::Static);
        self.output(folder, found.source(), &format!("where {} puts its build", found.framework.title), 0.9);
        self.plan.networking.single_page = found.framework.kind == Type::Spa;
    }

    /// Sets the default port of the framework, or `otherwise`. The application receives it as `PORT`, too.
    pub fn default_port(&mut self, found: Option<&Found>, otherwise: u16, source: Source<'_>) {
        let (port, reason) = match found.and_then(|found| Some((found.framework.port?, found.framework.title))) {
            Some((port, title)) => (port, format!("default port of {title}, passed as PORT")),
            None => (otherwise, "default port, passed as PORT".to_owned()),
        };
        self.port(port, source, &reason, 0.7);
    }

    pub fn port(&mut self, port: u16, source: Source<'_>, reason: &str, confidence: f64) {
        self.plan.networking.port = Some(port);
        self.add_evidence("networking.port", &port.to_string(), source, reason, confidence);
    }

    /// Clears the fields with this prefix: a source of higher precedence replaces all of them.
    pub fn clear(&mut self, fields: &str) {
        let plan = &mut self.plan;
        if "processes.".starts_with(fields) {
            plan.processes.clear();
        }
        for (field, value) in [
            ("build.install", &mut plan.build.install),
            ("build.build", &mut plan.build.build),
            ("build.release", &mut plan.build.release),
            ("build.output", &mut plan.build.output),
        ] {
            if field.starts_with(fields) {
                *value = None;
            }
        }
        plan.evidence.retain(|evidence| !evidence.field.starts_with(fields));
    }

    pub fn kind(&mut self, kind: Kind) {
        self.plan.kind = kind;
    }

    /// Adds a question about `field`; the lines `answer_with` in `capsule.toml` answer it.
    pub fn add_question(&mut self, field: &str, text: &str, answer_with: &str) {
        if self.plan.questions.len() < MAX_QUESTIONS {
            self.plan.questions.push(Question {
                field: truncate(field),
                text: truncate(text),
                answer_with: truncate(answer_with),
            });
        }
    }

    /// Sets the kind and the values that depend on it.
    pub fn finish(mut self) -> Plan {
        let plan = &mut self.plan;
        // Environment variables cannot have such names and values.
        plan.build.env.retain(|name, value| !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0'));
        let web = plan.processes.contains_key("web");
        plan.kind = match plan.kind {
            Kind::Unknown if web => Kind::Web,
            Kind::Static if web => Kind::Web,
            Kind::Web | Kind::Api if !web && !plan.processes.is_empty() => Kind::Worker,
            Kind::Unknown if !plan.processes.is_empty() => Kind::Worker,
            Kind::Unknown | Kind::Web | Kind::Api if plan.processes.is_empty() && plan.build.output.is_some() => Kind::Static,
            kind => kind,
        };
        let is_declared = plan.evidence.iter().any(|evidence| evidence.field == "networking.port" && evidence.confidence >= 1.0);
        if !is_declared && let Some(port) = plan.processes.get("web").and_then(|command| crate::ports::of_command(command)) {
            let known = plan.evidence.iter().find(|evidence| evidence.field == "processes.web");
            let (file, line) = known.map_or_else(|| (String::new(), None), |known| (known.file.clone(), known.line));
            self.port(port, Source { file: &file, line }, "the start command sets it", 0.95);
        }
        let plan = &mut self.plan;
        if !matches!(plan.kind, Kind::Web | Kind::Api) && !is_declared {
            plan.networking.port = None;
            plan.evidence.retain(|evidence| evidence.field != "networking.port");
        }
        if matches!(plan.kind, Kind::Web | Kind::Api) {
            if web {
                plan.networking.port.get_or_insert(3000);
            }
            plan.networking.protocol.get_or_insert_with(|| "http".into());
        }
        if plan.kind == Kind::Static {
            plan.networking.protocol = Some("http".into());
        }
        let settled: Vec<String> = plan
            .evidence
            .iter()
            .filter(|evidence| evidence.confidence >= 1.0 && crate::DECISIVE_FILES.contains(&evidence.file.as_str()))
            .map(|evidence| evidence.field.clone())
            .collect();
        // A declared install command answers the question about the package manager.
        let answers = |field: &str| if field == "detection.package_manager" { "build.install" } else { field }.to_owned();
        plan.questions.retain(|question| !settled.contains(&answers(&question.field)));
        if plan.kind == Kind::Unknown {
            plan.questions.push(Question {
                field: "processes.web".into(),
                text: "could not detect an app here".into(),
                answer_with: "[processes]\nweb = \"the command that starts it\"".into(),
            });
        }
        let (request, limit) = match (plan.kind, plan.detection.language.as_deref()) {
            (Kind::Static, _) => ("16Mi", "64Mi"),
            (_, Some("java" | "kotlin" | "scala" | "groovy" | "clojure")) => ("256Mi", "1Gi"),
            (_, Some("go" | "rust" | "c" | "cpp" | "zig" | "crystal")) => ("32Mi", "512Mi"),
            (_, Some("elixir" | "erlang" | "dotnet")) => ("128Mi", "512Mi"),
            _ => ("64Mi", "512Mi"),
        };
        plan.resources.memory = Range { request: request.into(), limit: limit.into() };
        plan.resources.cpu = Range { request: "100m".into(), limit: "1".into() };
        // Only stateless processes may have several replicas by default.
        plan.scaling.max_replicas = if matches!(plan.kind, Kind::Web | Kind::Api) { 3 } else { 1 };
        self.plan
    }
}
