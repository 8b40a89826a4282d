//! `capsule plan` and `capsule init`: how a folder would be built and run.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{anyhow, bail};
use capsule_builder::archive;
use capsule_buildplan::{Folder, IMAGES, ImageOptions, Kind, Plan, PlanError, Tree};
use serde_json::json;

use crate::arguments::{DockerfileOptions, PlanSource, ServiceArgs};
use crate::folder::Application;
use crate::terminal::{Terminal, table};
use crate::{folder, git};

pub fn plan(source: &PlanSource, options: &DockerfileOptions, terminal: Terminal) -> anyhow::Result<()> {
    // Plan the folder that `capsule deploy` would deploy.
    let is_folder = source.folder.is_dir() && source.commit.is_none() && source.since.is_none() && source.changed.is_empty();
    let mut source = source.clone();
    if is_folder {
        let application = Application::find(&source.folder)?;
        if application.is_above {
            terminal.note(&format!("Planning {}, which has the capsule.toml", application.folder.display()));
            source.folder = application.folder;
        }
    }
    let tree = tree(&source.folder, source.commit.as_deref())?;
    let failed = |error: PlanError| anyhow!("{}/{error}", source.folder.display());
    let mut changed = source.changed.clone();
    if let Some(since) = &source.since {
        changed.extend(git::changed(&source.folder, since)?);
    }
    if source.since.is_some() || !changed.is_empty() {
        let changed: Vec<&str> = changed.iter().map(|path| path.trim_start_matches("./")).collect();
        let affected = capsule_buildplan::affected(&*tree, &changed).map_err(failed)?;
        return terminal.show(&affected, |affected| match affected.as_slice() {
            [] => "No member is affected.".into(),
            affected => affected.iter().map(|member| member.path.as_str()).collect::<Vec<_>>().join("\n"),
        });
    }
    let mut plan = capsule_buildplan::plan(&*tree).map_err(failed)?;
    if !options.dockerfile {
        plan.mismatches = capsule_builder::local_mismatches(&plan);
        return terminal.show(&plan, text);
    }
    let mut image_options = ImageOptions {
        buildkit: !options.classic,
        scope: source
            .folder
            .canonicalize()
            .ok()
            .and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
            .unwrap_or_default(),
        secrets: options.secrets.clone(),
        arguments: options.arguments.clone(),
        opentelemetry: options.opentelemetry,
        ..ImageOptions::default()
    };
    image_options.images = base_images(&options.images)?;
    let image = capsule_buildplan::dockerfile(&*tree, &plan, &image_options).map_err(|error| anyhow!(error))?;
    terminal.show(&json!({"dockerfile": image.dockerfile, "dockerignore": image.dockerignore}), |_| {
        image.dockerfile.trim_end().to_owned()
    })
}

/// Parses base images given as `name=image`.
pub fn base_images(pairs: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    let mut images = BTreeMap::new();
    for pair in pairs {
        let (name, image) = pair.split_once('=').ok_or_else(|| anyhow!("Invalid --image `{pair}`. Use NAME=IMAGE."))?;
        if !IMAGES.iter().any(|(known, ..)| *known == name) {
            let names: Vec<&str> = IMAGES.iter().map(|(name, ..)| *name).collect();
            bail!("Unknown base image `{name}`. Known base images: {}.", names.join(", "));
        }
        images.insert(name.to_owned(), image.to_owned());
    }
    Ok(images)
}

/// Writes a `capsule.toml` with the project and service of the folder, and the plan as comments.
pub fn init(args: &ServiceArgs, terminal: Terminal) -> anyhow::Result<()> {
    let names = folder::for_init(args)?;
    let plan = plan_folder(&args.folder)?;
    let written = folder::save_names(&args.folder, &names)? | folder::annotate(&args.folder, &settings(&plan))?;
    let result = json!({"project": names.project, "service": names.service, "written": written, "plan": plan});
    terminal.show(&result, |_| {
        let outcome = if written { "Wrote" } else { "Nothing to add to" };
        format!("{}\n{outcome} {}.\nDeploy with: capsule deploy", text(&plan), args.folder.join("capsule.toml").display())
    })
}

