//! `capsule open`: a service's address in the browser.

use std::process::{Command, Stdio};

use serde_json::json;

use super::service;
use crate::arguments::At;
use crate::client::{Client, web_page};
use crate::folder;
use crate::terminal::{Failure, Terminal};

pub fn open(mut client: Client, at: &At, terminal: Terminal) -> anyhow::Result<()> {
    let found = service::find(&mut client, &folder::known(at)?, terminal)?;
    let url = found.state(&mut client)?.url;
    if url.is_empty() {
        let text = format!("{} was never deployed to {}.", found.service.name, found.environment);
        return Err(Failure::new("not_deployed", text).hint("Deploy it first: capsule deploy").into());
    }
    // The address is the server's word: a desktop would open files, mail and programs as well.
    let Some(page) = web_page(&url) else {
        return Err(Failure::new("no_web_page", format!("The address {url} is no page of the web: it was not opened."))
            .hint("Only http and https are opened.")
            .into());
    };
    let opened = !terminal.json && browse(&page);
    terminal.show(&json!({"url": page, "opened": opened}), |_| page.clone())
}

/// Asks the desktop to show a page; says whether there is one that could. The page is one argument, of no shell.
fn browse(page: &str) -> bool {
    let desktop = std::env::var_os("DISPLAY").is_some() || std::env::var_os("WAYLAND_DISPLAY").is_some();
    let programs: &[&str] = if cfg!(target_os = "macos") { &["open"] } else { &["xdg-open", "wslview"] };
    (desktop || cfg!(target_os = "macos"))
        && programs
            .iter()
            .any(|program| Command::new(program).arg(page).stdout(Stdio::null()).stderr(Stdio::null()).spawn().is_ok())
}
