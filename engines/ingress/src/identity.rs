//! Whether a running ingress is up to date.

use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;

use crate::Hello;

/// Identifies the build of Capsule that this process runs, by its version and by the size and modification time of the
/// executable. A server and the ingress that it started have the same id until the executable is replaced.
#[must_use]
pub fn build_id() -> String {
    let version = env!("CARGO_PKG_VERSION");
    // The link leads to the file that was started, even if that is deleted by now.
    match std::fs::metadata("/proc/self/exe") {
        Ok(file) => format!("{version}-{:x}-{:x}.{:x}", file.size(), file.mtime(), file.mtime_nsec()),
        Err(_) => version.into(),
    }
}

impl Hello {
    /// Why this ingress has to be restarted: it differs from the one that a server with this `listen` setting and this
    /// build would start. `None` if it is up to date.
    #[must_use]
    pub fn outdated_reason(&self, listen: SocketAddr, build: &str) -> Option<String> {
        let mut reasons = Vec::new();
        let has_address = self.listen.parse::<SocketAddr>().is_ok_and(|address| {
            // Port 0 stands for any free port.
            address.ip() == listen.ip() && (listen.port() == 0 || address.port() == listen.port())
        });
        if !has_address {
            reasons.push(format!("listens on {}, but the setting `listen` is {listen}", self.listen));
        }
        if self.build != build {
            reasons.push("runs a different build of Capsule than the server".into());
        }
        (!reasons.is_empty()).then(|| format!("The ingress (process {}) {}.", self.pid, reasons.join(", and ")))
    }
}

#[cfg(test)]
mod tests {
    use super::build_id;
    use crate::Hello;

    #[test]
    fn an_ingress_with_another_address_or_build_is_outdated() {
        let hello = |listen: &str, build: &str| Hello { pid: 7, listen: listen.into(), revision: 1, build: build.into() };
        let listen = |text: &str| text.parse().expect("an address");
        let same = hello("127.0.0.1:8080", &build_id());
        assert_eq!(same.outdated_reason(listen("127.0.0.1:8080"), &build_id()), None);
        assert_eq!(same.outdated_reason(listen("127.0.0.1:0"), &build_id()), None, "any port");
        for other in ["127.0.0.1:9090", "0.0.0.0:8080", "[::1]:8080", "0.0.0.0:0"] {
            let reason = same.outdated_reason(listen(other), &build_id()).expect("outdated");
            assert!(reason.contains("127.0.0.1:8080") && reason.contains(other) && reason.contains("process 7"), "{reason}");
        }
        // An ingress older than the member has no build id.
        for other in ["", "0.0.9-1-2.3"] {
            let reason = hello("127.0.0.1:8080", other).outdated_reason(listen("127.0.0.1:8080"), &build_id()).expect("outdated");
            assert!(reason.contains("a different build"), "{reason}");
        }
    }
}
