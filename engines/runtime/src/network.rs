//! A workload's network: its own namespace with its own loopback, and at most a way out through
//! the host. Nothing listens on the host for it; whoever wants to talk to it asks its shim.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sched::{CloneFlags, unshare};

use crate::firewall;
use crate::spec::Network;
use crate::uplink::{RESOLVER, Uplink};

/// Addresses for the pairs of host and workload: a /30 each out of this /16, which is [`firewall::SANDBOXES`].
const SUBNET: &str = "10.213";
/// Interfaces on the host's side are named so.
const PREFIX: &str = "capsule";

/// Prepares the host for workloads that reach the outside: forwarding, address translation, and a filter that keeps
/// workloads from the host and from each other. Without the filter they are given no way out.
///
/// # Errors
/// With the reason why there will be no way out.
pub fn prepare_host() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        // There, each workload has an uplink of its own.
        return Ok(());
    }
    let isolated = |why: String| format!("applications and builds have no way out to the network: {why}");
    firewall::filter_host(&resolvers()).map_err(isolated)?;
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")
        .map_err(|error| isolated(format!("IP forwarding cannot be switched on: {error}")))
}

/// Prepares the host again where another program has removed the filter, or the host's name servers have changed.
/// Whether that was so.
///
/// # Errors
/// As [`prepare_host`].
pub fn keep_host_prepared() -> Result<bool, String> {
    if !rustix::process::geteuid().is_root() || firewall::is_host_filtered(Some(&resolvers())) {
        return Ok(false);
    }
    prepare_host().map(|()| true)
}

/// The host's name servers, as lines of `/etc/resolv.conf`; a stub on the host's own loopback cannot be reached from
/// inside.
pub fn resolvers() -> String {
    let host = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let stub = host.lines().any(|line| line.trim().starts_with("nameserver 127."));
    if stub { std::fs::read_to_string("/run/systemd/resolve/resolv.conf").unwrap_or(host) } else { host }
}

/// Moves the calling process into a network of its own. Called while it has one thread. `uplink` is the
/// way out where it is not root.
///
/// What could not be set up beyond the loopback becomes a warning.
pub fn enter(network: Network, uplink: Option<&mut Uplink>) -> std::io::Result<Vec<String>> {
    let name_servers = if uplink.is_some() { format!("nameserver {RESOLVER}\n") } else { resolvers() };
    let host = firewall::Host::look(&name_servers);
    let pair = network == Network::Egress && uplink.is_none();
    let (entered, wait) = mpsc::channel::<()>();
    // This thread stays in the host's network and gives the pair's far end away.
    let pair = pair.then(|| {
        std::thread::spawn(move || {
            // The host's rules may have been flushed since the server started.
            let filtered = if firewall::is_host_filtered(None) { Ok(()) } else { prepare_host() };
            wait.recv().map_err(|_| "the network namespace was not entered".to_owned())?;
            filtered.and_then(|()| make_pair(std::process::id()))
        })
    });
    unshare(CloneFlags::CLONE_NEWNET)?;
    // Interfaces that come from here on have no link-local address; the loopback is there already and keeps `::1`.
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    let _ = entered.send(());
    ip(&["link", "set", "lo", "up"]).map_err(std::io::Error::other)?;
    if network == Network::Isolated {
        return Ok(Vec::new());
    }
    let filtered = firewall::filter_inside(&host);
    let made = pair.map(|pair| pair.join().unwrap_or_else(|_| Err("the network helper failed".into())));
    // Without a filter, no address: the workload has no rights to give itself one.
    let connected = filtered.and_then(|()| match (made, uplink) {
        (Some(made), _) => made.and_then(|(host, own)| connect_outside(&host, &own)),
        (None, Some(uplink)) => uplink.connect(),
        (None, None) => Ok(()),
    });
    Ok(connected.err().map(|why| format!("there is no way out to the network: {why}")).into_iter().collect())
}

/// Makes a pair of interfaces, one end in the network of the process `pid`. Tries places by chance
/// until one is free. Returns the two addresses.
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
                // The filter drops it as well: what an interface does not speak cannot be spoken to.
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

/// Several commands by one process; none after one that fails.
fn ip_all(commands: &[String]) -> Result<(), String> {
    run_ip(&["-batch", "-"], &commands.join("\n"))
}

fn run_ip(arguments: &[&str], input: &str) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("ip cannot be run: {error}; install iproute2");
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
