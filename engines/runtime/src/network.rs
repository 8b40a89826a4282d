//! The network of a workload: a namespace with its own loopback, and optionally a route to the internet through the host.
//! Nothing listens on the host; connections to the workload are opened by its shim.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sched::{CloneFlags, unshare};

use crate::firewall;
use crate::spec::Network;
use crate::uplink::{RESOLVER, Uplink};

/// The prefix of [`firewall::SANDBOXES`]. Each pair of host and workload has a /30 network of it.
const SUBNET: &str = "10.213";
/// The prefix of the names of interfaces on the host.
const PREFIX: &str = "capsule";

/// Prepares the host for workloads with internet access: forwarding, address translation, and a packet filter that isolates
/// workloads from the host and from each other. Without the filter, workloads get no internet access.
///
/// # Errors
/// Why workloads have no internet access.
pub fn prepare_host() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        // Without root, each workload has an uplink of its own.
        return Ok(());
    }
    let isolated = |why: String| format!("applications and builds have no network access: {why}");
    firewall::filter_host(&resolvers()).map_err(isolated)?;
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")
        .map_err(|error| isolated(format!("cannot enable IP forwarding: {error}")))
}

/// Prepares the host again if another program has removed the packet filter, or the host's name servers have changed.
/// Returns whether it did.
///
/// # Errors
/// As [`prepare_host`].
pub fn restore_host() -> Result<bool, String> {
    if !rustix::process::geteuid().is_root() || firewall::is_host_filtered(Some(&resolvers())) {
        return Ok(false);
    }
    prepare_host().map(|()| true)
}

/// The host's name servers, as lines of `/etc/resolv.conf`. A stub resolver on the host's loopback, which sandboxes cannot
/// reach, is replaced by its upstream servers.
pub fn resolvers() -> String {
    let host = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let stub = host.lines().any(|line| line.trim().starts_with("nameserver 127."));
    if stub { std::fs::read_to_string("/run/systemd/resolve/resolv.conf").unwrap_or(host) } else { host }
}

/// Moves the calling process, which must have one thread, into a new network namespace. `uplink` connects it without root.
///
/// Returns warnings if the network access cannot be set up.
pub fn enter(network: Network, uplink: Option<&mut Uplink>) -> std::io::Result<Vec<String>> {
    let name_servers = if uplink.is_some() { format!("nameserver {RESOLVER}\n") } else { resolvers() };
    let host = firewall::Host::inspect(&name_servers);
    let pair = network == Network::Egress && uplink.is_none();
    let (entered, wait) = mpsc::channel::<()>();
    // This thread stays in the host's network namespace and moves one end of the pair into the new one.
    let pair = pair.then(|| {
        std::thread::spawn(move || {
            // The host's rules may have been flushed since the server started.
            let filtered = if firewall::is_host_filtered(None) { Ok(()) } else { prepare_host() };
            wait.recv().map_err(|_| "cannot enter the network namespace".to_owned())?;
            filtered.and_then(|()| make_pair(std::process::id()))
        })
    });
    unshare(CloneFlags::CLONE_NEWNET)?;
    // Later interfaces get no link-local address. The loopback exists already and keeps `::1`.
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    let _ = entered.send(());
    ip(&["link", "set", "lo", "up"]).map_err(std::io::Error::other)?;
    if network == Network::Isolated {
        return Ok(Vec::new());
    }
    let filtered = firewall::filter_inside(&host);
    let made = pair.map(|pair| pair.join().unwrap_or_else(|_| Err("the network thread panicked".into())));
    // Without a filter, no address: the workload has no rights to add one.
    let connected = filtered.and_then(|()| match (made, uplink) {
        (Some(made), _) => made.and_then(|(host, own)| connect_outside(&host, &own)),
        (None, Some(uplink)) => uplink.connect(),
        (None, None) => Ok(()),
    });
    Ok(connected.err().map(|why| format!("no network access: {why}")).into_iter().collect())
}

/// Creates a pair of interfaces, with one end in the network namespace of the process `pid`. Tries random slots until one is
/// free. Returns the two addresses.
fn make_pair(pid: u32) -> Result<(String, String), String> {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.subsec_nanos());
    let mut place = seed.wrapping_mul(2_654_435_761).wrapping_add(pid);
    let mut last = String::new();
    for _ in 0..32 {
        place = place.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let slot = (place >> 8) % 16_384;
        let name = format!("{PREFIX}{slot}");
        let base = slot * 4;
        let address = |host: u32| format!("{SUBNET}.{}.{}", base >> 8, (base & 255) + host);
        let made = ip_all(&[
            format!("link add {name} type veth peer name eth0 netns {pid}"),
            format!("addr add {}/30 dev {name}", address(1)),
            format!("link set {name} up"),
        ]);
        match made {
            Ok(()) => {
                // In addition to the packet filter, which drops IPv6.
                let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
                return Ok((address(1), address(2)));
            }
            Err(why) => last = why,
        }
    }
    Err(last)
}

fn connect_outside(host: &str, own: &str) -> Result<(), String> {
    ip_all(&[format!("addr add {own}/30 dev eth0"), "link set eth0 up".into(), format!("route add default via {host}")])
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    run_ip(arguments, "")
}

/// Runs several commands in one process, up to the first that fails.
fn ip_all(commands: &[String]) -> Result<(), String> {
    run_ip(&["-batch", "-"], &commands.join("\n"))
}

fn run_ip(arguments: &[&str], input: &str) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("cannot run \"ip\": {error}. Install iproute2");
    let mut command = Command::new("ip");
    let mut child =
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(input.as_bytes());
    }
    let done = child.wait_with_output().map_err(failed)?;
    if done.status.success() {
        Ok(())
    } else {
        let why = String::from_utf8_lossy(&done.stderr);
        Err(format!("ip {}: {}", arguments.join(" "), why.trim().replace('\n', "; ")))
    }
}
