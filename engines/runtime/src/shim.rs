//! The owner of one workload. A small process without an async runtime: it starts the workload,
//! writes its output to files, starts it again with growing delays when it ends by itself, and
//! answers on its socket. It needs nothing of the control plane once it runs.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cgroup::Groups;
use crate::disk::{self, Disk, Enforcement, Schedule};
use crate::layers::Layers;
use crate::logs::{LINE_BYTES, Stream, Writer};
use crate::mask::Mask;
use crate::network;
use crate::protocol::{self, Request, ShimState, ShimStatus};
use crate::sandbox::{Task, describe};
use crate::seccomp::threads_share_files;
use crate::spec::{Network, Spec, Writes};
use crate::throttle::{GAP, Throttle};
use crate::trees::Usage;
use crate::uplink::Uplink;

/// What the shim prints once its socket answers and the workload is being started.
pub const READY: &str = "ready";
/// What the shim of a workload that runs once prints before the reason for which it was stopped, if it was.
pub const STOPPED: &str = "stopped: ";

/// A workload that ran this long is taken to be well again: delays begin anew.
const WELL: Duration = Duration::from_secs(60);
/// Delays between restarts double from the first to the last of these.
const FIRST_DELAY: Duration = Duration::from_millis(500);
const LAST_DELAY: Duration = Duration::from_secs(60);
/// So long a connection to the workload's own loopback may take.
const CONNECT: Duration = Duration::from_secs(2);
/// The most connections that are being made at a time: each takes a thread until the workload accepts it.
const CONNECTING: usize = 64;
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

/// What is printed, and how much more may be.
struct Log {
    writer: Writer,
    throttle: Throttle,
}

impl Log {
    /// Ends a gap in the output with a line that says how much is missing. A full disk must not take the workload down;
    /// what cannot be kept is lost.
    fn reopen(&mut self, at_once: bool) {
        if let Some(gap) = self.throttle.reopen(Instant::now(), at_once) {
            let _ = self.writer.write(Stream::Capsule, gap.to_string().as_bytes());
        }
    }
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
        log: Mutex::new(Log { writer: log, throttle: Throttle::new(Instant::now()) }),
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
            let _ = thread(move || answer(&server, &stream));
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

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a line of the workload's, masked already, or a piece of one that goes on, unless it prints more than it
    /// may; whether more is printed for now.
    fn print(self: &Arc<Self>, stream: Stream, text: &[u8], goes_on: bool) -> bool {
        let mut log = self.log();
        log.reopen(false);
        let was_closed = log.throttle.is_closed();
        if log.throttle.admit(text.len(), Instant::now()) {
            let _ = log.writer.write_part(stream, text, goes_on);
            return true;
        }
        drop(log);
        if !was_closed {
            // The gap is told of even if nothing more is printed. Without a thread to spare, at the next line.
            let shared = self.clone();
            let _ = thread(move || {
                std::thread::sleep(GAP);
                shared.log().reopen(false);
            });
        }
        false
    }

    fn say(&self, text: &str) {
        let _ = self.log().writer.write(Stream::Capsule, &self.mask.bytes(text.as_bytes()));
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

    fn read(self: &Arc<Self>, pipe: impl Read + Send + 'static, stream: Stream) -> Result<std::thread::JoinHandle<()>, String> {
        let shared = self.clone();
        thread(move || {
            let mut pipe = BufReader::with_capacity(LINE_BYTES, pipe);
            let mut output = shared.mask.output();
            let mut is_printed = true;
            loop {
                let (end, is_whole) = match pipe.fill_buf() {
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    Ok([]) | Err(_) => break,
                    Ok(read) => {
                        let newline = read.iter().position(|byte| *byte == b'\n');
                        let end = newline.map_or(read.len(), |at| at + 1);
                        output.push(&read[..end], |line| is_printed = shared.print(stream, line, !line.ends_with(b"\n")));
                        (end, newline.is_some())
                    }
                };
                pipe.consume(end);
                if !std::mem::replace(&mut is_printed, true) {
                    // The rest of the line is passed over with it.
                    output.clear();
                    if shared.skip(&mut pipe, is_whole).is_err() {
                        break;
                    }
                }
            }
            output.end(|line| {
                shared.print(stream, line, false);
            });
            shared.log().reopen(true);
        })
    }

    /// Passes over output while none is printed, up to the end of a line: its rest by itself might show half a secret.
    fn skip(&self, pipe: &mut impl BufRead, mut at_start: bool) -> std::io::Result<()> {
        loop {
            let buffer = match pipe.fill_buf() {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                buffer => buffer?,
            };
            let mut log = self.log();
            log.reopen(false);
            if buffer.is_empty() || (at_start && !log.throttle.is_closed()) {
                return Ok(());
            }
            let open_again = !log.throttle.is_closed();
            let end = if open_again {
                buffer.iter().position(|byte| *byte == b'\n').map_or(buffer.len(), |at| at + 1)
            } else {
                buffer.len()
            };
            at_start = buffer[end - 1] == b'\n';
            log.throttle.count_dropped(buffer[..end].iter().filter(|byte| **byte == b'\n').count(), end);
            drop(log);
            pipe.consume(end);
        }
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

fn answer(shared: &Arc<Shared>, stream: &UnixStream) -> std::io::Result<()> {
    let mut writer = stream;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut line = String::new();
    BufReader::new(stream.take(4096)).read_line(&mut line)?;
    match serde_json::from_str(&line)? {
        Request::Status => {
            let mut reply = serde_json::to_vec(&shared.status())?;
            reply.push(b'\n');
            writer.write_all(&reply)
        }
        Request::Stop => {
            shared.stop();
            writer.write_all(b"ok\n")
        }
        Request::Evict { reason } => {
            let (pid, is_evicted) = {
                let life = shared.life();
                (life.pid, life.evicted.is_some())
            };
            if let Some(pid) = pid {
                let done = shared.evict(pid, reason);
                return writer.write_all(if done { b"ok\n".as_slice() } else { protocol::NOTHING_DONE });
            }
            if is_evicted {
                // What it wrote is being removed.
                return writer.write_all(b"ok\n");
            }
            let mut layers = shared.layers();
            if !shared.begin_clearing(&reason) {
                return writer.write_all(protocol::NOTHING_DONE);
            }
            // Answered before it is done, which may take longer than the caller waits.
            let answered = writer.write_all(b"ok\n");
            shared.say(&format!("evicted while it waits for its next start: it {reason}"));
            shared.clear_app(&mut layers);
            shared.life().evicted = None;
            answered
        }
        Request::Connect { port } => protocol::hand_over(stream, connect_inside(port)),
    }
}

/// Connects to the workload's own loopback: this process lives in the same network.
fn connect_inside(port: u16) -> std::io::Result<TcpStream> {
    static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);
    let before = UNDER_WAY.fetch_add(1, Ordering::AcqRel);
    let connected = if before < CONNECTING {
        connect_loopback(port)
    } else {
        Err(std::io::Error::other(format!("{}{before} connections to the process are being made", protocol::BUSY)))
    };
    UNDER_WAY.fetch_sub(1, Ordering::AcqRel);
    connected
}

fn connect_loopback(port: u16) -> std::io::Result<TcpStream> {
    let four = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let six = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
    TcpStream::connect_timeout(&four, CONNECT).or_else(|error| TcpStream::connect_timeout(&six, CONNECT).map_err(|_| error))
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
