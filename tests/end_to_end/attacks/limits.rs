//! Disk and inode limits of applications and builds, and read-only releases.

use std::path::Path;

use capsule_tests::{NOBODY, Server, eventually, kill, probe};
use libtest_mimic::Trial;
use serde_json::Value;
use tempfile::TempDir;

use crate::tenants::rootless;
use crate::test_of_processes;

pub fn trials() -> Vec<Trial> {
    vec![
        test_of_processes(
            "an instance that exceeds its disk limit is stopped with a reason, even if it hides its files",
            instances,
        ),
        test_of_processes("a build that exceeds its disk limit is stopped with a reason, even if it hides its files", builds),
        test_of_processes("files that an instance writes to /app survive a crash and are deleted with the deployment", layers),
        rootless("without root, instances write to a layer above their release, within their limit", layers_without_root),
        test_of_processes("the disk reserve stays free", reserve),
    ]
}

const HOST: &str = "app-production.localhost";

/// Runs Python in the application of a service and returns the variable `answer`.
fn python(server: &Server, host: &str, code: &str) -> Result<String, String> {
    let code: String = code.bytes().map(|byte| format!("%{byte:02X}")).collect();
    // An application that is stopped meanwhile does not respond.
    let reply = server.try_get(host, &format!("/run?code={code}"))?;
    if reply.status == 200 { Ok(reply.body) } else { Err(reply.body) }
}

/// The application's folder with additions to capsule.toml.
fn with(declared: &str) -> TempDir {
    let folder = probe("one");
    let file = folder.path().join("capsule.toml");
    let text = std::fs::read_to_string(&file).expect("there");
    std::fs::write(file, format!("{text}\n{declared}\n")).expect("written");
    folder
}

fn text_of(folder: &Path) -> &str {
    folder.to_str().expect("a path")
}

/// Waits until an instance was stopped for this reason.
fn stopped(server: &Server, folder: &Path, attack: &str, reason: &str) -> Value {
    eventually(&format!("{attack}: stopped"), || {
        let instance = server.instances(folder).into_iter().next()?;
        instance["last_exit"].as_str().is_some_and(|text| text.contains(reason)).then_some(instance)
    })
}

/// Each hides 64 MiB or 60,000 files from a measurement of folders only.
const VISIBLE: &str = "open('/app/large', 'wb').write(bytes(64 << 20))";
const UNLINKED: &str =
    "import os\nheld.append(open('/app/large', 'wb'))\nos.unlink('/app/large')\nheld[-1].write(bytes(64 << 20))";
const MAPPED: &str = "import mmap, os\nf = open('/app/large', 'w+b')\nf.truncate(64 << 20)\nheld.append(mmap.mmap(f.fileno(), 64 << 20))\n\
    os.unlink('/app/large')\nf.close()\nfor at in range(0, 64 << 20, 1 << 20): held[-1][at:at + (1 << 20)] = b'x' * (1 << 20)";
const EMPTY: &str = "import os\nos.makedirs('/app/many')\nfor n in range(60000): open(f'/app/many/{n}', 'w')";
const DEEP: &str = "import os\nos.chdir('/app')\nfor n in range(60000):\n    os.mkdir('d')\n    os.chdir('d')";

fn instances() {
    let server = Server::with(&["run.disk_mib=32", "run.inodes=3000", "run.tmp_mib=16"]);
    let folder = probe("one");
    server.deploy(folder.path(), "app").ok();
    for place in ["/tmp", "/home/app", "/dev/shm"] {
        let full = python(&server, HOST, &format!("open('{place}/large', 'wb').write(bytes(64 << 20))")).expect_err(place);
        assert!(full.contains("No space left"), "{full}");
        let full = python(
            &server,
            HOST,
            &format!("import os\nos.unlink('{place}/large')\nfor n in range(60000): open(f'{place}/{{n}}', 'w')"),
        );
        assert!(full.expect_err(place).contains("No space left"));
    }
    // Like part of the release: the limit applies to written files, not to the release.
    let attacks = [
        (VISIBLE, "exceeded its disk limit of 32 MiB"),
        (UNLINKED, "exceeded its disk limit of 32 MiB"),
        (MAPPED, "exceeded its disk limit of 32 MiB"),
        (EMPTY, "exceeded its limit of 3000 files and folders"),
        (DEEP, "exceeded its limit of 3000 files and folders"),
    ];
    for (attack, reason) in attacks {
        let _ = python(&server, HOST, attack);
        let instance = stopped(&server, folder.path(), attack, reason);
        assert_eq!(instance["disk"]["limit_bytes"], 32 << 20, "{instance}");
        // It restarts after the back-off, without its files, and is not stopped again.
        eventually("it answers again", || server.try_get(HOST, "/").ok().filter(|reply| reply.body == "version one").map(|_| ()));
        assert_eq!(
            python(&server, HOST, "import os\nanswer = os.path.exists('/app/large') or os.path.exists('/app/many')"),
            Ok("False".into())
        );
        let shown = server.capsule(&["status", text_of(folder.path())]).ok().out;
        assert!(shown.contains(reason) && shown.contains("disk limit of an instance: 32 MiB"), "{shown}");
        let log = server.capsule(&["logs", text_of(folder.path())]).ok().out;
        assert!(log.contains(reason) && log.contains("removed the files that the process wrote into /app"), "{log}");
        // A new deployment starts without back-off.
        server.capsule(&["restart", text_of(folder.path())]).ok();
        eventually("the new instance serves", || {
            let instances = server.instances(folder.path());
            (instances.len() == 1 && instances[0]["state"] == "running" && instances[0]["restarts"] == 0).then_some(())
        });
    }
}

