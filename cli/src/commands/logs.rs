//! What instances print, and what builds printed.

use std::io::Write;

use anyhow::bail;
use capsule_contracts::deploy::LogLine;

use super::service;
use crate::arguments::At;
use crate::client::Client;
use crate::folder;
use crate::terminal::{Terminal, harmless};

pub fn logs(
    mut client: Client,
    at: &At,
    follow: bool,
    tail: Option<u32>,
    deployment: Option<i64>,
    terminal: Terminal,
) -> anyhow::Result<()> {
    let found = service::find(&mut client, &folder::known(at)?)?;
    let path = match deployment {
        Some(number) => {
            let known = found.deployments(&mut client, 100)?;
            let Some(deployment) = known.iter().find(|known| number == 0 || known.number == number) else {
                bail!("{} has no such deployment in {}", found.service.name, found.environment);
            };
            format!("/deployments/{}/logs?follow={follow}", deployment.id)
        }
        None => {
            let tail = tail.map_or_else(String::new, |lines| format!("&tail={lines}"));
            format!("/services/{}/logs?environment={}&follow={follow}{tail}", found.service.id, found.environment)
        }
    };
    let mut out = std::io::stdout().lock();
    for line in client.stream::<LogLine>(&path)? {
        let line = line?;
        let written = if terminal.json {
            writeln!(out, "{}", serde_json::to_string(&line)?)
        } else {
            writeln!(out, "{} {} {}", line.at, line.source, harmless(&line.text))
        };
        // Whoever reads has seen enough.
        if written.and_then(|()| out.flush()).is_err() {
            return Ok(());
        }
    }
    Ok(())
}
