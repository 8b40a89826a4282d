//! For whoever runs the server.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{anyhow, bail};
use capsule_store::{Migrations, StepState, Store};

use serde_json::json;

use crate::arguments::{ConfigCommand, MigrateCommand, Server, ServerCommand};
use crate::server::data::{Claim, Data};
use crate::server::{self, configuration};
use crate::terminal::{Terminal, table};

pub fn server(directory: &Path, arguments: Server, terminal: Terminal) -> anyhow::Result<()> {
    if let Some(ServerCommand::Down) = arguments.command {
        let ended = server::down(directory)?;
        return terminal
            .show(&json!({"instances": ended}), |_| format!("Stopped the server, the ingress and {ended} instance(s)."));
    }
    let mut flags = arguments.set;
    flags.extend(arguments.listen.map(|listen| ("listen".to_owned(), listen)));
    let loaded = configuration::load(directory, arguments.config.as_deref(), &flags)?;
    server::run(directory, loaded.configuration, &arguments.only)
}

pub fn config(directory: &Path, command: ConfigCommand, terminal: Terminal) -> anyhow::Result<()> {
    let ConfigCommand::Check(arguments) = command;
    let loaded = configuration::load(directory, arguments.config.as_deref(), &arguments.set)?;
    let settings = serde_json::to_value(&loaded.configuration)?;
    let all: BTreeMap<&String, serde_json::Value> = loaded
        .origins
        .iter()
        .map(|(name, origin)| {
            let value = settings.pointer(&format!("/{}", name.replace('.', "/"))).cloned().unwrap_or_default();
            // It may hold a password.
            let value = if name.ends_with(".url") && value != "" { json!("(set, not shown)") } else { value };
            (name, json!({"value": value, "origin": origin}))
        })
        .collect();
    terminal.show(&all, |all| {
        let rows: Vec<_> = all
            .iter()
            .map(|(name, setting)| {
                let value = setting["value"].as_str().map_or_else(|| setting["value"].to_string(), str::to_owned);
                vec![(*name).clone(), value, setting["origin"].as_str().unwrap_or_default().to_owned()]
            })
            .collect();
        table(&["SETTING", "VALUE", "FROM"], &rows)
    })
}

/// Every database, and its migrations.
const DATABASES: [(&str, Migrations); 4] = [
    (capsule_identity::NAME, capsule_identity::MIGRATIONS),
    (capsule_organization::NAME, capsule_organization::MIGRATIONS),
    (capsule_project::NAME, capsule_project::MIGRATIONS),
    (capsule_deploy::NAME, capsule_deploy::MIGRATIONS),
];

pub fn migrate(directory: &Path, command: &MigrateCommand, terminal: Terminal) -> anyhow::Result<()> {
    let (MigrateCommand::Run(arguments) | MigrateCommand::Info(arguments) | MigrateCommand::Validate(arguments)) = command;
    let loaded = configuration::load(directory, arguments.config.as_deref(), &arguments.set)?;
    let databases = server::databases(directory, &loaded.configuration);
    // Nobody else may write meanwhile; looking is always allowed.
    let claimed = matches!(command, MigrateCommand::Run(_)).then(|| Data::claim(directory, Claim::Alone)).transpose()?;
    let asynchronous = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let steps = asynchronous.block_on(async {
        let mut all = Vec::new();
        for (name, migrations) in DATABASES {
            if claimed.is_some() {
                Store::migrate(&databases, name, migrations).await.map_err(|error| anyhow!("{name}: {error}"))?;
            }
            let steps = Store::steps(&databases, name, migrations).await.map_err(|error| anyhow!("{name}: {error}"))?;
            all.extend(steps.into_iter().map(|step| (name, step)));
        }
        anyhow::Ok(all)
    })?;
    let wrong: Vec<_> = steps.iter().filter(|(_, step)| step.state != StepState::Applied).collect();
    if matches!(command, MigrateCommand::Validate(_)) && !wrong.is_empty() {
        let told = wrong.iter().map(|(name, step)| format!("{name}: {} is {}", step.file, step.state.name()));
        bail!("{}", told.collect::<Vec<_>>().join("\n"));
    }
    let shown: Vec<_> = steps
        .iter()
        .map(|(name, step)| {
            json!({"database": name, "component": step.component, "file": step.file, "state": step.state.name(), "applied_at": step.applied_at})
        })
        .collect();
    terminal.show(&shown, |_| {
        let rows: Vec<_> = steps
            .iter()
            .map(|(name, step)| {
                let at = step.applied_at.map_or_else(String::new, |at| at.to_string());
                vec![(*name).to_owned(), step.component.clone(), step.file.clone(), step.state.name().to_owned(), at]
            })
            .collect();
        table(&["DATABASE", "COMPONENT", "MIGRATION", "STATE", "APPLIED"], &rows)
    })
}
