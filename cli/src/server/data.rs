//! The data directory: whose it is, what is secret in it, and which processes use it.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::terminal::Failure;

/// What a running process tells those who can read its data directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Running {
    pub pid: u32,
    /// Where that id means something: another container's process of the same id is another process.
    pub host: String,
    /// What runs in it.
    pub parts: Vec<String>,
    /// Where its health and metrics are told.
    pub private: String,
    /// Where applications and the API are reached, if this process keeps the ingress.
    pub public: Option<Public>,
    /// The setting `listen`, and the build of Capsule: what an ingress of this process would have.
    #[serde(default)]
    pub listen: String,
    #[serde(default)]
    pub build: String,
}

/// Where applications and the API are reached.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Public {
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
    /// A name for this process that no other has.
    name: String,
    /// Held for as long as the process lives.
    _lock: File,
    announced: Option<(PathBuf, File)>,
}

/// How a process uses a data directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Alone.
    Alone,
    /// Beside other processes that have other parts, or the same ones.
    Shared,
}

impl Data {
    /// Makes the directory if it is not there, and claims it.
    pub fn claim(directory: &Path, claim: Claim) -> anyhow::Result<Self> {
        accessible(directory, "server")?;
        let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
        made.with_context(|| format!("the data directory {} cannot be made", directory.display()))?;
        let directory = directory.canonicalize()?;
        // Sockets' names have a limit of about a hundred bytes, and the longest is below `run/i`.
        if directory.as_os_str().len() > 70 {
            bail!("the data directory's path is too long for Unix sockets: {} (at most 70 bytes)", directory.display());
        }
        if directory.join(capsule_backup::STAGING_DIRECTORY).exists() {
            bail!(
                "a restore into {} was interrupted, so it is not whole. Run \"capsule backup restore --replace\" again",
                directory.display()
            );
        }
        for (path, mode) in restrict(&directory) {
            tracing::warn!(path = %path.display(), mode = format!("{mode:o}"), "others could read this: its mode is repaired");
        }
        if std::fs::metadata(&directory)?.permissions().mode() & 0o077 != 0 {
            bail!("others can read {}, and that cannot be changed", directory.display());
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
        // For the message to the next who tries; the lock is what counts.
        lock.set_len(0)?;
        lock.write_all(std::process::id().to_string().as_bytes())?;
        let name = random::<4>()?;
        Ok(Self { directory, name, _lock: lock, announced: None })
    }

    /// Where this process's gateway listens.
    pub fn gateway_socket(&self) -> PathBuf {
        self.directory.join(format!("run/gateways/{}.sock", self.name))
    }

    pub fn path(&self) -> &Path {
        &self.directory
    }

    /// The secret that proves that its bearer owns this directory; made at the first start.
    pub fn local_token(&self) -> anyhow::Result<String> {
        let path = self.directory.join("local-token");
        if !path.exists() {
            capsule_store::create_secret_file(&path, &random::<32>()?)?;
        }
        let token = std::fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))?;
        if token.len() < 32 {
            bail!("{} is damaged; remove it, and a new one is made", path.display());
        }
        Ok(token)
    }

    /// Says that this process answers.
    pub fn announce(&mut self, running: &Running) -> anyhow::Result<()> {
        let path = self.directory.join(PROCESSES).join(format!("{}.json", self.name));
        let temporary = path.with_extension("new");
        let mut file = File::create(&temporary)?;
        // The lock tells the living from those who could not say goodbye.
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

/// So many random bytes, in hexadecimal.
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

/// The error of whoever finds a data directory in use.
fn in_use(directory: &Path, lock: &mut File) -> Failure {
    let mut pids: Vec<String> = running(directory).iter().map(|process| process.pid.to_string()).collect();
    if pids.is_empty() {
        // One that is just starting is not announced yet.
        let mut pid = String::new();
        let _ = lock.read_to_string(&mut pid);
        pids.extend(pid.parse::<u32>().ok().map(|pid| pid.to_string()));
    }
    let who = match pids.as_slice() {
        [] => String::new(),
        [pid] => format!(": process {pid}"),
        pids => format!(": processes {}", pids.join(", ")),
    };
    Failure::new("data_directory_in_use", format!("A server runs with the data directory {} already{who}.", directory.display()))
        .hint(format!(
            "Stop it with `capsule server down --data {0}`, or use another directory with --data.",
            directory.display()
        ))
}

/// Fails for a user to whom the data directory is closed, with how its owner runs `capsule <command>`.
pub fn accessible(directory: &Path, command: &str) -> Result<(), Failure> {
    let me = rustix::process::geteuid();
    // The directory itself, or the nearest above it that may be looked at: it is the one that is closed.
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
    let is_open = at == directory && metadata.uid() == me.as_raw();
    let is_below_open = at != directory && rustix::fs::access(at, rustix::fs::Access::EXEC_OK).is_ok();
    if me.is_root() || is_open || is_below_open {
        return Ok(());
    }
    let (owner, user) = (user_name(metadata.uid()), user_name(me.as_raw()));
    let sudo = if metadata.uid() == 0 { "sudo".into() } else { format!("sudo -u {owner}") };
    Err(Failure::new(
        "not_your_data_directory",
        format!("The data directory {} belongs to {owner}, and you are {user}.", directory.display()),
    )
    .hint(format!(
        "Run it as {owner}: {sudo} capsule {command} --data {0}\nYour own server takes a directory of yours: --data DIRECTORY",
        directory.display()
    )))
}

/// The name of a user, or the number where there is no name.
fn user_name(uid: u32) -> String {
    let user = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid)).ok().flatten();
    user.map_or_else(|| format!("user {uid}"), |user| user.name)
}

