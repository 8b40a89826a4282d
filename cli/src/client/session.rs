//! Stores sessions between commands, in a file that only its owner can read.

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
    /// Whether the user signed in with `--insecure-http`.
    #[serde(default)]
    pub insecure_http: bool,
    /// Whether the local token opened the session, and not a password. Missing in files of earlier versions.
    #[serde(default)]
    pub by_local_token: bool,
    /// The id of the user. Missing in files of earlier versions.
    #[serde(default)]
    pub user_id: Option<String>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Sessions {
    /// The server that the user last signed in to.
    last: Option<String>,
    /// By server.
    sessions: BTreeMap<String, Tokens>,
}

/// An exclusive lock on the sessions, so that two commands do not use the same refresh token.
pub struct Lock(#[expect(dead_code, reason = "the file holds the lock")] File);

pub fn lock() -> anyhow::Result<Lock> {
    let directory = directory()?;
    let created = DirBuilder::new().recursive(true).mode(0o700).create(&directory);
    created.with_context(|| format!("cannot create {}", directory.display()))?;
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(directory.join("sessions.lock"))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)?;
    Ok(Lock(file))
}

pub fn load(server: &str) -> anyhow::Result<Option<Tokens>> {
    Ok(read()?.sessions.remove(server))
}

pub fn last() -> anyhow::Result<Option<(String, Tokens)>> {
    let mut all = read()?;
    let Some(server) = all.last else { return Ok(None) };
    Ok(all.sessions.remove(&server).map(|tokens| (server, tokens)))
}

/// Stores a session. The caller holds the [`Lock`].
pub fn store(server: &str, tokens: &Tokens) -> anyhow::Result<()> {
    let mut all = read()?;
    all.sessions.insert(server.into(), tokens.clone());
    all.last = Some(server.into());
    write(&all)
}

/// Removes a session. The caller holds the [`Lock`].
pub fn remove(server: &str) -> anyhow::Result<()> {
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
        .ok_or_else(|| anyhow!("Cannot store sessions: set HOME or XDG_CONFIG_HOME."))
}

fn read() -> anyhow::Result<Sessions> {
    let path = directory()?.join("sessions.json");
    match std::fs::read(&path) {
        Ok(bytes) => {
            serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged. Remove it and sign in again", path.display()))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Sessions::default()),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
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
