//! A network namespace with one link (a veth pair) to the host that can be disconnected.

use std::process::Command;

/// A namespace and its link. Dropping the value deletes both. Only one can exist at a time.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// The address of the host's end of the link.
    pub const HOST: &'static str = "10.231.7.1";
    /// The address of the namespace's end.
    pub const INSIDE: &'static str = "10.231.7.2";

    /// Creates the namespace.
    #[must_use]
    pub fn create() -> Self {
        let made = Self { name: format!("cap{}", std::process::id()) };
        let name = made.name.as_str();
        let (host, inside) = (format!("{name}a"), format!("{name}b"));
        for arguments in [
            vec!["netns", "add", name],
            vec!["link", "add", &host, "type", "veth", "peer", "name", &inside],
            vec!["link", "set", &inside, "netns", name],
            vec!["addr", "add", &format!("{}/24", Self::HOST), "dev", &host],
            vec!["link", "set", &host, "up"],
            vec!["-n", name, "addr", "add", &format!("{}/24", Self::INSIDE), "dev", &inside],
            vec!["-n", name, "link", "set", &inside, "up"],
            vec!["-n", name, "link", "set", "lo", "up"],
        ] {
            ip(&arguments);
        }
        made
    }

    /// The name, for `ip netns exec`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Disconnects the link: packets are dropped without an error.
    pub fn disconnect(&self) {
        ip(&["-n", &self.name, "link", "set", &format!("{}b", self.name), "down"]);
    }

    /// Reconnects the link.
    pub fn reconnect(&self) {
        ip(&["-n", &self.name, "link", "set", &format!("{}b", self.name), "up"]);
    }
}

fn ip(arguments: &[&str]) {
    let done = Command::new("ip").args(arguments).output().expect("ip runs");
    assert!(done.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
        let _ = Command::new("ip").args(["link", "delete", &format!("{}a", self.name)]).status();
    }
}
