//! Explains why the server cannot listen on an address, and which process already does.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use crate::terminal::Failure;

/// The error for a setting whose address cannot be listened on.
pub fn cannot_listen(setting: &str, address: SocketAddr, origin: &str, error: &std::io::Error) -> Failure {
    let mut message = format!("Cannot listen on {address}, the value of `{setting}` ({}): {}.", source(origin), reason(error));
    let other = if setting == "listen" { "--listen ADDRESS:PORT".into() } else { format!("--set {setting}=ADDRESS:PORT") };
    let hint = match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            let holder = holder(address).unwrap_or_else(|| {
                format!("Run `ss -ltnp sport = :{}` as root to find the program that listens there.", address.port())
            });
            message.push(' ');
            message.push_str(&holder);
            format!("Stop that program, or choose another address: {other}")
        }
        std::io::ErrorKind::PermissionDenied if address.port() < 1024 => {
            format!("Ports below 1024 need root or CAP_NET_BIND_SERVICE. Choose another address: {other}")
        }
        _ => format!("Choose another address: {other}"),
    };
    Failure::new("cannot_listen", message).hint(hint)
}

fn source(origin: &str) -> String {
    if origin == "default" { "the default".into() } else { format!("from {origin}") }
}

fn reason(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => "the address is in use".into(),
        std::io::ErrorKind::PermissionDenied => "permission denied".into(),
        std::io::ErrorKind::AddrNotAvailable => "this host has no such address".into(),
        _ => error.to_string(),
    }
}

/// Tries to listen on an address.
pub fn try_listen(address: SocketAddr) -> std::io::Result<()> {
    std::net::TcpListener::bind(address).map(drop)
}

/// Describes the process that listens on an address, if this user can see it.
fn holder(address: SocketAddr) -> Option<String> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| std::fs::read_to_string(path).unwrap_or_default());
    let sockets: Vec<String> = tables
        .iter()
        .flat_map(|table| listeners(table))
        .filter(|(listens, _)| collide(*listens, address))
        .map(|(_, inode)| format!("socket:[{inode}]"))
        .collect();
    let processes = std::fs::read_dir("/proc").ok()?.flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let pid = pids.into_iter().find(|pid| has_any(*pid, &sockets))?;
    Some(described(pid))
}

fn has_any(pid: u32, sockets: &[String]) -> bool {
    let Ok(descriptors) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    descriptors
        .flatten()
        .filter_map(|descriptor| std::fs::read_link(descriptor.path()).ok())
        .any(|link| sockets.iter().any(|socket| link == Path::new(socket)))
}

/// Shows only the data directory of its command line, which may contain secrets.
fn described(pid: u32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<String> = words.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    let data = words.iter().position(|word| word == "--data").and_then(|at| words.get(at + 1));
    let of = data.map_or_else(String::new, |data| format!(", with the data directory {data}"));
    let who =
        if pid == std::process::id() { "This server itself".into() } else { format!("Process {pid} ({}{of})", name.trim()) };
    format!("{who} listens there.")
}

/// The listening addresses and their socket inodes in a table such as `/proc/net/tcp` (proc(5)).
fn listeners(table: &str) -> Vec<(SocketAddr, String)> {
    const LISTEN: &str = "0A";
    let entry = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (address, port) = fields.get(1)?.split_once(':')?;
        if *fields.get(3)? != LISTEN {
            return None;
        }
        let port = u16::from_str_radix(port, 16).ok()?;
        Some((SocketAddr::new(ip(address)?, port), (*fields.get(9)?).to_owned()))
    };
    table.lines().skip(1).filter_map(entry).collect()
}

/// Parses an address written as 32-bit words in host byte order.
fn ip(hex: &str) -> Option<IpAddr> {
    let words: Option<Vec<[u8; 4]>> =
        (0..hex.len() / 8).map(|at| u32::from_str_radix(hex.get(at * 8..at * 8 + 8)?, 16).ok().map(u32::to_ne_bytes)).collect();
    match words?.concat().as_slice() {
        four if four.len() == 4 => Some(IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(four).ok()?))),
        sixteen => Some(IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(sixteen).ok()?))),
    }
}

/// Whether two listeners exclude each other.
fn collide(a: SocketAddr, b: SocketAddr) -> bool {
    let (ip, other) = (a.ip().to_canonical(), b.ip().to_canonical());
    a.port() == b.port() && (ip == other || ip.is_unspecified() || other.is_unspecified())
}

#[cfg(test)]
mod tests {
    use super::{cannot_listen, collide, listeners};
    use std::net::{SocketAddr, TcpListener};

    #[test]
    fn the_error_of_an_address_in_use_names_the_setting_its_source_and_the_process() {
        for ip in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(held) = TcpListener::bind(ip) else { continue };
            let address = held.local_addr().expect("an address");
            let error = TcpListener::bind(address).expect_err("in use");
            let text =
                cannot_listen("private_listen", address, "the environment variable CAPSULE_PRIVATE_LISTEN", &error).to_string();
            for part in [
                "private_listen",
                "CAPSULE_PRIVATE_LISTEN",
                &address.to_string(),
                "This server itself listens there",
                "--set private_listen=",
            ] {
                assert!(text.contains(part), "no {part} in {text}");
            }
        }
    }

    #[test]
    fn listeners_of_the_kernels_table_are_parsed() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
                     \x20  0: 0100007F:1F91 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100\n\
                     \x20  1: 0100007F:1F91 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0 100\n";
        let found = listeners(table);
        assert_eq!(found.len(), 1, "a connection is not a listener");
        assert_eq!(found[0].1, "4711");
        if cfg!(target_endian = "little") {
            assert_eq!(found[0].0, "127.0.0.1:8081".parse::<SocketAddr>().expect("an address"));
        }
        let at = |text: &str| text.parse::<SocketAddr>().expect("an address");
        assert!(collide(at("0.0.0.0:80"), at("127.0.0.1:80")) && collide(at("[::]:80"), at("127.0.0.1:80")));
        assert!(!collide(at("127.0.0.2:80"), at("127.0.0.1:80")) && !collide(at("127.0.0.1:81"), at("127.0.0.1:80")));
    }
}