/// Takes from everybody else what only the owner of a data directory may have. Tells which modes were wrong.
pub fn restrict(directory: &Path) -> Vec<(PathBuf, u32)> {
    let mut paths: Vec<(PathBuf, u32)> = vec![(directory.into(), 0o077)];
    let own = ["keys", "run", "run/gateways", "run/processes", "run/i", "logs", "blobs", "local-token", "server.lock"];
    paths.extend(own.iter().map(|name| (directory.join(name), 0o077)));
    // An operator may let a group read the settings.
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
            Err(error) => tracing::error!(path = %path.display(), %error, "others can read this, and that cannot be changed"),
        }
    }
    wrong
}

/// Keeps servers from a data directory for as long as the returned file is open; nothing of it runs.
pub fn hold_stopped(directory: &Path) -> anyhow::Result<Option<File>> {
    let path = directory.join("server.lock");
    let lock = match OpenOptions::new().write(true).open(&path) {
        Ok(lock) => lock,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("{} cannot be opened", path.display())),
    };
    if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        bail!("a server runs in {}; \"capsule server down\" stops it", directory.display());
    }
    if std::os::unix::net::UnixStream::connect(directory.join("run/ingress.sock")).is_ok() {
        bail!("applications of {} still run; \"capsule server down\" stops them", directory.display());
    }
    Ok(Some(lock))
}

/// The processes that use a data directory.
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

/// The local token of a data directory, for those who can read it.
pub fn local_token(directory: &Path) -> Option<String> {
    std::fs::read_to_string(directory.join("local-token")).ok()
}

#[cfg(test)]
mod tests {
    use super::{Claim, Data, accessible};

    #[test]
    fn whoever_finds_a_data_directory_in_use_is_told_the_process() {
        let folder = tempfile::tempdir().expect("a folder");
        let _held = Data::claim(folder.path(), Claim::Alone).expect("free");
        let told = Data::claim(folder.path(), Claim::Alone).err().expect("in use").to_string();
        assert!(told.contains(&format!("process {}", std::process::id())), "{told}");
        assert!(told.contains("capsule server down --data"), "{told}");
    }

    #[test]
    fn ones_own_directory_and_one_that_is_not_there_are_accessible() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(accessible(folder.path(), "server").is_ok());
        assert!(accessible(&folder.path().join("not/there"), "server").is_ok());
    }
}
