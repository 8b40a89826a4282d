//! Plans in a confined process: the same plans as in this process, and no other effect of a repository.
//!
//! This binary also has the role of the planner. `CAPSULE_FUZZ_SECONDS` and `CAPSULE_FUZZ_SEED` are as in the tests of
//! `capsule-buildplan`.

#[path = "../../buildplan/tests/plans/structure.rs"]
mod structure;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use capsule_builder::planner::{self, Planner, PlannerError, Source};
use capsule_builder::{DiskReserve, archive};
use capsule_buildplan::{Folder, Options, Plan, plan_with};
use libtest_mimic::{Arguments, Failed, Trial};
use rand::SeedableRng;
use rand::rngs::StdRng;

/// A role of this test: confines itself like a planner, then tries what a planner must not be able to do.
const PROBE: &str = "probe";
const OPTIONS: Options = Options { containers: false };

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some(planner::ROLE) => return ExitCode::from(u8::try_from(planner::run()).unwrap_or(1)),
        Some(PROBE) => return probe(&std::env::args().nth(2).unwrap_or_default()),
        _ => {}
    }
    let trials = vec![
        Trial::test("a plan in a confined process is the same", same),
        Trial::test("an archive is planned without being unpacked, whatever its format", archives),
        Trial::test("archive bombs are refused early", bombs),
        Trial::test("a process that ends without a plan becomes an error message", ends),
        Trial::test("the process can open nothing but its tree", confined),
        Trial::test("the process can open nothing but its tree, also without root", confined_rootless),
        Trial::test("memory and the stack are limited", bounded),
        Trial::test("plans wait for a permit, and interactive requests have a timeout", waiting),
        Trial::test("a hostile structure ends in a plan or a message within these limits", random),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

struct Room {
    directory: tempfile::TempDir,
    planner: Planner,
}

fn room_with(program: PathBuf) -> Room {
    let directory = tempfile::tempdir().expect("a folder");
    let planner = Planner::new(program, &directory.path().join("plans"), 1).expect("a planner");
    Room { directory, planner }
}

fn room() -> Room {
    room_with(std::env::current_exe().expect("this program"))
}

fn wait<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(work)
}

impl Room {
    fn folder(&self) -> PathBuf {
        let folder = self.directory.path().join("repository");
        std::fs::create_dir_all(&folder).expect("made");
        folder
    }

    fn archive(&self, bytes: &[u8]) -> PathBuf {
        let file = self.directory.path().join("archive");
        std::fs::write(&file, bytes).expect("written");
        file
    }

    fn plan(&self, source: &Source) -> Result<Plan, String> {
        wait(self.planner.plan(source, OPTIONS)).map_err(|error| error.to_string())
    }
}

fn write(root: &Path, files: &[(&str, &str)]) {
    for (path, content) in files {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        std::fs::write(path, content).expect("written");
    }
}

/// A program in a folder that runs this script as the planner.
fn script(directory: &Path, text: &str) -> PathBuf {
    let program = directory.join("planner");
    std::fs::write(&program, format!("#!/bin/sh\n{text}\n")).expect("written");
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("set");
    program
}

const FILES: [(&str, &str); 4] = [
    ("package.json", "{\"scripts\":{\"start\":\"node server.js\"},\"dependencies\":{\"express\":\"4\"}}"),
    ("server.js", "app.listen(process.env.PORT || 4000)"),
    ("config/Procfile.real", "web: node cluster.js\n"),
    ("deep/a/b/c.txt", ""),
];

fn same() -> Result<(), Failed> {
    let room = room();
    let folder = room.folder();
    write(&folder, &FILES);
    symlink("config/Procfile.real", folder.join("Procfile"))?;
    let planned = room.plan(&Source::Folder(folder.clone()))?;
    assert_eq!(planned, plan_with(&Folder::new(&folder), OPTIONS)?);
    assert_eq!((planned.processes["web"].as_str(), planned.networking.port), ("node cluster.js", Some(4000)));
    // What the process costs, for the record.
    let began = Instant::now();
    for _ in 0..20 {
        room.plan(&Source::Folder(folder.clone()))?;
    }
    eprintln!("a plan in a process of its own: {:.2} ms", began.elapsed().as_secs_f64() * 50.0);
    std::fs::remove_file(folder.join("Procfile"))?;
    write(&folder, &[("Procfile", "nonsense\n")]);
    let error = room.plan(&Source::Folder(folder)).expect_err("malformed");
    assert!(error.starts_with("Procfile:1: "), "{error}");
    Ok(())
}

