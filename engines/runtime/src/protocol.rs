//! The protocol between the control plane or the ingress and a shim: over the shim's Unix socket, one line of JSON in each
//! direction. The protocol is frozen and versioned, since shims of an older version survive upgrades.

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

/// How long a shim may take to reply.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause before the next attempt to connect to a shim whose accept queue is full.
const CONNECT_BACKOFF: Duration = Duration::from_millis(20);
/// The beginning of the reply of a shim that makes the most connections that it may.
pub const BUSY: &str = "busy: ";
/// The reply to an eviction that frees nothing. Shims of earlier versions never send it.
pub const NOTHING_EVICTED: &[u8] = b"nothing\n";

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Report the [`ShimStatus`].
    Status,
    /// Stop the workload: SIGTERM, and SIGKILL after its grace period.
    Stop,
    /// Kill the workload and discard its writes into `/app`. It restarts after a delay, unless it runs once. The reply is
    /// [`NOTHING_EVICTED`] if there was nothing to kill or to discard.
    Evict { reason: String },
    /// Open a TCP connection to a port on the workload's own loopback.
    Connect { port: u16 },
}

/// The state of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShimState {
    Running,
    /// It ended by itself, and the shim waits before it restarts it.
    Backoff,
    Stopping,
}

/// The status of a workload.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ShimStatus {
    pub version: u32,
    pub id: String,
    pub state: ShimState,
    /// Process id of the shim, on the host.
    pub shim_pid: u32,
    /// Process id of the workload's first process, on the host, while it runs.
    pub pid: Option<u32>,
    /// When it was last started, in microseconds since the Unix epoch.
    pub started_at: i64,
    /// How often it ended by itself.
    pub restarts: u32,
    /// How it last ended.
    pub last_exit: Option<String>,
    /// Memory in use, in bytes, if the host reports it.
    pub memory: Option<u64>,
    /// The limits that cannot be enforced on this host.
    pub warnings: Vec<String>,
    /// Its disk usage and limit.
    #[serde(default)]
    pub disk: Option<Disk>,
}

/// Listens on `<directory>/<name>.sock`. The path of the directory may be longer than that of a socket.
///
/// # Errors
/// When the socket cannot be created.
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
    stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
    stream.set_write_timeout(Some(REPLY_TIMEOUT))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    Ok(stream)
}

/// Calls `act` with a short path to a socket, through the directory's descriptor: a socket path has at most 107 bytes.
fn at<T>(directory: &Path, name: &str, act: impl FnOnce(&Path) -> std::io::Result<T>) -> std::io::Result<T> {
    let opened = open_directory(directory)?;
    act(&path_in(&opened, name))
}

fn open_directory(directory: &Path) -> std::io::Result<OwnedFd> {
    Ok(rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// The path of a socket, valid while the directory is open.
fn path_in(directory: &OwnedFd, name: &str) -> PathBuf {
    let fd = std::os::fd::AsRawFd::as_raw_fd(directory);
    PathBuf::from(format!("/proc/self/fd/{fd}/{name}.sock"))
}

/// Requests the status of a shim's workload.
pub fn status(directory: &Path, name: &str) -> std::io::Result<ShimStatus> {
    let mut line = String::new();
    BufReader::new(call(directory, name, &Request::Status)?.take(1 << 20)).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}

/// Stops a shim and its workload.
pub fn stop(directory: &Path, name: &str) -> std::io::Result<()> {
    let mut line = String::new();
    BufReader::new(call(directory, name, &Request::Stop)?).read_line(&mut line)?;
    Ok(())
}

/// Kills a shim's workload and discards its writes into `/app`. Returns whether there was anything to do.
pub fn evict(directory: &Path, name: &str, reason: &str) -> std::io::Result<bool> {
    let mut line = String::new();
    BufReader::new(call(directory, name, &Request::Evict { reason: reason.into() })?).read_line(&mut line)?;
    Ok(!line.is_empty() && line.as_bytes() != NOTHING_EVICTED)
}

/// Opens a TCP connection to `port` on the loopback of the instance `name`, whose socket is in `directory`. The shim
/// connects inside the workload's network and sends the file descriptor. No thread is blocked.
///
/// # Errors
/// When the shim does not reply, or nothing listens on the port; of kind `TimedOut` when the workload does not accept the
/// connection, or the shim already makes the most connections that it may.
pub async fn connect(directory: &Path, name: &str, port: u16) -> std::io::Result<TcpStream> {
    let opened = open_directory(directory)?;
    let path = path_in(&opened, name);
    let mut stream = loop {
        match tokio::net::UnixStream::connect(&path).await {
            // The accept queue of the shim is full.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => tokio::time::sleep(CONNECT_BACKOFF).await,
            connected => break connected?,
        }
    };
    let mut line = serde_json::to_vec(&Request::Connect { port })?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    let (descriptor, text) = stream.async_io(tokio::io::Interest::READABLE, || receive(&stream)).await?;
    descriptor.map(TcpStream::from).ok_or_else(|| {
        let stuck = text.contains(BUSY) || text.contains("timed out");
        let kind = if stuck { std::io::ErrorKind::TimedOut } else { std::io::ErrorKind::ConnectionRefused };
        std::io::Error::new(kind, text)
    })
}

/// Receives a file descriptor from a shim, or the reason why there is none.
fn receive(stream: impl AsFd) -> std::io::Result<(Option<OwnedFd>, String)> {
    let mut reply = [0_u8; 512];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut reply)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok((descriptor, String::from_utf8_lossy(&reply[..received.bytes]).trim().to_owned()))
}

/// Replies to [`Request::Connect`]: `ok` with the file descriptor, or the reason why there is none.
///
/// # Errors
/// When the other end has closed the socket.
pub fn send_connection(stream: &UnixStream, connection: std::io::Result<TcpStream>) -> std::io::Result<()> {
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
