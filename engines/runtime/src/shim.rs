//! The owner of one workload. A small process without an async runtime: it starts the workload,
//! writes its output to files, starts it again with growing delays when it ends by itself, and
//! answers on its socket. It needs nothing of the control plane once it runs.

mod output;
mod requests;

use std::io::Write;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cgroup::Groups;
use crate::disk::{self, Disk, Enforcement, Schedule};
use crate::layers::Layers;
use crate::logs::{Stream, Writer};
use crate::mask::Mask;
use crate::network;
use crate::protocol::{self, ShimState, ShimStatus};
use crate::sandbox::{Task, describe};
use crate::seccomp::threads_share_files;
use crate::spec::{Network, Spec, Writes};
use crate::trees::Usage;
use crate::uplink::Uplink;
use output::Log;

/// What the shim prints once its socket answers and the workload is being started.
pub const READY: &str = "ready";
/// What the shim of a workload that runs once prints before the reason for which it was stopped, if it was.
pub const STOPPED: &str = "stopped: ";

/// A workload that ran this long is taken to be well again: delays begin anew.
const WELL: Duration = Duration::from_secs(60);
/// Delays between restarts double from the first to the last of these.
const FIRST_DELAY: Duration = Duration::from_millis(500);
const LAST_DELAY: Duration = Duration::from_secs(60);
/// Helper threads do little; they need no more stack.
const STACK: usize = 128 << 10;

struct Shared {
    spec: Spec,
    privileged: bool,
    groups: Groups,
    warnings: Vec<String>,
    enforcement: Enforcement,
    mask: Mask,
    log: Mutex<Log>,
    layers: Mutex<Layers>,
    life: Mutex<Life>,
    changed: Condvar,
}

struct Life {
    pid: Option<u32>,
    started_at: i64,
    restarts: u32,
    last_exit: Option<String>,
    stopping: bool,
    usage: Usage,
    /// Why it is being killed: it exceeded a limit.
    evicted: Option<String>,
}

/// The role's entry. Reads the [`Spec`] as one line from standard input; the exit code is that of
/// a workload that runs once.
#[must_use]
pub fn run() -> i32 {
    match start() {
        Ok(code) => code,
        Err(error) => {
            println!("{error}");
            126
        }
    }
}

fn start() -> Result<i32, String> {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).map_err(|error| format!("no workload was given: {error}"))?;
    let spec: Spec = serde_json::from_str(&line).map_err(|error| format!("the workload is not understood: {error}"))?;
    drop(line);
    let _ = nix::unistd::setsid();

    let privileged = rustix::process::geteuid().is_root();
    let mut uplink = None;
    if !privileged {
        if spec.network == Network::Egress {
            uplink = Some(Uplink::prepare().map_err(|error| format!("no uplink: {error}"))?);
        }
        enter_user_namespace()
            .map_err(|error| format!("no sandbox can be made: neither root nor user namespaces are to be had here ({error})"))?;
    }
    // Before there is any other thread: mounts are a thread's own.
    let layers = Layers::mount(&spec, privileged)?;
    let mut groups = Groups::create(&spec.id, &spec.limits);
    let helpers = [Some(std::process::id()), uplink.as_ref().map(Uplink::pid)];
    groups.take_in(helpers.into_iter().flatten());
    // When memory runs out, it is not the owner that ends.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
    let mut warnings =
        network::enter(spec.network, uplink.as_mut()).map_err(|error| format!("no network of its own: {error}"))?;
    warnings.extend(groups.warnings.iter().cloned());
    if layers.is_copy() {
        warnings.push("/app is a copy of the release, since this host mounts no overlays".into());
    }
    let log =
        Writer::open(&spec.log_directory).map_err(|error| format!("no log: {}", spec.without_host_paths(&error.to_string())))?;
    let listener = protocol::listen(&spec.run_directory, &spec.id)
        .map_err(|error| format!("no socket: {}", spec.without_host_paths(&error.to_string())))?;

    let (once, mask) = (spec.once, Mask::new(&spec.masked));
    let shared = Arc::new(Shared {
        spec,
        privileged,
        groups,
        warnings,
        enforcement: layers.enforcement(),
        mask,
        log: Mutex::new(Log::new(log)),
        layers: Mutex::new(layers),
        life: Mutex::new(Life {
            pid: None,
            started_at: now(),
            restarts: 0,
            last_exit: None,
            stopping: false,
            usage: Usage::NOTHING,
            evicted: None,
        }),
        changed: Condvar::new(),
    });
    let server = shared.clone();
    thread(move || {
        for stream in listener.incoming().flatten() {
            let server = server.clone();
            // Without a thread to spare, the caller's connection closes and it asks again.
            let _ = thread(move || requests::answer(&server, &stream));
        }
    })?;
    if once {
        let server = shared.clone();
        thread(move || {
            let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
            server.stop();
        })?;
        if let Some(seconds) = shared.spec.limits.seconds {
            let server = shared.clone();
            thread(move || {
                std::thread::sleep(Duration::from_secs(seconds));
                server.say(&format!("stopped: it took longer than the {seconds} s it may take"));
                server.stop();
            })?;
        }
    }
    if let Some(limit) = shared.spec.limits.disk {
        let server = shared.clone();
        thread(move || server.watch_disk(limit))?;
    }
    println!("{READY}");
    let code = shared.supervise();
    shared.layers().remove();
    shared.groups.remove();
    let _ = std::fs::remove_file(shared.spec.run_directory.join(format!("{}.sock", shared.spec.id)));
    Ok(code)
}

