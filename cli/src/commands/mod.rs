//! The commands, one file for each kind.

mod account;
mod admin;
mod backup;
mod build;
mod deploy;
mod doctor;
mod lifecycle;
mod logs;
mod operator;
mod plan;
mod quotas;
mod service;
mod status;
mod variables;

use std::process::ExitCode;

use clap::CommandFactory;

use crate::arguments::{Arguments, Command};
use crate::client::Client;
use crate::server::data;
use crate::terminal::Terminal;

/// Carries out what the command line says.
pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let terminal = Terminal { json: arguments.json };
    let directory = arguments.data.unwrap_or_else(data::default_directory);
    let server = arguments.server.as_deref();
    let client = || Client::find(server, &directory);
    match arguments.command {
        Command::Server(server) => operator::server(&directory, server, terminal),
        Command::Config { command } => operator::config(&directory, command, terminal),
        Command::Migrate { command } => operator::migrate(&directory, &command, terminal),
        Command::Backup { command } => backup::run(&directory, &command, terminal),
        Command::Login(login) => account::login(client()?, login, terminal),
        Command::Logout => account::logout(client()?, terminal),
        Command::Whoami => account::whoami(client()?, terminal),
        Command::Init(at) => plan::init(&at, terminal),
        Command::Plan { of, image } => plan::plan(&of, &image, terminal),
        Command::Build(build) => build::build(&build, terminal),
        Command::Deploy { at, detach, yes } => return deploy::deploy(client()?, &at, detach, yes, terminal),
        Command::Status(at) => status::status(client()?, &at, terminal),
        Command::Logs { at, follow, tail, deployment } => logs::logs(client()?, &at, follow, tail, deployment, terminal),
        Command::Env { command } => variables::env(client()?, command, terminal),
        Command::Restart(at) => return lifecycle::restart(client()?, &at, terminal),
        Command::Stop(at) => lifecycle::stop(client()?, &at, terminal),
        Command::Start(at) => return lifecycle::start(client()?, &at, terminal),
        Command::Rollback { number, at } => return lifecycle::rollback(client()?, &at.into(), number, terminal),
        Command::Open(at) => status::open(client()?, &at, terminal),
        Command::Destroy { at, yes } => lifecycle::destroy(client()?, &at, yes, terminal),
        Command::Quotas { organization } => quotas::quotas(client()?, organization.as_deref(), terminal),
        Command::Admin { command } => admin::run(client()?, &command, terminal),
        Command::Doctor => return doctor::doctor(client(), &directory, terminal),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Arguments::command(), "capsule", &mut std::io::stdout());
            Ok(())
        }
    }
    .map(|()| ExitCode::SUCCESS)
}