fn tar_of(files: &[(&str, &str)]) -> Vec<u8> {
    let mut packed = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        packed.append_data(&mut header, path, content.as_bytes()).expect("packed");
    }
    let mut link = tar::Header::new_gnu();
    link.set_entry_type(tar::EntryType::Symlink);
    link.set_size(0);
    packed.append_link(&mut link, "Procfile", "./config/Procfile.real").expect("packed");
    packed.into_inner().expect("packed")
}

fn gzipped(bytes: &[u8]) -> Vec<u8> {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(bytes).expect("compressed");
    gz.finish().expect("compressed")
}

fn archives() -> Result<(), Failed> {
    let room = room();
    let tar = tar_of(&FILES);
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (path, content) in FILES {
        zip.start_file(path, zip::write::SimpleFileOptions::default())?;
        zip.write_all(content.as_bytes())?;
    }
    zip.add_symlink("Procfile", "config/Procfile.real", zip::write::SimpleFileOptions::default())?;
    let zip = zip.finish()?.into_inner();
    for bytes in [gzipped(&tar), tar, zip] {
        let planned = room.plan(&Source::Archive(room.archive(&bytes)))?;
        assert_eq!((planned.processes["web"].as_str(), planned.networking.port), ("node cluster.js", Some(4000)));
    }
    let error = room.plan(&Source::Archive(room.archive(b"hello"))).expect_err("no archive");
    assert!(error.contains("archive"), "{error}");
    let full = room.planner.clone().with_disk_reserve(u64::MAX);
    let planned = wait(full.plan(&Source::Archive(room.archive(&gzipped(&tar_of(&FILES)))), OPTIONS));
    let error = planned.expect_err("the disk has no room").to_string();
    assert!(error.contains("room for"), "{error}");
    Ok(())
}

/// A header of a tar whose content has so many bytes.
fn header(kind: tar::EntryType, size: u64) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_mut_bytes()[..4].copy_from_slice(b"name");
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_size(size);
    header.set_cksum();
    header.as_bytes().to_vec()
}

/// An entry with its content, padded.
fn entry(kind: tar::EntryType, content: &[u8]) -> Vec<u8> {
    let mut whole = header(kind, content.len() as u64);
    whole.extend_from_slice(content);
    whole.resize(whole.len().next_multiple_of(512), 0);
    whole
}

/// Archives that a reader would pay for, by what they are refused with.
fn costly() -> Vec<(&'static str, Vec<u8>)> {
    use tar::EntryType as Kind;
    let end = vec![0; 1024];
    let mut all = Vec::new();
    for kind in [Kind::GNULongName, Kind::GNULongLink, Kind::XHeader, Kind::XGlobalHeader] {
        // They may be as large as anyone likes, and compress to little.
        all.push(("bytes; at most", gzipped(&entry(kind, &vec![b'n'; 4 << 20]))));
        all.push(("bytes; at most", gzipped(&header(kind, 256 << 20))));
    }
    // Each of them implies folders of its own.
    let folders = (0..2000)
        .map(|n| format!("{n}/").repeat(100) + "file")
        .flat_map(|name| [entry(Kind::GNULongName, name.as_bytes()), header(Kind::Regular, 0)].concat());
    all.push(("more than 200000 entries", gzipped(&folders.collect::<Vec<u8>>())));
    let long = entry(Kind::GNULongName, "d/".repeat(2045).as_bytes());
    all.push(("folders deep", [long, header(Kind::Regular, 0), end.clone()].concat()));
    let long = entry(Kind::GNULongName, "d".repeat(300).as_bytes());
    all.push(("longer than 255 bytes", [long, header(Kind::Regular, 0), end.clone()].concat()));
    let different = entry(Kind::XHeader, b"13 size=9999\n");
    all.push(("two different sizes", [different, header(Kind::Regular, 0), end].concat()));
    // A directory of 400,000 entries, and no content.
    let mut one = b"PK\x01\x02".to_vec();
    one.resize(46, 0);
    one[28] = 1;
    one.push(b'a');
    let mut zip = b"PK\x03\x04".to_vec();
    zip.extend(one.repeat(400_000));
    zip.extend_from_slice(b"PK\x05\x06\0\0\0\0\xff\xff\xff\xff");
    zip.extend_from_slice(&(47_u32 * 400_000).to_le_bytes());
    zip.extend_from_slice(&4_u32.to_le_bytes());
    zip.extend_from_slice(&[0, 0]);
    all.push(("more than 200000 entries", zip));
    all
}

