//! The packet filters of sandboxes, in nftables. IPv6 is dropped. Outgoing IPv4 packets are accepted except to blocked
//! ranges; incoming ones only if they are replies.
//!
//! There are two filters, each of which suffices. The host's table filters on the host's end of each pair of interfaces, and
//! always matches the host's present addresses. The sandbox's own table is in its network namespace, where only its shim may
//! change it: it is the only one without root, and stays in force while another program replaces the host's rules.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

/// Addresses of sandboxes: a /30 each out of this network.
pub const SANDBOXES: &str = "10.213.0.0/16";
/// Addresses that slirp4netns gives out.
const UPLINKS: &str = "10.0.2.0/24";

/// Destinations that no sandbox may reach: this network and loopback, link-local (where AWS, Azure, Google Cloud and
/// most others keep metadata), the metadata of Alibaba Cloud, Azure and Oracle Cloud beyond it, multicast, broadcast and
/// reserved ranges.
const BLOCKED: &[&str] = &[
    "0.0.0.0/8",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
    SANDBOXES,
];

/// The addresses of the host for a sandbox's own filter.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// The host's addresses.
    pub addresses: BTreeSet<Ipv4Addr>,
    /// The name servers that sandboxes use.
    pub resolvers: BTreeSet<Ipv4Addr>,
}

impl Host {
    /// Reads the addresses of the calling thread's network namespace. `resolvers` are lines as in `/etc/resolv.conf`.
    pub fn inspect(resolvers: &str) -> Self {
        let addresses = nix::ifaddrs::getifaddrs().into_iter().flatten().filter_map(|interface| {
            let address = interface.address?;
            Some(address.as_sockaddr_in()?.ip())
        });
        Self { addresses: addresses.collect(), resolvers: name_servers(resolvers) }
    }
}

/// The IPv4 name servers of a text like `/etc/resolv.conf`. Without those on the host's loopback, which sandboxes cannot
/// reach.
fn name_servers(text: &str) -> BTreeSet<Ipv4Addr> {
    let servers = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    servers.filter_map(|address| address.trim().parse().ok()).filter(|address: &Ipv4Addr| !address.is_loopback()).collect()
}

/// The host's table. It replaces an existing one, and that of an older version.
///
/// Packets from a sandbox are filtered before connection tracking and address translation, which would redirect those for a
/// published port of the host.
fn host_rules(resolvers: &BTreeSet<Ipv4Addr>) -> String {
    let (nowhere, resolvers) = (elements(BLOCKED), elements(resolvers));
    format!(
        r#"
table ip capsule
delete table ip capsule
table inet capsule
delete table inet capsule
table inet capsule {{
    set nowhere {{ type ipv4_addr; flags interval; auto-merge; {nowhere} }}
    set resolvers {{ type ipv4_addr; {resolvers} }}
    chain from_sandbox {{
        meta nfproto != ipv4 drop
        ip saddr != {SANDBOXES} drop
        fib saddr . iif oif missing drop
        ip daddr @resolvers meta l4proto {{ tcp, udp }} th dport 53 return
        ip daddr @nowhere drop
        fib daddr type != unicast drop
    }}
    chain prerouting {{
        type filter hook prerouting priority raw; policy accept;
        iifname "capsule*" jump from_sandbox
    }}
    chain to_sandbox {{
        ct state established accept
        ct state related meta l4proto icmp accept
        drop
    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname "capsule*" oifname "capsule*" drop
        oifname "capsule*" jump to_sandbox
    }}
    chain output {{
        type filter hook output priority filter; policy accept;
        oifname "capsule*" jump to_sandbox
    }}
    chain input {{
        type filter hook input priority filter; policy accept;
        iifname "capsule*" ip daddr @resolvers meta l4proto {{ tcp, udp }} th dport 53 accept
        iifname "capsule*" drop
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {SANDBOXES} oifname != "capsule*" masquerade
    }}
}}
"#
    )
}

/// A sandbox's own table. It does not track connections, which would slow down its loopback.
fn inside_rules(host: &Host) -> String {
    let nowhere = BLOCKED.iter().map(|range| (*range).to_owned());
    let nowhere = elements(nowhere.chain([UPLINKS.to_owned()]).chain(host.addresses.iter().map(Ipv4Addr::to_string)));
    let resolvers = elements(&host.resolvers);
    format!(
        r#"
table inet capsule {{
    set nowhere {{ type ipv4_addr; flags interval; auto-merge; {nowhere} }}
    set resolvers {{ type ipv4_addr; {resolvers} }}
    chain output {{
        type filter hook output priority filter; policy drop;
        oifname "lo" accept
        meta nfproto != ipv4 drop
        ip saddr != {{ {SANDBOXES}, {UPLINKS} }} drop
        ip daddr @resolvers meta l4proto {{ tcp, udp }} th dport 53 accept
        ip daddr @nowhere drop
        accept
    }}
}}
"#
    )
}

