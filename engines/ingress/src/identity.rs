//! Whether an ingress that runs is the one that a server would start now.

use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;

use crate::Hello;

/// Which build of Capsule this process runs: the version, and size and modification time of the file. The same for
/// a server and the ingress that it started; another once the file was replaced, though the process goes on.
#[must_use]
pub fn build() -> String {
    let version = env!("CARGO_PKG_VERSION");
    // The link leads to the file that was started, even if it is deleted by now.
    match std::fs::metadata("/proc/self/exe") {
        Ok(file) => format!("{version}-{:x}-{:x}.{:x}", file.size(), file.mtime(), file.mtime_nsec()),
        Err(_) => version.into(),
    }
}

impl Hello {
    /// How this ingress differs from the one that a server of this build with this setting `listen` would start.
    #[must_use]
    pub fn outdated(&self, listen: SocketAddr, build: &str) -> Option<String> {
        let mut reasons = Vec::new();
        let is_there = self.listen.parse::<SocketAddr>().is_ok_and(|address| {
            // Port 0 takes whichever is free.
            address.ip() == listen.ip() && (listen.port() == 0 || address.port() == listen.port())
        });
        if !is_there {
            reasons.push(format!("listens on {}, while the setting `listen` is {listen}", self.listen));
        }
        if self.build != build {
            reasons.push("runs another build of Capsule than the server".into());
        }
        (!reasons.is_empty()).then(|| format!("The ingress (process {}) {}.", self.pid, reasons.join(", and ")))
    }
}

#[cfg(test)]
mod tests {
    use super::build;
    use crate::Hello;

    #[test]
    fn an_ingress_that_a_server_would_start_otherwise_is_outdated() {
        let hello = |listen: &str, build: &str| Hello { pid: 7, listen: listen.into(), revision: 1, build: build.into() };
        let listen = |text: &str| text.parse().expect("an address");
        let same = hello("127.0.0.1:8080", &build());
        assert_eq!(same.outdated(listen("127.0.0.1:8080"), &build()), None);
        assert_eq!(same.outdated(listen("127.0.0.1:0"), &build()), None, "any port");
        for other in ["127.0.0.1:9090", "0.0.0.0:8080", "[::1]:8080", "0.0.0.0:0"] {
            let told = same.outdated(listen(other), &build()).expect("outdated");
            assert!(told.contains("127.0.0.1:8080") && told.contains(other) && told.contains("process 7"), "{told}");
        }
        // One from before builds were told has none.
        for other in ["", "0.0.9-1-2.3"] {
            let told = hello("127.0.0.1:8080", other).outdated(listen("127.0.0.1:8080"), &build()).expect("outdated");
            assert!(told.contains("another build"), "{told}");
        }
    }
}
