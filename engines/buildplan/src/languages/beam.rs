//! Elixir with Mix, Erlang with rebar3, Gleam.

use super::{Pin, pinned, version};
use crate::dependencies::Dependencies;
use crate::frameworks::{self, Found, Type};
use crate::plan::{Draft, Kind, PlanError, Source};
use crate::tree::{Repo, line_of};

pub fn elixir_is_there(repo: &Repo<'_>) -> Option<String> {
    repo.first(&["mix.exs"]).map(str::to_owned)
}

pub fn elixir(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    const FILE: &str = "mix.exs";
    let text = repo.text(FILE);
    draft.language("elixir", Source::file(FILE));
    draft.package_manager("mix", Source::file(FILE), "mix.exs exists");
    let wanted = text.lines().enumerate().find_map(|(index, line)| {
        let (_, rest) = line.split_once("elixir: \"")?;
        Some(Pin::new(rest.split('"').next()?, FILE, Some(index + 1)))
    });
    version(
        draft,
        "elixir",
        pinned(repo, &["elixir"], &[(".elixir-version", "")]).or_else(|| buildpack(repo, "elixir")).or(wanted),
    );
    version(draft, "erlang", pinned(repo, &["erlang"], &[(".erlang-version", "")]).or_else(|| buildpack(repo, "erlang")));
    let mut dependencies = Dependencies::default();
    // The applications of an umbrella say what they take themselves.
    let umbrella = if text.contains("apps_path:") { repo.folders("apps") } else { Vec::new() };
    for file in std::iter::once(FILE.to_owned()).chain(umbrella.iter().map(|folder| format!("{folder}/{FILE}"))) {
        for (index, line) in repo.text(&file).lines().enumerate() {
            if let Some(rest) = line.trim().trim_start_matches('[').trim().strip_prefix("{:") {
                let name = rest.split(|c: char| !(c.is_alphanumeric() || c == '_')).next().unwrap_or_default();
                dependencies.add(name, &file, Some(index + 1));
            }
        }
    }
    let found = frameworks::find("elixir", &dependencies, repo);
    if let Some(found) = &found {
        draft.found(found);
    }
    draft.plan.build.env.insert("MIX_ENV".into(), "prod".into());
    draft.install(
        "mix local.hex --force --if-missing && mix local.rebar --force --if-missing && mix deps.get --only prod",
        Source::file(if repo.has("mix.lock") { "mix.lock" } else { FILE }),
        "the packages it names",
    );
    let phoenix = found.as_ref().is_some_and(|found| found.framework.name == "phoenix");
    let assets = ["assets.deploy", "\"assets.deploy\""].iter().find_map(|alias| line_of(&text, alias)).filter(|_| phoenix);
    let release = text.lines().position(|line| line.trim_start().starts_with("releases:")).map(|index| index + 1);
    let app = text.lines().find_map(|line| line.trim().strip_prefix("app: :").map(|rest| rest.trim_end_matches(',').to_owned()));
    let mut steps = vec!["mix compile"];
    if assets.is_some() {
        steps.push("mix assets.deploy");
    }
    if release.is_some() {
        steps.push("mix release --overwrite");
    }
    draft.build(&steps.join(" && "), Source { file: FILE, line: assets.or(release) }, "how Mix builds it");
    let is_application = found.is_some() || text.contains("mod: {");
    if !is_application {
        draft.kind(Kind::Library);
        return Ok(());
    }
    let process = if found.as_ref().is_none_or(|found| found.framework.kind == Type::Worker) { "worker" } else { "web" };
    match (&app, release) {
        (Some(app), Some(line)) => {
            draft.process(
                process,
                &format!("_build/prod/rel/{app}/bin/{app} start"),
                Source { file: FILE, line: Some(line) },
                "the release that Mix makes",
                0.9,
            );
        }
        _ => {
            let command = found.as_ref().and_then(|found| found.framework.start).unwrap_or("mix run --no-halt");
            let source = found.as_ref().map_or_else(|| Source::file(FILE), Found::source);
            draft.process(process, command, source, "how Mix starts it", 0.9);
        }
    }
    if process == "web" {
        draft.default_port(found.as_ref(), 4000, found.as_ref().map_or_else(|| Source::file(FILE), Found::source));
    }
    if phoenix {
        draft.plan.build.env.insert("PHX_SERVER".into(), "true".into());
    }
    if let Some(ecto) = dependencies.find("ecto_sql").filter(|_| repo.has_folder("priv/repo/migrations")) {
        let source = Source { file: &ecto.file, line: ecto.line };
        match (&app, release) {
            (Some(app), Some(_)) if repo.has(&format!("lib/{app}/release.ex")) => {
                let module = camel(app);
                draft.release(
                    &format!("_build/prod/rel/{app}/bin/{app} eval {module}.Release.migrate"),
                    source,
                    "Ecto's migrations",
                );
            }
            _ => draft.release("mix ecto.migrate", source, "Ecto's migrations"),
        }
    }
    dependencies.conclude("elixir", draft);
    Ok(())
}

