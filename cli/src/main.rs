//! `capsule`: the server, its client, and the roles that the server starts, in one binary.
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
    // Before any other set-up, to keep shims small.
    if let Some(code) = roles::run_if_role() {
        return code;
    }
    let arguments: Vec<_> = std::env::args_os().collect();
    let arguments = match usage::parse(&arguments) {
        Ok(arguments) => arguments,
        Err(error) => return Terminal { json: usage::has_json_flag(&arguments) }.usage(&error),
    };
    let terminal = Terminal { json: arguments.json };
    commands::run(arguments).unwrap_or_else(|error| terminal.fail(&error))
}
