//! The server of this host, found by its data directory.

use std::path::Path;

use crate::server::data;
use crate::terminal::Failure;

/// A server that runs here, and the secret that signs its owner in.
pub struct Local {
    pub url: String,
    pub address: String,
    pub token: String,
}

/// The server that uses this data directory, if one runs and we may read its secret.
pub fn find(directory: &Path) -> Option<Local> {
    let public = data::running(directory).into_iter().find_map(|process| process.public)?;
    let token = data::local_token(directory)?;
    Some(Local { url: public.url, address: public.address, token })
}

/// Why there is none, and what to do, for a directory that was named.
pub fn why_not(directory: &Path) -> Failure {
    if let Err(failure) = data::accessible(directory, "…") {
        return failure;
    }
    let shown = directory.display();
    if data::running(directory).is_empty() {
        return Failure::new(
            "server_not_running",
            format!("No server runs with the data directory {shown}, which --data or CAPSULE_DATA names."),
        )
        .hint(format!(
            "Start it: capsule server --data {shown}\n\
             To use another server, name that one with --server URL, once `capsule login --server URL` has signed you in."
        ));
    }
    Failure::new("no_ingress", format!("The processes that use the data directory {shown} do not run the ingress."))
        .hint("Name the server with --server URL.")
}