/// Maps the calling user to root of a namespace of its own.
fn enter_user_namespace() -> std::io::Result<()> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    unshare(CloneFlags::CLONE_NEWUSER)?;
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    std::fs::write("/proc/self/gid_map", format!("0 {gid} 1"))
}

impl Shared {
    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the workload running until it is told to stop, or once if it is to run once.
    fn supervise(self: &Arc<Self>) -> i32 {
        let mut failures: u32 = 0;
        loop {
            let began = Instant::now();
            let ended = self.run_once();
            let mut life = self.life();
            life.pid = None;
            let evicted = life.evicted.clone();
            let text = match (&evicted, &ended) {
                (Some(reason), _) => format!("was stopped: it {reason}"),
                (None, Ok(status)) => describe(*status),
                (None, Err(error)) => format!("could not be started: {error}"),
            };
            life.last_exit = Some(text.clone());
            self.changed.notify_all();
            if self.spec.once {
                drop(life);
                if let Some(reason) = evicted {
                    self.say(&format!("stopped: it {reason}"));
                    println!("{STOPPED}{reason}");
                    return 137;
                }
                return ended.ok().and_then(|status| status.code()).unwrap_or(126);
            }
            if life.stopping {
                return ended.ok().and_then(|status| status.code()).unwrap_or(126);
            }
            if evicted.is_some() {
                drop(life);
                self.clear_app(&mut self.layers());
                life = self.life();
                life.evicted = None;
            }
            life.restarts += 1;
            failures = if began.elapsed() >= WELL { 1 } else { failures + 1 };
            let delay = FIRST_DELAY.saturating_mul(1 << (failures - 1).min(10)).min(LAST_DELAY);
            self.say(&format!("the process {text}; starting it again in {} s", delay.as_secs_f32()));
            let (life, _) =
                self.changed.wait_timeout_while(life, delay, |life| !life.stopping).unwrap_or_else(PoisonError::into_inner);
            if life.stopping {
                return 0;
            }
        }
    }

    fn layers(&self) -> MutexGuard<'_, Layers> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Throws away what an evicted workload wrote into `/app`: it would be evicted again at once.
    fn clear_app(&self, layers: &mut Layers) {
        let cleared = layers.clear();
        self.life().usage = Usage::NOTHING;
        match cleared {
            Ok(()) => self.say("what the process wrote into /app was removed"),
            Err(error) => self.say(&format!("what the process wrote into /app could not be removed: {error}")),
        }
    }

    /// Measures what the workload holds on disk for as long as this process lives, and evicts it at the limit.
    fn watch_disk(&self, limit: Usage) {
        // This thread's own: a workload that keeps every core busy does not keep it from being measured.
        let _ = rustix::process::nice(-20);
        let mut targets: Vec<_> =
            self.spec.mounts.iter().filter(|mount| mount.writable).map(|mount| mount.target.clone()).collect();
        targets.push("/app".into());
        let share_files = threads_share_files(&self.spec.relaxations);
        let mut schedule = Schedule::new(limit);
        loop {
            let (pid, is_evicted) = {
                let life = self.life();
                (life.pid, life.evicted.is_some())
            };
            if let Some(pid) = pid.filter(|_| !is_evicted) {
                let layers = self.layers();
                if schedule.is_due(&layers) {
                    let began = Instant::now();
                    match disk::measure(&layers, limit, Some(pid), &targets, share_files) {
                        Ok(usage) => self.life().usage = usage,
                        Err(excess) => {
                            self.evict(pid, excess.to_string());
                        }
                    }
                    schedule.measured(began.elapsed(), &layers);
                }
            }
            std::thread::sleep(disk::TICK);
        }
    }

