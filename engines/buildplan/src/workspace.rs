//! Monorepos: finds the members, those that can be deployed, and those that a change affects.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::bounds::truncate;
use crate::budget::may_search;
use crate::plan::{Draft, Kind, Member, PlanError, Source};
use crate::tree::{Repo, Tree, join, line_of};

/// Members that are read.
const MAX_MEMBERS: usize = 400;
/// Patterns of members, and parts of a pattern.
const MAX_PATTERNS: usize = 400;
const MAX_PARTS: usize = 16;

/// A tool that defines the members of a workspace.
struct Workspace {
    tool: &'static str,
    file: &'static str,
    patterns: Vec<String>,
}

/// Every workspace that the repository describes.
fn workspaces(repo: &Repo<'_>) -> Result<Vec<Workspace>, PlanError> {
    let mut all = Vec::new();
    let mut add = |tool, file, patterns: Vec<String>| {
        if !patterns.is_empty() {
            all.push(Workspace { tool, file, patterns });
        }
    };
    let texts = |value: Option<&Value>| -> Vec<String> {
        value.and_then(Value::as_array).into_iter().flatten().filter_map(|text| text.as_str().map(str::to_owned)).collect()
    };
    if let Some(yaml) = repo.yaml("pnpm-workspace.yaml")? {
        add("pnpm", "pnpm-workspace.yaml", texts(yaml.get("packages")));
    }
    if let Some(package) = repo.json("package.json")? {
        let own = package.get("workspaces");
        let patterns = texts(own.and_then(|own| own.get("packages")).or(own));
        add("workspaces", "package.json", patterns);
    }
    if let Some(lerna) = repo.json("lerna.json")? {
        let named = texts(lerna.get("packages"));
        add("lerna", "lerna.json", if named.is_empty() { vec!["packages/*".into()] } else { named });
    }
    if let Some(rush) = repo.json("rush.json")? {
        let projects = rush.get("projects").and_then(Value::as_array).into_iter().flatten();
        add(
            "rush",
            "rush.json",
            projects.filter_map(|project| Some(project.get("projectFolder")?.as_str()?.to_owned())).collect(),
        );
    }
    if repo.has("nx.json") {
        add("nx", "nx.json", ["apps/*", "packages/*", "libs/*", "apps/*/*"].map(str::to_owned).to_vec());
    }
    if repo.has_folder(".moon")
        && let Some(yaml) = repo.yaml(".moon/workspace.yml")?
    {
        let projects = yaml.get("projects");
        let named =
            projects.and_then(Value::as_object).into_iter().flatten().filter_map(|(_, path)| path.as_str().map(str::to_owned));
        add("moon", ".moon/workspace.yml", named.chain(texts(projects)).collect());
    }
    if let Some(deno) = repo.json("deno.json")? {
        let own = deno.get("workspace");
        add("deno", "deno.json", texts(own.and_then(|own| own.get("members")).or(own)));
    }
    if let Some(cargo) = repo.toml("Cargo.toml")? {
        add("cargo", "Cargo.toml", cargo_members(&cargo));
    }
    let modules = repo.text("go.work");
    let modules =
        modules.lines().filter_map(|line| line.trim().trim_start_matches("use ").trim().strip_prefix("./").map(str::to_owned));
    add("go", "go.work", modules.collect());
    if let Some(python) = repo.toml("pyproject.toml")? {
        let members = python.get("tool").and_then(|tool| tool.get("uv")?.get("workspace")?.get("members")?.as_array());
        add("uv", "pyproject.toml", members.into_iter().flatten().filter_map(|text| text.as_str().map(str::to_owned)).collect());
    }
    add("gradle", if repo.has("settings.gradle") { "settings.gradle" } else { "settings.gradle.kts" }, gradle_members(repo));
    add("maven", "pom.xml", maven_members(repo));
    Ok(all)
}

