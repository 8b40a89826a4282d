//! A network namespace of one's own, with one cable to the host that can be cut.

use std::process::Command;

/// A namespace and its cable; both end with this value. There is one at a time.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// The host's end of the cable.
    pub const HOST: &'static str = "10.231.7.1";
    /// The namespace's end.
    pub const INSIDE: &'static str = "10.231.7.2";

    /// Makes it.
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

    /// Its name, as `ip netns exec` takes it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Cuts the cable: what is sent is lost, without a word to anybody.
    pub fn cut(&self) {
        ip(&["-n", &self.name, "link", "set", &format!("{}b", self.name), "down"]);
    }

    /// Mends it.
    pub fn mend(&self) {
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
