//! The data directory: its lock, its permissions, its secrets, and the processes that use it.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::terminal::Failure;

/// A running server process, as announced in the data directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Running {
    pub pid: u32,
    /// Host name or container id. A process id is unique only within it.
    pub host: String,
    /// The parts of the server that run in the process.
    pub parts: Vec<String>,
    /// Address of its health and metrics pages.
    pub private: String,
    /// Addresses of the ingress, if this process manages it.
    pub public: Option<Public>,
    /// The setting `listen`, and below, the build of Capsule: those of an ingress that this process starts.
    #[serde(default)]
    pub listen: String,
    #[serde(default)]
    pub build: String,
}

/// Addresses of applications and the API.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Public {
    /// URL for users.
    pub url: String,
    /// URL for programs on this host. It has an IP address, so that no name must be resolved.
    pub address: String,
}

/// The default data directory of the user.
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
    /// A unique name of this process.
    name: String,
    /// Holds the lock until the process ends.
    _lock: File,
    announced: Option<(PathBuf, File)>,
}

/// How a process uses a data directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// No other process may use it.
    Alone,
    /// Other processes may use it, with the same parts or others.
    Shared,
}

impl Data {
    /// Creates the directory if it does not exist, and locks it.
    ///
    /// # Errors
    /// When it is in use, belongs to another user, or cannot be created.
    pub fn claim(directory: &Path, claim: Claim) -> anyhow::Result<Self> {
        accessible(directory, "server")?;
        let created = DirBuilder::new().recursive(true).mode(0o700).create(directory);
        created.with_context(|| format!("cannot create the data directory {}", directory.display()))?;
        let directory = directory.canonicalize()?;
        // Paths of Unix sockets are limited to about 100 bytes. The longest ones are below `run/i`.
        if directory.as_os_str().len() > 70 {
            bail!(
                "The path of the data directory is too long for Unix sockets: {} (at most 70 bytes). Use a shorter one with --data.",
                directory.display()
            );
        }
        if directory.join(capsule_backup::STAGING_DIRECTORY).exists() {
            bail!(
                "A restore into {} was interrupted, so its data is incomplete. Run `capsule backup restore --replace` again.",
                directory.display()
            );
        }
        for (path, mode) in restrict(&directory) {
            tracing::warn!(path = %path.display(), mode = format!("{mode:o}"), "other users could read this; its mode was corrected");
        }
        if std::fs::metadata(&directory)?.permissions().mode() & 0o077 != 0 {
            bail!(
                "Other users can read {}, and its mode cannot be changed. Use another data directory with --data.",
                directory.display()
            );
        }
        for inner in ["keys", "run", "run/gateways", "run/processes", "logs", "blobs"] {
            DirBuilder::new().recursive(true).mode(0o700).create(directory.join(inner))?;
        }
        let mut lock = lock_file(&directory)?;
        let operation = match claim {
            Claim::Alone => FlockOperation::NonBlockingLockExclusive,
            Claim::Shared => FlockOperation::NonBlockingLockShared,
        };
        if rustix::fs::flock(&lock, operation).is_err() {
            return Err(in_use(&directory, &mut lock).into());
        }
        // Shown to the next process that tries to lock the directory.
        lock.set_len(0)?;
        lock.write_all(std::process::id().to_string().as_bytes())?;
        let name = random::<4>()?;
        Ok(Self { directory, name, _lock: lock, announced: None })
    }

    /// The socket of this process's gateway.
    pub fn gateway_socket(&self) -> PathBuf {
        self.directory.join(format!("run/gateways/{}.sock", self.name))
    }

    pub fn path(&self) -> &Path {
        &self.directory
    }