pub fn cargo_members(manifest: &toml::Table) -> Vec<String> {
    let workspace = manifest.get("workspace");
    let list = |name: &str| {
        workspace.and_then(|workspace| workspace.get(name)?.as_array()).into_iter().flatten().filter_map(toml::Value::as_str)
    };
    list("members").map(str::to_owned).chain(list("exclude").map(|path| format!("!{path}"))).collect()
}

/// `include(":app", "libs:core")` of Gradle's settings.
pub fn gradle_members(repo: &Repo<'_>) -> Vec<String> {
    let text = ["settings.gradle", "settings.gradle.kts"].iter().find_map(|file| repo.read(file)).unwrap_or_else(|| "".into());
    let mut all = Vec::new();
    let mut within = false;
    for line in text.lines() {
        let line = line.trim();
        within |= line.starts_with("include") && !line.starts_with("includeBuild");
        if within {
            let quote = if line.contains('"') { '"' } else { '\'' };
            all.extend(line.split(quote).skip(1).step_by(2).map(|name| name.trim_start_matches(':').replace(':', "/")));
            within = line.ends_with(',') || line.ends_with('(');
        }
    }
    all.truncate(MAX_MEMBERS);
    all
}

pub fn maven_members(repo: &Repo<'_>) -> Vec<String> {
    let text = repo.text("pom.xml");
    let names = text.split("<module>").skip(1).filter_map(|rest| Some(rest.split('<').next()?.trim().to_owned()));
    names.take(MAX_MEMBERS).collect()
}

/// Expands patterns such as `packages/*`; patterns with `!` exclude folders.
pub fn globbed(repo: &Repo<'_>, patterns: &[String]) -> Vec<String> {
    let (mut found, mut excluded) = (Expansion::default(), Expansion::default());
    for pattern in patterns.iter().take(MAX_PATTERNS) {
        let (pattern, all) = match pattern.strip_prefix('!') {
            Some(pattern) => (pattern, &mut excluded),
            None => (pattern.as_str(), &mut found),
        };
        let mut parts: Vec<&str> = pattern.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
        parts.dedup_by(|one, other| *one == "**" && *other == "**");
        // Nothing is named above the repository, or from the top of the file system.
        if parts.len() <= MAX_PARTS && !pattern.starts_with('/') && !parts.contains(&"..") {
            all.expand(repo, "", &parts);
            all.been.clear();
        }
    }
    found.folders.retain(|folder| !excluded.folders.contains(folder));
    found.folders.into_iter().take(MAX_MEMBERS).collect()
}

/// What patterns name.
#[derive(Default)]
struct Expansion {
    folders: BTreeSet<String>,
    /// Folders that were looked into for the rest of the pattern at hand, by how much of it that was.
    been: BTreeSet<(String, usize)>,
}

impl Expansion {
    fn expand(&mut self, repo: &Repo<'_>, at: &str, parts: &[&str]) {
        if self.folders.len() >= MAX_MEMBERS || at.matches('/').count() > 5 || !self.been.insert((at.to_owned(), parts.len())) {
            return;
        }
        let Some((part, rest)) = parts.split_first() else {
            if !at.is_empty() {
                self.folders.insert(at.to_owned());
            }
            return;
        };
        let is_pattern = part.contains(['*', '?', '{']);
        if is_pattern && !may_search(repo.list(at).len() * 64) {
            return;
        }
        if *part == "**" {
            self.expand(repo, at, rest);
            for folder in repo.folders(at) {
                self.expand(repo, &folder, parts);
            }
        } else if is_pattern {
            let (before, after) = part.split_once('*').unwrap_or((part, ""));
            for folder in repo.folders(at) {
                let name = folder.rsplit('/').next().unwrap_or(&folder);
                if name.len() >= before.len() + after.len() && name.starts_with(before) && name.ends_with(after) {
                    self.expand(repo, &folder, rest);
                }
            }
        } else {
            let folder = join(at, part);
            if repo.has_folder(&folder) {
                self.expand(repo, &folder, rest);
            }
        }
    }
}

