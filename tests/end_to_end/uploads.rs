//! Malicious and damaged uploads get a clear error, and no file is written outside their folder.

use std::io::Write;

use capsule_tests::{Server, eventually, text};
use flate2::Compression;
use flate2::write::GzEncoder;
use libtest_mimic::Trial;
use serde_json::json;

use crate::test;

/// The name of a case, its archive, and text that the error must contain.
type Case = (&'static str, fn() -> Vec<u8>, &'static str);

const CASES: [Case; 11] = [
    ("has a path outside the folder", || tar(&[Entry::File("../escaped", b"x")]), "../escaped"),
    ("has an absolute path", || tar(&[Entry::File("/etc/escaped", b"x")]), "/etc/escaped"),
    ("links out of the folder", || tar(&[Entry::Link("out", "../../../etc/passwd"), Entry::File("index.html", b"x")]), "out"),
    ("links to an absolute path", || tar(&[Entry::Link("out", "/etc"), Entry::File("out/escaped", b"x")]), "out"),
    ("has a hard link out of the folder", || tar(&[Entry::HardLink("out", "/etc/passwd")]), "out"),
    ("has a device", || tar(&[Entry::Device("dev")]), "dev"),
    ("claims an impossible size", || tar(&[Entry::Absurd("index.html")]), "cut short"),
    ("is truncated", || tar(&[Entry::File("index.html", &[7; 50_000])])[..300].to_vec(), "cut short"),
    ("is not an archive", || b"#!/bin/sh\necho hello\n".repeat(99), "unknown archive format"),
    ("is a zip bomb", zip_bomb, "MiB"),
    ("is a zip with a path outside the folder", || zip("../escaped"), "../escaped"),
];

pub fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> = CASES
        .into_iter()
        .map(|(name, archive, expected)| {
            test(&format!("an upload that {name} is rejected with a reason"), move || refused(&archive(), expected))
        })
        .collect();
    trials.push(test("an empty, too large or unauthorized upload is rejected before it is stored", at_the_door));
    trials.push(test("a file name that is not UTF-8 does not break the server", odd_names));
    trials.push(test("POST /plan returns a plan and stores nothing", planned));
    trials
}

/// Creates a service of the local administrator; returns its id and a token.
fn service(server: &Server) -> (String, String) {
    let token = server.admin();
    (server.service(&token, "site"), token)
}

fn deployed(server: &Server, archive: &[u8]) -> serde_json::Value {
    let (service, token) = service(server);
    let upload = server.api_raw(
        "POST",
        &format!("/uploads?service_id={service}"),
        Some(&token),
        "application/gzip",
        Some(archive.to_vec()),
    );
    let upload = upload.ok();
    let body = json!({"upload_id": upload["id"]});
    let deployment = server.api("POST", &format!("/services/{service}/deploy"), Some(&token), Some(&body)).ok();
    eventually("it is settled", || {
        let now = server.api("GET", &format!("/deployments/{}", text(&deployment, "id")), Some(&token), None).ok();
        matches!(now["status"].as_str(), Some("failed" | "running")).then_some(now)
    })
}

fn refused(archive: &[u8], expected: &str) {
    let server = Server::default();
    let settled = deployed(&server, archive);
    assert_eq!(settled["status"], "failed", "{settled}");
    assert!(text(&settled, "error").contains(expected), "{settled}");
    for place in [server.data().join("work/escaped"), server.data().join("escaped"), "/etc/escaped".into()] {
        assert!(!place.exists(), "{} was written", place.display());
    }
    eventually("the unpacked source is removed", || (server.entries("work", "") == 0).then_some(()));
}

fn at_the_door() {
    let server = Server::with(&["uploads.max_mib=1"]);
    let (service, token) = service(&server);
    let send = |token: Option<&str>, bytes: Vec<u8>| {
        server.api_raw("POST", &format!("/uploads?service_id={service}"), token, "application/gzip", Some(bytes))
    };
    let empty = send(Some(&token), Vec::new());
    assert_eq!(empty.status, 400, "{empty:?}");
    let large = send(Some(&token), vec![7; 3 << 20]);
    assert_eq!(large.status, 413, "{large:?}");
    assert!(large.body.contains("larger than 1 MiB") && large.body.contains(".capsuleignore"), "{large:?}");
    assert_eq!(send(None, vec![7; 10]).status, 401);
    assert_eq!(send(Some("nonsense"), vec![7; 10]).status, 401);
    let nowhere = server.api_raw("POST", "/uploads?service_id=7", Some(&token), "application/gzip", Some(vec![1]));
    assert_eq!(nowhere.status, 422, "{nowhere:?}");
    assert_eq!(server.blobs(), 0, "bytes of refused uploads were kept");
}

