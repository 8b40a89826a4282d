//! Go modules.

use super::required;
use crate::plan::{Draft, Kind, PlanError, Source};
use crate::tree::Tree;

pub const FILE: &str = "go.mod";

const FRAMEWORKS: [(&str, &str); 5] = [
    ("github.com/gin-gonic/gin", "gin"),
    ("github.com/labstack/echo", "echo"),
    ("github.com/gofiber/fiber", "fiber"),
    ("github.com/go-chi/chi", "chi"),
    ("github.com/gorilla/mux", "gorilla"),
];

pub fn detect(tree: &dyn Tree, draft: &mut Draft) -> Result<(), PlanError> {
    let text = required(tree, FILE)?;
    if !text.lines().any(|line| line.starts_with("module ")) {
        return Err(PlanError { file: FILE.into(), line: None, message: "it has no `module` line".into() });
    }
    draft.language("go", Source::file(FILE));
    draft.package_manager("go", Source::file(FILE), "Go modules");
    if let Some((index, version)) = text.lines().enumerate().find_map(|(index, line)| Some((index, line.strip_prefix("go ")?))) {
        draft.version("go", version.trim(), Source { file: FILE, line: Some(index + 1) });
    }
    for (module, framework) in FRAMEWORKS {
        if text.contains(module) {
            draft.framework(framework, Source::line(FILE, &text, module), &format!("module {module}"));
            break;
        }
    }
    draft.install("go mod download", Source::file(FILE), "the modules it names");
    let mains = mains(tree);
    match mains.as_slice() {
        [] => draft.kind(Kind::Library),
        [(package, file), rest @ ..] => {
            let command = format!("go build -o bin/app {package}");
            let line = tree.read(file).and_then(|text| crate::tree::line_of(&text, "package main"));
            draft.build(&command, Source { file, line }, "package main");
            draft.kind(Kind::Web);
            draft.process(
                "web",
                "./bin/app",
                Source { file, line },
                "what the build makes",
                if rest.is_empty() { 0.9 } else { 0.5 },
            );
            draft.port(8080, Source::file(file), "the usual port of Go servers; PORT says the same", 0.7);
            if !rest.is_empty() {
                let all: Vec<_> = mains.iter().map(|(package, _)| package.as_str()).collect();
                draft.ask(
                    "build.build",
                    &format!("several main packages are here ({}); {package} was taken", all.join(", ")),
                    &format!("[build]\nbuild = \"go build -o bin/app {}\"", rest[0].0),
                );
            }
        }
    }
    Ok(())
}

/// Packages that make a program: the root, and folders of `cmd/`.
fn mains(tree: &dyn Tree) -> Vec<(String, String)> {
    let main_in = |folder: &str| {
        tree.list(folder).into_iter().filter(|name| name.ends_with(".go") && !name.ends_with("_test.go")).find_map(|name| {
            let path = if folder.is_empty() { name } else { format!("{folder}/{name}") };
            tree.read(&path)?.lines().any(|line| line.trim() == "package main").then_some(path)
        })
    };
    let mut mains = Vec::new();
    if let Some(file) = main_in("") {
        mains.push((".".to_owned(), file));
    }
    for name in tree.list("cmd") {
        if let Some(folder) = name.strip_suffix('/')
            && let Some(file) = main_in(&format!("cmd/{folder}"))
        {
            mains.push((format!("./cmd/{folder}"), file));
        }
    }
    mains
}