/// The name of a member.
fn name_of(member: &Repo<'_>, folder: &str) -> String {
    let json = member.json("package.json").ok().flatten();
    let named = json.as_ref().and_then(|json| json.get("name")?.as_str().map(str::to_owned));
    let cargo = || member.toml("Cargo.toml").ok()??.get("package")?.get("name")?.as_str().map(str::to_owned);
    let python = || member.toml("pyproject.toml").ok()??.get("project")?.get("name")?.as_str().map(str::to_owned);
    let last = || folder.rsplit('/').next().unwrap_or(folder).to_owned();
    named.or_else(cargo).or_else(python).unwrap_or_else(last)
}

/// Lists the members that can be deployed. A repository that is not an application itself becomes a monorepo, or the plan
/// of the only member that is an application.
pub fn detect(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    let workspaces = workspaces(repo)?;
    let Some(first) = workspaces.first() else { return nested(repo, draft) };
    let folders: BTreeSet<String> = workspaces.iter().flat_map(|workspace| globbed(repo, &workspace.patterns)).collect();
    let text = repo.text(first.file);
    let line = first.patterns.first().and_then(|pattern| line_of(&text, pattern));
    let source = Source { file: first.file, line };
    if draft.plan.detection.build_tool.is_none() && first.tool != "workspaces" {
        draft.build_tool(first.tool, source, "describes a workspace");
    }
    members(repo, draft, folders, source, &format!("a member of the {} workspace", first.tool))
}

/// Finds applications in folders, if the root has none and there is no workspace.
fn nested(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    let is_something = !draft.plan.processes.is_empty() || draft.plan.build.output.is_some() || draft.plan.kind == Kind::Library;
    if is_something || draft.plan.detection.framework.is_some() || !draft.plan.questions.is_empty() {
        return Ok(());
    }
    let usual = [
        "frontend", "backend", "client", "server", "web", "api", "app", "apps", "services", "packages", "ui", "www", "site",
        "worker",
    ];
    let mut folders = BTreeSet::new();
    for folder in repo.folders("").into_iter().filter(|folder| usual.contains(&folder.as_str())) {
        folders.extend(repo.folders(&folder).into_iter().filter(|_| matches!(folder.as_str(), "apps" | "services" | "packages")));
        folders.insert(folder);
    }
    // A folder that merely has this repository's files in it is no member.
    let source = Source::file("");
    members(repo, draft, folders, source, "an independent application")
}

fn members(
    repo: &Repo<'_>,
    draft: &mut Draft,
    folders: BTreeSet<String>,
    source: Source<'_>,
    reason: &str,
) -> Result<(), PlanError> {
    let is_application = !draft.plan.processes.is_empty() || draft.plan.build.output.is_some();
    let mut all = Vec::new();
    let mut languages = BTreeSet::new();
    for folder in folders {
        let member = repo.folder(&folder);
        repo.check()?;
        let mut inner = Draft::default();
        // The error of a member is reported when that member is deployed.
        if crate::languages::detect(&member, &mut inner).is_err() || crate::declared::procfile(&member, &mut inner).is_err() {
            continue;
        }
        let plan = inner.finish();
        languages.extend(plan.detection.language.clone());
        let is_deployable = matches!(plan.kind, Kind::Web | Kind::Api | Kind::Worker | Kind::Cron | Kind::Static);
        // A worker that was only guessed is more likely a tool.
        let is_guess = plan.kind == Kind::Worker && plan.detection.framework.is_none() && !member.has("Procfile");
        if is_deployable && !is_guess {
            all.push(Member { path: truncate(&folder), name: truncate(&name_of(&member, &folder)), kind: plan.kind });
        }
    }
    for member in &all {
        let file = if source.file.is_empty() { member.path.as_str() } else { source.file };
        draft.add_evidence("members", &member.path, Source { file, line: source.line }, reason, 0.9);
    }
    draft.plan.members = all;
    if is_application || draft.plan.members.is_empty() {
        return Ok(());
    }
    if let [only] = draft.plan.members.as_slice() {
        let folder = only.path.clone();
        draft.plan.questions.clear();
        return enter(
            repo,
            draft,
            &folder,
            Source { file: source.file, line: source.line },
            "the only application in the workspace",
        );
    }
    draft.kind(Kind::Monorepo);
    if draft.plan.detection.language.is_none() && languages.len() == 1 {
        draft.plan.detection.language = languages.first().cloned();
    }
    languages.retain(|language| !draft.plan.detection.languages.contains(language));
    draft.plan.detection.languages.extend(languages);
    let list: Vec<&str> = draft.plan.members.iter().map(|member| member.path.as_str()).collect();
    let (list, first) = (list.join(", "), list[0].to_owned());
    draft.plan.questions.clear();
    draft.add_question(
        "build.root",
        &format!("this is a monorepo with several applications ({list}); each is a service of its own"),
        &format!("[build]\nroot = \"{first}\""),
    );
    Ok(())
}

