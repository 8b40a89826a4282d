//! For whoever runs the server.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{anyhow, bail};
use capsule_store::{Databases, MigrationState, Store, copy};

use serde_json::json;

use super::health;
use crate::arguments::{ConfigCommand, MigrateCommand, Server, ServerCommand};
use crate::server::data::{self, Claim, Data};
use crate::server::{self, DATABASES, configuration};
use crate::terminal::{Terminal, table};

pub fn server(directory: &Path, arguments: Server, terminal: Terminal) -> anyhow::Result<()> {
    match arguments.command {
        Some(ServerCommand::Down) => {
            let ended = server::down(directory)?;
            return terminal
                .show(&json!({"instances": ended}), |_| format!("Stopped the server, the ingress and {ended} instance(s)."));
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
    terminal.say(
        "Replacing the ingress: requests under way are finished, connections that last longer than 30 s end, and for a \
         few seconds new ones are refused.",
    );
    let replaced = server::replace_ingress(directory)?;
    terminal.show(&replaced, |replaced| match (&replaced.ended, &replaced.pid, &replaced.listen) {
        (_, Some(pid), Some(listen)) => format!("The ingress is process {pid} now, and listens on {listen}."),
        (Some(pid), ..) => format!(
            "The ingress (process {pid}) has ended. Start the server, which starts another: capsule server --data {}",
            directory.display()
        ),
        _ => "No ingress runs. The server starts one.".into(),
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

async fn repair(databases: &Databases, terminal: Terminal) -> anyhow::Result<()> {
    let mut repaired = Vec::new();
    for (name, migrations) in DATABASES {
        let files = Store::repair(databases, name, migrations).await.map_err(|error| anyhow!("{name}: {error}"))?;
        repaired.extend(files.into_iter().map(|file| format!("{name}: {file}")));
    }
    terminal.show(&repaired, |files| match files.as_slice() {
        [] => "Nothing is to be repaired: every migration is as it was applied.".into(),
        files => format!("Taken over as it is now:\n{}", files.join("\n")),
    })
}

async fn to_postgres(directory: &Path, to: &Databases, terminal: Terminal) -> anyhow::Result<()> {
    if matches!(to, Databases::Embedded(_)) {
        bail!("set database.url to the PostgreSQL server that the data is to be moved to");
    }
    let from = Databases::Embedded(directory.into());
    if !from.any_exists(&DATABASES.map(|(name, _)| name)) {
        bail!(
            "there are no embedded databases in {}: nothing is to be moved; name the data directory with --data",
            directory.display()
        );
    }
    let mut moved = Vec::new();
    for (name, migrations) in DATABASES {
        let rows = copy::copy(&from, to, name, migrations).await.map_err(|error| anyhow!("{error}"))?;
        moved.push(json!({"database": name, "rows": rows}));
    }
    terminal.show(&moved, |moved| {
        let rows: Vec<_> =
            moved.iter().map(|row| vec![row["database"].as_str().unwrap_or_default().into(), row["rows"].to_string()]).collect();
        let hint = "Everything is there, compared by count and digest. With database.url as it is, start the server;\n\
                    the files of the embedded databases in the data directory can be removed once you are content.";
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
    // Nobody else may write meanwhile; looking is always allowed.
    let looks = matches!(command, MigrateCommand::Info(_) | MigrateCommand::Validate(_));
    let claimed = (!looks).then(|| Data::claim(directory, Claim::Alone)).transpose()?;
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
            let steps = Store::migration_status(&databases, name, migrations).await.map_err(|error| anyhow!("{name}: {error}"))?;
            all.extend(steps.into_iter().map(|step| (name, step)));
        }
        anyhow::Ok(all)
    })?;
    let wrong: Vec<_> = steps.iter().filter(|(_, step)| step.state != MigrationState::Applied).collect();
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
