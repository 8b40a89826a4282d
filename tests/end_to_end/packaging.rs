//! The container image and the compose file, started with Docker Engine; the Debian package, installed in a new Debian.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use capsule_tests::{CommandOutput, Docker, binary, eventually, free_port, root, run};
use libtest_mimic::Trial;

use crate::{test_of_containers, test_with};

pub fn trials() -> Vec<Trial> {
    vec![
        test_of_containers("the compose file starts a cluster that deploys and survives a restart", compose),
        test_with(
            "the Debian package installs, upgrades without stopping applications, and keeps data until it is purged",
            &["dpkg-deb", "objdump", "strip", "unshare"],
            debian_package,
        ),
    ]
}

/// A running compose project. Dropping the value stops it.
struct Project {
    engine: Arc<Docker>,
    port: u16,
}

impl Project {
    fn compose(&self, arguments: &[&str]) -> CommandOutput {
        let file = root().join("packaging/compose.yaml");
        let all: Vec<&str> =
            ["-p", "capsule-test", "-f", file.to_str().expect("a path")].into_iter().chain(arguments.iter().copied()).collect();
        let environment = [
            ("CAPSULE_SECRET", "the-secret-of-the-test"),
            ("CAPSULE_IMAGE", "capsule-test"),
            ("CAPSULE_PORT", &self.port.to_string()),
            ("POSTGRES_IMAGE", "capsule-test-servers"),
            ("RABBITMQ_IMAGE", "capsule-test-servers"),
            ("REDIS_IMAGE", "capsule-test-servers"),
        ];
        self.engine.run("docker-compose", &all, &environment)
    }

    /// Sends a request to the application from outside.
    fn page(&self) -> Option<String> {
        let url = format!("http://127.0.0.1:{}/", self.port);
        let mut answer = ureq::get(url).header("host", "site-production.localhost").call().ok()?;
        answer.body_mut().read_to_string().ok()
    }
}

impl Drop for Project {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.compose(&["logs", "--tail", "40"]).out);
        }
        let _ = self.compose(&["down", "--volumes", "--timeout", "5"]);
    }
}

/// The image of Capsule with the binary under test. With `CAPSULE_IMAGE_FROM_SOURCE`, it is built from source, which takes
/// many minutes.
fn image(engine: &Docker) {
    let file = root().join("packaging/Dockerfile");
    let base = format!("BASE={}", Docker::BASE);
    let mut arguments = vec!["--file", file.to_str().expect("a path"), "--build-arg", &base];
    if std::env::var_os("CAPSULE_IMAGE_FROM_SOURCE").is_none() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::copy(binary(), folder.path().join("capsule")).expect("copied");
        std::fs::write(folder.path().join("Dockerfile"), "FROM scratch\nCOPY capsule /out/capsule\n").expect("written");
        engine.build(folder.path(), "capsule-test-binary", &[]);
        arguments.extend(["--build-arg", "BINARY=capsule-test-binary"]);
    }
    engine.build(&root(), "capsule-test", &arguments);
}

fn compose() {
    let engine = Docker::engine();
    let base = format!("BASE={}", Docker::BASE);
    engine.build(&root().join("tests/servers/image"), "capsule-test-servers", &["--build-arg", &base]);
    image(&engine);

    let project = Project { engine, port: free_port() };
    let _ = project.compose(&["up", "--detach", "--no-build"]).ok();
    let healthy = || {
        let all = project.compose(&["ps"]).out.matches("(healthy)").count();
        (all == 8).then_some(())
    };
    eventually("every container is healthy", healthy);

    let on_deploy = |command: &[&str]| project.compose(&[&["exec", "-T", "deploy"], command].concat());
    let doctor = on_deploy(&["capsule", "doctor"]);
    for found in ["✓ sandbox", "✓ limits", "✓ network"] {
        assert!(doctor.out.contains(found), "{doctor:?}");
    }
    let _ = on_deploy(&["sh", "-c", "mkdir /site && echo hello from the cluster >/site/index.html"]).ok();
    let _ = on_deploy(&["capsule", "deploy", "/site", "--project", "site", "--service", "site", "--yes"]).ok();
    assert_eq!(project.page().as_deref(), Some("hello from the cluster\n"));

    // Like after a restart of the host: all containers are new, their volumes remain.
    let _ = project.compose(&["kill"]).ok();
    let _ = project.compose(&["up", "--detach", "--no-build", "--force-recreate"]).ok();
    eventually("the application is back", || project.page().filter(|page| page == "hello from the cluster\n"));
}

/// A new Debian in a directory.
struct Debian {
    root: PathBuf,
}