fn bombs() -> Result<(), Failed> {
    let room = room();
    let target = room.directory.path().join("target");
    let few = archive::Limits { entries: 1000, ..archive::Limits::default() };
    let unpacked = |bytes: &[u8]| {
        std::fs::create_dir(&target).expect("made");
        let error =
            archive::unpack(&room.archive(bytes), &target, few, &DiskReserve::new(&target, 0)).expect_err("a bomb").to_string();
        std::fs::remove_dir_all(&target).expect("removed");
        error
    };
    for (expected, bytes) in costly() {
        let error = room.plan(&Source::Archive(room.archive(&bytes))).expect_err(expected);
        assert!(error.contains(expected) && error.len() < 2000, "{expected}: {error}");
        let (expected, error) = (expected.replace("200000", "1000"), unpacked(&bytes));
        assert!(error.contains(&expected) && error.len() < 2000, "{expected}: {error}");
    }
    for one in [header(tar::EntryType::Regular, 0), entry(tar::EntryType::XHeader, b"10 a=bcde\n")] {
        let error = unpacked(&gzipped(&one.repeat(1001)));
        assert!(error.contains("more than 1000 entries"), "{error}");
    }
    Ok(())
}

fn ends() -> Result<(), Failed> {
    for (text, expected) in [
        ("kill -SEGV $$", "nested too deeply"),
        ("kill -ABRT $$", "MiB of memory"),
        ("kill -XCPU $$", "CPU time"),
        ("kill -KILL $$", "CPU time"),
        ("kill -SYS $$", "signal 31"),
        ("exit 3", "status 3"),
        ("echo nonsense", "status 0"),
        ("echo '{\"Plan\":{}}'", "status 0"),
        ("exec yes nonsense", "signal 13"),
        ("echo '{\"Unconfined\":\"chroot\"}'; exit 1", "does not allow: chroot"),
    ] {
        let directory = tempfile::tempdir()?;
        let room = room_with(script(directory.path(), text));
        let error = room.plan(&Source::Folder(room.folder())).expect_err(text);
        assert!(error.contains(expected), "{text}: {error}");
    }
    Ok(())
}

/// Gives up its rights, tries everything, and prints what succeeded.
fn probe(what: &str) -> ExitCode {
    let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().expect("a descriptor");
    let input: OwnedFd = own(rustix::stdio::stdin());
    if let Err(error) = planner::confine(&input, true) {
        println!("unconfined: {error}");
        return ExitCode::from(2);
    }
    match what {
        "memory" => {
            let mut all: Vec<Vec<u8>> = Vec::new();
            for _ in 0..800 {
                all.push(vec![1; 1 << 20]);
            }
            println!("{} MiB", all.len());
        }
        "stack" => println!("{}", deep(0)),
        _ => {
            let done = attempts();
            println!("{}", if done.is_empty() { "nothing".into() } else { done.join(", ") });
        }
    }
    ExitCode::SUCCESS
}

/// What a planner must not be able to do, and can.
fn attempts() -> Vec<&'static str> {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let mut done = Vec::new();
    let mut check = |name: &'static str, succeeded: bool| done.extend(succeeded.then_some(name));
    for path in [
        "/etc/passwd",
        "/proc/self/status",
        "/proc/1/root/etc/passwd",
        "../../../../etc/passwd",
        "link/passwd",
        "/sys/kernel/notes",
    ] {
        check(path, File::open(path).is_ok());
    }
    let mut text = String::new();
    let read = File::open("/own.txt").is_ok_and(|mut file| file.read_to_string(&mut text).is_ok());
    check("not reading its own tree", !(read && text == "own"));
    check("writing", File::create("/written").is_ok() || std::fs::write("own.txt", "x").is_ok());
    check("making folders", std::fs::create_dir("/made").is_ok());
    check("removing", std::fs::remove_file("/own.txt").is_ok());
    check("a socket", std::net::UdpSocket::bind("127.0.0.1:0").is_ok() || std::net::TcpListener::bind("[::]:0").is_ok());
    check("a Unix socket", std::os::unix::net::UnixStream::pair().is_ok());
    check("a thread", std::thread::Builder::new().spawn(|| ()).is_ok());
    check("a program", Command::new("/own.txt").spawn().is_ok() || Command::new("/bin/sh").spawn().is_ok());
    check("another user", nix::unistd::setuid(nix::unistd::Uid::from_raw(0)).is_ok());
    check("another root", rustix::process::chroot(".").is_ok());
    check("a namespace", nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER).is_ok());
    check("a signal", nix::sys::signal::kill(nix::unistd::Pid::from_raw(1), None).is_ok());
    check("more memory", setrlimit(Resource::Data, Rlimit { current: None, maximum: None }).is_ok());
    done
}

