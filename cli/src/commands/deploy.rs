//! `capsule deploy`: from the folder to the URL.

use std::io::{Read, Seek};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use capsule_buildplan::Kind;
use capsule_contracts::deploy::{Deployment, LogLine, Status, Upload};
use serde_json::json;

use super::interrupt::Watch;
use super::prepare::prepare;
use crate::arguments::Deploy;
use crate::client::Client;
use crate::folder::Wanted;
use crate::terminal::{Failure, Progress, Terminal, bytes};
use crate::{folder, pack};

pub fn deploy(mut client: Client, arguments: &Deploy, terminal: Terminal) -> anyhow::Result<ExitCode> {
    let chosen = folder::chosen(&arguments.at, arguments.yes)?;
    let folder = &chosen.folder;
    if *folder != arguments.at.folder {
        terminal.say(&format!("Deploying {}, where capsule.toml is", folder.display()));
    }
    plan(folder, terminal)?;
    let found = prepare(&mut client, &chosen, arguments, terminal)?;
    let pinned = Wanted { organization: Some(found.organization.slug.clone()), ..chosen.wanted.clone() };
    if folder::remember(folder, &pinned)? {
        terminal.say("Kept organization, project and service in capsule.toml");
    }
    let packed = pack::pack(folder)?;
    let upload = send(&mut client, &found.service.id.to_string(), &packed, terminal)?;
    let body = json!({"upload_id": upload.id, "environment": found.environment});
    let deployment: Deployment = client.post(&format!("/services/{}/deploy", found.service.id), &body)?;
    if arguments.detach {
        terminal.show(&deployment, |deployment| format!("Deployment {} has begun.", deployment.number))?;
        return Ok(ExitCode::SUCCESS);
    }
    follow(&mut client, &deployment, terminal)
}

/// Fails early where there is nothing to run.
fn plan(folder: &Path, terminal: Terminal) -> anyhow::Result<()> {
    let plan = super::plan::of(folder)?;
    terminal.say(&format!("Found {}", super::plan::summary(&plan)));
    if plan.kind != Kind::Static && plan.processes.is_empty() {
        let question = plan.questions.first();
        let why = question.map_or("it is not clear how it is started".into(), |question| question.text.clone());
        let answer = question.map_or("[processes]\nweb = \"…\"".into(), |question| question.answer_with.clone());
        return Err(Failure::new("nothing_to_run", format!("There is nothing to run in {}: {why}", folder.display()))
            .hint(format!("Say how in capsule.toml, such as\n\n{answer}"))
            .into());
    }
    Ok(())
}

fn send(client: &mut Client, service: &str, packed: &pack::Packed, terminal: Terminal) -> anyhow::Result<Upload> {
    let progress = Progress::bytes(packed.bytes, "Uploading");
    let upload = client.upload(&format!("/uploads?service_id={service}"), packed.bytes, || {
        let mut file = packed.file.try_clone()?;
        file.rewind()?;
        Ok(progress.read(file).take(packed.bytes))
    });
    progress.finish();
    let upload = upload?;
    terminal.say(&format!("Uploaded {} file(s), {}", packed.files, bytes(packed.bytes)));
    Ok(upload)
}

/// Shows a deployment's log until its end, then the outcome.
pub fn follow(client: &mut Client, deployment: &Deployment, terminal: Terminal) -> anyhow::Result<ExitCode> {
    let id = deployment.id;
    let began = std::time::Instant::now();
    let progress = Progress::spinner(&format!("Deployment {}", deployment.number));
    let watch = Watch::begin(terminal, &progress, how_to_cancel(deployment));
    let mut shown = 0;
    let settled = loop {
        // A server that restarts meanwhile goes on with the deployment; so do we.
        match client.stream::<LogLine>(&format!("/deployments/{id}/logs?follow=true")) {
            Ok(lines) => {
                for (index, line) in lines.enumerate() {
                    let Ok(line) = line else { break };
                    if index >= shown {
                        show(&progress, &line);
                        shown = index + 1;
                    }
                }
            }
            Err(error) if crate::client::is_not_found(&error) => return Err(error),
            Err(_) if began.elapsed() < Duration::from_secs(3600) => {}
            Err(error) => return Err(error),
        }
        match client.get::<Deployment>(&format!("/deployments/{id}")) {
            Ok(now) if now.status.is_settled() => break now,
            Ok(_) => {}
            Err(error) if crate::client::is_final(&error) => return Err(error),
            Err(_) => progress.message("Waiting for the server to come back"),
        }
        std::thread::sleep(Duration::from_millis(200));
    };
    drop(watch);
    progress.finish();
    terminal.show(&settled, |settled| match settled.status {
        Status::Running => {
            format!("Deployment {} is running after {:.1} s\n{}", settled.number, began.elapsed().as_secs_f64(), settled.url)
        }
        Status::Superseded => format!("Deployment {} gave way to a newer one", settled.number),
        Status::Cancelled => format!("Deployment {} was cancelled", settled.number),
        _ => format!("{}\n{}", failure_of(settled), EARLIER),
    })?;
    if settled.status == Status::Running {
        return Ok(ExitCode::SUCCESS);
    }
    let (code, message) = match settled.status {
        Status::Superseded => ("superseded", format!("Deployment {} gave way to a newer one.", settled.number)),
        Status::Cancelled => ("cancelled", format!("Deployment {} was cancelled.", settled.number)),
        _ => ("deployment_failed", failure_of(&settled)),
    };
    terminal.report(&Failure::new(code, message).hint(EARLIER));
    Ok(ExitCode::FAILURE)
}

/// What becomes of an earlier version when a deployment does not succeed.
const EARLIER: &str = "An earlier version, if there is one, is still live.";

fn failure_of(settled: &Deployment) -> String {
    format!("Deployment {} failed: {}", settled.number, settled.error.as_deref().unwrap_or("the reason is not known"))
}

fn how_to_cancel(deployment: &Deployment) -> String {
    let doing = if matches!(deployment.trigger.as_str(), "upload" | "redeploy") { "building" } else { "deploying" };
    format!("Still {doing}. `capsule cancel {} -e {}` stops it.", deployment.number, deployment.environment_name)
}

fn show(progress: &Progress, line: &LogLine) {
    if line.stream == "capsule" {
        progress.message(&line.text);
        progress.log_line(&format!("▸ {}", line.text));
    } else {
        progress.log_line(&format!("  {}", line.text));
    }
}
