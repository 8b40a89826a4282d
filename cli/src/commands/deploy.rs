//! `capsule deploy`: from the folder to the URL.

use std::io::{Read, Seek};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use capsule_buildplan::Kind;
use capsule_contracts::deploy::{Deployment, LogLine, Status, Upload};
use serde_json::json;

use super::interrupt::InterruptGuard;
use super::prepare::prepare;
use crate::arguments::Deploy;
use crate::client::Client;
use crate::folder::ServiceNames;
use crate::terminal::{Failure, Progress, Terminal, bytes, counted};
use crate::{folder, pack};

pub fn deploy(mut client: Client, arguments: &Deploy, terminal: Terminal) -> anyhow::Result<ExitCode> {
    let selection = folder::select(&arguments.at, arguments.yes)?;
    let folder = &selection.folder;
    if *folder != arguments.at.folder {
        terminal.note(&format!("Deploying {}, which has the capsule.toml", folder.display()));
    }
    plan(folder, terminal)?;
    let found = prepare(&mut client, &selection, arguments, terminal)?;
    let pinned = ServiceNames { organization: Some(found.organization.slug.clone()), ..selection.names.clone() };
    if folder::save_names(folder, &pinned)? {
        terminal.note("Saved organization, project and service in capsule.toml");
    }
    let packed = pack::pack(folder)?;
    let upload = send(&mut client, &found.service.id.to_string(), &packed, terminal)?;
    let body = json!({"upload_id": upload.id, "environment": found.environment});
    let deployment: Deployment = client.post(&format!("/services/{}/deploy", found.service.id), &body)?;
    if arguments.detach {
        terminal.show(&deployment, |deployment| format!("Deployment {} has started.", deployment.number))?;
        return Ok(ExitCode::SUCCESS);
    }
    follow(&mut client, &deployment, terminal)
}

/// Plans the folder.
///
/// # Errors
/// `nothing_to_run`, when the plan has neither a process nor static files.
fn plan(folder: &Path, terminal: Terminal) -> anyhow::Result<()> {
    let plan = super::plan::plan_folder(folder)?;
    terminal.note(&super::plan::summary(&plan));
    if plan.kind != Kind::Static && plan.processes.is_empty() {
        let question = plan.questions.first();
        let why = question.map_or("no start command was found".into(), |question| question.text.clone());
        let setting = question.map_or("[processes]\nweb = \"…\"".into(), |question| question.answer_with.clone());
        return Err(Failure::new("nothing_to_run", format!("Nothing to run in {}: {why}.", folder.display()))
            .hint(format!("Add this to capsule.toml:\n\n{setting}"))
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
    terminal.note(&format!("Uploaded {}, {}", counted(packed.files, "file"), bytes(packed.bytes)));
    Ok(upload)
}

/// Shows a deployment's log until it finishes, then the outcome.
pub fn follow(client: &mut Client, deployment: &Deployment, terminal: Terminal) -> anyhow::Result<ExitCode> {
    let id = deployment.id;
    let started = std::time::Instant::now();
    let progress = Progress::spinner(&format!("Deployment {}", deployment.number));
    let guard = InterruptGuard::install(terminal, &progress, how_to_cancel(deployment));
    let mut shown = 0;
    let finished = loop {
        // A server that restarts continues the deployment, so keep following it.
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
            Err(_) if started.elapsed() < Duration::from_secs(3600) => {}
            Err(error) => return Err(error),
        }
        match client.get::<Deployment>(&format!("/deployments/{id}")) {
            Ok(current) if current.status.is_settled() => break current,
            Ok(_) => {}
            Err(error) if crate::client::is_final(&error) => return Err(error),
            Err(_) => progress.message("Waiting for the server"),
        }
        std::thread::sleep(Duration::from_millis(200));
    };
    drop(guard);
    progress.finish();
    terminal.show(&finished, |finished| match finished.status {
        Status::Running => {
            format!("Deployment {} is running after {:.1} s\n{}", finished.number, started.elapsed().as_secs_f64(), finished.url)
        }
        Status::Superseded => format!("Deployment {} was superseded by a newer one", finished.number),
        Status::Cancelled => format!("Deployment {} was cancelled", finished.number),
        _ => format!("{}\n{}", failure_of(finished), PREVIOUS_VERSION_IS_LIVE),
    })?;
    if finished.status == Status::Running {
        return Ok(ExitCode::SUCCESS);
    }
    let (code, message) = match finished.status {
        Status::Superseded => ("superseded", format!("Deployment {} was superseded by a newer one.", finished.number)),
        Status::Cancelled => ("cancelled", format!("Deployment {} was cancelled.", finished.number)),
        _ => ("deployment_failed", failure_of(&finished)),
    };
    terminal.report(&Failure::new(code, message).hint(PREVIOUS_VERSION_IS_LIVE));
    Ok(ExitCode::FAILURE)
}

/// The hint of a deployment that did not succeed.
const PREVIOUS_VERSION_IS_LIVE: &str = "The previous version, if any, is still live.";

fn failure_of(deployment: &Deployment) -> String {
    format!("Deployment {} failed: {}", deployment.number, deployment.error.as_deref().unwrap_or("unknown reason"))
}

fn how_to_cancel(deployment: &Deployment) -> String {
    let activity = if matches!(deployment.trigger.as_str(), "upload" | "redeploy") { "building" } else { "deploying" };
    format!("Still {activity}. `capsule cancel {} -e {}` cancels it.", deployment.number, deployment.environment_name)
}

fn show(progress: &Progress, line: &LogLine) {
    if line.stream == "capsule" {
        progress.message(&line.text);
        progress.log_line(&format!("▸ {}", line.text));
    } else {
        progress.log_line(&format!("  {}", line.text));
    }
}
