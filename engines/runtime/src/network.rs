//! A workload's network: its own namespace with its own loopback, and at most a way out through
//! the host. Nothing listens on the host for it; whoever wants to talk to it asks its shim.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sched::{CloneFlags, unshare};

use crate::spec::Network;
use crate::uplink::Uplink;

/// Addresses for the pairs of host and workload: a /30 each out of this /16.
const SUBNET: &str = "10.213";
/// Interfaces on the host's side are named so.
const PREFIX: &str = "capsule";

/// The host's rules: workloads reach the outside, but neither each other, nor the host itself but
/// for name look-ups, nor the link-local range where clouds keep their metadata.
const RULES: &str = r#"
table ip capsule
delete table ip capsule
table ip capsule {
    chain forward {
        type filter hook forward priority filter; policy accept;
        iifname "capsule*" oifname "capsule*" drop
        iifname "capsule*" ip daddr 169.254.0.0/16 drop
    }
    chain input {
        type filter hook input priority filter; policy accept;
        iifname "capsule*" ct state established,related accept
        iifname "capsule*" udp dport 53 accept
        iifname "capsule*" tcp dport 53 accept
        iifname "capsule*" drop
    }
    chain postrouting {
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr 10.213.0.0/16 oifname != "capsule*" masquerade
    }
}
"#;

/// Prepares the host for workloads that reach the outside: forwarding and address translation.
///
/// # Errors
/// With the reason why there will be no way out.
pub fn prepare_host() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        // There, each workload has an uplink of its own.
        return Ok(());
    }
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")
        .map_err(|error| format!("IP forwarding cannot be switched on: {error}"))?;
    let mut nft = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("workloads have no way out to the network: nft cannot be run: {error}; install nftables"))?;
    if let Some(mut stdin) = nft.stdin.take() {
        let _ = stdin.write_all(RULES.as_bytes());
    }
    let done = nft.wait_with_output().map_err(|error| format!("nft did not finish: {error}"))?;
    if done.status.success() {
        Ok(())
    } else {
        Err(format!("workloads have no way out to the network: nft: {}", String::from_utf8_lossy(&done.stderr).trim()))
    }
}

/// Moves the calling process into a network of its own. Called while it has one thread. `uplink` is the
/// way out where it is not root.
///
/// What could not be set up beyond the loopback becomes a warning.
pub fn enter(network: Network, uplink: Option<Uplink>) -> std::io::Result<Vec<String>> {
    let mut warnings = Vec::new();
    let egress = network == Network::Egress && uplink.is_none();
    let (entered, wait) = mpsc::channel::<()>();
    // This thread stays in the host's network and gives the pair's far end away.
    let pair = egress.then(|| {
        std::thread::spawn(move || {
            wait.recv().map_err(|_| "the network namespace was not entered".to_owned())?;
            make_pair(std::process::id())
        })
    });
    unshare(CloneFlags::CLONE_NEWNET)?;
    let _ = entered.send(());
    ip(&["link", "set", "lo", "up"]).map_err(std::io::Error::other)?;
    if let Some(pair) = pair {
        let made = pair.join().unwrap_or_else(|_| Err("the network helper failed".into()));
        if let Err(why) = made.and_then(|(host, own)| connect_outside(&host, &own)) {
            warnings.push(format!("there is no way out to the network: {why}"));
        }
    } else if let Some(uplink) = uplink
        && let Err(why) = uplink.connect()
    {
        warnings.push(format!("there is no way out to the network: {why}"));
    }
    Ok(warnings)
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
        match ip(&["link", "add", &name, "type", "veth", "peer", "name", "eth0", "netns", &pid.to_string()]) {
            Ok(()) => {
                let base = slot * 4;
                let address = |host: u32| format!("{SUBNET}.{}.{}", base >> 8, (base & 255) + host);
                ip(&["addr", "add", &format!("{}/30", address(1)), "dev", &name])?;
                ip(&["link", "set", &name, "up"])?;
                return Ok((address(1), address(2)));
            }
            Err(why) => last = why,
        }
    }
    Err(last)
}

fn connect_outside(host: &str, own: &str) -> Result<(), String> {
    ip(&["addr", "add", &format!("{own}/30"), "dev", "eth0"])?;
    ip(&["link", "set", "eth0", "up"])?;
    ip(&["route", "add", "default", "via", host])
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let done = Command::new("ip")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("ip cannot be run: {error}; install iproute2"))?;
    if done.status.success() {
        Ok(())
    } else {
        Err(format!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&done.stderr).trim()))
    }
}
