//! Files of Heroku and Dokku: `Procfile`, `app.json` and `Aptfile`.

use serde_json::Value;

use super::{check_process_name, too_many_processes};
use crate::bounds::{MAX_PROCESSES, truncate_to};
use crate::plan::{Draft, PlanError, Source};
use crate::tree::{Repo, line_of};

/// Names of add-ons, and the service that each provides.
const ADDONS: [(&str, &str); 14] = [
    ("heroku-postgresql", "postgresql"),
    ("heroku-redis", "redis"),
    ("rediscloud", "redis"),
    ("openredis", "redis"),
    ("cleardb", "mysql"),
    ("jawsdb-maria", "mariadb"),
    ("jawsdb", "mysql"),
    ("mongolab", "mongodb"),
    ("ormongo", "mongodb"),
    ("cloudamqp", "rabbitmq"),
    ("heroku-kafka", "kafka"),
    ("bonsai", "elasticsearch"),
    ("searchbox", "elasticsearch"),
    ("memcachier", "memcached"),
];

/// Applies `app.json`: variables, add-ons, the health check.
pub fn app_json(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    const FILE: &str = "app.json";
    let Some(json) = repo.json(FILE)? else { return Ok(()) };
    let text = repo.text(FILE);
    // Expo and other tools use a file of this name, too.
    if json.get("expo").is_some() {
        return Ok(());
    }
    let at = |name: &str| Source { file: FILE, line: line_of(&text, &format!("\"{name}\"")) };
    for (name, value) in json.get("env").and_then(Value::as_object).into_iter().flatten() {
        let value = value.as_str().or_else(|| value.get("value")?.as_str());
        if let Some(value) = value {
            draft.plan.build.env.insert(name.clone(), value.to_owned());
        }
    }
    for addon in json.get("addons").and_then(Value::as_array).into_iter().flatten() {
        let name = addon.as_str().or_else(|| addon.get("plan")?.as_str()).unwrap_or_default();
        let name = name.split(':').next().unwrap_or_default();
        if let Some((_, need)) = ADDONS.iter().find(|(addon, _)| name == *addon) {
            draft.need(need, Source { file: FILE, line: line_of(&text, name) }, &format!("the add-on {name}"));
        }
    }
    let checks = json.pointer("/healthchecks/web").and_then(Value::as_array).into_iter().flatten();
    for path in checks.filter_map(|check| check.get("path")?.as_str()).filter(|path| path.starts_with('/')).take(1) {
        draft.health_check(path, at("path"), "set in app.json", 1.0);
    }
    // Dokku runs these before a release, Heroku after the first one.
    for script in ["predeploy", "postdeploy"] {
        if let Some(command) =
            json.pointer(&format!("/scripts/dokku/{script}")).and_then(Value::as_str).filter(|_| script == "predeploy")
        {
            draft.release(command, at(script), "set in app.json");
        }
    }
    Ok(())
}

/// Applies a `Procfile`: its process types replace the detected ones, and `release` is the release command.
pub fn procfile(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    const FILE: &str = "Procfile";
    let Some(text) = repo.read(FILE) else {
        return Ok(());
    };
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let number = Some(index + 1);
        let malformed = || PlanError {
            file: FILE.into(),
            line: number,
            message: format!("`{}` is not `type: command`", truncate_to(line, 200)),
        };
        let (name, command) = line.split_once(':').ok_or_else(malformed)?;
        let (name, command) = (name.trim(), command.trim());
        if command.is_empty() {
            return Err(malformed());
        }
        check_process_name(name, FILE, number)?;
        // `release` is none.
        if found.len() >= MAX_PROCESSES {
            return Err(too_many_processes(FILE, number));
        }
        found.push((name.to_owned(), command.to_owned(), Source { file: FILE, line: number }));
    }
    if found.iter().any(|(name, ..)| name != "release") {
        draft.clear("processes.");
    }
    for (name, command, source) in found {
        if name == "release" {
            draft.release(&command, source, "set in Procfile");
        } else {
            draft.process(&name, &command, source, "set in Procfile", 1.0);
        }
    }
    Ok(())
}

/// `Aptfile`: packages of Debian's, a line each. Other archives (`:repo:…`) and files (`https://…`) are not supported.
pub fn aptfile(repo: &Repo<'_>, draft: &mut Draft) {
    const FILE: &str = "Aptfile";
    for (index, line) in repo.text(FILE).lines().enumerate() {
        let names = line.split('#').next().filter(|names| !names.contains(':')).unwrap_or_default();
        for package in names.split_whitespace() {
            draft.system_package(package, Source { file: FILE, line: Some(index + 1) }, "the Aptfile names it");
        }
    }
}