fn builds() {
    let server = Server::with(&["build.disk_mib=48", "build.inodes=4000", "build.tmp_mib=16"]);
    let hidden = |folder: &str| {
        format!(
            "import os, time\nheld = []\nheld.append(open('{folder}/large', 'wb'))\nos.unlink('{folder}/large')\n\
             held[-1].write(bytes(100 << 20))\nheld[-1].flush()\ntime.sleep(600)\n"
        )
    };
    let empty = |folder: &str| format!("import time\nfor n in range(60000): open(f'{folder}/{{n}}', 'w')\ntime.sleep(600)\n");
    let attacks = [
        (hidden("/app"), "exceeded its disk limit of 48 MiB"),
        (hidden("/cache"), "exceeded its disk limit of 48 MiB"),
        (empty("/app"), "exceeded its limit of 4000 files and folders"),
        (empty("/cache"), "exceeded its limit of 4000 files and folders"),
        ("open('/tmp/large', 'wb').write(bytes(64 << 20))\n".into(), "No space left"),
    ];
    for (number, (attack, reason)) in attacks.into_iter().enumerate() {
        let folder = with("[build]\nbuild = \"python3 attack.py\"");
        std::fs::write(folder.path().join("attack.py"), &attack).expect("written");
        let failed = server.deploy(folder.path(), &format!("app{number}")).refused();
        assert!(failed.err.contains(reason), "{attack}: {failed:?}");
    }
    // Earlier builds leave nothing that counts towards the limit of later ones.
    eventually("nothing is left", || (server.entries("work", "") == 0 && server.entries("layers", "") == 0).then_some(()));
}

/// The files of the only release, with sizes and times.
fn release(server: &Server) -> Vec<String> {
    let listed = std::process::Command::new("find")
        .arg(server.data().join("releases"))
        .args(["-printf", "%P %s %T@ %U\n"])
        .output()
        .expect("find runs");
    let mut lines: Vec<String> = String::from_utf8_lossy(&listed.stdout).lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// Checks that `/proc/self/mountinfo` shows no path of the host.
fn assert_no_host_path(server: &Server, mountinfo: &str) {
    let data = server.data().file_name().expect("a name").to_string_lossy().into_owned();
    assert!(mountinfo.contains(" /app "), "{mountinfo}");
    for name in [data.as_str(), "releases", "layers", "/work/", "toolchains"] {
        assert!(!mountinfo.contains(name), "{name} in {mountinfo}");
    }
}

fn layers() {
    let mut server = Server::default();
    let folder = with(
        "[build]\nbuild = \"mkdir data && echo built >data/file && cat /proc/self/mountinfo\"\nrelease = \"echo migrated >released\"",
    );
    let built = server.deploy(folder.path(), "app").ok();
    assert_no_host_path(&server, &built.err);
    assert_no_host_path(&server, &python(&server, HOST, "answer = open('/proc/self/mountinfo').read()").expect("read"));
    let before = release(&server);
    let read = |server: &Server, path: &str| python(server, HOST, &format!("answer = open('{path}').read()"));
    assert_eq!(read(&server, "/app/released").as_deref(), Ok("migrated\n"), "what the release command wrote is there");
    // It adds, changes, replaces and deletes files of the release.
    let write = "import os, shutil\nopen('/app/own', 'w').write('kept')\nopen('/app/data/new', 'w').write('kept')\n\
                 open('/app/data/file', 'a').write('changed')\nos.unlink('/app/version')";
    python(&server, HOST, write).expect("written");
    let is_as_written = |server: &Server, after: &str| {
        eventually(after, || (read(server, "/app/own").as_deref() == Ok("kept")).then_some(()));
        assert_eq!(read(server, "/app/data/new").as_deref(), Ok("kept"), "{after}");
        assert_eq!(read(server, "/app/data/file").as_deref(), Ok("built\nchanged"), "{after}");
    };
    // Restore the file `version`, which it reads when it starts.
    python(&server, HOST, "open('/app/version', 'w').write('two')").expect("written");
    let _ = server.try_get(HOST, "/crash");
    is_as_written(&server, "after a crash");
    assert_eq!(server.get(HOST, "/").body, "version two", "it runs what it wrote");
    let shims = capsule_tests::processes("capsule shim");
    let pid = server.instances(folder.path())[0]["pid"].as_u64().expect("a pid");
    let parent = parent_of(u32::try_from(pid).expect("a pid"));
    assert!(shims.is_empty() || shims.contains(&parent), "{shims:?} {parent}");
    kill(parent);
    eventually("the application ends with its shim", || (!Path::new(&format!("/proc/{pid}")).exists()).then_some(()));
    is_as_written(&server, "after the end of its shim");
    server.kill();
    server.start();
    is_as_written(&server, "after a restart of the server");
    assert_eq!(release(&server), before, "the release is as it was built");
    server.capsule(&["restart", text_of(folder.path())]).ok();
    eventually("the new deployment has the release as it was built", || {
        let gone = read(&server, "/app/own").is_err();
        (gone && server.get(HOST, "/").body == "version one").then_some(())
    });
    assert_eq!(read(&server, "/app/released").as_deref(), Ok("migrated\n"));
    eventually("the layer of the old instance is gone", || (server.entries("layers", "") == 1).then_some(()));
    assert_eq!(release(&server), before);
}

fn parent_of(pid: u32) -> u32 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let after_name = stat.rsplit(") ").next().expect("a state");
    after_name.split(' ').nth(1).expect("a parent").parse().expect("a number")
}