/// `elixir_version=1.17.3`, as the buildpack for Heroku reads it.
fn buildpack(repo: &Repo<'_>, tool: &str) -> Option<Pin> {
    const FILE: &str = "elixir_buildpack.config";
    let text = repo.read(FILE)?;
    let key = format!("{tool}_version=");
    let (index, value) = text.lines().enumerate().find_map(|(index, line)| Some((index, line.trim().strip_prefix(&key)?)))?;
    Some(Pin::new(value, FILE, Some(index + 1)))
}

fn camel(name: &str) -> String {
    let words = name.split('_').map(|word| {
        let mut letters = word.chars();
        letters.next().map(|first| first.to_uppercase().chain(letters).collect::<String>()).unwrap_or_default()
    });
    words.collect()
}

pub fn erlang_is_there(repo: &Repo<'_>) -> Option<String> {
    repo.first(&["rebar.config", "erlang.mk"]).map(str::to_owned)
}

pub fn erlang(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    const FILE: &str = "rebar.config";
    let text = repo.text(FILE);
    draft.language("erlang", Source::file(FILE));
    draft.package_manager("rebar3", Source::file(FILE), "rebar.config exists");
    version(draft, "erlang", pinned(repo, &["erlang"], &[(".erlang-version", "")]));
    let mut dependencies = Dependencies::default();
    let from = text.find("{deps").map_or(0, |at| text[..at].matches('\n').count());
    for (index, line) in text.lines().enumerate().skip(from) {
        for part in line.split(['{', '[', ',', ']', '}']) {
            let name = part.trim();
            if !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_') {
                dependencies.add(name, FILE, Some(index + 1));
            }
        }
    }
    let found = frameworks::find("erlang", &dependencies, repo);
    if let Some(found) = &found {
        draft.found(found);
    }
    draft.install("rebar3 get-deps", Source::file(FILE), "the packages it names");
    if let Some((line, name)) = text.lines().enumerate().find_map(|(index, line)| {
        let (_, rest) = line.split_once("{release,")?;
        Some((index + 1, rest.trim().trim_start_matches('{').trim().split([',', '}']).next()?.trim().to_owned()))
    }) {
        let source = Source { file: FILE, line: Some(line) };
        draft.build("rebar3 as prod release", source, "a release is described");
        let process = if found.is_some() { "web" } else { "worker" };
        draft.process(
            process,
            &format!("_build/prod/rel/{name}/bin/{name} foreground"),
            source,
            "the release that rebar3 makes",
            0.9,
        );
        if process == "web" {
            draft.default_port(found.as_ref(), 8080, source);
        }
    } else {
        draft.build("rebar3 compile", Source::file(FILE), "how rebar3 builds it");
        if found.is_none() {
            draft.kind(Kind::Library);
        } else {
            draft.add_question(
                "processes.web",
                "no release is described in rebar.config",
                "[processes]\nweb = \"erl -pa _build/default/lib/*/ebin -noshell -s my_app\"",
            );
        }
    }
    dependencies.conclude("erlang", draft);
    Ok(())
}

pub fn gleam_is_there(repo: &Repo<'_>) -> Option<String> {
    repo.first(&["gleam.toml"]).map(str::to_owned)
}

pub fn gleam(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    const FILE: &str = "gleam.toml";
    const SHIPMENT: &str = "gleam export erlang-shipment";
    const SHIPPED: &str = "./build/erlang-shipment/entrypoint.sh run";
    let table = repo.toml(FILE)?.unwrap_or_default();
    let text = repo.text(FILE);
    draft.language("gleam", Source::file(FILE));
    draft.package_manager("gleam", Source::file(FILE), "gleam.toml exists");
    let own = table.get("gleam").and_then(toml::Value::as_str).map(|wanted| Pin::new(wanted, FILE, line_of(&text, "gleam =")));
    version(draft, "gleam", own.or_else(|| pinned(repo, &["gleam"], &[])));
    version(draft, "erlang", pinned(repo, &["erlang"], &[]));
    let mut dependencies = Dependencies::default();
    for name in table.get("dependencies").and_then(toml::Value::as_table).into_iter().flat_map(|all| all.keys()) {
        dependencies.add(name, FILE, line_of(&text, &format!("{name} =")));
    }
    let found = frameworks::find("gleam", &dependencies, repo);
    draft.install("gleam deps download", Source::file(FILE), "the packages it names");
    match &found {
        Some(found) => {
            draft.found(found);
            if found.framework.kind.is_files() {
                draft.build("gleam run -m lustre/dev build app --minify --outdir=dist", found.source(), "how Lustre is built");
                draft.files(found, "dist");
            } else {
                draft.build(SHIPMENT, found.source(), "everything needed to run");
                draft.process("web", SHIPPED, found.source(), "what the build makes", 0.9);
                draft.default_port(Some(found), 8000, found.source());
            }
        }
        None => {
            let name = table.get("name").and_then(toml::Value::as_str).unwrap_or_default();
            let main = format!("src/{name}.gleam");
            match line_of(&repo.text(&main), "pub fn main") {
                Some(line) => {
                    let source = Source { file: &main, line: Some(line) };
                    draft.build(SHIPMENT, source, "everything needed to run");
                    draft.process("worker", SHIPPED, source, "it has a main function", 0.7);
                }
                None => {
                    draft.build("gleam build", Source::file(FILE), "how Gleam builds it");
                    draft.kind(Kind::Library);
                }
            }
        }
    }
    dependencies.conclude("gleam", draft);
    Ok(())
}
