//! The plan, as `capsule plan --json` prints it, and the draft it is made from.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

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

/// What was found, and what would be done. Unknown values are null, never invented.
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
    /// Services it wants to talk to, such as `postgresql`.
    pub needs: Vec<String>,
    pub system_packages: Vec<String>,
    pub members: Vec<Member>,
    pub evidence: Vec<Evidence>,
    pub questions: Vec<Question>,
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
    /// Fetches the dependencies.
    pub install: Option<String>,
    /// Makes the release out of source and dependencies.
    pub build: Option<String>,
    /// Runs once per deployment before the new instances start, such as migrations.
    pub release: Option<String>,
    /// The folder with the site's files, for what is served as files.
    pub output: Option<String>,
    pub env: BTreeMap<String, String>,
}

/// A request and a limit, as Kubernetes writes quantities.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    pub request: String,
    pub limit: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    pub cpu: Range,
    pub memory: Range,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scaling {
    pub min_replicas: u32,
    pub max_replicas: u32,
}

impl Default for Scaling {
    fn default() -> Self {
        Self { min_replicas: 1, max_replicas: 1 }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Networking {
    pub port: Option<u16>,
    pub protocol: Option<String>,
    /// A path that answers below 500 when the application is well.
    pub health_check: Option<String>,
    pub readiness_probe: Option<String>,
    /// Whether unknown paths of a site get its `index.html`.
    #[serde(default)]
    pub single_page: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    pub path: String,
    pub name: String,
    pub kind: Kind,
}

/// Where a conclusion came from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    pub field: String,
    pub value: String,
    pub file: String,
    pub line: Option<usize>,
    pub reason: String,
    /// 1 is certain.
    pub confidence: f32,
}

/// A doubt, and what settles it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    pub field: String,
    pub text: String,
    /// Lines for `capsule.toml`.
    pub answer_with: String,
}

/// A file that decides is malformed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanError {
    pub file: String,
    pub line: Option<usize>,
    pub message: String,
}

impl PlanError {
    /// What the TOML of `file` has wrong, and in which line of `text`.
    pub(crate) fn toml(file: &str, text: &str, error: &toml::de::Error) -> Self {
        let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        Self { file: file.into(), line, message: error.message().into() }
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

/// A plan in the making. A conclusion goes in together with its evidence.
#[derive(Debug, Default)]
pub struct Draft {
    pub plan: Plan,
}

/// Where in the repository something was found.
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
    /// Records why `field` has `value`. Earlier evidence for the same field gives way.
    pub fn because(&mut self, field: &str, value: &str, source: Source<'_>, reason: &str, confidence: f32) {
        self.plan.evidence.retain(|known| known.field != field);
        self.plan.evidence.push(Evidence {
            field: field.into(),
            value: value.into(),
            file: source.file.into(),
            line: source.line,
            reason: reason.into(),
            confidence,
        });
    }

    pub fn language(&mut self, language: &str, source: Source<'_>) {
        self.plan.detection.language = Some(language.into());
        self.plan.detection.languages.push(language.into());
        self.because("detection.language", language, source, "it is there", 1.0);
    }

    pub fn framework(&mut self, framework: &str, source: Source<'_>, reason: &str) {
        self.plan.detection.framework = Some(framework.into());
        self.because("detection.framework", framework, source, reason, 1.0);
    }

    pub fn package_manager(&mut self, manager: &str, source: Source<'_>, reason: &str) {
        self.plan.detection.package_manager = Some(manager.into());
        self.because("detection.package_manager", manager, source, reason, 1.0);
    }

    pub fn version(&mut self, of: &str, version: &str, source: Source<'_>) {
        self.plan.detection.versions.insert(of.into(), version.into());
        self.because(&format!("detection.versions.{of}"), version, source, "asked for there", 1.0);
    }

    pub fn install(&mut self, command: &str, source: Source<'_>, reason: &str) {
        self.plan.build.install = Some(command.into());
        self.because("build.install", command, source, reason, 1.0);
    }

    pub fn build(&mut self, command: &str, source: Source<'_>, reason: &str) {
        self.plan.build.build = Some(command.into());
        self.because("build.build", command, source, reason, 1.0);
    }

    pub fn release(&mut self, command: &str, source: Source<'_>, reason: &str) {
        self.plan.build.release = Some(command.into());
        self.because("build.release", command, source, reason, 1.0);
    }

    pub fn output(&mut self, folder: &str, source: Source<'_>, reason: &str, confidence: f32) {
        self.plan.build.output = Some(folder.into());
        self.because("build.output", folder, source, reason, confidence);
    }

    pub fn process(&mut self, name: &str, command: &str, source: Source<'_>, reason: &str, confidence: f32) {
        self.plan.processes.insert(name.into(), command.into());
        self.because(&format!("processes.{name}"), command, source, reason, confidence);
    }

    /// Something it wants to talk to; the first sign of it is enough.
    pub fn need(&mut self, need: &str, source: Source<'_>, reason: &str) {
        if !self.plan.needs.iter().any(|known| known == need) {
            self.plan.needs.push(need.into());
            self.because("needs", need, source, reason, 0.7);
        }
    }

    pub fn port(&mut self, port: u16, source: Source<'_>, reason: &str, confidence: f32) {
        self.plan.networking.port = Some(port);
        self.because("networking.port", &port.to_string(), source, reason, confidence);
    }

    pub fn kind(&mut self, kind: Kind) {
        self.plan.kind = kind;
    }

    /// A doubt about `field`, settled by `answer_with` in `capsule.toml`.
    pub fn ask(&mut self, field: &str, text: &str, answer_with: &str) {
        self.plan.questions.push(Question { field: field.into(), text: text.into(), answer_with: answer_with.into() });
    }

    /// Settles the kind and what follows from it.
    pub fn finish(mut self) -> Plan {
        let plan = &mut self.plan;
        let web = plan.processes.contains_key("web");
        plan.kind = match plan.kind {
            Kind::Unknown if web => Kind::Web,
            Kind::Static if web => Kind::Web,
            Kind::Web | Kind::Api if !web && !plan.processes.is_empty() => Kind::Worker,
            Kind::Unknown if !plan.processes.is_empty() => Kind::Worker,
            Kind::Unknown | Kind::Web | Kind::Api if plan.processes.is_empty() && plan.build.output.is_some() => Kind::Static,
            kind => kind,
        };
        if matches!(plan.kind, Kind::Web | Kind::Api) {
            plan.networking.port.get_or_insert(3000);
            plan.networking.protocol.get_or_insert_with(|| "http".into());
        }
        if plan.kind == Kind::Static {
            plan.networking.protocol = Some("http".into());
        }
        let settled: Vec<String> = plan
            .evidence
            .iter()
            .filter(|evidence| matches!(evidence.file.as_str(), "capsule.toml" | "Procfile"))
            .map(|evidence| evidence.field.clone())
            .collect();
        plan.questions.retain(|question| !settled.contains(&question.field));
        if plan.kind == Kind::Unknown {
            plan.questions.push(Question {
                field: "processes.web".into(),
                text: "nothing here is recognized as an application".into(),
                answer_with: "[processes]\nweb = \"the command that starts it\"".into(),
            });
        }
        let (request, limit) = match plan.detection.language.as_deref() {
            Some("java") => ("256Mi", "1Gi"),
            Some("go" | "rust") => ("32Mi", "512Mi"),
            _ => ("64Mi", "512Mi"),
        };
        plan.resources.memory = Range { request: request.into(), limit: limit.into() };
        plan.resources.cpu = Range { request: "100m".into(), limit: "1".into() };
        self.plan
    }
}
