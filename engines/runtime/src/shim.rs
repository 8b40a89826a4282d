//! The shim: the owner of one workload. A small process without an async runtime, which starts the workload, writes its
//! output to files, restarts it with growing delays when it ends, and serves requests on its socket. Once it runs, it does
//! not depend on the control plane.

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

/// What the shim prints once it listens on its socket and starts the workload.
pub const READY: &str = "ready";
/// What the shim of a workload that runs once prints before the reason, if it stopped the workload.
pub const STOPPED: &str = "stopped: ";

/// After a run of this duration, the restart delay begins again with the shortest.
const STABLE_AFTER: Duration = Duration::from_secs(60);
/// The restart delay doubles from the shortest to the longest.
const MIN_RESTART_DELAY: Duration = Duration::from_millis(500);
const MAX_RESTART_DELAY: Duration = Duration::from_secs(60);
/// The stack of a helper thread.
const STACK_BYTES: usize = 128 << 10;

struct Shared {
    spec: Spec,
    privileged: bool,
    groups: Groups,
    warnings: Vec<String>,
    enforcement: Enforcement,
    mask: Mask,
    log: Mutex<Log>,
    layers: Mutex<Layers>,
    state: Mutex<WorkloadState>,
    changed: Condvar,
}

struct WorkloadState {
    pid: Option<u32>,
    started_at: i64,
    restarts: u32,
    last_exit: Option<String>,
    stopping: bool,
    usage: Usage,
    /// Why the workload is being killed. Completes "it …".
    evicted: Option<String>,
}