    /// The secret that signs in the owner of this directory. Created at the first start.
    ///
    /// # Errors
    /// When it cannot be read or created, or is damaged.
    pub fn local_token(&self) -> anyhow::Result<String> {
        let path = self.directory.join("local-token");
        if !path.exists() {
            capsule_store::create_secret_file(&path, &random::<32>()?)?;
        }
        let token = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        if token.len() < 32 {
            bail!("{} is damaged. Remove it; the server creates a new one.", path.display());
        }
        Ok(token)
    }

    /// Announces that this process is ready.
    pub fn announce(&mut self, running: &Running) -> anyhow::Result<()> {
        let path = self.directory.join(PROCESSES).join(format!("{}.json", self.name));
        let temporary = path.with_extension("new");
        let mut file = File::create(&temporary)?;
        // The lock distinguishes running processes from those that were killed.
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        file.write_all(&serde_json::to_vec(running)?)?;
        std::fs::rename(temporary, &path)?;
        self.announced = Some((path, file));
        Ok(())
    }
}

impl Drop for Data {
    fn drop(&mut self) {
        if let Some((path, _)) = &self.announced {
            let _ = std::fs::remove_file(path);
        }
    }
}

const PROCESSES: &str = "run/processes";

/// `N` random bytes in hexadecimal.
fn random<const N: usize>() -> std::io::Result<String> {
    let mut bytes = [0_u8; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The name of this host, or container.
pub fn host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

fn lock_file(directory: &Path) -> std::io::Result<File> {
    OpenOptions::new().create(true).truncate(false).read(true).write(true).mode(0o600).open(directory.join("server.lock"))
}

/// The error for a data directory in use.
fn in_use(directory: &Path, lock: &mut File) -> Failure {
    let mut pids: Vec<String> = running(directory).iter().map(|process| process.pid.to_string()).collect();
    if pids.is_empty() {
        // A process that is starting has not announced itself yet.
        let mut pid = String::new();
        let _ = lock.read_to_string(&mut pid);
        pids.extend(pid.parse::<u32>().ok().map(|pid| pid.to_string()));
    }
    let processes = match pids.as_slice() {
        [] => String::new(),
        [pid] => format!(": process {pid}"),
        pids => format!(": processes {}", pids.join(", ")),
    };
    Failure::new(
        "data_directory_in_use",
        format!("A server is already running with the data directory {}{processes}.", directory.display()),
    )
    .hint(format!("Stop it with `capsule server down --data {0}`, or use another directory with --data.", directory.display()))
}

/// Checks that this user can use the data directory.
///
/// # Errors
/// When they cannot. The error has the `capsule <command>` line for its owner.
pub fn accessible(directory: &Path, command: &str) -> Result<(), Failure> {
    let user_id = rustix::process::geteuid();
    // The directory, or the nearest parent that can be examined: its permissions decide.
    let Some((at, metadata)) = directory
        .ancestors()
        .find_map(|at| match std::fs::metadata(at) {
            Ok(metadata) => Some(Some((at, metadata))),
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => None,
            Err(_) => Some(None),
        })
        .flatten()
    else {
        return Ok(());
    };
    let is_open = at == directory && metadata.uid() == user_id.as_raw();
    let is_below_open = at != directory && rustix::fs::access(at, rustix::fs::Access::EXEC_OK).is_ok();
    if user_id.is_root() || is_open || is_below_open {
        return Ok(());
    }
    let (owner, user) = (user_name(metadata.uid()), user_name(user_id.as_raw()));
    let sudo = if metadata.uid() == 0 { "sudo".into() } else { format!("sudo -u {owner}") };
    Err(Failure::new(
        "not_your_data_directory",
        format!("The data directory {} belongs to {owner}; you are {user}.", directory.display()),
    )
    .hint(format!(
        "Run it as {owner}: {sudo} capsule {command} --data {0}\nTo run your own server, use a directory of yours: --data DIRECTORY",
        directory.display()
    )))
}

/// The name of a user, or `user <uid>` if there is none.
fn user_name(uid: u32) -> String {
    let user = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid)).ok().flatten();
    user.map_or_else(|| format!("user {uid}"), |user| user.name)
}