fn deep(depth: u64) -> u64 {
    let room = std::hint::black_box([depth; 64]);
    if std::hint::black_box(depth) == u64::MAX { 0 } else { deep(depth + 1) + room[3] }
}

fn probed(what: &str, uid: Option<u32>) -> Result<(ExitStatus, String), Failed> {
    let directory = tempfile::tempdir()?;
    let root = directory.path().join("tree");
    write(&root, &[("own.txt", "own")]);
    symlink("/etc", root.join("link"))?;
    // Whoever runs the probe may enter what this test made.
    for path in [directory.path(), &root] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?;
    }
    let mut command = Command::new(std::env::current_exe()?);
    command.args([PROBE, what]).stdin(File::open(&root)?).stderr(Stdio::null()).current_dir("/");
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    let output = command.output()?;
    Ok((output.status, String::from_utf8_lossy(&output.stdout).trim().to_owned()))
}

fn confined() -> Result<(), Failed> {
    let (status, told) = probed("everything", None)?;
    if told.starts_with("unconfined") && !rustix::process::geteuid().is_root() {
        eprintln!("this host gives neither root nor user namespaces: {told}");
        return Ok(());
    }
    assert_eq!((told.as_str(), status.code()), ("nothing", Some(0)));
    Ok(())
}

fn confined_rootless() -> Result<(), Failed> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    match probed("everything", Some(4_000_000)) {
        Ok((_, told)) if told.starts_with("unconfined: a user namespace") => {
            eprintln!("this host has no user namespaces: {told}");
        }
        Ok((status, told)) => assert_eq!((told.as_str(), status.code()), ("nothing", Some(0))),
        // The folder of the build may be closed for others.
        Err(error) => eprintln!("not tried: {error:?}"),
    }
    Ok(())
}

fn bounded() -> Result<(), Failed> {
    for what in ["memory", "stack"] {
        let (status, told) = probed(what, None)?;
        if told.starts_with("unconfined") {
            return Ok(());
        }
        assert!(status.signal().is_some() && told.is_empty(), "{what}: {status} {told}");
    }
    Ok(())
}

fn waiting() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let room = room_with(script(directory.path(), "exec sleep 30"));
    let planner = room.planner.clone().with_permit_timeout(Duration::from_millis(50));
    let source = Source::Folder(room.folder());
    wait(async {
        tokio::select! {
            biased;
            ended = planner.plan(&source, OPTIONS) => panic!("{ended:?}"),
            told = planner.plan_now(&source, OPTIONS) => assert!(matches!(told, Err(PlannerError::Busy)), "{told:?}"),
        }
    });
    Ok(())
}

fn random() -> Result<(), Failed> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = number("CAPSULE_FUZZ_SEED").unwrap_or_else(rand::random);
    eprintln!("CAPSULE_FUZZ_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let time = Duration::from_secs(number("CAPSULE_FUZZ_SECONDS").unwrap_or(3));
    let (began, mut count) = (Instant::now(), 0);
    while began.elapsed() < time {
        let room = room();
        let folder = room.folder();
        structure::make(&mut random, &folder);
        let told = match room.plan(&Source::Folder(folder)) {
            Ok(plan) => serde_json::to_string(&plan)?,
            Err(error) => error,
        };
        let signs = ["nested too deeply", "CPU time", "by signal", "with status", "error of Capsule's own", "does not allow"];
        assert!(!signs.iter().any(|sign| told.contains(sign)), "CAPSULE_FUZZ_SEED={seed}, after {count}: {told}");
        assert!(!told.contains(structure::SECRET), "CAPSULE_FUZZ_SEED={seed}, after {count}: {told}");
        count += 1;
    }
    eprintln!("{count} repositories");
    Ok(())
}
