//! Who is signed in.

use anyhow::bail;
use capsule_contracts::identity::User;
use serde_json::json;

use crate::arguments::Login;
use crate::client::Client;
use crate::terminal::{Terminal, ask, ask_password};

pub fn login(mut client: Client, arguments: Login, terminal: Terminal) -> anyhow::Result<()> {
    if client.is_local() && arguments.email.is_none() && !arguments.register {
        // The server is of this host, and its data directory can be read: no password is needed.
        return whoami(client, terminal);
    }
    let email = match arguments.email {
        Some(email) => email,
        None => ask("E-mail", None, "give your e-mail address with --email")?,
    };
    if email.trim().is_empty() {
        bail!("an e-mail address is needed");
    }
    let password = ask_password("Password", arguments.register)?;
    if arguments.register {
        let body = json!({"email": email, "password": password, "name": arguments.name, "setup_token": arguments.setup_token});
        client.enter("/auth/register", &body)?;
    } else {
        client.enter("/auth/login", &json!({"email": email, "password": password}))?;
    }
    whoami(client, terminal)
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
