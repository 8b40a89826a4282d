//! `capsule server`, `config` and `migrate`: for operators.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{anyhow, bail};
use capsule_store::{Databases, MigrationState, Store, copy};

use serde_json::json;

use super::health;
use crate::arguments::{ConfigCommand, MigrateCommand, Server, ServerCommand};
use crate::server::data::{self, Claim, Data};
use crate::server::{self, DATABASES, configuration};
use crate::terminal::{Terminal, counted, table};

pub fn server(directory: &Path, arguments: Server, terminal: Terminal) -> anyhow::Result<()> {
    match arguments.command {
        Some(ServerCommand::Down) => {
            let ended = server::down(directory)?;
            return terminal.show(&json!({"instances": ended}), |_| {
                format!("Stopped the server, the ingress and {}.", counted(ended, "instance"))
            });
        }
        Some(ServerCommand::Health { at }) => return health::health(directory, at.as_deref(), terminal),
        Some(ServerCommand::ReplaceIngress) => return replace_ingress(directory, terminal),
        None => {}
    }
    data::accessible(directory, "server")?;
    let mut flags = arguments.set;
    flags.extend(arguments.listen.map(|listen| ("listen".to_owned(), listen)));
    let loaded = configuration::load(directory, arguments.config.as_deref(), &flags)?;
    server::run(directory, loaded, &arguments.only)
}

fn replace_ingress(directory: &Path, terminal: Terminal) -> anyhow::Result<()> {
    terminal.note(
        "Replacing the ingress: requests in flight finish, connections that last longer than 30 s are closed, and new \
         connections are refused for a few seconds.",
    );
    let replaced = server::replace_ingress(directory)?;
    terminal.show(&replaced, |replaced| match (&replaced.ended, &replaced.pid, &replaced.listen) {
        (_, Some(pid), Some(listen)) => format!("Replaced the ingress: process {pid} listens on {listen}."),
        (Some(pid), ..) => format!(
            "Stopped the ingress (process {pid}). The server starts a new one: capsule server --data {}",
            directory.display()
        ),
        _ => "No ingress is running. The server starts one.".into(),
    })
}

pub fn config(directory: &Path, command: ConfigCommand, terminal: Terminal) -> anyhow::Result<()> {
    data::accessible(directory, "config check")?;
    let ConfigCommand::Check(arguments) = command;
    let loaded = configuration::load(directory, arguments.config.as_deref(), &arguments.set)?;
    let settings = serde_json::to_value(&loaded.configuration)?;
    let all: BTreeMap<&String, serde_json::Value> = loaded
        .origins
        .iter()
        .map(|(name, origin)| {
            let value = settings.pointer(&format!("/{}", name.replace('.', "/"))).cloned().unwrap_or_default();
            // It may contain a password.
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
        table(&["SETTING", "VALUE", "SOURCE"], &rows)
    })
}

async fn repair(databases: &Databases, terminal: Terminal) -> anyhow::Result<()> {
    let mut repaired = Vec::new();
    for (name, migrations) in DATABASES {
        let files = Store::repair(databases, name, migrations).await.map_err(|error| anyhow!("{name}: {error}"))?;
        repaired.extend(files.into_iter().map(|file| format!("{name}: {file}")));
    }
    terminal.show(&repaired, |files| match files.as_slice() {
        [] => "Nothing to repair: every migration is as it was applied.".into(),
        files => format!("Recorded the current version of:\n{}", files.join("\n")),
    })
}

async fn to_postgres(directory: &Path, to: &Databases, terminal: Terminal) -> anyhow::Result<()> {
    if matches!(to, Databases::Embedded(_)) {
        bail!("Set database.url to the PostgreSQL server to move the data to.");
    }
    let from = Databases::Embedded(directory.into());
    if !from.any_exists(&DATABASES.map(|(name, _)| name)) {
        bail!("There are no embedded databases in {}. Choose the data directory with --data.", directory.display());
    }
    let mut moved = Vec::new();
    for (name, migrations) in DATABASES {
        let rows = copy::copy(&from, to, name, migrations).await.map_err(|error| anyhow!("{error}"))?;
        moved.push(json!({"database": name, "rows": rows}));
    }
    terminal.show(&moved, |moved| {
        let rows: Vec<_> =
            moved.iter().map(|row| vec![row["database"].as_str().unwrap_or_default().into(), row["rows"].to_string()]).collect();
        let hint = "All rows were copied, and compared by count and digest. Start the server with this database.url.\n\
                    After you have checked it, you can remove the embedded databases (*.db) from the data directory.";
        format!("{}\n{hint}", table(&["DATABASE", "ROWS"], &rows))
    })
}

pub fn migrate(directory: &Path, command: &MigrateCommand, terminal: Terminal) -> anyhow::Result<()> {
    let (MigrateCommand::Run(arguments)
    | MigrateCommand::Info(arguments)
    | MigrateCommand::Validate(arguments)
    | MigrateCommand::Repair(arguments)
    | MigrateCommand::ToPostgres(arguments)) = command;
    data::accessible(directory, "migrate")?;
    let loaded = configuration::load(directory, arguments.config.as_deref(), &arguments.set)?;
    let databases = server::databases(directory, &loaded.configuration);
    // No other process may write to the databases meanwhile. Reading is always allowed.
    let is_read_only = matches!(command, MigrateCommand::Info(_) | MigrateCommand::Validate(_));
    let claimed = (!is_read_only).then(|| Data::claim(directory, Claim::Alone)).transpose()?;
    let asynchronous = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match command {
        MigrateCommand::Repair(_) => return asynchronous.block_on(repair(&databases, terminal)),
        MigrateCommand::ToPostgres(_) => return asynchronous.block_on(to_postgres(directory, &databases, terminal)),
        MigrateCommand::Run(_) | MigrateCommand::Info(_) | MigrateCommand::Validate(_) => {}
    }
    let steps = asynchronous.block_on(async {
        let mut all = Vec::new();
        for (name, migrations) in DATABASES {
            if claimed.is_some() {
                Store::migrate(&databases, name, migrations).await.map_err(|error| anyhow!("{name}: {error}"))?;
            }
            let steps =
                Store::migration_status(&databases, name, migrations).await.map_err(|error| anyhow!("{name}: {error}"))?;
            all.extend(steps.into_iter().map(|step| (name, step)));
        }
        anyhow::Ok(all)
    })?;
    let not_applied: Vec<_> = steps.iter().filter(|(_, step)| step.state != MigrationState::Applied).collect();
    if matches!(command, MigrateCommand::Validate(_)) && !not_applied.is_empty() {
        let problems = not_applied.iter().map(|(name, step)| format!("{name}: {} is {}", step.file, step.state.name()));
        bail!("{}", problems.collect::<Vec<_>>().join("\n"));
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
