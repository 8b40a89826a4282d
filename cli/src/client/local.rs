//! The server of this host, found by its data directory.

use std::path::Path;

use crate::server::data;

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
