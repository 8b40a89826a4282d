//! The way out to the network where the runtime is not root: slirp4netns, which carries a workload's
//! packets over ordinary sockets of the user.
//!
//! It has to be started outside of the namespaces that it connects. So a helper is started before the
//! shim enters them, waits to be told, and becomes slirp4netns; it ends when the shim does.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// The name server that slirp4netns offers, which asks those of the host.
pub const RESOLVER: &str = "10.0.2.3";

const PROGRAM: &str = "slirp4netns";

/// A helper that waits to be told.
#[derive(Debug)]
pub struct Uplink(Child);

impl Uplink {
    /// Starts the helper, in the namespaces of the caller.
    pub fn prepare() -> std::io::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg("uplink").arg(std::process::id().to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().map(Self)
    }

    /// The process that carries the packets.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Connects the network that the caller is in now; returns once packets flow.
    pub fn connect(&mut self) -> Result<(), String> {
        let failed = |error: std::io::Error| error.to_string();
        let mut lifeline = self.0.stdin.take().ok_or("no helper")?;
        lifeline.write_all(b"go\n").map_err(failed)?;
        let said = self.0.stdout.take().ok_or("no helper")?;
        // Warnings of slirp4netns come the same way; the sign that it is ready is this byte.
        if !BufReader::new(said).bytes().map_while(Result::ok).any(|byte| byte == b'1') {
            drop(lifeline);
            let _ = self.0.wait();
            return Err(format!("without root it takes {PROGRAM} and /dev/net/tun; `apt-get install {PROGRAM}`"));
        }
        // Open until this process ends; the helper ends with it.
        std::mem::forget(lifeline);
        Ok(())
    }
}

/// The role's entry: `capsule uplink <pid>`. Does not return if all is well.
#[must_use]
pub fn run() -> i32 {
    let Some(pid) = std::env::args().nth(2) else { return 126 };
    let mut line = String::new();
    // One byte at a time would not matter: nothing follows the line.
    if std::io::stdin().lock().read_line(&mut line).is_err() || line.is_empty() {
        return 0;
    }
    let error = Command::new(PROGRAM)
        .args(["--configure", "--mtu=65520", "--disable-host-loopback", "--enable-sandbox", "--enable-seccomp"])
        .args(["--exit-fd=0", "--ready-fd=1", &pid, "eth0"])
        .exec();
    eprintln!("{PROGRAM}: {error}");
    127
}
