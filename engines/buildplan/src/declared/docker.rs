//! The Dockerfile and the compose file of a repository.

use serde_json::Value;

use crate::bounds::{MAX_LIST_ITEMS, truncate};
use crate::plan::{Draft, Kind, Member, PlanError, Source};
use crate::tree::{Repo, join, line_where};

/// Names of a Dockerfile.
pub const DOCKERFILES: [&str; 2] = ["Dockerfile", "Containerfile"];
const COMPOSE: [&str; 4] = ["compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml"];

/// Applies a Dockerfile: the given one, or the one with a default name.
pub fn dockerfile(repo: &Repo<'_>, named: Option<&str>, draft: &mut Draft) -> Result<(), PlanError> {
    let all: Vec<String> = repo.list("").iter().filter(|name| is_dockerfile(name)).cloned().collect();
    let file = match named {
        Some("none") => return Ok(()),
        Some(file) if repo.has(file) => file.to_owned(),
        Some(file) => {
            return Err(PlanError {
                file: "capsule.toml".into(),
                line: None,
                message: format!("dockerfile names `{file}`, which does not exist"),
            });
        }
        None => match DOCKERFILES.iter().find(|name| repo.has(name)) {
            Some(file) => (*file).to_owned(),
            None if all.is_empty() => return Ok(()),
            None => {
                draft.add_question(
                    "build.dockerfile",
                    &format!("none of the Dockerfiles ({}) is called Dockerfile; no Dockerfile is used", all.join(", ")),
                    &format!("[build]\ndockerfile = \"{}\"", all[0]),
                );
                return Ok(());
            }
        },
    };
    let read = Dockerfile::read(&repo.text(&file));
    let Some(from) = read.from else {
        return Err(PlanError { file, line: None, message: "it has no FROM".into() });
    };
    draft.clear("processes.");
    draft.clear("build.");
    draft.plan.questions.clear();
    draft.plan.build.dockerfile = Some(file.clone());
    draft.add_evidence(
        "build.dockerfile",
        &file,
        Source { file: &file, line: Some(from) },
        "the repository has a Dockerfile",
        if named.is_none() && all.len() > 1 { 0.7 } else { 1.0 },
    );
    if let Some((command, line)) = read.command {
        draft.process("web", &command, Source { file: &file, line: Some(line) }, "what the image runs", 1.0);
    } else {
        draft.process("web", "", Source { file: &file, line: Some(from) }, "what its base image runs", 0.8);
    }
    if !matches!(draft.plan.kind, Kind::Web | Kind::Api | Kind::Worker | Kind::Cron) {
        draft.kind(Kind::Web);
    }
    match read.port {
        Some((port, line)) => {
            if draft.plan.kind == Kind::Worker {
                draft.kind(Kind::Web);
            }
            draft.port(port, Source { file: &file, line: Some(line) }, "EXPOSE", 1.0);
        }
        None if draft.plan.networking.port.is_none() => {
            draft.add_question(
                "networking.port",
                &format!("{file} has no EXPOSE; the port is unknown"),
                "[networking]\nport = 8080",
            );
        }
        None => {}
    }
    if let Some((path, line)) = read.health {
        draft.health_check(&path, Source { file: &file, line: Some(line) }, "HEALTHCHECK", 0.9);
    }
    if named.is_none() && all.len() > 1 {
        let others: Vec<&str> = all.iter().filter(|other| **other != file).map(String::as_str).collect();
        draft.add_question(
            "build.dockerfile",
            &format!("there are other Dockerfiles ({}); using {file}", others.join(", ")),
            &format!("[build]\ndockerfile = \"{}\"", others[0]),
        );
    }
    Ok(())
}

fn is_dockerfile(name: &str) -> bool {
    DOCKERFILES.iter().any(|usual| {
        name == *usual
            || (name.starts_with(&format!("{usual}.")) && !name.ends_with(".dockerignore"))
            || name.ends_with(&format!(".{usual}"))
            || name.ends_with(&format!(".{}", usual.to_lowercase()))
    })
}

/// The settings of the last stage of a Dockerfile.
#[derive(Default)]
struct Dockerfile {
    from: Option<usize>,
    command: Option<(String, usize)>,
    port: Option<(u16, usize)>,
    health: Option<(String, usize)>,
}

impl Dockerfile {
    fn read(text: &str) -> Self {
        let mut read = Self::default();
        let (mut entrypoint, mut command) = (None, None);
        let mut lines = text.lines().enumerate();
        while let Some((index, line)) = lines.next() {
            let mut line = line.trim().to_owned();
            if line.starts_with('#') {
                continue;
            }
            while line.ends_with('\\') {
                line.pop();
                match lines.next() {
                    Some((_, next)) if next.trim().starts_with('#') => line.push('\\'),
                    Some((_, next)) => line.push_str(next.trim()),
                    None => break,
                }
            }
            let Some((instruction, rest)) = line.split_once(char::is_whitespace) else { continue };
            let (rest, number) = (rest.trim(), index + 1);
            match instruction.to_ascii_uppercase().as_str() {
                "FROM" => {
                    (entrypoint, command) = (None, None);
                    read = Self { from: Some(number), ..Self::default() };
                }
                "EXPOSE" => {
                    let first = rest.split_whitespace().find(|word| !word.to_ascii_lowercase().ends_with("/udp"));
                    let first = first.and_then(|word| word.split('/').next()?.parse().ok());
                    read.port = read.port.or_else(|| Some((first?, number)));
                }
                "ENTRYPOINT" => entrypoint = Some((words(rest), number)),
                "CMD" => command = Some((words(rest), number)),
                "HEALTHCHECK" => {
                    read.health = rest.split_once("://").and_then(|(_, url)| {
                        let (_, path) = url.split_once('/')?;
                        let path = path.split([' ', '"', '\'', '|', ']', ',', ')']).next().unwrap_or_default();
                        Some((format!("/{path}"), number))
                    });
                }
                _ => {}
            }
        }
        read.command = match (entrypoint, command) {
            (Some((first, line)), Some((rest, _))) => Some((format!("{first} {rest}"), line)),
            (Some(one), None) | (None, Some(one)) => Some(one),
            (None, None) => None,
        };
        read
    }
}