fn odd_names() {
    let server = Server::default();
    let mut header = tar::Header::new_gnu();
    header.set_size(1);
    header.set_mode(0o644);
    header.as_gnu_mut().expect("GNU").name[..12].copy_from_slice(b"bad\xff\xfename.ht");
    header.set_cksum();
    let mut archive = tar::Builder::new(Vec::new());
    archive.append(&header, &b"x"[..]).expect("appended");
    let settled = deployed(&server, &archive.into_inner().expect("finished"));
    assert_eq!(settled["status"], "failed", "there is no page in it: {settled}");
    assert!(!text(&settled, "error").is_empty());
}

fn planned() {
    let server = Server::default();
    let (service, token) = service(&server);
    let archive =
        tar(&[Entry::File("package.json", br#"{"dependencies": {"express": "5"}, "scripts": {"start": "node a.js"}}"#)]);
    let plan =
        server.api_raw("POST", &format!("/plan?service_id={service}"), Some(&token), "application/gzip", Some(archive)).ok();
    assert_eq!(plan["detection"]["framework"], "express", "{plan}");
    assert!(
        plan["evidence"]
            .as_array()
            .is_some_and(|all| all.iter().any(|one| one["file"] == "package.json" && one["line"].is_u64()))
    );
    let broken = tar(&[Entry::File("package.json", b"{ \"name\": ")]);
    let refused = server.api_raw("POST", &format!("/plan?service_id={service}"), Some(&token), "application/gzip", Some(broken));
    assert!((400..500).contains(&refused.status) && refused.body.contains("package.json"), "{refused:?}");
    assert_eq!(server.blobs(), 0, "the archive was kept");
}

enum Entry {
    File(&'static str, &'static [u8]),
    Link(&'static str, &'static str),
    HardLink(&'static str, &'static str),
    Device(&'static str),
    Absurd(&'static str),
}

/// An archive with unchecked names, which common programs do not write.
fn tar(entries: &[Entry]) -> Vec<u8> {
    let mut out = GzEncoder::new(Vec::new(), Compression::fast());
    for entry in entries {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(0);
        let mut content: &[u8] = b"";
        let name = match entry {
            Entry::File(name, bytes) => {
                header.set_size(bytes.len() as u64);
                content = bytes;
                name
            }
            Entry::Link(name, to) => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_link_name(to).expect("short");
                name
            }
            Entry::HardLink(name, to) => {
                header.set_entry_type(tar::EntryType::Link);
                header.set_link_name(to).expect("short");
                name
            }
            Entry::Device(name) => {
                header.set_entry_type(tar::EntryType::Block);
                header.set_device_major(8).expect("fits");
                header.set_device_minor(0).expect("fits");
                name
            }
            Entry::Absurd(name) => {
                header.set_size(8 << 40);
                name
            }
        };
        header.as_gnu_mut().expect("GNU").name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        out.write_all(header.as_bytes()).expect("written");
        out.write_all(content).expect("written");
        out.write_all(&vec![0; content.len().next_multiple_of(512) - content.len()]).expect("written");
    }
    out.write_all(&[0; 1024]).expect("written");
    out.finish().expect("finished")
}

fn zip(name: &str) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    archive.start_file(name, zip::write::SimpleFileOptions::default()).expect("begun");
    archive.write_all(b"x").expect("written");
    archive.finish().expect("finished").into_inner()
}

/// A few MiB that unpack to several GiB.
fn zip_bomb() -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default().large_file(true);
    let zeros = vec![0; 1 << 20];
    archive.start_file("zeros", options).expect("begun");
    for _ in 0..2200 {
        archive.write_all(&zeros).expect("written");
    }
    archive.finish().expect("finished").into_inner()
}