/// Replaces the plan by that of one folder. Dependencies are installed at the root if the lockfile is there; other steps run
/// in the folder.
pub fn enter(repo: &Repo<'_>, draft: &mut Draft, folder: &str, source: Source<'_>, reason: &str) -> Result<(), PlanError> {
    let folder = folder.trim_matches('/').trim_start_matches("./");
    if folder.is_empty() || folder == "." {
        return Ok(());
    }
    let member = repo.folder(folder);
    let mut inner = Draft::default();
    crate::languages::detect(&member, &mut inner).map_err(|error| PlanError { file: join(folder, &error.file), ..error })?;
    crate::declared::others(&member, &mut inner);
    crate::declared::procfile(&member, &mut inner).map_err(|error| PlanError { file: join(folder, &error.file), ..error })?;
    let (outer_install, outer_tool) = (draft.plan.build.install.clone(), draft.plan.detection.build_tool.clone());
    let shares_lock = inner.plan.detection.language.as_deref() == Some("javascript")
        && draft.plan.detection.package_manager.is_some()
        && !["package-lock.json", "yarn.lock", "pnpm-lock.yaml", "bun.lock", "bun.lockb"].iter().any(|lock| member.has(lock));
    let within = |command: &str| format!("cd {folder} && {command}");
    let manager = draft.plan.detection.package_manager.clone().unwrap_or_default();
    let mut plan = inner.plan;
    for evidence in &mut plan.evidence {
        evidence.file = join(folder, &evidence.file);
    }
    plan.members = std::mem::take(&mut draft.plan.members);
    let kept = draft
        .plan
        .evidence
        .iter()
        .filter(|evidence| evidence.field == "members" || (shares_lock && evidence.field.contains("package_manager")));
    plan.evidence.retain(|evidence| !(shares_lock && evidence.field == "detection.package_manager"));
    plan.evidence.splice(0..0, kept.cloned().collect::<Vec<_>>());
    let build = plan.build.build.take();
    let name = name_of(&member, folder);
    plan.build.build = match outer_tool.as_deref() {
        Some("turbo") if build.is_some() => Some(format!("npx turbo run build --filter={name}")),
        Some("nx") if build.is_some() || member.has("project.json") => Some(format!("npx nx build {name}")),
        _ => build.map(|command| {
            let command = if shares_lock { command.replacen("npm run", &format!("{manager} run"), 1) } else { command };
            within(&command)
        }),
    };
    plan.build.install = if shares_lock { outer_install } else { plan.build.install.map(|command| within(&command)) };
    plan.build.release = plan.build.release.map(|command| within(&command));
    plan.build.output = plan.build.output.map(|output| if output == "." { folder.to_owned() } else { join(folder, &output) });
    for command in plan.processes.values_mut() {
        *command = within(command);
    }
    if shares_lock {
        plan.detection.package_manager = Some(manager);
    }
    plan.detection.build_tool = outer_tool.or(plan.detection.build_tool);
    for (tool, version) in &draft.plan.detection.versions {
        plan.detection.versions.entry(tool.clone()).or_insert_with(|| version.clone());
    }
    for evidence in &mut plan.evidence {
        let value = match evidence.field.as_str() {
            "build.install" => plan.build.install.clone(),
            "build.build" => plan.build.build.clone(),
            "build.release" => plan.build.release.clone(),
            "build.output" => plan.build.output.clone(),
            field => field.strip_prefix("processes.").and_then(|name| plan.processes.get(name).cloned()),
        };
        if let Some(value) = value {
            evidence.value = value;
        }
    }
    draft.plan = plan;
    draft.add_evidence("build.root", folder, source, reason, 0.9);
    Ok(())
}

