//! The sandbox: the first process of a workload's PID namespace. It builds the file system that the workload sees, drops
//! every privilege, starts the workload, reaps its children, and ends with its exit code.
//!
//! The workload sees `/app` (its own directory), `/usr` and a few files of `/etc` read-only, a
//! private `/tmp`, its own `/proc`, a minimal `/dev`, and the mounts of its specification. It sees nothing else of the host.
//!
//! Its standard input is a pipe from the shim: the first line is the [`Task`]. When the pipe closes, the shim has ended, and
//! the sandbox ends with the workload.

use std::io::Read;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::CapabilitySet;
use serde::{Deserialize, Serialize};
use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::confine::confine;
use crate::network::resolvers;
use crate::spec::Spec;
use crate::uplink::RESOLVER;

/// The task that the shim sends to the sandbox.
#[derive(Debug, Serialize, Deserialize)]
pub struct Task {
    pub spec: Spec,
    /// `cgroup.procs` files to join.
    pub groups: Vec<PathBuf>,
    /// Whether this process is root on the host, and not only in its own user namespace.
    pub privileged: bool,
}

/// Parts of `/etc` that programs need and that hold no secrets.
const ETC: &[&str] = &[
    "ssl/certs",
    "ssl/openssl.cnf",
    "ca-certificates",
    "pki",
    "alternatives",
    "localtime",
    "timezone",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "nsswitch.conf",
    "mime.types",
    "services",
    "protocols",
    "gai.conf",
    "host.conf",
    "java-17-openjdk",
    "java-21-openjdk",
    "maven",
    "fonts",
];

/// The size of `/tmp` and of the home directory, each, if no limit is set.
const DEFAULT_TEMPORARY_BYTES: u64 = 1 << 30;
/// The most open descriptors of a process: each is examined when the workload's disk usage is measured.
const MAX_DESCRIPTORS: u64 = 65_536;
/// The most bytes of `/dev/shm`.
const MAX_SHARED_MEMORY_BYTES: u64 = 256 << 20;

/// Runs the role `sandbox`. Returns the exit code of the workload.
#[must_use]
pub fn run() -> i32 {
    match start() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cannot set up the sandbox: {error}");
            126
        }
    }
}

/// The step that failed, and why.
#[derive(Debug)]
struct SetupError(String);

impl std::fmt::Display for SetupError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

fn at<E: std::fmt::Display>(what: impl std::fmt::Display) -> impl FnOnce(E) -> SetupError {
    move |error| SetupError(format!("{what}: {error}"))
}

fn start() -> Result<i32, SetupError> {
    let task = read_task().map_err(at("reading the task"))?;
    let spec = &task.spec;
    for group in &task.groups {
        // The shim has already warned about a limit that cannot be applied.
        let _ = std::fs::write(group, "0");
    }
    // Undoes the shim's setting: when memory runs out, the kernel kills the workload first.
    let _ = std::fs::write("/proc/self/oom_score_adj", "0");
    if spec.limits.low_priority {
        let _ = rustix::process::nice(10);
    }
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS).map_err(at("unshare"))?;
    nix::unistd::sethostname("capsule").map_err(at("hostname"))?;
    build_root(&task).map_err(|error| SetupError(spec.without_host_paths(&error.0)))?;

    // Caught, not blocked: the workload would inherit blocked signals.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGCHLD]).map_err(at("signals"))?;
    for bit in 0..=40 {
        // Fails for capabilities that this kernel does not have.
        let _ = rustix::thread::remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit));
    }
    rustix::thread::set_no_new_privs(true).map_err(at("no_new_privs"))?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    limit_descriptors().map_err(at("descriptors"))?;
    confine(&spec.relaxations).map_err(SetupError)?;

    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(&spec.command).env_clear().envs(&spec.environment).current_dir("/app").stdin(Stdio::null());
    if task.privileged {
        command.uid(spec.uid).gid(spec.uid);
    }
    let child = command.spawn().map_err(at("starting /bin/sh"))?;
    drop(command);
    std::thread::Builder::new()
        .stack_size(64 << 10)
        .spawn(|| {
            let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
            // The shim has ended. The end of the first process ends the PID namespace.
            std::process::exit(137);
        })
        .map_err(at("lifeline"))?;
    // Not waited for through its handle: the loop reaps every child, including this one.
    wait_for(Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX)), &mut signals)
}

/// Lowers the limits of open descriptors to [`MAX_DESCRIPTORS`] where they are higher.
fn limit_descriptors() -> rustix::io::Result<()> {
    let limits = getrlimit(Resource::Nofile);
    let most = |limit: Option<u64>| Some(limit.unwrap_or(MAX_DESCRIPTORS).min(MAX_DESCRIPTORS));
    setrlimit(Resource::Nofile, Rlimit { current: most(limits.current), maximum: most(limits.maximum) })
}

/// Reads one line byte by byte: the thread that watches the pipe must get the rest.
fn read_task() -> std::io::Result<Task> {
    let mut line = Vec::new();
    let mut byte = [0];
    let mut stdin = std::fs::File::open("/proc/self/fd/0")?;
    while stdin.read(&mut byte)? == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    Ok(serde_json::from_slice(&line)?)
}

fn wait_for(main: Pid, signals: &mut Signals) -> Result<i32, SetupError> {
    loop {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) if pid == main => return Ok(code),
                Ok(WaitStatus::Signaled(pid, signal, _)) if pid == main => return Ok(128 + signal as i32),
                Ok(WaitStatus::StillAlive) | Err(_) => break,
                Ok(_) => {}
            }
        }
        for signal in signals.wait().filter(|signal| *signal != SIGCHLD) {
            // To all processes of the namespace except this one.
            let signal = Signal::try_from(signal).map_err(at("signals"))?;
            let _ = kill(Pid::from_raw(-1), signal);
        }
    }
}

