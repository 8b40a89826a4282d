//! For whoever runs the server.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::json;

use crate::arguments::{ConfigCommand, Server, ServerCommand};
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
    server::run(directory, loaded.configuration)
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
            let value = if name == "database.url" && value != "" { json!("(set, not shown)") } else { value };
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
