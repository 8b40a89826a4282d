//! Rust with Cargo.

use super::{required, toml_table};
use crate::plan::{Draft, Kind, PlanError, Source};
use crate::tree::Tree;

pub const FILE: &str = "Cargo.toml";

const FRAMEWORKS: [&str; 6] = ["axum", "actix-web", "rocket", "warp", "poem", "salvo"];

pub fn detect(tree: &dyn Tree, draft: &mut Draft) -> Result<(), PlanError> {
    let text = required(tree, FILE)?;
    let manifest = toml_table(FILE, &text)?;
    draft.language("rust", Source::file(FILE));
    draft.package_manager("cargo", Source::file(FILE), "Cargo.toml is there");
    let dependencies = manifest.get("dependencies").and_then(toml::Value::as_table);
    if let Some(framework) = FRAMEWORKS.into_iter().find(|name| dependencies.is_some_and(|all| all.contains_key(*name))) {
        draft.framework(framework, Source::line(FILE, &text, framework), &format!("dependency {framework}"));
    }
    let Some(name) = manifest.get("package").and_then(|package| package.get("name")?.as_str()) else {
        draft.kind(Kind::Monorepo);
        draft.ask(
            "build.build",
            "this is a workspace; which member is to be deployed?",
            "[build]\nbuild = \"cargo install --locked --path member --root .\"\n[processes]\nweb = \"./bin/member\"",
        );
        return Ok(());
    };
    let declared: Vec<&str> = manifest
        .get("bin")
        .and_then(toml::Value::as_array)
        .map(|bins| bins.iter().filter_map(|bin| bin.get("name")?.as_str()).collect())
        .unwrap_or_default();
    let program = if tree.has("src/main.rs") && declared.is_empty() { Some(name) } else { declared.first().copied() };
    let Some(program) = program else {
        draft.kind(Kind::Library);
        return Ok(());
    };
    let locked = if tree.has("Cargo.lock") { " --locked" } else { "" };
    draft.build(&format!("cargo install{locked} --path . --root ."), Source::file(FILE), "Cargo builds it into bin/");
    draft.kind(Kind::Web);
    draft.process(
        "web",
        &format!("./bin/{program}"),
        Source::line(FILE, &text, "name ="),
        "the program that the build makes",
        if declared.len() > 1 { 0.5 } else { 0.9 },
    );
    draft.port(8080, Source::file(FILE), "the usual port of Rust servers; PORT says the same", 0.7);
    if declared.len() > 1 {
        draft.ask(
            "processes.web",
            &format!("several programs are built ({}); {program} was taken", declared.join(", ")),
            &format!("[processes]\nweb = \"./bin/{}\"", declared[1]),
        );
    }
    Ok(())
}
