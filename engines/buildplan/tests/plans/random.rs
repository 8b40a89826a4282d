//! Random repositories: every one ends in a plan or an error, within a time limit.
//!
//! `CAPSULE_FUZZ_SECONDS` sets the duration (a few seconds by default), `CAPSULE_FUZZ_SEED` repeats a run.

use std::time::{Duration, Instant};

use capsule_buildplan::{Folder, ImageOptions, Memory, affected, dockerfile, plan};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

use crate::{corpus, parse, structure};

/// Pieces that mean something to one parser or another.
const PIECES: [&[u8]; 40] = [
    b"{",
    b"}",
    b"[",
    b"]",
    b"\"",
    b"'",
    b"\\",
    b"\n",
    b"\r\n",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"//",
    b"/*",
    b"*/",
    b"#",
    b":",
    b"=",
    b",",
    b"<",
    b">",
    b"</a>",
    b"&a",
    b"*a",
    b"- ",
    b"  ",
    b"\t",
    b"${",
    b"$PORT",
    b"99999999999999999999",
    b"-1",
    b"../",
    b"/",
    b"add_executable(",
    b"PORT",
    b"FROM ",
    b"CMD [",
    b"\xc3\x28",
    b"workspaces",
    b"**",
];

/// How long one plan may take, on a machine that has a lot else to do.
const SOON: Duration = Duration::from_secs(20);

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

fn changed(random: &mut StdRng, content: &mut Vec<u8>) {
    for _ in 0..random.random_range(1..=6) {
        let at = random.random_range(0..=content.len());
        match random.random_range(0..6) {
            0 => content.truncate(at),
            1 => {
                let piece = PIECES.choose(random).copied().unwrap_or_default();
                content.splice(at..at, piece.iter().copied());
            }
            2 if at < content.len() => content[at] = random.random(),
            3 if at < content.len() => {
                let end = (at + random.random_range(1..=40)).min(content.len());
                content.drain(at..end);
            }
            4 if at < content.len() => {
                let end = (at + random.random_range(1..=200)).min(content.len());
                let piece = content[at..end].repeat(random.random_range(1..=30));
                content.splice(at..at, piece);
            }
            _ => {
                let piece = PIECES.choose(random).copied().unwrap_or_default().repeat(random.random_range(1..=500));
                content.splice(at..at, piece);
            }
        }
    }
}

#[test]
fn random_files_end_in_a_plan_or_an_error_in_time() {
    let seed = number("CAPSULE_FUZZ_SEED", rand::random());
    eprintln!("CAPSULE_FUZZ_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut paths: Vec<_> = std::fs::read_dir(corpus()).expect("the corpus").flatten().map(|entry| entry.path()).collect();
    paths.sort();
    let corpus: Vec<Vec<(String, Vec<u8>)>> = paths
        .iter()
        .map(|path| {
            let (_, files, _) = parse(&std::fs::read_to_string(path).expect("a fixture"));
            files.into_iter().map(|(path, content)| (path, content.into_bytes())).collect()
        })
        .collect();
    let names: Vec<String> = corpus.iter().flatten().map(|(path, _)| path.clone()).collect();
    let (began, mut count) = (Instant::now(), 0_u64);
    let time = Duration::from_secs(number("CAPSULE_FUZZ_SECONDS", 5));
    while began.elapsed() < time {
        let mut files = corpus.choose(&mut random).cloned().unwrap_or_default();
        if random.random_ratio(1, 3) {
            files.extend(corpus.choose(&mut random).cloned().unwrap_or_default());
        }
        for (path, content) in &mut files {
            if random.random_ratio(1, 2) {
                changed(&mut random, content);
            }
            if random.random_ratio(1, 20) {
                *path = names.choose(&mut random).cloned().unwrap_or_default();
            }
        }
        let tree = Memory::new(files.clone());
        let since = Instant::now();
        if let Ok(plan) = plan(&tree) {
            let _ = dockerfile(&tree, &plan, &ImageOptions::default());
            let _ = affected(&tree, &["package.json", "a/b"]);
        }
        assert!(since.elapsed() < SOON, "CAPSULE_FUZZ_SEED={seed}, after {count}: {files:?}");
        count += 1;
    }
    eprintln!("{count} repositories");
    assert!(count > 20, "{count} repositories only");
}

#[test]
fn random_names_and_links_do_not_lead_out_of_the_repository() {
    let seed = number("CAPSULE_FUZZ_SEED", rand::random());
    eprintln!("CAPSULE_FUZZ_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let (began, mut count) = (Instant::now(), 0_u64);
    let time = Duration::from_secs(number("CAPSULE_FUZZ_SECONDS", 5));
    while began.elapsed() < time {
        let directory = tempfile::tempdir().expect("a folder");
        let root = directory.path().join("repository");
        std::fs::create_dir(&root).expect("made");
        structure::make(&mut random, &root);
        let tree = Folder::new(&root);
        let since = Instant::now();
        let told = match plan(&tree) {
            Ok(plan) => {
                let image = dockerfile(&tree, &plan, &ImageOptions::default()).map(|image| image.dockerfile);
                let text = serde_json::to_string(&plan).expect("JSON");
                assert!(text.len() < 700_000, "CAPSULE_FUZZ_SEED={seed}, after {count}: {} bytes", text.len());
                format!("{text}{image:?}{:?}", affected(&tree, &["package.json", "a/b"]))
            }
            Err(error) => error.to_string(),
        };
        assert!(!told.contains(structure::SECRET), "CAPSULE_FUZZ_SEED={seed}, after {count}: {told}");
        assert!(since.elapsed() < SOON, "CAPSULE_FUZZ_SEED={seed}, after {count}");
        count += 1;
    }
    eprintln!("{count} repositories");
    assert!(count > 5, "{count} repositories only");
}
