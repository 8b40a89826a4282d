//! The requests that the control plane and the ingress send to the shim's socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::Shared;
use crate::protocol::{self, Request};

/// So long a connection to the workload's own loopback may take.
const CONNECT: Duration = Duration::from_secs(2);
/// The most connections that are being made at a time: each takes a thread until the workload accepts it.
const CONNECTING: usize = 64;

pub fn answer(shared: &Arc<Shared>, stream: &UnixStream) -> std::io::Result<()> {
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
