//! Go modules and workspaces; Hugo.

use super::{Pin, pinned, version};
use crate::dependencies::Dependencies;
use crate::frameworks::{self, Found, Type};
use crate::plan::{Draft, Kind, PlanError, Source};
use crate::tree::{Repo, join, line_of};

const FILE: &str = "go.mod";

pub fn is_there(repo: &Repo<'_>) -> Option<String> {
    let marker = repo.first(&[FILE, "go.work", "main.go", "hugo.toml", "hugo.yaml", "hugo.json", "config/_default/hugo.toml"]);
    let old_hugo = || repo.first(&["config.toml", "config.yaml"]).filter(|_| repo.has("archetypes/default.md"));
    marker.or_else(old_hugo).map(str::to_owned)
}

pub fn detect(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    let marker = is_there(repo).unwrap_or_default();
    let text = repo.text(FILE);
    if repo.has(FILE) && !text.lines().any(|line| line.starts_with("module ")) {
        return Err(PlanError { file: FILE.into(), line: None, message: "it has no `module` line".into() });
    }
    draft.language("go", Source::file(&marker));
    let directive = |name: &str| {
        let find = |file: &str| {
            let text = repo.read(file)?;
            let (index, rest) =
                text.lines().enumerate().find_map(|(index, line)| Some((index, line.strip_prefix(name)?.trim())))?;
            Some(Pin::new(rest.trim_start_matches("go"), file, Some(index + 1)))
        };
        find(FILE).or_else(|| find("go.work"))
    };
    version(
        draft,
        "go",
        directive("toolchain ").or_else(|| pinned(repo, &["go", "golang"], &[(".go-version", "")])).or_else(|| directive("go ")),
    );
    let dependencies = modules(&text);
    let found = frameworks::find("go", &dependencies, repo);
    if let Some(found) = &found {
        draft.found(found);
        if found.framework.name == "hugo" {
            draft.build("hugo --gc --minify", found.source(), "how Hugo makes the pages");
            draft.files(found, "public");
            return Ok(());
        }
    }
    if repo.has(FILE) {
        draft.package_manager("go", Source::file(FILE), "Go modules");
        if repo.has("vendor/modules.txt") {
            draft.add_evidence("build.install", "", Source::file("vendor/modules.txt"), "the modules are in the repository", 1.0);
        } else {
            draft.install("go mod download", Source::file(FILE), "the modules it names");
        }
    } else if repo.has("go.work") {
        draft.package_manager("go", Source::file("go.work"), "a Go workspace");
        draft.install("go work sync", Source::file("go.work"), "the modules it names");
    }
    programs(repo, found.as_ref(), draft);
    dependencies.conclude("go", draft);
    Ok(())
}

fn modules(text: &str) -> Dependencies {
    let mut all = Dependencies::default();
    let mut within = false;
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        let required = match line.strip_prefix("require ") {
            Some(rest) if rest.trim_start().starts_with('(') => {
                within = true;
                continue;
            }
            Some(rest) => rest.trim(),
            None if within && line.starts_with(')') => {
                within = false;
                continue;
            }
            None if within => line,
            None => continue,
        };
        let mut words = required.split_whitespace();
        // What others ask for says nothing of this program.
        if let Some(name) = words.next().filter(|name| !name.starts_with("//") && !required.ends_with("// indirect")) {
            all.add(name, FILE, Some(index + 1));
        }
    }
    all
}

fn programs(repo: &Repo<'_>, found: Option<&Found>, draft: &mut Draft) {
    let mains = mains(repo);
    let usual =
        |name: &str| ["server", "web", "api", "app", "http", "www"].iter().position(|usual| name.ends_with(&format!("/{usual}")));
    let main = mains.iter().min_by_key(|(package, _)| if package == "." { 0 } else { usual(package).map_or(9, |at| at + 1) });
    let Some((package, file)) = main else { return draft.kind(Kind::Library) };
    let line = line_of(&repo.text(file), "package main");
    let source = Source { file, line };
    draft.build(&format!("go build -o bin/app {package}"), source, "package main");
    let is_worker = found.is_some_and(|found| found.framework.kind == Type::Worker);
    let process = if is_worker { "worker" } else { "web" };
    if found.is_none() {
        draft.kind(Kind::Web);
    }
    draft.process(process, "./bin/app", source, "what the build makes", if mains.len() == 1 { 0.9 } else { 0.5 });
    if !is_worker {
        match super::port_in(&repo.text(file)) {
            Some((port, line)) => draft.port(port, Source { file, line: Some(line) }, "default beside PORT in this file", 0.9),
            None => draft.default_port(found, 8080, found.map_or(source, Found::source)),
        }
    }
    if mains.len() > 1 {
        let all: Vec<_> = mains.iter().map(|(package, _)| package.as_str()).collect();
        let other = all.iter().find(|other| **other != package.as_str()).copied().unwrap_or(".");
        draft.add_question(
            "build.build",
            &format!("found several main packages ({}); using {package}", all.join(", ")),
            &format!("[build]\nbuild = \"go build -o bin/app {other}\""),
        );
    }
}

/// Packages that make a program: the root, and folders of `cmd/`; of a workspace, its modules.
fn mains(repo: &Repo<'_>) -> Vec<(String, String)> {
    let main_in = |folder: &str| {
        let files = repo.all_ending(folder, ".go").into_iter().filter(|name| !name.ends_with("_test.go"));
        files.take(50).find(|path| repo.text(path).lines().take(60).any(|line| line.trim() == "package main"))
    };
    let mut mains = Vec::new();
    let mut folders = vec![String::new()];
    folders.extend(repo.folders("cmd").into_iter().take(200));
    for line in repo.text("go.work").lines().take(1000) {
        let member = line.trim().trim_start_matches("use ").trim();
        if let Some(folder) = member.strip_prefix("./").filter(|folder| !folder.is_empty()) {
            folders.push(folder.to_owned());
            folders.extend(repo.folders(&join(folder, "cmd")).into_iter().take(200));
        }
    }
    for folder in folders {
        if let Some(file) = main_in(&folder) {
            mains.push((if folder.is_empty() { ".".into() } else { format!("./{folder}") }, file));
        }
    }
    mains
}
