//! `capsule open`: opens a service's URL in the browser.

use std::process::{Command, Stdio};

use serde_json::json;

use super::service;
use crate::arguments::ServiceArgs;
use crate::client::{Client, web_page};
use crate::folder;
use crate::terminal::{Failure, Terminal};

pub fn open(mut client: Client, args: &ServiceArgs, terminal: Terminal) -> anyhow::Result<()> {
    let found = service::find(&mut client, &folder::resolve(args)?, terminal)?;
    let url = found.state(&mut client)?.url;
    if url.is_empty() {
        let text = format!("{} was never deployed to {}.", found.service.name, found.environment);
        return Err(Failure::new("not_deployed", text).hint("Deploy it first: capsule deploy").into());
    }
    // The URL comes from the server, and a desktop also opens files, mail and programs.
    let Some(page) = web_page(&url) else {
        return Err(Failure::new("no_web_page", format!("{url} is not a web page, so it was not opened."))
            .hint("Only http and https URLs are opened.")
            .into());
    };
    let opened = !terminal.json && browse(&page);
    terminal.show(&json!({"url": page, "opened": opened}), |_| page.clone())
}

/// Opens a page with the desktop's opener. Returns whether an opener was started. No shell is involved.
fn browse(page: &str) -> bool {
    let has_desktop = std::env::var_os("DISPLAY").is_some() || std::env::var_os("WAYLAND_DISPLAY").is_some();
    let programs: &[&str] = if cfg!(target_os = "macos") { &["open"] } else { &["xdg-open", "wslview"] };
    (has_desktop || cfg!(target_os = "macos"))
        && programs
            .iter()
            .any(|program| Command::new(program).arg(page).stdout(Stdio::null()).stderr(Stdio::null()).spawn().is_ok())
}