impl Debian {
    fn unpack(root: PathBuf) -> Self {
        std::fs::create_dir(&root).expect("created");
        let archive = capsule_tests::root().join("target/debian-bookworm.tar.gz");
        run(Command::new("tar").arg("-xzf").arg(&archive).arg("-C").arg(&root)).ok();
        std::fs::copy("/etc/resolv.conf", root.join("etc/resolv.conf")).expect("copied");
        Self { root }
    }

    /// Runs a command in it.
    fn run(&self, command: &[&str]) -> CommandOutput {
        let script = "mount --rbind /dev \"$0/dev\" && mount -t proc proc \"$0/proc\" && exec chroot \"$0\" \"$@\"";
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "sh", "-c", script]).arg(&self.root).args(command);
        run(unshare
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("DEBIAN_FRONTEND", "noninteractive"))
    }

    /// Whether this file of it is there, with content.
    fn has(&self, path: &str) -> bool {
        std::fs::metadata(self.root.join(path)).is_ok_and(|metadata| metadata.is_dir() || metadata.len() > 0)
    }

    /// Replaces `systemctl` with a program that records its arguments, as on a machine that systemd has started.
    fn record_systemctl(&self) {
        std::fs::create_dir_all(self.root.join("run/systemd/system")).expect("created");
        let program = self.root.join("usr/local/bin/systemctl");
        std::fs::write(&program, "#!/bin/sh\necho \"$@\" >>/systemctl.log\n").expect("written");
        run(Command::new("chmod").arg("755").arg(program)).ok();
    }

    /// The recorded calls of `systemctl`, which are then forgotten.
    fn recorded(&self) -> String {
        let log = self.root.join("systemctl.log");
        let calls = std::fs::read_to_string(&log).unwrap_or_default();
        let _ = std::fs::remove_file(log);
        calls
    }
}

fn build_package(directory: &Path) -> PathBuf {
    let built = run(Command::new(root().join("packaging/deb")).arg(binary()).arg(directory).arg("-Znone")).ok();
    built.out.trim().into()
}

fn debian_package() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let debian = Debian::unpack(folder.path().join("root"));
    std::fs::rename(build_package(folder.path()), debian.root.join("capsule.deb")).expect("moved");

    debian.run(&["apt-get", "update", "-qq"]).ok();
    debian.run(&["apt-get", "install", "-y", "-qq", "--no-install-recommends", "/capsule.deb", "systemd"]).ok();
    let version = debian.run(&["capsule", "--version"]).ok().out;
    assert_eq!(version.trim(), concat!("capsule ", env!("CARGO_PKG_VERSION")));
    for path in [
        "usr/share/man/man1/capsule.1.gz",
        "usr/share/man/man1/capsule-deploy.1.gz",
        "usr/share/bash-completion/completions/capsule",
        "usr/share/zsh/vendor-completions/_capsule",
        "usr/share/fish/vendor_completions.d/capsule.fish",
        "usr/share/doc/capsule/copyright",
        "etc/capsule/environment",
    ] {
        assert!(debian.has(path), "{path} is missing");
    }
    let verified = debian.run(&["systemd-analyze", "verify", "capsule.service", "capsule@deploy.service"]).ok();
    assert_eq!(verified.err, "", "systemd-analyze warns about the units");

    // An upgrade restarts the server at most, keeps a changed configuration file, and stops nothing else.
    debian.record_systemctl();
    let setting = debian.root.join("etc/capsule/environment");
    std::fs::write(&setting, "CAPSULE_LISTEN=0.0.0.0:80\n").expect("written");
    std::fs::create_dir_all(debian.root.join("var/lib/capsule/blobs")).expect("created");
    debian.run(&["dpkg", "--install", "--force-confdef", "/capsule.deb"]).ok();
    assert_eq!(debian.recorded(), "daemon-reload\ndaemon-reload\ntry-restart capsule.service capsule@*.service\n");
    assert_eq!(std::fs::read_to_string(&setting).expect("kept"), "CAPSULE_LISTEN=0.0.0.0:80\n");
    let unit = std::fs::read_to_string(debian.root.join("usr/lib/systemd/system/capsule.service")).expect("installed");
    assert!(unit.contains("KillMode=process\n") && unit.contains("ExecStart=/usr/bin/capsule server\n"), "{unit}");

    debian.run(&["dpkg", "--remove", "capsule"]).ok();
    assert_eq!(debian.recorded(), "disable --now capsule.service\nstop capsule@*.service\ndaemon-reload\n");
    assert!(!debian.has("usr/bin/capsule"));
    assert!(debian.has("etc/capsule/environment") && debian.has("var/lib/capsule/blobs"), "a removal keeps settings and data");
    debian.run(&["dpkg", "--purge", "capsule"]).ok();
    assert!(!debian.has("etc/capsule") && !debian.has("var/lib/capsule"), "a purge removes settings and data");
}
