//! `capsule`: the server and its client in one binary, and the roles it takes on behalf of itself.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod arguments;
mod client;
mod commands;
mod folder;
mod git;
mod nearest;
mod pack;
mod roles;
mod server;
mod terminal;
mod usage;

use std::process::ExitCode;

use terminal::Terminal;

fn main() -> ExitCode {
    // Before anything is set up: a shim is to stay small.
    if let Some(code) = roles::take() {
        return code;
    }
    let words: Vec<_> = std::env::args_os().collect();
    let arguments = match usage::parse(&words) {
        Ok(arguments) => arguments,
        Err(error) => return Terminal { json: usage::wants_json(&words) }.usage(&error),
    };
    let terminal = Terminal { json: arguments.json };
    commands::run(arguments).unwrap_or_else(|error| terminal.complain(&error))
}
