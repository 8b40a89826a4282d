//! How long a plan takes, in process, with the files read from disk. Aim: under 5 ms.

use std::time::Instant;

use capsule_buildplan::{Folder, plan};

use crate::sample::Sample;

pub fn measure() -> Vec<String> {
    let mut folders: Vec<_> = std::fs::read_dir(capsule_tests::root().join("examples"))
        .expect("the examples are there")
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect();
    folders.sort();
    folders
        .iter()
        .map(|folder| {
            let times = (0..51).map(|_| {
                let began = Instant::now();
                let planned = plan(&Folder::new(folder)).expect("a plan");
                let took = began.elapsed();
                assert!(!planned.evidence.is_empty() || planned.detection.language.is_some());
                took
            });
            let name = folder.file_name().unwrap_or_default().to_string_lossy();
            format!("{name:<13} {}", Sample::times(times).text("ms"))
        })
        .collect()
}
