//! Sessions kept between commands, in a file that only its owner can read.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use serde::{Deserialize, Serialize};

/// A session's tokens.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Tokens {
    pub access_token: String,
    pub refresh_token: String,
    /// Whether the one who signed in asked for a connection without encryption.
    #[serde(default)]
    pub insecure_http: bool,
    /// Whether the local token opened the session, and not a password. A file of an earlier version does not have it.
    #[serde(default)]
    pub by_local_token: bool,
    /// Whose session it is. A file of an earlier version does not have it.
    #[serde(default)]
    pub user_id: Option<String>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Sessions {
    /// The server signed in to last.
    last: Option<String>,
    /// By server.
    sessions: BTreeMap<String, Tokens>,
}

/// Held while tokens are exchanged, so that two commands do not use one refresh token twice.
pub struct Turn(#[expect(dead_code, reason = "the lock lives as long as it")] File);

pub fn lock() -> anyhow::Result<Turn> {
    let directory = directory()?;
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&directory);
    made.with_context(|| format!("{} cannot be made", directory.display()))?;
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(directory.join("sessions.lock"))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)?;
    Ok(Turn(file))
}

pub fn load(server: &str) -> anyhow::Result<Option<Tokens>> {
    Ok(read()?.sessions.remove(server))
}

pub fn last() -> anyhow::Result<Option<(String, Tokens)>> {
    let mut all = read()?;
    let Some(server) = all.last else { return Ok(None) };
    Ok(all.sessions.remove(&server).map(|tokens| (server, tokens)))
}

/// Needs the turn.
pub fn keep(server: &str, tokens: &Tokens) -> anyhow::Result<()> {
    let mut all = read()?;
    all.sessions.insert(server.into(), tokens.clone());
    all.last = Some(server.into());
    write(&all)
}

/// Needs the turn.
pub fn forget(server: &str) -> anyhow::Result<()> {
    let mut all = read()?;
    all.sessions.remove(server);
    if all.last.as_deref() == Some(server) {
        all.last = None;
    }
    write(&all)
}

fn directory() -> anyhow::Result<PathBuf> {
    let configured = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    configured
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".config")))
        .map(|base| base.join("capsule"))
        .ok_or_else(|| anyhow!("neither HOME nor XDG_CONFIG_HOME is set: sessions cannot be kept"))
}

fn read() -> anyhow::Result<Sessions> {
    let path = directory()?.join("sessions.json");
    match std::fs::read(&path) {
        Ok(bytes) => {
            serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged; remove it and sign in again", path.display()))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Sessions::default()),
        Err(error) => Err(error).with_context(|| format!("{} cannot be read", path.display())),
    }
}

fn write(all: &Sessions) -> anyhow::Result<()> {
    let directory = directory()?;
    let temporary = directory.join("sessions.json.new");
    let _ = std::fs::remove_file(&temporary);
    let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&temporary)?;
    file.write_all(&serde_json::to_vec_pretty(all)?)?;
    std::fs::rename(temporary, directory.join("sessions.json"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Sessions;

    #[test]
    fn a_session_of_an_earlier_version_did_not_come_from_the_local_token() {
        let file = r#"{"last": "http://localhost:8080",
            "sessions": {"http://localhost:8080": {"access_token": "a", "refresh_token": "b", "insecure_http": false}}}"#;
        let all: Sessions = serde_json::from_str(file).expect("it loads");
        let tokens = &all.sessions["http://localhost:8080"];
        assert!(!tokens.by_local_token && tokens.user_id.is_none(), "{tokens:?}");
    }
}
