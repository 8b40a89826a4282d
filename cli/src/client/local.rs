//! Finds the server on this host by its data directory.

use std::path::Path;

use crate::server::data;
use crate::terminal::Failure;

/// A server running on this host, and the secret that signs in its owner.
pub struct Local {
    pub url: String,
    pub address: String,
    pub token: String,
}

/// The server that uses this data directory, if one is running and its secret is readable.
pub fn find(directory: &Path) -> Option<Local> {
    let public = data::running(directory).into_iter().find_map(|process| process.public)?;
    let token = data::local_token(directory)?;
    Some(Local { url: public.url, address: public.address, token })
}

/// The error if no server was found for an explicitly chosen data directory.
pub fn not_found(directory: &Path) -> Failure {
    if let Err(failure) = data::accessible(directory, "…") {
        return failure;
    }
    let shown = directory.display();
    if data::running(directory).is_empty() {
        return Failure::new(
            "server_not_running",
            format!("No server is running with the data directory {shown} (from --data or CAPSULE_DATA)."),
        )
        .hint(format!(
            "Start it: capsule server --data {shown}\n\
             To use another server, sign in with `capsule login --server URL`, then use --server URL."
        ));
    }
    Failure::new("no_ingress", format!("None of the processes with the data directory {shown} runs the ingress."))
        .hint("Use --server with the URL of the server.")
}
