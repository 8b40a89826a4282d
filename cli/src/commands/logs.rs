//! `capsule logs`: the output of instances, and the logs of deployments.

use capsule_contracts::deploy::LogLine;

use super::service;
use crate::arguments::ServiceArgs;
use crate::client::Client;
use crate::folder;
use crate::terminal::Terminal;

pub fn logs(
    mut client: Client,
    args: &ServiceArgs,
    follow: bool,
    tail: Option<u32>,
    deployment: Option<i64>,
    terminal: Terminal,
) -> anyhow::Result<()> {
    let found = service::find(&mut client, &folder::resolve(args)?, terminal)?;
    let path = match deployment {
        Some(number) => {
            let deployment = service::deployment(&mut client, &found, number)?;
            format!("/deployments/{}/logs?follow={follow}", deployment.id)
        }
        None => {
            let tail = tail.map_or_else(String::new, |lines| format!("&tail={lines}"));
            format!("/services/{}/logs?environment={}&follow={follow}{tail}", found.service.id, found.environment)
        }
    };
    for line in client.stream::<LogLine>(&path)? {
        let line = line?;
        // The reader closed the pipe.
        if terminal.item(&line, &format!("{} {}", line.at, line.source), &line.text).is_err() {
            return Ok(());
        }
    }
    Ok(())
}