/// Converts a command, in exec or shell form, to a shell command.
fn words(text: &str) -> String {
    let Ok(words) = serde_json::from_str::<Vec<String>>(text) else { return text.to_owned() };
    let plain = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_alphanumeric() || "-_./:=,@%+$".contains(c));
    let quoted = words.iter().map(|word| if plain(word) { word.clone() } else { format!("'{}'", word.replace('\'', "'\\''")) });
    quoted.collect::<Vec<_>>().join(" ")
}

/// Names of images, and the service that each provides.
const IMAGES: [(&str, &str); 19] = [
    ("postgres", "postgresql"),
    ("postgis", "postgresql"),
    ("pgvector", "postgresql"),
    ("timescaledb", "postgresql"),
    ("mysql", "mysql"),
    ("mariadb", "mariadb"),
    ("redis", "redis"),
    ("valkey", "redis"),
    ("mongo", "mongodb"),
    ("rabbitmq", "rabbitmq"),
    ("kafka", "kafka"),
    ("redpanda", "kafka"),
    ("elasticsearch", "elasticsearch"),
    ("opensearch", "opensearch"),
    ("memcached", "memcached"),
    ("nats", "nats"),
    ("minio", "s3"),
    ("clickhouse", "clickhouse"),
    ("mailpit", "smtp"),
];

/// Applies a compose file: the services that the application needs and, if images are built (`containers`), the
/// settings of the application.
pub fn compose(repo: &Repo<'_>, containers: bool, draft: &mut Draft) -> Result<(), PlanError> {
    let Some(file) = repo.first(&COMPOSE) else { return Ok(()) };
    let Some(yaml) = repo.yaml(file)? else { return Ok(()) };
    let text = repo.text(file);
    let Some(services) = yaml.get("services").and_then(Value::as_object) else { return Ok(()) };
    let at = |name: &str| {
        let key = format!("{name}:");
        Source { file, line: line_where(&text, |line| line.trim() == key) }
    };
    let mut built: Vec<(&String, &Value)> = Vec::new();
    for (name, service) in services {
        if service.get("build").is_some() {
            built.push((name, service));
        } else if let Some(image) = service.get("image").and_then(Value::as_str) {
            let last = image.rsplit('/').next().unwrap_or(image).split([':', '@']).next().unwrap_or_default();
            if let Some((_, need)) = IMAGES.iter().find(|(known, _)| last == *known || last.starts_with(&format!("{known}-"))) {
                draft.need(need, at(name), &format!("the service {name} of the compose file"));
            }
        }
    }
    if !containers || built.is_empty() {
        return Ok(());
    }
    draft.plan.build.compose = Some(file.to_owned());
    draft.add_evidence("build.compose", file, Source { file, line: None }, "the repository has a compose file", 1.0);
    let context = |service: &Value| {
        let build = service.get("build").unwrap_or(&Value::Null);
        let path = build.as_str().or_else(|| build.get("context")?.as_str()).unwrap_or(".");
        path.trim_start_matches("./").trim_end_matches('/').to_owned()
    };
    if let [(name, service)] = built.as_slice() {
        let folder = context(service);
        let command = service.get("command");
        let command = command.and_then(|command| {
            let words = command.as_array().map(|words| words.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "));
            command.as_str().map(str::to_owned).or(words)
        });
        if let Some(command) = command {
            draft.clear("processes.");
            draft.process("web", &command, at(name), &format!("the service {name} of the compose file"), 1.0);
        }
        if let Some(port) = port_of(service) {
            draft.port(port, at(name), &format!("the service {name} of the compose file"), 1.0);
        }
        if !folder.is_empty() && folder != "." {
            draft.plan.members = vec![Member { path: truncate(&folder), name: truncate(name), kind: Kind::Web }];
        }
        return Ok(());
    }
    draft.plan.members.clear();
    draft.clear("processes.");
    draft.clear("build.install");
    draft.clear("build.build");
    draft.plan.detection.framework = None;
    draft.clear("detection.framework");
    draft.plan.evidence.retain(|evidence| evidence.field != "members");
    for (name, service) in built.into_iter().take(MAX_LIST_ITEMS) {
        let folder = context(service);
        let kind = if port_of(service).is_some() { Kind::Web } else { Kind::Worker };
        let path = if folder.is_empty() { ".".to_owned() } else { join("", &folder) };
        draft.add_evidence("members", name, at(name), "a service that the compose file builds", 1.0);
        draft.plan.members.push(Member { path: truncate(&path), name: truncate(name), kind });
    }
    draft.kind(Kind::Monorepo);
    draft.plan.questions.clear();
    Ok(())
}

/// The container port that a service publishes first.
fn port_of(service: &Value) -> Option<u16> {
    let first = service.get("ports").or_else(|| service.get("expose"))?.as_array()?.first()?;
    if let Some(target) = first.get("target") {
        return u16::try_from(target.as_u64()?).ok();
    }
    let text = first.as_str().map_or_else(|| first.to_string(), str::to_owned);
    text.split('/').next()?.rsplit(':').next()?.trim_end_matches('}').parse().ok()
}
