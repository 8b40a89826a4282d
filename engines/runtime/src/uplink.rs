//! The network access of a workload if the runtime is not root: slirp4netns, which forwards packets through ordinary sockets
//! of the user.
//!
//! It must start outside of the namespaces that it connects. So the shim starts a helper before it enters them; the helper
//! waits for a line on its standard input, executes slirp4netns, and ends with the shim.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// The name server of slirp4netns, which forwards to those of the host.
pub const RESOLVER: &str = "10.0.2.3";

const PROGRAM: &str = "slirp4netns";

/// The helper process.
#[derive(Debug)]
pub struct Uplink(Child);

impl Uplink {
    /// Starts the helper, in the namespaces of the caller.
    pub fn prepare() -> std::io::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg("uplink").arg(std::process::id().to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().map(Self)
    }

    /// The id of the helper process.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Connects the network namespace that the caller is in now. Returns once packets are forwarded.
    pub fn connect(&mut self) -> Result<(), String> {
        let failed = |error: std::io::Error| error.to_string();
        let mut lifeline = self.0.stdin.take().ok_or("no helper")?;
        lifeline.write_all(b"go\n").map_err(failed)?;
        let output = self.0.stdout.take().ok_or("no helper")?;
        // slirp4netns also prints warnings here. It prints this byte when it is ready.
        if !BufReader::new(output).bytes().map_while(Result::ok).any(|byte| byte == b'1') {
            drop(lifeline);
            let _ = self.0.wait();
            return Err(format!(
                "without root, network access needs {PROGRAM} and /dev/net/tun. Run \"apt-get install {PROGRAM}\""
            ));
        }
        // Stays open until this process ends, which ends the helper.
        std::mem::forget(lifeline);
        Ok(())
    }
}

/// Runs the role `capsule uplink <pid>`. Returns an exit code if slirp4netns cannot be executed.
#[must_use]
pub fn run() -> i32 {
    let Some(pid) = std::env::args().nth(2) else { return 126 };
    let mut line = String::new();
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