/// The plan as settings of `capsule.toml`.
fn settings(plan: &Plan) -> String {
    let quoted = |text: &String| toml_edit::Value::from(text.as_str()).to_string().trim().to_owned();
    let mut sections = Vec::new();
    let steps = [
        ("install", &plan.build.install),
        ("build", &plan.build.build),
        ("release", &plan.build.release),
        ("output", &plan.build.output),
        ("dockerfile", &plan.build.dockerfile),
    ];
    let lines: Vec<String> =
        steps.iter().filter_map(|(name, value)| Some(format!("{name} = {}", quoted(value.as_ref()?)))).collect();
    if !lines.is_empty() {
        sections.push(format!("[build]\n{}", lines.join("\n")));
    }
    let lines: Vec<String> = plan.processes.iter().map(|(name, command)| format!("{name} = {}", quoted(command))).collect();
    if !lines.is_empty() {
        sections.push(format!("[processes]\n{}", lines.join("\n")));
    }
    let port = plan.networking.port.map(|port| format!("port = {port}"));
    let health = plan.networking.health_check.as_ref().map(|path| format!("health_check = {}", quoted(path)));
    let lines: Vec<String> = port.into_iter().chain(health).collect();
    if !lines.is_empty() {
        sections.push(format!("[networking]\n{}", lines.join("\n")));
    }
    sections.join("\n\n")
}

/// The plan of a folder on this machine.
pub fn plan_folder(folder: &Path) -> anyhow::Result<Plan> {
    check_path(folder, Path::is_dir, "is not a folder")?;
    capsule_buildplan::plan(&Folder::new(folder)).map_err(|error| anyhow!("{}/{error}", folder.display()))
}

/// The files of a folder, of a commit of it, or of an archive.
fn tree(path: &Path, commit: Option<&str>) -> anyhow::Result<Box<dyn Tree>> {
    if let Some(revision) = commit {
        check_path(path, Path::is_dir, "is not a folder; --commit needs a folder")?;
        return Ok(Box::new(git::commit(path, revision)?));
    }
    check_path(path, |path| path.is_dir() || path.is_file(), "is neither a folder nor an archive")?;
    if path.is_dir() {
        return Ok(Box::new(Folder::new(path)));
    }
    Ok(Box::new(archive::listing(path).map_err(|error| anyhow!("{}: {error}", path.display()))?))
}

fn check_path(path: &Path, is_valid: impl Fn(&Path) -> bool, problem: &str) -> anyhow::Result<()> {
    if !is_valid(path) {
        bail!("{} {}", path.display(), if path.exists() { problem } else { "does not exist" });
    }
    Ok(())
}

/// What was detected, in one sentence: `Detected javascript, express.`
pub fn summary(plan: &Plan) -> String {
    let detection = &plan.detection;
    let mut parts: Vec<&str> = [&detection.language, &detection.framework].into_iter().flatten().map(String::as_str).collect();
    if plan.kind == Kind::Static && !parts.contains(&"static") {
        parts.push("static");
    }
    match parts.as_slice() {
        [] if plan.processes.is_empty() => "Could not detect an app here.".into(),
        [] => "No language or framework detected.".into(),
        parts => format!("Detected {}.", parts.join(", ")),
    }
}

fn text(plan: &Plan) -> String {
    let mut sections = vec![summary(plan)];
    sections.extend(plan.mismatches.iter().map(|mismatch| format!("warning: {mismatch} on this machine.")));
    let mut commands: Vec<Vec<String>> = Vec::new();
    for (name, command) in [("install", &plan.build.install), ("build", &plan.build.build), ("release", &plan.build.release)] {
        commands.extend(command.as_ref().map(|command| vec![name.into(), command.clone()]));
    }
    commands.extend(plan.processes.iter().map(|(name, command)| vec![name.clone(), command.clone()]));
    if plan.kind == Kind::Static {
        commands.push(vec!["files".into(), plan.build.output.clone().unwrap_or_else(|| ".".into())]);
    }
    if !commands.is_empty() {
        sections.push(table(&["STEP", "COMMAND"], &commands));
    }
    let evidence: Vec<Vec<String>> = plan
        .evidence
        .iter()
        .map(|evidence| {
            let place = evidence.line.map_or_else(|| evidence.file.clone(), |line| format!("{}:{line}", evidence.file));
            let confidence = format!("{:.0}%", evidence.confidence * 100.0);
            vec![evidence.field.clone(), evidence.value.clone(), place, confidence, evidence.reason.clone()]
        })
        .collect();
    if !evidence.is_empty() {
        sections.push(table(&["SETTING", "VALUE", "SOURCE", "CONFIDENCE", "REASON"], &evidence));
    }
    for question in &plan.questions {
        sections.push(format!(
            "{} is unclear: {}. Add this to capsule.toml:\n{}",
            question.field, question.text, question.answer_with
        ));
    }
    sections.join("\n\n")
}
