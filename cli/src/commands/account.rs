//! `capsule login`, `register`, `logout`, `whoami`, `password` and `account`.

use anyhow::{Context, bail};
use capsule_contracts::Empty;
use capsule_contracts::identity::User;
use serde_json::{Value, json};

use crate::arguments::{AccountCommand, Login, Register};
use crate::client::{Client, requires_password};
use crate::terminal::{Terminal, can_prompt, confirm, prompt, prompt_password, prompt_secret};

pub fn login(mut client: Client, arguments: Login, terminal: Terminal) -> anyhow::Result<()> {
    if arguments.register {
        let register = Register { email: arguments.email, name: arguments.name, token_stdin: false };
        let setup = setup_token(false, client.local_token());
        return create_account(client, register, setup.as_deref(), None, terminal);
    }
    if client.is_local() && arguments.email.is_none() {
        // The user can read the data directory of a server on this host, so no password is needed.
        client.sign_in_locally();
        return whoami(client, terminal);
    }
    let email = email(arguments.email)?;
    let password = prompt_password("Password", false)?;
    client.open_session("/auth/login", &json!({"email": email, "password": password}))?;
    whoami(client, terminal)
}

/// Creates an account, on the server of the registration link unless another is named.
pub fn register(
    client: impl Fn(Option<&str>) -> anyhow::Result<Client>,
    named: Option<&str>,
    arguments: Register,
    terminal: Terminal,
) -> anyhow::Result<()> {
    let link = link(arguments.token_stdin)?;
    let (server, token) = match link.rsplit_once('#') {
        Some((page, token)) => (page.strip_suffix("/register"), token),
        None => (None, link.as_str()),
    };
    let client = client(named.or(server))?;
    let setup = setup_token(server.is_some(), client.local_token());
    create_account(client, arguments, setup.as_deref(), Some(token).filter(|token| !token.is_empty()), terminal)
}

/// The set-up token of the first account: from the environment, or from the data directory. It grants the administrator
/// role, so it is not sent to the server of a link, which can be anyone's.
fn setup_token(is_from_link: bool, local_token: Option<&str>) -> Option<String> {
    if is_from_link {
        return None;
    }
    std::env::var("CAPSULE_SETUP_TOKEN").ok().or_else(|| local_token.map(str::to_owned))
}

/// The registration link or token. It is a secret, so it is prompted for or read, and never an argument.
fn link(stdin: bool) -> anyhow::Result<String> {
    if !stdin && !can_prompt() {
        return Ok(String::new());
    }
    let link = prompt_secret("Registration link (empty for none)", stdin).context("cannot read the registration link")?;
    Ok(link.trim().to_owned())
}

fn create_account(
    mut client: Client,
    arguments: Register,
    setup: Option<&str>,
    token: Option<&str>,
    terminal: Terminal,
) -> anyhow::Result<()> {
    let email = email(arguments.email)?;
    let password = prompt_password("Password", true)?;
    let body: Value = json!({
        "email": email,
        "password": password,
        "name": arguments.name,
        "setup_token": setup.or(token),
        "registration_token": token,
    });
    client.open_session("/auth/register", &body)?;
    whoami(client, terminal)
}

fn email(given: Option<String>) -> anyhow::Result<String> {
    let email = match given {
        Some(email) => email,
        None => prompt("E-mail", None, "Give your e-mail address with --email.")?,
    };
    if email.trim().is_empty() {
        bail!("The e-mail address is empty. Give it with --email.");
    }
    Ok(email)
}

pub fn logout(mut client: Client, terminal: Terminal) -> anyhow::Result<()> {
    client.sign_out()?;
    terminal.show(&json!({"server": client.name()}), |_| format!("Signed out of {}.", client.name()))
}

pub fn whoami(mut client: Client, terminal: Terminal) -> anyhow::Result<()> {
    let user: User = client.get("/auth/me")?;
    terminal.show(&json!({"server": client.name(), "user": user}), |_| {
        let role = if user.platform_admin { ", administrator of the installation" } else { "" };
        format!("{} <{}>{role}\nat {}", user.name, user.email, client.name())
    })
}

/// Runs an action that needs the password again. In a session of the local token, that token replaces the password.
pub fn confirmed<T>(client: &mut Client, action: impl Fn(&mut Client, &str) -> anyhow::Result<T>) -> anyhow::Result<T> {
    if let Some(token) = client.password_substitute().map(str::to_owned) {
        match action(client, &token) {
            Err(error) if requires_password(&error) => {}
            result => return result,
        }
    }
    let password = prompt_password("Your password", false)?;
    action(client, &password)
}

pub fn password(mut client: Client, terminal: Terminal) -> anyhow::Result<()> {
    terminal.note(&format!("Server {}", client.name()));
    let user: User = client.get("/auth/me")?;
    // From a pipe: the current password, then the new one, each on a line.
    let current = prompt_password("Current password (empty for the local administrator)", false);
    let current = match (current, client.password_substitute()) {
        (Ok(current), _) if !current.is_empty() => current,
        (_, Some(token)) => token.to_owned(),
        (current, None) => current?,
    };
    let new = prompt_password("New password", true)?;
    let _: Empty = client.post("/auth/password/change", &json!({"password": current, "new_password": new}))?;
    terminal.show(&json!({"user": user}), |_| format!("Changed the password of {}. All other sessions have ended.", user.email))
}

pub fn account(mut client: Client, command: &AccountCommand, terminal: Terminal) -> anyhow::Result<()> {
    let AccountCommand::Delete { yes } = command;
    // Without a session there is no account to erase: the local token must not open one for the local administrator.
    client.require_session();
    let user: User = client.get("/auth/me")?;
    let question = format!(
        "Erase the account {} at {}, and every organization of which you are the only member?",
        user.email,
        client.name()
    );
    if !confirm(&question, *yes)? {
        bail!("Nothing was changed.");
    }
    let _: Empty = confirmed(&mut client, |client, password| client.delete_with("/auth/me", &json!({"password": password})))?;
    terminal.show(&json!({"user": user}), |_| format!("Erasing the account {}.", user.email))
}

#[cfg(test)]
mod tests {
    use super::setup_token;

    #[test]
    fn the_set_up_token_is_not_sent_to_the_server_of_a_link() {
        assert_eq!(setup_token(true, Some("the local token")), None);
        assert!(setup_token(false, Some("the local token")).is_some());
    }
}
