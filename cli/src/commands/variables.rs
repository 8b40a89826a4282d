//! `capsule env`: the variables and secrets of an environment.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use capsule_contracts::Empty;
use capsule_contracts::project::Variables;
use serde_json::json;

use super::service;
use crate::arguments::{EnvCommand, ServiceArgs};
use crate::client::{Client, is_not_found};
use crate::folder;
use crate::terminal::{Terminal, counted, prompt_password, table};

const NEXT_STEP: &str = "Changes take effect with the next deployment: capsule deploy";

pub fn env(mut client: Client, command: EnvCommand, terminal: Terminal) -> anyhow::Result<()> {
    let (EnvCommand::List(place) | EnvCommand::Set { at: place, .. } | EnvCommand::Unset { at: place, .. }) = &command;
    let found = service::find(&mut client, &folder::resolve(&ServiceArgs::from(place.clone()))?, terminal)?;
    let id = found.environment()?.id;
    if !matches!(command, EnvCommand::List(_)) {
        found.announce(&client, terminal);
    }
    match command {
        EnvCommand::List(_) => {
            let all: Variables = client.get(&format!("/environments/{id}/variables"))?;
            terminal.show(&all, |all| {
                let variables = all.variables.iter().map(|(name, value)| vec![name.clone(), value.clone()]);
                let secrets = all.secrets.iter().map(|name| vec![name.clone(), "(secret)".into()]);
                let rows: Vec<_> = variables.chain(secrets).collect();
                if rows.is_empty() {
                    format!("The environment {} has no variables or secrets.", found.environment)
                } else {
                    table(&["NAME", "VALUE"], &rows)
                }
            })
        }
        EnvCommand::Set { variables, secret: true, .. } => {
            for text in &variables {
                let (name, value) = match text.split_once('=') {
                    Some((name, value)) => (name, value.to_owned()),
                    None => (text.as_str(), prompt_password(&format!("Value of {text}"), false)?),
                };
                check_name(name)?;
                let _: Empty = client.put(&format!("/environments/{id}/secrets/{name}"), &json!({"value": value}))?;
            }
            terminal
                .show(&json!({"set": variables.len()}), |_| format!("Saved {}. {NEXT_STEP}", counted(variables.len(), "secret")))
        }
        EnvCommand::Set { variables, .. } => {
            let mut changes = BTreeMap::new();
            for text in &variables {
                let (name, value) =
                    text.split_once('=').with_context(|| format!("Invalid variable `{text}`. Use NAME=VALUE."))?;
                changes.insert(name, value);
            }
            let all: Variables = client.patch(&format!("/environments/{id}/variables"), &json!({"variables": changes}))?;
            terminal.show(&all, |_| format!("Saved {}. {NEXT_STEP}", counted(changes.len(), "variable")))
        }
        EnvCommand::Unset { names, .. } => {
            let known: Variables = client.get(&format!("/environments/{id}/variables"))?;
            let missing: Vec<&str> = names
                .iter()
                .filter(|name| !known.variables.contains_key(*name) && !known.secrets.contains(name))
                .map(String::as_str)
                .collect();
            if !missing.is_empty() {
                bail!(
                    "The environment {} has no variable or secret {}. `capsule env list` lists them.",
                    found.environment,
                    missing.join(", ")
                );
            }
            let changes: BTreeMap<&String, Option<String>> =
                names.iter().filter(|name| known.variables.contains_key(*name)).map(|name| (name, None)).collect();
            for name in names.iter().filter(|name| known.secrets.contains(name)) {
                match client.delete::<Empty>(&format!("/environments/{id}/secrets/{name}")) {
                    Err(error) if !is_not_found(&error) => return Err(error),
                    _ => {}
                }
            }
            let all: Variables = client.patch(&format!("/environments/{id}/variables"), &json!({"variables": changes}))?;
            terminal.show(&all, |_| format!("Removed {}. {NEXT_STEP}", names.join(", ")))
        }
    }
}

/// Checks a secret's name, which becomes part of a path.
fn check_name(name: &str) -> anyhow::Result<()> {
    if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        bail!("Invalid variable name `{name}`: use A-Z, a-z, 0-9 and _.");
    }
    Ok(())
}