/// Runs the role `shim`. Reads the [`Spec`] as one line from standard input. Returns the exit code, which is that of the
/// workload if it runs once.
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
    std::io::stdin().read_line(&mut line).map_err(|error| format!("cannot read the workload: {error}"))?;
    let spec: Spec = serde_json::from_str(&line).map_err(|error| format!("invalid workload: {error}"))?;
    drop(line);
    let _ = nix::unistd::setsid();

    let privileged = rustix::process::geteuid().is_root();
    let mut uplink = None;
    if !privileged {
        if spec.network == Network::Egress {
            uplink = Some(Uplink::prepare().map_err(|error| format!("cannot start the uplink: {error}"))?);
        }
        enter_user_namespace().map_err(|error| format!("cannot create a sandbox: it takes root or user namespaces ({error})"))?;
    }
    // Before any other thread starts: a mount namespace belongs to a thread.
    let layers = Layers::mount(&spec, privileged)?;
    let mut groups = Groups::create(&spec.id, &spec.limits);
    let helpers = [Some(std::process::id()), uplink.as_ref().map(Uplink::pid)];
    groups.add_owner(helpers.into_iter().flatten());
    // When memory runs out, the kernel kills the workload, not the shim.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
    let mut warnings =
        network::enter(spec.network, uplink.as_mut()).map_err(|error| format!("cannot create a network namespace: {error}"))?;
    warnings.extend(groups.warnings.iter().cloned());
    if layers.is_copy() {
        warnings.push("/app is a copy of the release, since this host cannot mount overlays".into());
    }
    let log = Writer::open(&spec.log_directory)
        .map_err(|error| format!("cannot open the log: {}", spec.without_host_paths(&error.to_string())))?;
    let listener = protocol::listen(&spec.run_directory, &spec.id)
        .map_err(|error| format!("cannot create the socket: {}", spec.without_host_paths(&error.to_string())))?;

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
        state: Mutex::new(WorkloadState {
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
            // If no thread can be started, the connection closes and the caller tries again.
            let _ = thread(move || requests::handle(&server, &stream));
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
                server.log_line(&format!("stopped: it exceeded its time limit of {seconds} s"));
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

/// Enters a new user namespace, in which the calling user is root.
fn enter_user_namespace() -> std::io::Result<()> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    unshare(CloneFlags::CLONE_NEWUSER)?;
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    std::fs::write("/proc/self/gid_map", format!("0 {gid} 1"))
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, WorkloadState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs the workload until it is stopped, or once if it is to run once. Returns the exit code.
    fn supervise(self: &Arc<Self>) -> i32 {
        let mut failures: u32 = 0;
        loop {
            let began = Instant::now();
            let ended = self.run_once();
            let mut state = self.state();
            state.pid = None;
            let evicted = state.evicted.clone();
            let text = match (&evicted, &ended) {
                (Some(reason), _) => format!("was stopped: it {reason}"),
                (None, Ok(status)) => describe(*status),
                (None, Err(error)) => format!("could not be started: {error}"),
            };
            state.last_exit = Some(text.clone());
            self.changed.notify_all();
            if self.spec.once {
                drop(state);
                if let Some(reason) = evicted {
                    self.log_line(&format!("stopped: it {reason}"));
                    println!("{STOPPED}{reason}");
                    return 137;
                }
                return ended.ok().and_then(|status| status.code()).unwrap_or(126);
            }
            if state.stopping {
                return ended.ok().and_then(|status| status.code()).unwrap_or(126);
            }
            if evicted.is_some() {
                drop(state);
                self.clear_app(&mut self.layers());
                state = self.state();
                state.evicted = None;
            }
            state.restarts += 1;
            failures = if began.elapsed() >= STABLE_AFTER { 1 } else { failures + 1 };
            let delay = MIN_RESTART_DELAY.saturating_mul(1 << (failures - 1).min(10)).min(MAX_RESTART_DELAY);
            self.log_line(&format!("the process {text}; restarting it in {} s", delay.as_secs_f32()));
            let (state, _) =
                self.changed.wait_timeout_while(state, delay, |state| !state.stopping).unwrap_or_else(PoisonError::into_inner);
            if state.stopping {
                return 0;
            }
        }
    }

    fn layers(&self) -> MutexGuard<'_, Layers> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Discards an evicted workload's writes into `/app`, for which it would be evicted again at once.
    fn clear_app(&self, layers: &mut Layers) {
        let cleared = layers.clear();
        self.state().usage = Usage::NOTHING;
        match cleared {
            Ok(()) => self.log_line("removed the files that the process wrote into /app"),
            Err(error) => self.log_line(&format!("cannot remove the files that the process wrote into /app: {error}")),
        }
    }

    /// Measures the workload's disk usage until this process ends, and evicts the workload when it exceeds the limit.
    fn watch_disk(&self, limit: Usage) {
        // For this thread only: a workload that uses every core must not prevent its own measurement.
        let _ = rustix::process::nice(-20);
        let mut targets: Vec<_> =
            self.spec.mounts.iter().filter(|mount| mount.writable).map(|mount| mount.target.clone()).collect();
        targets.push("/app".into());
        let share_files = threads_share_files(&self.spec.relaxations);
        let mut schedule = Schedule::new(limit);
        loop {
            let (pid, is_evicted) = {
                let state = self.state();
                (state.pid, state.evicted.is_some())
            };
            if let Some(pid) = pid.filter(|_| !is_evicted) {
                let layers = self.layers();
                if schedule.is_due(&layers) {
                    let began = Instant::now();
                    match disk::measure(&layers, limit, Some(pid), &targets, share_files) {
                        Ok(usage) => self.state().usage = usage,
                        Err(excess) => {
                            self.evict(pid, excess.to_string());
                        }
                    }
                    schedule.record_measurement(began.elapsed(), &layers);
                }
            }
            std::thread::sleep(disk::CHECK_INTERVAL);
        }
    }

    /// Kills the workload's process `pid` for this reason. Returns whether it was running.
    fn evict(&self, pid: u32, reason: String) -> bool {
        let mut state = self.state();
        let runs = state.pid == Some(pid) && !state.stopping;
        if runs {
            state.evicted.get_or_insert(reason);
            signal(pid, Signal::SIGKILL);
        }
        runs
    }

    /// Marks the workload as evicted if it waits for its restart and has written files that can be discarded. Returns
    /// whether it does. The caller holds the lock of the layers while it discards them, so that no start happens meanwhile.
    fn begin_clearing(&self, reason: &str) -> bool {
        let mut state = self.state();
        let waits = state.pid.is_none() && state.evicted.is_none() && !state.stopping;
        let begins = waits && !self.spec.once && self.spec.writes == Writes::Layer && state.usage != Usage::NOTHING;
        if begins {
            state.evicted = Some(reason.to_owned());
        }
        begins
    }

    fn run_once(self: &Arc<Self>) -> std::io::Result<ExitStatus> {
        let mut child = spawn_in_new_pid_namespace()?;
        // The lifeline stays open for as long as this variable lives.
        let mut lifeline = child.stdin.take().ok_or_else(|| std::io::Error::other("the sandbox has no standard input"))?;
        {
            // Wait until the layers are cleared: the sandbox binds them once it has its task.
            let _layers = self.layers();
            let mut state = self.state();
            state.pid = Some(child.id());
            state.started_at = now();
            if state.stopping {
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
        // The PID namespace ends with its first process, so the pipes reach their end.
        for reader in readers.into_iter().flatten().flatten() {
            let _ = reader.join();
        }
        Ok(status)
    }

    /// Sends SIGTERM, and SIGKILL after the grace period. Returns at once.
    fn stop(self: &Arc<Self>) {
        let pid = {
            let mut state = self.state();
            if std::mem::replace(&mut state.stopping, true) {
                return;
            }
            self.changed.notify_all();
            state.pid
        };
        let Some(pid) = pid else { return };
        signal(pid, Signal::SIGTERM);
        let shared = self.clone();
        let grace = Duration::from_secs(if self.spec.once { 2 } else { self.spec.grace_seconds });
        let _ = thread(move || {
            let state = shared.state();
            let (state, _) = shared
                .changed
                .wait_timeout_while(state, grace, |state| state.pid == Some(pid))
                .unwrap_or_else(PoisonError::into_inner);
            if state.pid == Some(pid) {
                drop(state);
                shared.log_line(&format!("the process did not end within {} s of SIGTERM; killing it", grace.as_secs()));
                signal(pid, Signal::SIGKILL);
            }
        });
    }

    fn status(&self) -> ShimStatus {
        let state = self.state();
        ShimStatus {
            version: protocol::VERSION,
            id: self.spec.id.clone(),
            state: match (state.stopping, state.pid) {
                (true, _) => ShimState::Stopping,
                (false, Some(_)) => ShimState::Running,
                (false, None) => ShimState::Backoff,
            },
            shim_pid: std::process::id(),
            pid: state.pid,
            started_at: state.started_at,
            restarts: state.restarts,
            last_exit: state.last_exit.clone(),
            memory: self.groups.memory_in_use(),
            warnings: self.warnings.clone(),
            disk: self.spec.limits.disk.map(|limit| Disk { usage: state.usage, limit, enforcement: self.enforcement }),
        }
    }
}

/// Starts the sandbox as the first process of a new PID namespace. A thread can create only one, so each start takes a new
/// thread.
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
    let handle = std::thread::Builder::new().stack_size(STACK_BYTES).spawn(spawn)?;
    handle.join().unwrap_or_else(|_| Err(std::io::Error::other("the thread that starts the sandbox panicked")))
}

fn signal(pid: u32, signal: Signal) {
    if let Ok(pid) = i32::try_from(pid) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

fn thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<std::thread::JoinHandle<T>, String> {
    std::thread::Builder::new().stack_size(STACK_BYTES).spawn(work).map_err(|error| format!("cannot start a thread: {error}"))
}

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
}
