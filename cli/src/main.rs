//! `capsule`: the server and its client in one binary, and the roles it takes on behalf of itself.

mod arguments;
mod client;
mod commands;
mod folder;
mod git;
mod pack;
mod roles;
mod server;
mod terminal;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    // Before anything is set up: a shim is to stay small.
    if let Some(code) = roles::take() {
        return code;
    }
    let arguments = arguments::Arguments::parse();
    match commands::run(arguments) {
        Ok(code) => code,
        Err(error) => {
            terminal::complain(&error);
            ExitCode::FAILURE
        }
    }
}