    /// Kills the workload's process `pid`, whose end is then told with this reason; whether it could.
    fn evict(&self, pid: u32, reason: String) -> bool {
        let mut life = self.life();
        let runs = life.pid == Some(pid) && !life.stopping;
        if runs {
            life.evicted.get_or_insert(reason);
            signal(pid, Signal::SIGKILL);
        }
        runs
    }

    /// Notes that the workload is evicted while it waits for its next start, if it does and wrote something that can be
    /// thrown away. The caller holds the layers until that is done: no start passes them.
    fn begin_clearing(&self, reason: &str) -> bool {
        let mut life = self.life();
        let waits = life.pid.is_none() && life.evicted.is_none() && !life.stopping;
        let begins = waits && !self.spec.once && self.spec.writes == Writes::Layer && life.usage != Usage::NOTHING;
        if begins {
            life.evicted = Some(reason.to_owned());
        }
        begins
    }

    fn run_once(self: &Arc<Self>) -> std::io::Result<ExitStatus> {
        let mut child = spawn_in_new_pid_namespace()?;
        // The lifeline stays open for as long as this variable lives.
        let mut lifeline = child.stdin.take().ok_or_else(|| std::io::Error::other("no lifeline"))?;
        {
            // What is being cleared is not given to the sandbox, which binds it once it has its task.
            let _layers = self.layers();
            let mut life = self.life();
            life.pid = Some(child.id());
            life.started_at = now();
            if life.stopping {
                let _ = child.kill();
            }
        }
        let task = Task { spec: self.spec.clone(), groups: self.groups.members(), privileged: self.privileged };
        let mut line = serde_json::to_vec(&task)?;
        line.push(b'\n');
        lifeline.write_all(&line)?;
        drop((task, line));
        let readers = [
            child.stdout.take().map(|pipe| self.read(pipe, Stream::Stdout)),
            child.stderr.take().map(|pipe| self.read(pipe, Stream::Stderr)),
        ];
        let status = child.wait()?;
        // The namespace is gone with its first process, so the pipes are at their end.
        for reader in readers.into_iter().flatten().flatten() {
            let _ = reader.join();
        }
        Ok(status)
    }

    /// SIGTERM now, SIGKILL after the grace; returns at once.
    fn stop(self: &Arc<Self>) {
        let pid = {
            let mut life = self.life();
            if std::mem::replace(&mut life.stopping, true) {
                return;
            }
            self.changed.notify_all();
            life.pid
        };
        let Some(pid) = pid else { return };
        signal(pid, Signal::SIGTERM);
        let shared = self.clone();
        let grace = Duration::from_secs(if self.spec.once { 2 } else { self.spec.grace_seconds });
        let _ = thread(move || {
            let life = shared.life();
            let (life, _) = shared
                .changed
                .wait_timeout_while(life, grace, |life| life.pid == Some(pid))
                .unwrap_or_else(PoisonError::into_inner);
            if life.pid == Some(pid) {
                drop(life);
                shared.say(&format!("the process did not end within {} s of SIGTERM and is killed", grace.as_secs()));
                signal(pid, Signal::SIGKILL);
            }
        });
    }

    fn status(&self) -> ShimStatus {
        let life = self.life();
        ShimStatus {
            version: protocol::VERSION,
            id: self.spec.id.clone(),
            state: match (life.stopping, life.pid) {
                (true, _) => ShimState::Stopping,
                (false, Some(_)) => ShimState::Running,
                (false, None) => ShimState::Backoff,
            },
            shim_pid: std::process::id(),
            pid: life.pid,
            started_at: life.started_at,
            restarts: life.restarts,
            last_exit: life.last_exit.clone(),
            memory: self.groups.memory_in_use(),
            warnings: self.warnings.clone(),
            disk: self.spec.limits.disk.map(|limit| Disk { usage: life.usage, limit, enforcement: self.enforcement }),
        }
    }
}

/// Starts the sandbox as the first process of a new PID namespace. A thread can enter only one, so
/// each start takes a thread of its own.
fn spawn_in_new_pid_namespace() -> std::io::Result<Child> {
    let spawn = || {
        unshare(CloneFlags::CLONE_NEWPID)?;
        Command::new("/proc/self/exe")
            .arg("sandbox")
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
    };
    let handle = std::thread::Builder::new().stack_size(STACK).spawn(spawn)?;
    handle.join().unwrap_or_else(|_| Err(std::io::Error::other("the starting thread failed")))
}

fn signal(pid: u32, signal: Signal) {
    if let Ok(pid) = i32::try_from(pid) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

fn thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<std::thread::JoinHandle<T>, String> {
    std::thread::Builder::new().stack_size(STACK).spawn(work).map_err(|error| format!("no thread: {error}"))
}

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
}