/// Removes the permissions of other users from the files of a data directory. Returns the paths that had such
/// permissions, with their modes.
pub fn restrict(directory: &Path) -> Vec<(PathBuf, u32)> {
    let mut paths: Vec<(PathBuf, u32)> = vec![(directory.into(), 0o077)];
    let own = ["keys", "run", "run/gateways", "run/processes", "run/i", "logs", "blobs", "local-token", "server.lock"];
    paths.extend(own.iter().map(|name| (directory.join(name), 0o077)));
    // An operator may allow a group to read the configuration.
    paths.push((directory.join("capsule.toml"), 0o007));
    let files = |directory: &Path| std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    paths.extend(files(&directory.join("keys")).map(|path| (path, 0o077)));
    let is_database = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        [".db", ".db-wal", ".db-shm", ".db-journal"].iter().any(|end| name.ends_with(end))
    };
    paths.extend(files(directory).filter(is_database).map(|path| (path, 0o077)));
    let mut wrong = Vec::new();
    for (path, not_allowed) in paths {
        let Ok(kind) = std::fs::metadata(&path) else { continue };
        let mode = kind.permissions().mode() & 0o7777;
        if mode & not_allowed == 0 {
            continue;
        }
        match std::fs::set_permissions(&path, PermissionsExt::from_mode(mode & !not_allowed)) {
            Ok(()) => wrong.push((path, mode)),
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "other users can read this, and its mode cannot be changed");
            }
        }
    }
    wrong
}

/// Locks a data directory without running processes, so that no server starts while the returned file is open.
///
/// # Errors
/// When a server or the ingress is running.
pub fn lock_stopped(directory: &Path) -> anyhow::Result<Option<File>> {
    let path = directory.join("server.lock");
    let lock = match OpenOptions::new().write(true).open(&path) {
        Ok(lock) => lock,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot open {}", path.display())),
    };
    if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        bail!("A server is running with the data directory {0}. Stop it: capsule server down --data {0}", directory.display());
    }
    if std::os::unix::net::UnixStream::connect(directory.join("run/ingress.sock")).is_ok() {
        bail!(
            "Applications of the data directory {0} are still running. Stop them: capsule server down --data {0}",
            directory.display()
        );
    }
    Ok(Some(lock))
}

/// The running server processes of a data directory.
pub fn running(directory: &Path) -> Vec<Running> {
    let Ok(entries) = std::fs::read_dir(directory.join(PROCESSES)) else { return Vec::new() };
    let mut found = Vec::new();
    for path in entries.flatten().map(|entry| entry.path()) {
        let Ok(file) = File::open(&path) else { continue };
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
            let _ = std::fs::remove_file(path);
        } else if let Ok(running) = serde_json::from_reader(file) {
            found.push(running);
        }
    }
    found
}

/// Whether a server uses a data directory.
pub fn is_claimed(directory: &Path) -> bool {
    let Ok(lock) = OpenOptions::new().write(true).open(directory.join("server.lock")) else { return false };
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err()
}

/// The local token of a data directory, if this user can read it.
pub fn local_token(directory: &Path) -> Option<String> {
    std::fs::read_to_string(directory.join("local-token")).ok()
}

#[cfg(test)]
mod tests {
    use super::{Claim, Data, accessible};

    #[test]
    fn the_error_of_a_data_directory_in_use_names_the_process() {
        let folder = tempfile::tempdir().expect("a folder");
        let _held = Data::claim(folder.path(), Claim::Alone).expect("free");
        let error = Data::claim(folder.path(), Claim::Alone).err().expect("in use").to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        assert!(error.contains("capsule server down --data"), "{error}");
    }

    #[test]
    fn a_directory_of_the_user_and_one_that_does_not_exist_are_accessible() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(accessible(folder.path(), "server").is_ok());
        assert!(accessible(&folder.path().join("not/there"), "server").is_ok());
    }
}