/// The members that a change touches: in their folder, in that of a member they take, or in a file of the
/// workspace that all of them depend on.
///
/// # Errors
/// When a file that decides is malformed.
pub fn affected(tree: &dyn Tree, changed: &[&str]) -> Result<Vec<Member>, PlanError> {
    let repo = Repo::new(tree);
    let touched = touched(&repo, changed);
    repo.check().and(touched).map_err(PlanError::truncated)
}

fn touched(repo: &Repo<'_>, changed: &[&str]) -> Result<Vec<Member>, PlanError> {
    let mut draft = Draft::default();
    crate::languages::detect(repo, &mut draft)?;
    detect(repo, &mut draft)?;
    let folders: BTreeSet<String> = workspaces(repo)?.iter().flat_map(|workspace| globbed(repo, &workspace.patterns)).collect();
    let folders: BTreeSet<String> =
        folders.into_iter().chain(draft.plan.members.iter().map(|member| member.path.clone())).collect();
    let names: BTreeMap<String, &String> = folders.iter().map(|folder| (name_of(&repo.folder(folder), folder), folder)).collect();
    let taken_by = |folder: &String| -> BTreeSet<&String> {
        let member = repo.folder(folder);
        let manifests = ["package.json", "Cargo.toml", "pyproject.toml", "go.mod", "build.gradle", "build.gradle.kts", "pom.xml"];
        let text: String = manifests.iter().filter_map(|file| member.read(file)).map(|text| text.to_string()).collect();
        let mentioned = |name: &String, other: &String| {
            let last = other.rsplit('/').next().unwrap_or(other);
            // Where there is too much to search, a member takes the other: it is deployed once too often.
            !may_search(text.len())
                || text.contains(&format!("\"{name}\""))
                || text.contains(&format!("/{last}\""))
                || text.contains(&format!("{name} ="))
                || text.contains(&format!(":{last}"))
        };
        names.iter().filter(|(name, other)| **other != folder && mentioned(name, other)).map(|(_, other)| *other).collect()
    };
    let taken: BTreeMap<&String, BTreeSet<&String>> = folders.iter().map(|folder| (folder, taken_by(folder))).collect();
    let within =
        |path: &str| folders.iter().filter(|folder| path.starts_with(&format!("{folder}/"))).max_by_key(|folder| folder.len());
    let shared = [
        "package.json",
        "package-lock.json",
        "pnpm-lock.yaml",
        "pnpm-workspace.yaml",
        "yarn.lock",
        "bun.lock",
        "bun.lockb",
        "nx.json",
        "turbo.json",
        "lerna.json",
        "rush.json",
        "tsconfig.base.json",
        "Cargo.toml",
        "Cargo.lock",
        "go.work",
        "go.work.sum",
        "uv.lock",
        "pyproject.toml",
        "settings.gradle",
        "settings.gradle.kts",
        "build.gradle",
        "build.gradle.kts",
        "gradle.properties",
        "pom.xml",
        "gradle/libs.versions.toml",
    ];
    if changed.iter().any(|path| within(path).is_none() && shared.contains(path)) {
        return Ok(draft.plan.members);
    }
    let mut touched: BTreeSet<&String> = changed.iter().filter_map(|path| within(path)).collect();
    loop {
        let more: BTreeSet<&String> = folders
            .iter()
            .filter(|folder| !touched.contains(folder) && taken[folder].iter().any(|other| touched.contains(other)))
            .collect();
        if more.is_empty() {
            break;
        }
        touched.extend(more);
    }
    Ok(draft.plan.members.into_iter().filter(|member| touched.contains(&member.path)).collect())
}
