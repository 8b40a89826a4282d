//! The data directory: whose it is, what is secret in it, and that one server uses it at a time.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

/// What a running server tells those who can read its data directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Running {
    pub pid: u32,
    /// For people.
    pub url: String,
    /// For programs of this host: no name has to be resolved.
    pub address: String,
}

/// Where this user's server keeps its data unless told otherwise.
pub fn default_directory() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return "/var/lib/capsule".into();
    }
    let share = std::env::var_os("XDG_DATA_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    share
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".local/share")))
        .unwrap_or_else(|| "/tmp".into())
        .join("capsule")
}

/// A data directory in use by this process.
pub struct Data {
    directory: PathBuf,
    /// Held for as long as the server lives.
    _lock: File,
}

impl Data {
    /// Makes the directory if it is not there, and claims it.
    pub fn claim(directory: &Path) -> anyhow::Result<Self> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
        made.with_context(|| format!("the data directory {} cannot be made", directory.display()))?;
        let directory = directory.canonicalize()?;
        // Sockets' names have a limit of about a hundred bytes, and the longest is below `run/i`.
        if directory.as_os_str().len() > 70 {
            bail!("the data directory's path is too long for Unix sockets: {} (at most 70 bytes)", directory.display());
        }
        let metadata = std::fs::metadata(&directory)?;
        if metadata.permissions().mode() & 0o077 != 0 {
            std::fs::set_permissions(&directory, PermissionsExt::from_mode(0o700))
                .with_context(|| format!("others can read {}, and that cannot be changed", directory.display()))?;
        }
        for inner in ["keys", "run", "logs"] {
            DirBuilder::new().recursive(true).mode(0o700).create(directory.join(inner))?;
        }
        let lock = lock_file(&directory)?;
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            bail!("a server runs in {} already; `capsule server down` stops it", directory.display());
        }
        Ok(Self { directory, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        &self.directory
    }

    /// The secret that proves that its bearer owns this directory; made at the first start.
    pub fn local_token(&self) -> anyhow::Result<String> {
        let path = self.directory.join("local-token");
        if let Ok(mut file) = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
            let mut random = [0_u8; 32];
            File::open("/dev/urandom")?.read_exact(&mut random)?;
            let token: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
            file.write_all(token.as_bytes())?;
            file.sync_all()?;
        }
        let token = std::fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))?;
        if token.len() < 32 {
            bail!("{} is damaged; remove it, and a new one is made", path.display());
        }
        Ok(token)
    }

    /// Says that the server answers.
    pub fn announce(&self, running: &Running) -> anyhow::Result<()> {
        let temporary = self.directory.join("run/server.json.new");
        std::fs::write(&temporary, serde_json::to_vec(running)?)?;
        std::fs::rename(temporary, self.directory.join("run/server.json"))?;
        Ok(())
    }
}

impl Drop for Data {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.directory.join("run/server.json"));
    }
}

fn lock_file(directory: &Path) -> std::io::Result<File> {
    OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(directory.join("server.lock"))
}

/// The server that uses a data directory, if one does.
pub fn running(directory: &Path) -> Option<Running> {
    if !is_claimed(directory) {
        return None;
    }
    serde_json::from_slice(&std::fs::read(directory.join("run/server.json")).ok()?).ok()
}

/// Whether a server uses a data directory.
pub fn is_claimed(directory: &Path) -> bool {
    let Ok(lock) = OpenOptions::new().write(true).open(directory.join("server.lock")) else { return false };
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err()
}

/// The local token of a data directory, for those who can read it.
pub fn local_token(directory: &Path) -> Option<String> {
    std::fs::read_to_string(directory.join("local-token")).ok()
}
