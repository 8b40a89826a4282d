//! Deno: its settings, its tasks, and what is imported from where.

use serde_json::Value;

use super::{pinned, version};
use crate::dependencies::Dependencies;
use crate::frameworks::{self, Found};
use crate::plan::{Draft, Kind, PlanError, Source};
use crate::tree::{Repo, line_of};

const FILES: [&str; 2] = ["deno.json", "deno.jsonc"];

pub fn is_there(repo: &Repo<'_>) -> Option<String> {
    repo.first(&[FILES[0], FILES[1], "deno.lock"]).map(str::to_owned)
}

pub fn detect(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    let marker = is_there(repo).unwrap_or_default();
    draft.language("deno", Source::file(&marker));
    draft.package_manager("deno", Source::file(&marker), "its settings exist");
    version(draft, "deno", pinned(repo, &["deno"], &[(".deno-version", "v"), (".dvmrc", "v")]));
    let file = repo.first(&FILES).unwrap_or(FILES[0]);
    let json = repo.json(file)?.unwrap_or(Value::Null);
    let text = repo.text(file);
    let mut dependencies = Dependencies::default();
    let imports = json.get("imports").and_then(Value::as_object).into_iter().flatten();
    for (name, target) in imports {
        let target = target.as_str().unwrap_or_default();
        let line = line_of(&text, &format!("\"{name}\""));
        // `jsr:@oak/oak@17`, `npm:hono@4`, `https://deno.land/x/oak@v12/mod.ts`
        let package = target.trim_start_matches("jsr:").trim_start_matches("npm:").trim_start_matches("https://deno.land/x/");
        let package = package.get(1..).and_then(|rest| rest.find('@')).map_or(package, |at| &package[..=at]);
        for name in [name.trim_start_matches('$').trim_end_matches('/'), package.trim_start_matches('/')] {
            dependencies.add(name, file, line);
        }
    }
    let found = frameworks::find("deno", &dependencies, repo);
    if let Some(found) = &found {
        draft.found(found);
    }
    let task = |name: &str| json.get("tasks")?.get(name).and_then(|task| task.as_str().or_else(|| task.get("command")?.as_str()));
    if task("build").is_some() {
        draft.build("deno task build", Source::line(file, &text, "\"build\""), "task \"build\"");
    }
    let entry = ["main.ts", "server.ts", "mod.ts", "index.ts", "app.ts", "src/main.ts", "main.js", "server.js"];
    if found.as_ref().is_some_and(|found| found.framework.kind.is_files()) {
        if let Some(found) = &found {
            draft.files(found, found.framework.output.unwrap_or("_site"));
        }
    } else if let Some(name) = ["start", "serve", "preview"].into_iter().find(|name| task(name).is_some()) {
        draft.process(
            "web",
            &format!("deno task {name}"),
            Source::line(file, &text, &format!("\"{name}\"")),
            &format!("task \"{name}\""),
            1.0,
        );
    } else if let Some(main) = repo.first(&entry) {
        draft.process(
            "web",
            &format!("deno run --allow-all {main}"),
            Source::file(main),
            "a file of this name usually starts it",
            0.8,
        );
    } else {
        draft.kind(Kind::Library);
    }
    if let Some(main) = repo.first(&entry) {
        let (frozen, source, reason) = if repo.has("deno.lock") {
            (" --frozen", Source::file("deno.lock"), "the versions in the lockfile")
        } else {
            ("", Source::file(main), "what it imports")
        };
        draft.install(&format!("deno cache{frozen} {main}"), source, reason);
        // Beside the program, which finds there what was fetched.
        draft.plan.build.env.insert("DENO_DIR".into(), ".deno".into());
    }
    if draft.plan.processes.contains_key("web") {
        let source = found.as_ref().map_or_else(|| Source::file(&marker), Found::source);
        draft.default_port(found.as_ref(), 8000, source);
    }
    dependencies.conclude("deno", draft);
    Ok(())
}
