//! A command line that is not understood: which command was probably meant.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, Error, ErrorKind};
use clap::{Command, CommandFactory, Parser};

use crate::arguments::Arguments;
use crate::nearest::nearest;

/// Commands that take something away: proposed only behind the others, so that a typo and a hasty Enter do no harm.
const DESTRUCTIVE: [&str; 9] = ["destroy", "stop", "cancel", "down", "unset", "discard", "restore", "logout", "rollback"];

/// Understands the command line.
///
/// # Errors
/// When it cannot be understood, or asks for help.
pub fn parse(arguments: &[OsString]) -> Result<Arguments, Box<Error>> {
    Arguments::try_parse_from(arguments).map_err(|error| Box::new(suggested(error, arguments)))
}

/// Whether an error is to be told as JSON; asked where the command line could not be understood.
pub fn wants_json(arguments: &[OsString]) -> bool {
    arguments.iter().take_while(|argument| *argument != "--").any(|argument| argument == "--json")
}

/// An error about an unknown command, with the commands that are near.
fn suggested(mut error: Error, arguments: &[OsString]) -> Error {
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

/// The command in which `typed` was looked for.
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
    let known: Vec<&str> = command.get_subcommands().filter(|known| !known.is_hide_set()).map(Command::get_name).collect();
    let mut names = nearest(typed, known);
    // A stable sort: the nearest stays first of its kind.
    names.sort_by_key(|name| DESTRUCTIVE.contains(name));
    names.into_iter().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::{DESTRUCTIVE, near_commands, parse, wants_json};
    use crate::arguments::Arguments;
    use clap::CommandFactory;
    use std::ffi::OsString;

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn a_typo_proposes_the_nearest_command_and_a_destructive_one_never_before_another() {
        let command = Arguments::command();
        for (typed, meant) in
            [("dpeloy", "deploy"), ("deplyo", "deploy"), ("stauts", "status"), ("lgos", "logs"), ("strat", "start")]
        {
            assert_eq!(near_commands(typed, &command).first().map(String::as_str), Some(meant), "{typed}");
        }
        // Every spelling with two neighbours exchanged or one letter left out.
        let names: Vec<&str> = command.get_subcommands().map(clap::Command::get_name).collect();
        for name in &names {
            for at in 1..name.len() {
                let mut letters: Vec<char> = name.chars().collect();
                letters.swap(at - 1, at);
                for typed in [letters.iter().collect::<String>(), [&name[..at], &name[at + 1..]].concat()] {
                    let near = near_commands(&typed, &command);
                    let harmless = near.iter().position(|name| !DESTRUCTIVE.contains(&name.as_str()));
                    assert!(harmless.is_none_or(|first| first == 0), "{typed}: {near:?}");
                }
            }
        }
    }

    #[test]
    fn the_error_names_the_proposal() {
        let told = |text: &str| parse(&words(text)).expect_err("a typo").to_string();
        assert!(told("capsule dpeloy").contains("'deploy'"), "{}", told("capsule dpeloy"));
        assert!(!told("capsule dpeloy").contains("destroy"), "{}", told("capsule dpeloy"));
        assert!(told("capsule env lsit").contains("'list'"), "{}", told("capsule env lsit"));
        assert!(!told("capsule zzzzzz").contains("similar"), "{}", told("capsule zzzzzz"));
        assert!(wants_json(&words("capsule --json dpeloy")) && !wants_json(&words("capsule dpeloy -- --json")));
    }
}