/// The `elements` clause of a set in nft's syntax; empty if there are none.
fn elements<T: std::fmt::Display>(all: impl IntoIterator<Item = T>) -> String {
    let mut text = String::new();
    for element in all {
        let _ = write!(text, "{}{element}", if text.is_empty() { "elements = { " } else { ", " });
    }
    if !text.is_empty() {
        text.push_str(" }");
    }
    text
}

/// The name servers in the host's table that this process last put in force.
static IN_FORCE: Mutex<Option<BTreeSet<Ipv4Addr>>> = Mutex::new(None);

/// Puts the host's table in force.
pub fn filter_host(resolvers: &str) -> Result<(), String> {
    let resolvers = name_servers(resolvers);
    nft(&host_rules(&resolvers))?;
    *IN_FORCE.lock().unwrap_or_else(PoisonError::into_inner) = Some(resolvers);
    Ok(())
}

/// Whether the host's table exists and, with `resolvers`, whether it has these name servers.
pub fn is_host_filtered(resolvers: Option<&str>) -> bool {
    let listed = nft_command().args(["list", "table", "inet", "capsule"]).stdin(Stdio::null()).stdout(Stdio::null()).status();
    let in_force = IN_FORCE.lock().unwrap_or_else(PoisonError::into_inner);
    listed.is_ok_and(|status| status.success()) && resolvers.is_none_or(|now| in_force.as_ref() == Some(&name_servers(now)))
}

/// Puts a sandbox's own table in force, in the calling thread's network namespace.
pub fn filter_inside(host: &Host) -> Result<(), String> {
    nft(&inside_rules(host))
}

fn nft(rules: &str) -> Result<(), String> {
    let mut nft = nft_command()
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot run \"nft\": {error}. Install nftables"))?;
    if let Some(mut stdin) = nft.stdin.take() {
        let _ = stdin.write_all(rules.as_bytes());
    }
    let done = nft.wait_with_output().map_err(|error| format!("nft did not finish: {error}"))?;
    let why = || String::from_utf8_lossy(&done.stderr).lines().next().unwrap_or_default().to_owned();
    if done.status.success() { Ok(()) } else { Err(format!("nft: {}", why())) }
}

/// `nft` is in a directory that is only in the `PATH` of root.
fn nft_command() -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("nft");
    command.env("PATH", format!("{path}:/usr/sbin:/sbin")).stderr(Stdio::null());
    command
}

#[cfg(test)]
mod tests {
    use super::{Host, filter_host, filter_inside, host_rules, inside_rules, is_host_filtered, name_servers, nft_command};

    #[test]
    fn only_ipv4_name_servers_are_used() {
        let text = "search example.com\nnameserver 192.0.2.53\n# nameserver 192.0.2.1\n nameserver fe80::1\nnameserver\t10.0.0.2\nnameserver 127.0.0.1\n";
        let found: Vec<_> = name_servers(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["10.0.0.2", "192.0.2.53"]);
    }

    #[test]
    fn a_set_without_elements_has_no_clause() {
        assert!(host_rules(&Default::default()).contains("set resolvers { type ipv4_addr;  }"));
        let host = Host { addresses: name_servers("nameserver 192.0.2.7"), resolvers: Default::default() };
        assert!(inside_rules(&host).contains("10.0.2.0/24, 192.0.2.7 }"));
    }
    #[test]
    fn a_table_that_another_program_removed_is_detected() {
        if !rustix::process::geteuid().is_root() || nft_command().arg("--version").output().is_err() {
            return;
        }
        // In a network of its own: the thread's, and that of what it starts.
        let apart = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a network");
            let resolvers = "nameserver 192.0.2.53";
            assert!(!is_host_filtered(None));
            for _ in 0..2 {
                filter_host(resolvers).expect("in force, also where it was before");
            }
            assert!(is_host_filtered(None) && is_host_filtered(Some(resolvers)));
            assert!(!is_host_filtered(Some("nameserver 192.0.2.54")), "other name servers");
            let flushed = nft_command().args(["flush", "ruleset"]).status().expect("it runs");
            assert!(flushed.success() && !is_host_filtered(None));
            filter_inside(&Host::inspect(resolvers)).expect("in force");
        });
        apart.join().expect("it holds");
    }
}