fn layers_without_root() {
    let server = Server::unprivileged(&["run.disk_mib=32", "run.inodes=3000"]);
    let folder = probe("one");
    for path in [folder.path().to_path_buf(), folder.path().join("capsule.toml")] {
        std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).expect("it takes root");
    }
    server.deploy(folder.path(), "app").ok();
    assert_no_host_path(&server, &python(&server, HOST, "answer = open('/proc/self/mountinfo').read()").expect("read"));
    let before = release(&server);
    python(&server, HOST, "open('/app/own', 'w').write('kept')").expect("written");
    let _ = server.try_get(HOST, "/crash");
    let read = "answer = open('/app/own').read()";
    eventually("it is there after a crash", || (python(&server, HOST, read).as_deref() == Ok("kept")).then_some(()));
    // A folder that its owner cannot read is measured and removed, too.
    let closed =
        "import os\nos.mkdir('/app/closed')\nopen('/app/closed/large', 'wb').write(bytes(64 << 20))\nos.chmod('/app/closed', 0)";
    for attack in [closed, UNLINKED] {
        let _ = python(&server, HOST, attack);
        stopped(&server, folder.path(), attack, "exceeded its disk limit of 32 MiB");
        server.capsule(&["restart", text_of(folder.path())]).ok();
        eventually("the new instance serves", || {
            let instances = server.instances(folder.path());
            (instances.len() == 1 && instances[0]["state"] == "running" && instances[0]["restarts"] == 0).then_some(())
        });
    }
    assert_eq!(release(&server), before);
    eventually("the layers of old instances are gone", || (server.entries("layers", "") == 1).then_some(()));
}

fn reserve() {
    let mut server = Server::default();
    let (small, large) = (probe("small"), probe("large"));
    server.deploy(small.path(), "small").ok();
    server.deploy(large.path(), "app").ok();
    python(&server, HOST, "open('/app/large', 'wb').write(bytes(48 << 20))").expect("written");
    python(&server, "small-production.localhost", "open('/app/large', 'wb').write(bytes(1 << 20))").expect("written");
    let holds = |folder: &Path| server_disk(&server, folder);
    eventually("it is measured", || (holds(large.path()) > 40 << 20).then_some(()));
    server.stop();
    // More than the size of any disk.
    server.add_setting("disk.reserve_mib=4000000000");
    server.start();
    let instance = stopped(&server, large.path(), "the reserve", "MiB free");
    assert!(instance["last_exit"].as_str().is_some_and(|text| text.contains("used 48 MiB")), "{instance}");
    let refused = server.deploy(small.path(), "small").refused();
    assert!(refused.err.contains("in reserve"), "{refused:?}");
    let token = server.admin();
    let service = server.status(small.path())["service"]["id"].as_str().expect("an id").to_owned();
    let upload = format!("/uploads?service_id={service}");
    let reply = server.api_raw("POST", &upload, Some(&token), "application/x-tar", Some(crate::archive_of_page("x")));
    assert_eq!((reply.status, reply.json()["code"].as_str()), (507, Some("insufficient_storage")), "{reply:?}");
    // An instance with little disk usage keeps running.
    let instances = server.instances(small.path());
    assert_eq!((instances[0]["restarts"].as_u64(), instances[0]["last_exit"].as_str()), (Some(0), None), "{instances:?}");
}

fn server_disk(server: &Server, folder: &Path) -> u64 {
    server.instances(folder)[0]["disk"]["bytes"].as_u64().unwrap_or_default()
}
