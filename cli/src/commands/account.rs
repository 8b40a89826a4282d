//! Who is signed in, and their account.

use anyhow::{Context, bail};
use capsule_contracts::Empty;
use capsule_contracts::identity::User;
use serde_json::{Value, json};

use crate::arguments::{AccountCommand, Login, Register};
use crate::client::{Client, takes_password};
use crate::terminal::{Terminal, ask, ask_password, ask_secret, can_ask, confirm};

pub fn login(mut client: Client, arguments: Login, terminal: Terminal) -> anyhow::Result<()> {
    if arguments.register {
        let register = Register { email: arguments.email, name: arguments.name, token_stdin: false };
        let setup = setup_token(false, client.local_token());
        return enter(client, register, setup.as_deref(), None, terminal);
    }
    if client.is_local() && arguments.email.is_none() {
        // The server is of this host, and its data directory can be read: no password is needed.
        client.sign_in_locally();
        return whoami(client, terminal);
    }
    let email = email(arguments.email)?;
    let password = ask_password("Password", false)?;
    client.enter("/auth/login", &json!({"email": email, "password": password}))?;
    whoami(client, terminal)
}

/// Makes an account. A registration link says at which server, unless one is named.
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
    enter(client, arguments, setup.as_deref(), Some(token).filter(|token| !token.is_empty()), terminal)
}

/// The set-up token of the first account. Whoever can read the data directory has it already. It makes an
/// administrator, so a server that a link names does not get it: a link can name anybody's.
fn setup_token(is_linked: bool, local: Option<&str>) -> Option<String> {
    if is_linked {
        return None;
    }
    std::env::var("CAPSULE_SETUP_TOKEN").ok().or_else(|| local.map(str::to_owned))
}

/// The registration link or token: a secret, so it is asked for or read, and never an argument.
fn link(stdin: bool) -> anyhow::Result<String> {
    if !stdin && !can_ask() {
        return Ok(String::new());
    }
    let link = ask_secret("Registration link (empty if you have none)", stdin).context("the registration link cannot be read")?;
    Ok(link.trim().to_owned())
}

fn enter(
    mut client: Client,
    arguments: Register,
    setup: Option<&str>,
    token: Option<&str>,
    terminal: Terminal,
) -> anyhow::Result<()> {
    let email = email(arguments.email)?;
    let password = ask_password("Password", true)?;
    let body: Value = json!({
        "email": email,
        "password": password,
        "name": arguments.name,
        "setup_token": setup.or(token),
        "registration_token": token,
    });
    client.enter("/auth/register", &body)?;
    whoami(client, terminal)
}

fn email(given: Option<String>) -> anyhow::Result<String> {
    let email = match given {
        Some(email) => email,
        None => ask("E-mail", None, "give your e-mail address with --email")?,
    };
    if email.trim().is_empty() {
        bail!("an e-mail address is needed");
    }
    Ok(email)
}

pub fn logout(mut client: Client, terminal: Terminal) -> anyhow::Result<()> {
    client.leave()?;
    terminal.show(&json!({"server": client.name()}), |_| format!("Signed out of {}.", client.name()))
}

pub fn whoami(mut client: Client, terminal: Terminal) -> anyhow::Result<()> {
    let user: User = client.get("/auth/me")?;
    terminal.show(&json!({"server": client.name(), "user": user}), |_| {
        let rank = if user.platform_admin { ", administrator of the installation" } else { "" };
        format!("{} <{}>{rank}\nat {}", user.name, user.email, client.name())
    })
}

/// Does what takes the password once more. In a session that the server's local token opened, that token does.
pub fn confirmed<T>(client: &mut Client, act: impl Fn(&mut Client, &str) -> anyhow::Result<T>) -> anyhow::Result<T> {
    if let Some(token) = client.password_substitute().map(str::to_owned) {
        match act(client, &token) {
            Err(error) if takes_password(&error) => {}
            done => return done,
        }
    }
    let password = ask_password("Your password, to confirm", false)?;
    act(client, &password)
}

pub fn password(mut client: Client, terminal: Terminal) -> anyhow::Result<()> {
    terminal.say(&format!("Server {}", client.name()));
    let user: User = client.get("/auth/me")?;
    // From a pipe: the present password, then the new one, each on a line.
    let present = ask_password("Present password (empty for the local administrator)", false);
    let present = match (present, client.password_substitute()) {
        (Ok(present), _) if !present.is_empty() => present,
        (_, Some(token)) => token.to_owned(),
        (present, None) => present?,
    };
    let new = ask_password("New password", true)?;
    let _: Empty = client.post("/auth/password/change", &json!({"password": present, "new_password": new}))?;
    terminal.show(&json!({"user": user}), |_| format!("Changed the password of {}. Every other session has ended.", user.email))
}

pub fn account(mut client: Client, command: &AccountCommand, terminal: Terminal) -> anyhow::Result<()> {
    let AccountCommand::Delete { yes } = command;
    // Whoever is not signed in has no account to erase: it is not the local administrator's.
    client.require_session();
    let user: User = client.get("/auth/me")?;
    let question = format!("Erase the account {} at {}, with every organization that is yours alone?", user.email, client.name());
    if !confirm(&question, *yes)? {
        bail!("nothing was changed");
    }
    let _: Empty = confirmed(&mut client, |client, password| client.delete_with("/auth/me", &json!({"password": password})))?;
    terminal.show(&json!({"user": user}), |_| format!("The account {} is being erased.", user.email))
}

#[cfg(test)]
mod tests {
    use super::setup_token;

    #[test]
    fn a_server_that_a_link_names_does_not_get_the_set_up_token() {
        assert_eq!(setup_token(true, Some("the local token")), None);
        assert!(setup_token(false, Some("the local token")).is_some());
    }
}
