//! The commands, one file for each subject.

mod account;
mod admin;
mod backup;
mod build;
mod cancel;
mod deploy;
mod destroy;
mod doctor;
mod health;
mod interrupt;
mod lifecycle;
mod logs;
mod open;
mod operator;
mod organizations;
mod plan;
mod prepare;
mod quotas;
mod service;
mod status;
mod variables;

use std::process::ExitCode;

use anyhow::Context;
use clap::CommandFactory;

use crate::arguments::{Arguments, Command};
use crate::client::{Choice, Client};
use crate::server::data;
use crate::terminal::{self, Terminal};

/// Runs the command of the command line.
pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let terminal = Terminal { json: arguments.json };
    let choice = Choice { server: arguments.server, data: arguments.data.clone(), insecure_http: arguments.insecure_http };
    let directory = arguments.data.unwrap_or_else(data::default_directory);
    let client = || Client::find(&choice);
    match arguments.command {
        Command::Server(server) => operator::server(&directory, server, terminal),
        Command::Config { command } => operator::config(&directory, command, terminal),
        Command::Migrate { command } => operator::migrate(&directory, &command, terminal),
        Command::Backup { command } => backup::run(&directory, &command, terminal),
        Command::Login(login) => account::login(client()?, login, terminal),
        Command::Register(register) => {
            let client = |server: Option<&str>| {
                Client::find(&Choice { server: server.map(str::to_owned).or_else(|| choice.server.clone()), ..choice.clone() })
            };
            account::register(client, choice.server.as_deref(), register, terminal)
        }
        Command::Password => account::password(client()?, terminal),
        Command::Account { command } => account::account(client()?, &command, terminal),
        Command::Org { command } => organizations::run(client()?, command, terminal),
        Command::Logout => account::logout(client()?, terminal),
        Command::Whoami => account::whoami(client()?, terminal),
        Command::Init(at) => plan::init(&at, terminal),
        Command::Plan { source, options } => plan::plan(&source, &options, terminal),
        Command::Build(build) => build::build(&build, terminal),
        Command::Deploy(arguments) => return deploy::deploy(client()?, &arguments, terminal),
        Command::Status(at) => status::status(client()?, &at, terminal),
        Command::Logs { at, follow, tail, deployment } => logs::logs(client()?, &at, follow, tail, deployment, terminal),
        Command::Env { command } => variables::env(client()?, command, terminal),
        Command::Restart(at) => return lifecycle::restart(client()?, &at, terminal),
        Command::Stop(at) => lifecycle::stop(client()?, &at, terminal),
        Command::Start(at) => return lifecycle::start(client()?, &at, terminal),
        Command::Rollback { number, at } => return lifecycle::rollback(client()?, &at.into(), number, terminal),
        Command::Cancel { number, at } => cancel::cancel(client()?, &at.into(), number, terminal),
        Command::Open(at) => open::open(client()?, &at, terminal),
        Command::Destroy(arguments) => destroy::destroy(client()?, &arguments, terminal),
        Command::Quotas { organization } => quotas::quotas(client()?, organization.as_deref(), terminal),
        Command::Admin { command } => admin::run(client()?, &command, terminal),
        Command::Doctor => return doctor::doctor(client(), &directory, terminal),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "capsule", &mut script);
            terminal::print(&String::from_utf8_lossy(&script))
        }
        Command::ManPages { directory } => clap_mangen::generate_to(Arguments::command(), &directory)
            .with_context(|| format!("cannot write the manual pages into {}", directory.display())),
    }
    .map(|()| ExitCode::SUCCESS)
}
