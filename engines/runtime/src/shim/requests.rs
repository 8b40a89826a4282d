//! The requests that the control plane and the ingress send to the shim's socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::Shared;
use crate::protocol::{self, Request};

/// How long a connection to the workload may take to open.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// The most simultaneous connection attempts: each takes a thread until the workload accepts it.
const MAX_CONNECTING: usize = 64;

pub fn handle(shared: &Arc<Shared>, stream: &UnixStream) -> std::io::Result<()> {
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
                let state = shared.state();
                (state.pid, state.evicted.is_some())
            };
            if let Some(pid) = pid {
                let done = shared.evict(pid, reason);
                return writer.write_all(if done { b"ok\n".as_slice() } else { protocol::NOTHING_EVICTED });
            }
            if is_evicted {
                // Its files are being removed.
                return writer.write_all(b"ok\n");
            }
            let mut layers = shared.layers();
            if !shared.begin_clearing(&reason) {
                return writer.write_all(protocol::NOTHING_EVICTED);
            }
            // Before the removal, which may take longer than the caller waits.
            let answered = writer.write_all(b"ok\n");
            shared.log_line(&format!("evicted while it waits for its restart: it {reason}"));
            shared.clear_app(&mut layers);
            shared.state().evicted = None;
            answered
        }
        Request::Connect { port } => protocol::send_connection(stream, connect_inside(port)),
    }
}

/// Connects to the workload's own loopback: this process is in the same network namespace.
fn connect_inside(port: u16) -> std::io::Result<TcpStream> {
    static CONNECTING: AtomicUsize = AtomicUsize::new(0);
    let before = CONNECTING.fetch_add(1, Ordering::AcqRel);
    let connected = if before < MAX_CONNECTING {
        connect_loopback(port)
    } else {
        Err(std::io::Error::other(format!("{}{before} connections to the process are being made", protocol::BUSY)))
    };
    CONNECTING.fetch_sub(1, Ordering::AcqRel);
    connected
}

fn connect_loopback(port: u16) -> std::io::Result<TcpStream> {
    let four = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let six = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
    TcpStream::connect_timeout(&four, CONNECT_TIMEOUT)
        .or_else(|error| TcpStream::connect_timeout(&six, CONNECT_TIMEOUT).map_err(|_| error))
}
