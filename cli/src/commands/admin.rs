//! `capsule admin`: users, quotas, dead letters and sagas of the installation.

use anyhow::{anyhow, bail};
use capsule_contracts::Empty;
use capsule_contracts::identity::User;
use capsule_contracts::operations::{DeadLetter, Saga};
use serde_json::json;

use super::account::confirmed;
use crate::arguments::{AdminCommand, DeadLettersCommand, QuotasCommand, SagasCommand, UsersCommand};
use crate::client::Client;
use crate::terminal::{Terminal, confirm, table};

pub fn run(client: Client, command: &AdminCommand, terminal: Terminal) -> anyhow::Result<()> {
    let is_change = matches!(
        command,
        AdminCommand::DeadLetters { command: DeadLettersCommand::Replay { .. } | DeadLettersCommand::Discard { .. } }
            | AdminCommand::Quotas { command: QuotasCommand::Set { .. } }
            | AdminCommand::Users {
                command: UsersCommand::Grant { .. } | UsersCommand::Revoke { .. } | UsersCommand::Delete { .. }
            }
    );
    if is_change {
        terminal.note(&format!("Server {}", client.name()));
    }
    match command {
        AdminCommand::Users { command } => users(client, command, terminal),
        AdminCommand::DeadLetters { command } => dead_letters(client, *command, terminal),
        AdminCommand::Sagas { command } => sagas(client, *command, terminal),
        AdminCommand::Quotas { command } => super::quotas::administer(client, command, terminal),
    }
}

fn user(client: &mut Client, email: &str) -> anyhow::Result<User> {
    let wanted = email.trim().to_lowercase();
    client
        .list::<User>("/admin/users")?
        .into_iter()
        .find(|user| user.email == wanted)
        .ok_or_else(|| anyhow!("There is no account {email}. `capsule admin users list` lists the accounts."))
}

fn users(mut client: Client, command: &UsersCommand, terminal: Terminal) -> anyhow::Result<()> {
    let (email, platform_admin) = match command {
        UsersCommand::List => {
            return terminal.show(&client.list::<User>("/admin/users")?, |users| {
                let rows: Vec<_> = users
                    .iter()
                    .map(|user| {
                        let role = if user.platform_admin { "administrator" } else { "" };
                        vec![user.email.clone(), user.name.clone(), user.created_at.to_string(), role.to_owned()]
                    })
                    .collect();
                table(&["EMAIL", "NAME", "CREATED", "ROLE"], &rows)
            });
        }
        UsersCommand::Delete { email, yes } => {
            let user = user(&mut client, email)?;
            if !confirm(
                &format!("Erase the account {}, and every organization of which it is the only member?", user.email),
                *yes,
            )? {
                bail!("Nothing was changed.");
            }
            let path = format!("/admin/users/{}", user.id);
            let _: Empty = confirmed(&mut client, |client, password| client.delete_with(&path, &json!({"password": password})))?;
            return terminal.show(&user, |user| format!("Erasing the account {}.", user.email));
        }
        UsersCommand::Grant { email } => (email, true),
        UsersCommand::Revoke { email } => (email, false),
    };
    let path = format!("/admin/users/{}", user(&mut client, email)?.id);
    let changed: User = confirmed(&mut client, |client, password| {
        client.patch(&path, &json!({"platform_admin": platform_admin, "password": password}))
    })?;
    terminal.show(&changed, |user| match user.platform_admin {
        true => format!("{} is now an administrator of the installation.", user.email),
        false => format!("{} is no longer an administrator of the installation.", user.email),
    })
}

fn dead_letters(mut client: Client, command: DeadLettersCommand, terminal: Terminal) -> anyhow::Result<()> {
    match command {
        DeadLettersCommand::List => {
            let letters: Vec<DeadLetter> = client.list("/admin/dead-letters")?;
            terminal.show(&letters, |letters| {
                if letters.is_empty() {
                    return "No dead letters.".into();
                }
                let rows: Vec<_> = letters
                    .iter()
                    .map(|letter| {
                        let (id, attempts) = (letter.id.to_string(), letter.attempts.to_string());
                        vec![id, letter.service.clone(), letter.kind.clone(), attempts, letter.last_error.clone()]
                    })
                    .collect();
                table(&["ID", "SERVICE", "EVENT", "ATTEMPTS", "LAST ERROR"], &rows)
            })
        }
        DeadLettersCommand::Show { id } => {
            let letter: DeadLetter = client.get(&format!("/admin/dead-letters/{id}"))?;
            terminal.show(&letter, |letter| {
                let mut text = format!("{} could not handle {} ({}).\n\n", letter.service, letter.kind, letter.id);
                for failure in &letter.errors {
                    text += &format!("{}  {}\n", failure.at, failure.error);
                }
                let envelope = letter.envelope.clone().unwrap_or_default();
                text + "\n" + &serde_json::to_string_pretty(&envelope).unwrap_or_default()
            })
        }
        DeadLettersCommand::Replay { id } => {
            let letter: DeadLetter = client.post(&format!("/admin/dead-letters/{id}/replay"), &json!({}))?;
            terminal.show(&letter, |letter| format!("Retrying {1} in {0}.", letter.service, letter.kind))
        }
        DeadLettersCommand::Discard { id } => {
            let letter: DeadLetter = client.delete(&format!("/admin/dead-letters/{id}"))?;
            terminal.show(&letter, |letter| format!("Discarded {} for {}.", letter.kind, letter.service))
        }
    }
}

fn sagas(mut client: Client, command: SagasCommand, terminal: Terminal) -> anyhow::Result<()> {
    match command {
        SagasCommand::List => {
            let sagas: Vec<Saga> = client.list("/admin/sagas")?;
            terminal.show(&sagas, |sagas| {
                if sagas.is_empty() {
                    return "No sagas.".into();
                }
                let rows: Vec<_> = sagas
                    .iter()
                    .map(|saga| {
                        let error = saga.last_error.clone().unwrap_or_default();
                        vec![saga.id.to_string(), saga.name.clone(), saga.state.clone(), saga.step.clone(), error]
                    })
                    .collect();
                table(&["ID", "SAGA", "STATE", "STEP", "LAST ERROR"], &rows)
            })
        }
        SagasCommand::Show { id } => {
            let saga: Saga = client.get(&format!("/admin/sagas/{id}"))?;
            terminal.show(&saga, |saga| {
                let mut text = format!("{} of {} is {} ({}).\n\n", saga.name, saga.service, saga.state, saga.id);
                for event in &saga.history {
                    text += &format!("{}  {}: {}\n", event.at, event.step, event.what);
                }
                text
            })
        }
    }
}
