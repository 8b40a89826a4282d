//! A Kafka server: Apache Kafka with one node in KRaft mode.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use super::{kill_process, wait_for};
use crate::{free_port, root};

/// A server in a temporary folder on free ports. Dropping the value stops it.
#[derive(Debug)]
pub struct Kafka {
    folder: TempDir,
    port: u16,
    process: Option<Child>,
}

impl Kafka {
    /// Whether `scripts/bootstrap test` has downloaded it.
    #[must_use]
    pub fn is_installed() -> bool {
        jars().join("kafka_2.13-3.9.1.jar").is_file()
    }

    /// Creates and starts a server.
    #[must_use]
    pub fn start() -> Self {
        let folder = tempfile::Builder::new().prefix("kf-").tempdir().expect("a temporary folder");
        let (port, controller) = (free_port(), free_port());
        let properties = format!(
            "process.roles=broker,controller\nnode.id=1\ncontroller.quorum.voters=1@127.0.0.1:{controller}\n\
             listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}\n\
             advertised.listeners=PLAINTEXT://127.0.0.1:{port}\ncontroller.listener.names=CONTROLLER\n\
             log.dirs={}\noffsets.topic.replication.factor=1\noffsets.topic.num.partitions=4\n\
             transaction.state.log.replication.factor=1\ntransaction.state.log.min.isr=1\n\
             group.initial.rebalance.delay.ms=0\nauto.create.topics.enable=false\n",
            folder.path().join("data").display()
        );
        std::fs::write(folder.path().join("server.properties"), properties).expect("written");
        let mut server = Self { folder, port, process: None };
        let made = server
            .java("kafka.tools.StorageTool")
            .args(["format", "-t", "MkU3OEVBNTcwNTJENDM2Qk", "-c"])
            .arg(server.path("server.properties"))
            .output()
            .expect("java runs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        server.resume();
        server
    }

    /// Starts the server with its existing data.
    pub fn resume(&mut self) {
        let log = std::fs::File::create(self.path("out.log")).expect("written");
        let mut command = self.java("kafka.Kafka");
        command.arg(self.path("server.properties")).stdout(log).stderr(Stdio::null());
        self.process = Some(command.spawn().expect("java runs"));
        wait_for("Kafka", self.port);
    }

    /// Kills the server with SIGKILL. Its data stays.
    pub fn kill(&mut self) {
        kill_process(&mut self.process);
    }

    /// `kafka://host:port`
    #[must_use]
    pub fn url(&self) -> String {
        format!("kafka://127.0.0.1:{}", self.port)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn java(&self, class: &str) -> Command {
        let mut command = Command::new("java");
        command.args(["-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp"]);
        command.arg(format!("{}/*", jars().display())).arg(class).current_dir(Path::new("/"));
        command
    }
}

fn jars() -> PathBuf {
    root().join("target/kafka-3.9.1")
}

impl Drop for Kafka {
    fn drop(&mut self) {
        self.kill();
    }
}