fn build_root(task: &Task) -> Result<(), SetupError> {
    let spec = &task.spec;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).map_err(at("making mounts private"))?;
    let root = spec.run_directory.join("root");
    let _ = std::fs::create_dir(&root);
    tmpfs(&root, "mode=755,size=16m,nr_inodes=4096")?;
    let inside = |path: &str| root.join(path.trim_start_matches('/'));

    bind(Path::new("/usr"), &inside("/usr"), false)?;
    for name in ["bin", "sbin", "lib", "lib32", "lib64", "libx32"] {
        let source = Path::new("/").join(name);
        if let Ok(target) = std::fs::read_link(&source) {
            symlink(target, inside(name)).map_err(at(source.display()))?;
        } else if source.is_dir() {
            bind(&source, &inside(name), false)?;
        }
    }
    for name in ETC {
        let source = Path::new("/etc").join(name);
        if source.exists() {
            bind(&source, &inside("/etc").join(name), false)?;
        }
    }
    let user = if task.privileged { spec.uid } else { 0 };
    write(
        &inside("/etc/passwd"),
        &format!("root:x:0:0:root:/nonexistent:/bin/false\napp:x:{user}:{user}:app:/home/app:/bin/sh\n"),
    )?;
    write(&inside("/etc/group"), &format!("root:x:0:\napp:x:{user}:\n"))?;
    write(&inside("/etc/hosts"), "127.0.0.1 localhost capsule\n::1 localhost capsule\n")?;
    write(&inside("/etc/hostname"), "capsule\n")?;
    let resolvers = if task.privileged { resolvers() } else { format!("nameserver {RESOLVER}\n") };
    write(&inside("/etc/resolv.conf"), &resolvers)?;

    let dev = inside("/dev");
    make_dir(&dev)?;
    for name in ["null", "zero", "full", "random", "urandom", "tty"] {
        let target = dev.join(name);
        write(&target, "")?;
        mount(Some(&Path::new("/dev").join(name)), &target, none, MsFlags::MS_BIND, none).map_err(at(target.display()))?;
    }
    for (name, target) in
        [("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2")]
    {
        symlink(target, dev.join(name)).map_err(at(name))?;
    }
    make_dir(&dev.join("shm"))?;
    let temporary = spec.limits.temporary.unwrap_or(DEFAULT_TEMPORARY_BYTES);
    tmpfs(&dev.join("shm"), &format!("mode=1777,{}", size(temporary.min(MAX_SHARED_MEMORY_BYTES))))?;
    make_dir(&inside("/tmp"))?;
    tmpfs(&inside("/tmp"), &format!("mode=1777,{}", size(temporary)))?;
    make_dir(&inside("/var"))?;
    symlink("/tmp", inside("/var/tmp")).map_err(at("/var/tmp"))?;
    make_dir(&inside("/run"))?;
    make_dir(&inside("/home/app"))?;
    tmpfs(&inside("/home/app"), &format!("mode=700,{},uid={user},gid={user}", size(temporary)))?;
    make_dir(&inside("/proc"))?;
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), &inside("/proc"), Some("proc"), quiet, none).map_err(at("/proc"))?;

    bind(&spec.directory, &inside("/app"), true)?;
    for extra in &spec.mounts {
        bind(&extra.source, &inside(&extra.target.to_string_lossy()), extra.writable)?;
    }

    let old = root.join(".old");
    make_dir(&old)?;
    nix::unistd::pivot_root(&root, &old).map_err(at("pivot_root"))?;
    std::env::set_current_dir("/").map_err(at("/"))?;
    umount2("/.old", MntFlags::MNT_DETACH).map_err(at("leaving the host's file system"))?;
    let _ = std::fs::remove_dir("/.old");
    let remount = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(none, "/", none, remount, none).map_err(at("making / read-only"))
}

/// Bind-mounts `source` at `target`, which is created as a directory or file.
fn bind(source: &Path, target: &Path, writable: bool) -> Result<(), SetupError> {
    let none: Option<&str> = None;
    let kind = std::fs::metadata(source).map_err(at(source.display()))?;
    if kind.is_dir() {
        make_dir(target)?;
    } else {
        if let Some(parent) = target.parent() {
            make_dir(parent)?;
        }
        write(target, "")?;
    }
    mount(Some(source), target, none, MsFlags::MS_BIND | MsFlags::MS_REC, none).map_err(at(source.display()))?;
    let mut flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    if !writable {
        flags |= MsFlags::MS_RDONLY;
    }
    mount(none, target, none, flags, none).map_err(at(format!("{} with its flags", target.display())))
}

/// The mount options that limit a tmpfs, with one inode for every 8 KiB.
fn size(bytes: u64) -> String {
    format!("size={bytes},nr_inodes={}", (bytes >> 13).max(1024))
}

fn tmpfs(target: &Path, options: &str) -> Result<(), SetupError> {
    mount(Some("tmpfs"), target, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some(options))
        .map_err(at(target.display()))
}

fn make_dir(path: &Path) -> Result<(), SetupError> {
    std::fs::create_dir_all(path).map_err(at(path.display()))
}

fn write(path: &Path, text: &str) -> Result<(), SetupError> {
    std::fs::write(path, text).map_err(at(path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).map_err(at(path.display()))
}

/// Describes to people how a process ended.
pub fn describe(status: std::process::ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(137), _) => "was killed (signal 9), possibly because it exceeded its memory limit".into(),
        (Some(code), _) if code > 128 => format!("ended by signal {}", code - 128),
        (Some(code), _) => format!("exited with status {code}"),
        (None, Some(signal)) => format!("ended by signal {signal}"),
        (None, None) => "ended".into(),
    }
}
