//! Parses the command line. For an unknown command, suggests the nearest ones.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, Error, ErrorKind};
use clap::{Command, CommandFactory, Parser};

use crate::arguments::Arguments;
use crate::nearest::nearest;

/// Commands that stop or delete something. They are suggested after all others, so that a typo does no harm.
const DESTRUCTIVE: [&str; 9] = ["destroy", "stop", "cancel", "down", "unset", "discard", "restore", "logout", "rollback"];

/// Parses the command line.
///
/// # Errors
/// When it is invalid, or requests help or the version.
pub fn parse(arguments: &[OsString]) -> Result<Arguments, Box<Error>> {
    Arguments::try_parse_from(arguments).map_err(|error| Box::new(with_suggestions(error, arguments)))
}

/// Whether `--json` was given, for a command line that cannot be parsed.
pub fn has_json_flag(arguments: &[OsString]) -> bool {
    arguments.iter().take_while(|argument| *argument != "--").any(|argument| argument == "--json")
}

/// Adds the nearest commands to an error about an unknown command.
fn with_suggestions(mut error: Error, arguments: &[OsString]) -> Error {
    if error.kind() != ErrorKind::InvalidSubcommand {
        return error;
    }
    let Some(ContextValue::String(typed)) = error.get(ContextKind::InvalidSubcommand) else { return error };
    let names = near_commands(typed, &parent(typed, arguments));
    error.remove(ContextKind::SuggestedSubcommand);
    error.remove(ContextKind::Suggested);
    if !names.is_empty() {
        error.insert(ContextKind::SuggestedSubcommand, ContextValue::Strings(names));
    }
    error
}

/// The command that has no subcommand `typed`.
fn parent(typed: &str, arguments: &[OsString]) -> Command {
    let mut command = Arguments::command();
    for argument in arguments.iter().skip(1).filter_map(|argument| argument.to_str()) {
        if argument == typed {
            break;
        }
        if let Some(inner) = command.find_subcommand(argument) {
            command = inner.clone();
        }
    }
    command
}

fn near_commands(typed: &str, command: &Command) -> Vec<String> {
    let known: Vec<&str> = command.get_subcommands().filter(|inner| !inner.is_hide_set()).map(Command::get_name).collect();
    let mut names = nearest(typed, known);
    // A stable sort: within each group, the nearest stays first.
    names.sort_by_key(|name| DESTRUCTIVE.contains(name));
    names.into_iter().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::{DESTRUCTIVE, has_json_flag, near_commands, parse};
    use crate::arguments::Arguments;
    use clap::CommandFactory;
    use std::ffi::OsString;

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn a_typo_suggests_the_nearest_command_and_destructive_ones_last() {
        let command = Arguments::command();
        for (typed, expected) in
            [("dpeloy", "deploy"), ("deplyo", "deploy"), ("stauts", "status"), ("lgos", "logs"), ("strat", "start")]
        {
            assert_eq!(near_commands(typed, &command).first().map(String::as_str), Some(expected), "{typed}");
        }
        // Every spelling with two adjacent letters swapped or one left out.
        let names: Vec<&str> = command.get_subcommands().map(clap::Command::get_name).collect();
        for name in &names {
            for at in 1..name.len() {
                let mut letters: Vec<char> = name.chars().collect();
                letters.swap(at - 1, at);
                for typed in [letters.iter().collect::<String>(), [&name[..at], &name[at + 1..]].concat()] {
                    let near = near_commands(&typed, &command);
                    let first_harmless = near.iter().position(|name| !DESTRUCTIVE.contains(&name.as_str()));
                    assert!(first_harmless.is_none_or(|first| first == 0), "{typed}: {near:?}");
                }
            }
        }
    }

    #[test]
    fn the_error_names_the_suggestion() {
        let message = |text: &str| parse(&words(text)).expect_err("a typo").to_string();
        assert!(message("capsule dpeloy").contains("'deploy'"), "{}", message("capsule dpeloy"));
        assert!(!message("capsule dpeloy").contains("destroy"), "{}", message("capsule dpeloy"));
        assert!(message("capsule env lsit").contains("'list'"), "{}", message("capsule env lsit"));
        assert!(!message("capsule zzzzzz").contains("similar"), "{}", message("capsule zzzzzz"));
        assert!(has_json_flag(&words("capsule --json dpeloy")) && !has_json_flag(&words("capsule dpeloy -- --json")));
    }
}
