//! `capsule deploy`: from the folder to the URL.

use std::io::{IsTerminal, Read, Seek};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use capsule_buildplan::Kind;
use capsule_contracts::deploy::{Deployment, LogLine, Status, Upload};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::service;
use crate::arguments::At;
use crate::client::Client;
use crate::terminal::{Terminal, harmless};
use crate::{folder, pack};

pub fn deploy(mut client: Client, at: &At, detach: bool, yes: bool, terminal: Terminal) -> anyhow::Result<ExitCode> {
    let wanted = folder::known_or_asked(at, yes)?;
    let plan = super::plan::of(&at.folder)?;
    terminal.say(&format!("Found {}", super::plan::summary(&plan)));
    if plan.kind != Kind::Static && plan.processes.is_empty() {
        let question = plan.questions.first();
        let why = question.map_or("it is not clear how it is started".into(), |question| question.text.clone());
        let answer = question.map_or("[processes]\nweb = \"…\"".into(), |question| question.answer_with.clone());
        bail!("there is nothing to run in {}: {why}\nSay how in capsule.toml, such as\n\n{answer}", at.folder.display());
    }
    let found = service::find_or_create(&mut client, &wanted, terminal)?;
    if folder::remember(&at.folder, &wanted)? {
        terminal.say("Remembered project and service in capsule.toml");
    }
    let packed = pack::pack(&at.folder)?;
    let upload = send(&mut client, &found.service.id.to_string(), &packed)?;
    let body = json!({"upload_id": upload.id, "environment": wanted.environment});
    let deployment: Deployment = client.post(&format!("/services/{}/deploy", found.service.id), &body)?;
    if detach {
        terminal.show(&deployment, |deployment| format!("Deployment {} has begun.", deployment.number))?;
        return Ok(ExitCode::SUCCESS);
    }
    follow(&mut client, &deployment, terminal)
}

fn send(client: &mut Client, service: &str, packed: &pack::Packed) -> anyhow::Result<Upload> {
    let bar = ProgressBar::new(packed.bytes);
    bar.set_style(style("{spinner} Uploading {bytes} of {total_bytes} {wide_bar}"));
    let upload = client.upload(&format!("/uploads?service_id={service}"), packed.bytes, || {
        let mut file = packed.file.try_clone()?;
        file.rewind()?;
        Ok(bar.wrap_read(file).take(packed.bytes))
    });
    bar.finish_and_clear();
    let upload = upload?;
    eprintln!("Uploaded {} file(s), {}", packed.files, indicatif::HumanBytes(packed.bytes));
    Ok(upload)
}

/// Shows a deployment's log until its end, then the outcome.
pub fn follow(client: &mut Client, deployment: &Deployment, terminal: Terminal) -> anyhow::Result<ExitCode> {
    let id = deployment.id;
    let began = std::time::Instant::now();
    let bar = ProgressBar::new_spinner();
    bar.set_style(style("{spinner} {msg} {elapsed}"));
    bar.set_message(format!("Deployment {}", deployment.number));
    bar.enable_steady_tick(Duration::from_millis(120));
    let mut shown = 0;
    let settled = loop {
        // A server that restarts meanwhile goes on with the deployment; so do we.
        match client.stream::<LogLine>(&format!("/deployments/{id}/logs?follow=true")) {
            Ok(lines) => {
                for (index, line) in lines.enumerate() {
                    let Ok(line) = line else { break };
                    if index >= shown {
                        show(&bar, &line);
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
            Err(error) if error.is::<crate::client::Refused>() => return Err(error),
            Err(_) => bar.set_message("Waiting for the server to come back"),
        }
        std::thread::sleep(Duration::from_millis(200));
    };
    bar.finish_and_clear();
    terminal.show(&settled, |settled| match settled.status {
        Status::Running => {
            format!("Deployment {} is running after {:.1} s\n{}", settled.number, began.elapsed().as_secs_f64(), settled.url)
        }
        Status::Superseded => format!("Deployment {} gave way to a newer one", settled.number),
        Status::Cancelled => format!("Deployment {} was cancelled", settled.number),
        _ => format!(
            "Deployment {} failed: {}\nWhat ran before keeps running.",
            settled.number,
            settled.error.as_deref().unwrap_or("the reason is not known")
        ),
    })?;
    Ok(if settled.status == Status::Running { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn show(bar: &ProgressBar, line: &LogLine) {
    let said = harmless(&line.text);
    let text = if line.stream == "capsule" {
        bar.set_message(said.clone());
        format!("▸ {said}")
    } else {
        format!("  {said}")
    };
    if std::io::stderr().is_terminal() {
        bar.println(text);
    } else {
        eprintln!("{text}");
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}
