//! The time to make a plan: in process, and as a command compared with Nixpacks on the same trees. Also the time of builds
//! with and without a cache.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use capsule_buildplan::{Folder, plan};
use capsule_tests::{Server, binary, corpus, example, root};

use crate::sample::Sample;

/// The number of runs of each command on each tree.
const RUNS: usize = 5;

pub fn measure() -> Vec<String> {
    let corpus = corpus();
    let folders: Vec<PathBuf> = std::fs::read_dir(corpus.path()).expect("unpacked").flatten().map(|entry| entry.path()).collect();
    let medians = folders.iter().map(|folder| {
        let times = (0..21).map(|_| {
            let began = Instant::now();
            let _ = plan(&Folder::new(folder));
            began.elapsed()
        });
        Sample::times(times).median()
    });
    let inside = Sample::of(medians);
    let mut lines = vec![format!(
        "in process, {} small repositories: median {:.3} ms, 95 of 100 below {:.3} ms, slowest {:.3} ms",
        folders.len(),
        inside.median(),
        inside.percentile(95),
        inside.percentile(100)
    )];
    let large = monorepo();
    lines.push(compare("as a command, the same repositories", &folders, RUNS));
    lines.push(compare("as a command, a monorepo of 100,000 files", &[large.path().to_owned()], RUNS));
    lines
}

/// Measures the first build, and one after a change of the source.
pub fn rebuild() -> Vec<String> {
    let server = Server::default();
    ["next", "spring-boot", "axum"]
        .into_iter()
        .map(|name| {
            let folder = example(name);
            let timed = || {
                let began = Instant::now();
                let _ = server.deploy(folder.path(), name).ok();
                began.elapsed()
            };
            let cold = timed();
            std::fs::write(folder.path().join("CHANGED"), "1").expect("written");
            let warm = timed();
            format!(
                "{name:<12} cold {:>6.1} s, warm {:>6.1} s ({:.2} of cold)",
                cold.as_secs_f64(),
                warm.as_secs_f64(),
                warm.as_secs_f64() / cold.as_secs_f64()
            )
        })
        .collect()
}

/// Compares both commands on each tree.
fn compare(name: &str, folders: &[PathBuf], runs: usize) -> String {
    let peer = root().join("target/nixpacks/bin/nixpacks");
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for folder in folders {
        let of = |program: &Path, words: &[&str]| (0..runs).map(|_| run(program, words, folder)).collect::<Vec<_>>();
        ours.push(Sample::times(of(&binary(), &["plan", "--json"])).median());
        if peer.is_file() {
            theirs.push(Sample::times(of(&peer, &["plan"])).median());
        }
    }
    let ours = Sample::of(ours).median();
    if theirs.is_empty() {
        return format!("{name}: {ours:.2} ms (Nixpacks is not installed)");
    }
    let theirs = Sample::of(theirs).median();
    format!("{name}: {ours:.2} ms; Nixpacks {theirs:.2} ms ({:.1} times as long)", theirs / ours)
}

fn run(program: &Path, words: &[&str], folder: &Path) -> Duration {
    let mut command = Command::new(program);
    command.args(words).arg(folder).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let began = Instant::now();
    // Some repositories are malformed on purpose; the time of an error counts as well.
    let _ = command.status().expect("it runs");
    began.elapsed()
}

/// Creates a monorepo of fifty packages with two thousand files each.
fn monorepo() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |path: &str, content: &str| {
        let path = folder.path().join(path);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        std::fs::write(path, content).expect("written");
    };
    write("package.json", "{\"private\":true,\"workspaces\":[\"packages/*\",\"apps/*\"]}");
    write("package-lock.json", "{}");
    write(
        "apps/web/package.json",
        "{\"name\":\"web\",\"scripts\":{\"start\":\"node server.js\"},\"dependencies\":{\"express\":\"4\"}}",
    );
    for package in 0..50 {
        write(&format!("packages/p{package}/package.json"), &format!("{{\"name\":\"p{package}\",\"main\":\"index.js\"}}"));
        for part in 0..20 {
            let at = folder.path().join(format!("packages/p{package}/src/part{part}"));
            std::fs::create_dir_all(&at).expect("made");
            for file in 0..100 {
                std::fs::write(at.join(format!("file{file}.ts")), "export const a = 1;\n").expect("written");
            }
        }
    }
    folder
}
