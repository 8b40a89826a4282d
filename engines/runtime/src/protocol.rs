//! What the control plane and the ingress say to a shim: one line of JSON each way over its Unix
//! socket. Frozen and versioned: shims of an older version live on through upgrades.

use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;

use crate::disk::Disk;

/// The version of this protocol.
pub const VERSION: u32 = 1;

/// How long a shim may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// The pause before a shim whose queue of callers is full is called again.
const CONNECT_BACKOFF: Duration = Duration::from_millis(20);
/// How the reply begins when a shim is making as many connections as it may.
pub const BUSY: &str = "busy: ";
/// The reply to an eviction that frees nothing. Shims of earlier versions never give it.
pub const NOTHING_DONE: &[u8] = b"nothing\n";

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// How is it?
    Status,
    /// End it: SIGTERM, and SIGKILL after its grace.
    Stop,
    /// Kill it and throw away what it wrote into `/app`. It starts again after a pause, unless it runs once. The reply
    /// is [`NOTHING_DONE`] if there was nothing to kill or to throw away.
    Evict { reason: String },
    /// A TCP connection to a port on the workload's own loopback.
    Connect { port: u16 },
}

/// What a workload is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShimState {
    Running,
    /// It ended by itself; the shim waits before it starts it again.
    Backoff,
    Stopping,
}

/// What a shim knows of its workload.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ShimStatus {
    pub version: u32,
    pub id: String,
    pub state: ShimState,
    /// Process id of the shim, on the host.
    pub shim_pid: u32,
    /// Process id of the workload's first process, on the host, while it runs.
    pub pid: Option<u32>,
    /// When it was started last, in microseconds since the epoch.
    pub started_at: i64,
    /// How often it ended by itself.
    pub restarts: u32,
    /// How it ended last.
    pub last_exit: Option<String>,
    /// Memory in use, in bytes, where the host can tell.
    pub memory: Option<u64>,
    /// What could not be enforced here.
    pub warnings: Vec<String>,
    /// What it holds on disk, and how it is limited.
    #[serde(default)]
    pub disk: Option<Disk>,
}

/// Listens on `<directory>/<name>.sock`, however long the directory's path is.
///
/// # Errors
/// When the socket cannot be made.
pub fn listen(directory: &Path, name: &str) -> std::io::Result<UnixListener> {
    at(directory, name, |path| {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        UnixListener::bind(path)
    })
}

fn call(directory: &Path, name: &str, request: &Request) -> std::io::Result<UnixStream> {
    let mut stream = at(directory, name, |path| UnixStream::connect(path))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    Ok(stream)
}

/// A socket's path may have 107 bytes; through the directory's descriptor any path is short enough.
fn at<T>(directory: &Path, name: &str, act: impl FnOnce(&Path) -> std::io::Result<T>) -> std::io::Result<T> {
    let opened = open_directory(directory)?;
    act(&path_in(&opened, name))
}

fn open_directory(directory: &Path) -> std::io::Result<OwnedFd> {
    Ok(rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Valid for as long as the directory is open.
fn path_in(directory: &OwnedFd, name: &str) -> PathBuf {
    let fd = std::os::fd::AsRawFd::as_raw_fd(directory);
    PathBuf::from(format!("/proc/self/fd/{fd}/{name}.sock"))
}

/// Asks a shim how its workload is.
pub fn status(directory: &Path, name: &str) -> std::io::Result<ShimStatus> {
    let mut line = String::new();
    BufReader::new(call(directory, name, &Request::Status)?.take(1 << 20)).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}

/// Tells a shim to end its workload, and itself.
pub fn stop(directory: &Path, name: &str) -> std::io::Result<()> {
    let mut line = String::new();
    BufReader::new(call(directory, name, &Request::Stop)?).read_line(&mut line)?;
    Ok(())
}

/// Tells a shim to kill its workload and to throw away what it wrote into `/app`; whether there was anything to do.
pub fn evict(directory: &Path, name: &str, reason: &str) -> std::io::Result<bool> {
    let mut line = String::new();
    BufReader::new(call(directory, name, &Request::Evict { reason: reason.into() })?).read_line(&mut line)?;
    Ok(!line.is_empty() && line.as_bytes() != NOTHING_DONE)
}

/// A TCP connection to `port` on the loopback of the instance `name`, whose socket lies in
/// `directory`. The shim makes it inside the workload's network and hands it over. No thread waits for it.
///
/// # Errors
/// When the shim does not answer, or nothing listens on the port; of kind `TimedOut` when the workload does
/// not accept connections, or too many of them are being made.
pub async fn connect(directory: &Path, name: &str, port: u16) -> std::io::Result<TcpStream> {
    let opened = open_directory(directory)?;
    let path = path_in(&opened, name);
    let mut stream = loop {
        match tokio::net::UnixStream::connect(&path).await {
            // The shim has not accepted its last callers yet.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => tokio::time::sleep(CONNECT_BACKOFF).await,
            connected => break connected?,
        }
    };
    let mut line = serde_json::to_vec(&Request::Connect { port })?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    let (handed, text) = stream.async_io(tokio::io::Interest::READABLE, || receive(&stream)).await?;
    handed.map(TcpStream::from).ok_or_else(|| {
        let stuck = text.contains(BUSY) || text.contains("timed out");
        let kind = if stuck { std::io::ErrorKind::TimedOut } else { std::io::ErrorKind::ConnectionRefused };
        std::io::Error::new(kind, text)
    })
}

/// The descriptor that a shim hands over, or why there is none.
fn receive(stream: impl AsFd) -> std::io::Result<(Option<OwnedFd>, String)> {
    let mut reply = [0_u8; 512];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut reply)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let handed = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok((handed, String::from_utf8_lossy(&reply[..received.bytes]).trim().to_owned()))
}

/// Answers a request for a connection: `ok` with the descriptor, or why there is none.
///
/// # Errors
/// When the caller is gone.
pub fn hand_over(stream: &UnixStream, connection: std::io::Result<TcpStream>) -> std::io::Result<()> {
    match connection {
        Ok(connection) => {
            let fd = OwnedFd::from(connection);
            let fds = [fd.as_fd()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(&fds));
            rustix::net::sendmsg(stream.as_fd(), &[IoSlice::new(b"ok\n")], &mut control, SendFlags::NOSIGNAL)?;
        }
        Err(error) => (&*stream).write_all(format!("{error}\n").as_bytes())?,
    }
    Ok(())
}
