//! Detectors, one module per language or per family of small languages. Each searches for its marker files and makes a
//! draft; the draft with the highest rank becomes the plan.

mod beam;
mod compiled;
mod deno;
mod dotnet;
mod go;
mod jvm;
mod node;
mod php;
mod python;
mod ruby;
mod rust;
mod scripted;
mod sites;

use crate::plan::{Draft, Kind, PlanError, Source};
pub use crate::ports::default_in as port_in;
use crate::tree::Repo;

type IsThere = fn(&Repo<'_>) -> Option<String>;
type Detect = fn(&Repo<'_>, &mut Draft) -> Result<(), PlanError>;

/// In order of preference between drafts of equal rank.
const LANGUAGES: [(IsThere, Detect); 27] = [
    (php::is_there, php::detect),
    (ruby::is_there, ruby::detect),
    (python::is_there, python::detect),
    (beam::elixir_is_there, beam::elixir),
    (beam::erlang_is_there, beam::erlang),
    (beam::gleam_is_there, beam::gleam),
    (go::is_there, go::detect),
    (rust::is_there, rust::detect),
    (jvm::is_there, jvm::detect),
    (dotnet::is_there, dotnet::detect),
    (compiled::swift_is_there, compiled::swift),
    (compiled::dart_is_there, compiled::dart),
    (compiled::haskell_is_there, compiled::haskell),
    (compiled::crystal_is_there, compiled::crystal),
    (compiled::zig_is_there, compiled::zig),
    (compiled::ocaml_is_there, compiled::ocaml),
    (deno::is_there, deno::detect),
    (node::is_there, node::detect),
    (scripted::lua_is_there, scripted::lua),
    (scripted::perl_is_there, scripted::perl),
    (scripted::r_is_there, scripted::r),
    (scripted::julia_is_there, scripted::julia),
    (compiled::cpp_is_there, compiled::cpp),
    (scripted::scheme_is_there, scripted::scheme),
    (compiled::cobol_is_there, compiled::cobol),
    (sites::is_there, sites::detect),
    (scripted::shell_is_there, scripted::shell),
];

/// The rank of a draft: the higher, the more likely it is the application.
fn weight(draft: &Draft) -> u32 {
    let plan = &draft.plan;
    let framework = plan.detection.framework.is_some();
    match plan.kind {
        Kind::Web | Kind::Api if framework => 5,
        Kind::Worker | Kind::Static if framework => 3,
        _ if plan.processes.contains_key("web") => 3,
        Kind::Static => 2,
        _ if !plan.processes.is_empty() => 2,
        _ => 1,
    }
}

/// Detects the language of the main process. Other applications in the same folder become a question.
pub fn detect(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    let mut drafts = Vec::new();
    for (is_there, detect) in LANGUAGES {
        if let Some(marker) = is_there(repo) {
            let mut found = Draft::default();
            detect(repo, &mut found)?;
            drafts.push((marker, weight(&found), found));
        }
    }
    // A page or a script beside a program belongs to the program.
    let is_beside = |draft: &Draft| matches!(draft.plan.detection.language.as_deref(), Some("static" | "shell"));
    let at_the_top = |marker: &str| matches!(marker, "index.html" | "public/index.html" | "Staticfile");
    let runs = drafts.iter().any(|(_, weight, draft)| !is_beside(draft) && *weight > 1);
    let library = drafts.iter().any(|(.., draft)| draft.plan.kind == Kind::Library);
    let page = drafts.iter().any(|(marker, _, draft)| is_beside(draft) && (!library || at_the_top(marker)));
    let mut tools = Vec::new();
    if !runs && page {
        // A manifest that starts nothing beside a page: tools of whoever writes the page.
        tools.extend(drafts.extract_if(.., |(.., draft)| !is_beside(draft)).map(|(.., draft)| draft));
        drafts.truncate(1);
    } else if drafts.iter().any(|(.., draft)| !is_beside(draft)) {
        drafts.retain(|(.., draft)| !is_beside(draft));
    } else {
        drafts.truncate(1);
    }
    let most = drafts.iter().map(|(_, weight, _)| *weight).max().unwrap_or_default();
    let Some(at) = drafts.iter().position(|(_, weight, _)| *weight == most) else { return Ok(()) };
    let (marker, _, main) = drafts.remove(at);
    *draft = main;
    let language = draft.plan.detection.language.clone().unwrap_or_default();
    // Pages that a bundler makes beside a program are what the program serves.
    let is_rival = |weight: u32, other: &Draft| weight == most && most > 1 && !(is_assets(&language, other));
    let rivals: Vec<&str> =
        drafts.iter().filter(|(_, weight, other)| is_rival(*weight, other)).map(|(marker, ..)| marker.as_str()).collect();
    if !rivals.is_empty() {
        let files = std::iter::once(marker.as_str()).chain(rivals).collect::<Vec<_>>().join(", ");
        draft.add_question(
            "processes.web",
            &format!("found several languages ({files}); using {language} as the main one"),
            "[processes]\nweb = \"the command that starts it\"",
        );
    }
    for (_, _, other) in &drafts {
        draft.plan.detection.languages.extend(other.plan.detection.languages.iter().cloned());
        if is_assets(&language, other) {
            assets(&language, other, draft);
        }
    }
    for tool in tools {
        if let Some(build) = tool.plan.build.build.as_ref().filter(|_| tool.plan.kind == Kind::Unknown) {
            let source = Source::file(node::FILE);
            if let Some(install) = &tool.plan.build.install {
                draft.install(install, source, "what the page's tools take");
            }
            draft.build(build, source, "the page's tools");
        }
        draft.plan.detection.languages.extend(tool.plan.detection.languages);
    }
    let mut seen = std::collections::BTreeSet::new();
    draft.plan.detection.languages.retain(|language| seen.insert(language.clone()));
    Ok(())
}

/// Whether a `package.json` beside a program makes what the program serves.
fn is_assets(language: &str, other: &Draft) -> bool {
    let plan = &other.plan;
    plan.detection.language.as_deref() == Some("javascript")
        && !plan.processes.contains_key("web")
        && matches!(language, "php" | "python" | "go" | "rust" | "ruby" | "deno" | "elixir" | "java" | "kotlin" | "dotnet")
}

/// A `package.json` beside a program that makes what the program serves: its steps come first.
fn assets(language: &str, javascript: &Draft, draft: &mut Draft) {
    let (install, build) = (&javascript.plan.build.install, &javascript.plan.build.build);
    // Rails' and Phoenix's own commands run the build themselves; Maven and Gradle have plug-ins for it.
    let (installs, builds) = match language {
        "ruby" if draft.plan.detection.framework.as_deref() == Some("rails") => (true, false),
        "php" | "python" | "go" | "rust" | "ruby" | "deno" => (true, true),
        _ => return,
    };
    let Some(build) = build.as_ref() else { return };
    let source = Source::file(node::FILE);
    if let Some(install) = install.as_ref().filter(|_| installs) {
        let all = draft.plan.build.install.as_ref().map_or_else(|| install.clone(), |own| format!("{own} && {install}"));
        draft.install(&all, source, "with what the pages' assets take");
    }
    if builds {
        let all = draft.plan.build.build.as_ref().map_or_else(|| build.clone(), |own| format!("{build} && {own}"));
        draft.build(&all, source, "the pages' assets are built first");
    }
    for (name, version) in &javascript.plan.detection.versions {
        draft.plan.detection.versions.entry(name.clone()).or_insert_with(|| version.clone());
    }
}

/// A version that a file requests.
pub struct Pin {
    version: String,
    file: String,
    line: Option<usize>,
}

impl Pin {
    pub fn new(version: &str, file: &str, line: Option<usize>) -> Self {
        Self { version: version.to_owned(), file: file.to_owned(), line }
    }
}

/// Records a requested version.
pub fn version(draft: &mut Draft, of: &str, pin: Option<Pin>) {
    let Some(pin) = pin else { return };
    let version = pin.version.trim().trim_matches(['"', '\'']);
    // The values of templates and variables are unknown.
    let is_plain = |c: char| c.is_alphanumeric() || " .,-+_^~*<>=!|/@:()[]".contains(c);
    if !version.is_empty() && version.len() < 64 && version.chars().all(is_plain) {
        draft.version(of, version, Source { file: &pin.file, line: pin.line });
    }
}

/// A version from files that hold nothing else (each with a prefix that is taken off), or from the files
/// of asdf and mise.
pub fn pinned(repo: &Repo<'_>, tools: &[&str], files: &[(&str, &str)]) -> Option<Pin> {
    for (file, prefix) in files {
        if let Some(text) = repo.read(file)
            && let Some((index, line)) =
                text.lines().enumerate().find(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'))
        {
            return Some(Pin::new(line.trim().trim_start_matches(prefix), file, Some(index + 1)));
        }
    }
    let text = repo.text(".tool-versions");
    for (index, line) in text.lines().enumerate() {
        let mut words = line.split_whitespace();
        if words.next().is_some_and(|name| tools.contains(&name))
            && let Some(version) = words.next()
        {
            return Some(Pin::new(version, ".tool-versions", Some(index + 1)));
        }
    }
    for file in ["mise.toml", ".mise.toml"] {
        let Ok(Some(table)) = repo.toml(file) else { continue };
        let value = tools.iter().find_map(|tool| table.get("tools")?.get(*tool));
        let value = value.and_then(|value| value.as_array().and_then(|all| all.first()).or(Some(value)));
        let value = value.and_then(|value| value.get("version").or(Some(value))).and_then(toml::Value::as_str);
        if let Some(version) = value {
            let line = tools.iter().find_map(|tool| crate::tree::line_of(&repo.text(file), &format!("{tool} =")));
            return Some(Pin::new(version, file, line));
        }
    }
    None
}
