//! Repositories and archives that try to crash the planner, read outside their folder, or use unlimited resources.

use std::io::Write;

use capsule_tests::{Reply, Server, eventually, probe, text};
use flate2::Compression;
use flate2::write::GzEncoder;
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::test;

pub fn trials() -> Vec<Trial> {
    vec![
        test("a hostile repository causes an error message, and the server keeps running", hostile),
        test("plans and uploads count towards the request rate limit", limited),
        test("without root, plans are made with the same confinement", rootless),
        test("plan, log and status show when the requested toolchain version is not installed", versions),
    ]
}

/// Sends an archive to POST /plan.
fn plan(server: &Server, service: &str, token: &str, archive: Vec<u8>) -> Reply {
    server.api_raw("POST", &format!("/plan?service_id={service}"), Some(token), "application/gzip", Some(archive))
}

fn gzipped(bytes: &[u8]) -> Vec<u8> {
    let mut out = GzEncoder::new(Vec::new(), Compression::fast());
    out.write_all(bytes).expect("written");
    out.finish().expect("finished")
}

fn header(kind: tar::EntryType, name: &str, size: usize) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_size(size as u64);
    header.as_gnu_mut().expect("GNU").name[..name.len()].copy_from_slice(name.as_bytes());
    header.set_cksum();
    header
}

/// An archive entry that common programs do not write.
fn raw(kind: tar::EntryType, name: &str, content: &[u8]) -> Vec<u8> {
    let mut whole = header(kind, name, content.len()).as_bytes().to_vec();
    whole.extend_from_slice(content);
    whole.resize(whole.len().next_multiple_of(512), 0);
    whole
}

fn archive(files: &[(&str, String)]) -> Vec<u8> {
    let entries = files.iter().flat_map(|(path, content)| raw(tar::EntryType::Regular, path, content.as_bytes()));
    gzipped(&entries.chain([0; 1024]).collect::<Vec<u8>>())
}

fn pom(module: &str) -> String {
    format!(
        "<project><artifactId>a</artifactId><version>1</version><packaging>pom</packaging><modules><module>{module}</module></modules></project>"
    )
}

/// A zip that consists only of a central directory with this many entries.
fn zip_of(entries: u32) -> Vec<u8> {
    let mut entry = b"PK\x01\x02".to_vec();
    entry.resize(46, 0);
    entry[28] = 1;
    entry.push(b'a');
    let mut zip = b"PK\x03\x04".to_vec();
    zip.extend(entry.repeat(entries as usize));
    zip.extend_from_slice(b"PK\x05\x06\0\0\0\0\xff\xff\xff\xff");
    zip.extend_from_slice(&(47 * entries).to_le_bytes());
    zip.extend_from_slice(&4_u32.to_le_bytes());
    zip.extend_from_slice(&[0, 0]);
    zip
}

/// Deploys an archive and waits for the end of the deployment.
fn deployed(server: &Server, service: &str, token: &str, archive: Vec<u8>) -> Value {
    let path = format!("/uploads?service_id={service}");
    let upload = server.api_raw("POST", &path, Some(token), "application/gzip", Some(archive)).ok();
    let body = json!({"upload_id": upload["id"]});
    let deployment = server.api("POST", &format!("/services/{service}/deploy"), Some(token), Some(&body)).ok();
    eventually("it is settled", || {
        let now = server.api("GET", &format!("/deployments/{}", text(&deployment, "id")), Some(token), None).ok();
        matches!(now["status"].as_str(), Some("failed" | "running")).then_some(now)
    })
}

/// The size of the deploy service's databases in bytes.
fn stored(server: &Server) -> u64 {
    let files = std::fs::read_dir(server.data()).expect("the data directory").flatten();
    let files = files.filter(|file| file.file_name().to_string_lossy().starts_with("deploy.db"));
    files.filter_map(|file| Some(file.metadata().ok()?.len())).sum()
}

fn hostile() {
    const SECRET: &str = "SECRET-OF-ANOTHER";
    let server = Server::default();
    let token = server.admin();
    let service = server.service(&token, "site");
    let pid = server.pid();

    // Files of another organization are in a neighbouring folder.
    let other = server.data().join("apps/other.example/current/app");
    std::fs::create_dir_all(&other).expect("made");
    std::fs::write(other.join("Procfile"), format!("web: {SECRET}\n")).expect("written");
    std::fs::write(other.join("pom.xml"), pom(SECRET)).expect("written");
    let absolute = other.display().to_string();
    for module in [".", "./.", "../../apps/other.example/current/app", "../../../apps/other.example/current/app", &absolute] {
        for files in [
            vec![("pom.xml", pom(module))],
            vec![("capsule.toml", format!("[build]\nroot = \"{module}\"\n")), ("index.html", "hi".into())],
            vec![("package.json", format!("{{\"workspaces\":[\"{module}\"],\"scripts\":{{\"start\":\"x\"}}}}"))],
        ] {
            let reply = plan(&server, &service, &token, archive(&files));
            assert!(reply.status < 500 && !reply.body.contains(SECRET), "{module}: {reply:?}");
        }
    }
    let types: String = (0..100_000).map(|n| format!("p{n}: sleep 1\n")).collect();
    let refused = |archive: Vec<u8>, expected: &str| {
        let reply = plan(&server, &service, &token, archive);
        assert_eq!(reply.status, 422, "{reply:?}");
        assert!(reply.body.contains(expected) && reply.body.len() < 8000, "{reply:?}");
    };
    refused(archive(&[("Procfile", types)]), "more than 100 process types");
    refused(zip_of(400_000), "more than 200000 entries");
    for kind in [tar::EntryType::GNULongName, tar::EntryType::GNULongLink, tar::EntryType::XHeader] {
        refused(gzipped(&raw(kind, "long", &vec![b'n'; 4 << 20])), "bytes; at most");
    }
    assert_eq!(server.blobs(), 0, "an archive that was only planned is kept");

    // Deploying such a repository fails.
    let before = stored(&server);
    let settled = deployed(&server, &service, &token, archive(&[("pom.xml", pom("."))]));
    assert_eq!(settled["status"], "failed", "{settled}");
    let named =
        [raw(tar::EntryType::GNULongName, "long", &vec![b'n'; 4 << 20]), raw(tar::EntryType::Regular, "short", b"x")].concat();
    let settled = deployed(&server, &service, &token, gzipped(&named));
    assert!(settled["status"] == "failed" && text(&settled, "error").len() < 4000, "{settled}");
    let broken = format!("{{\"{}\"", "n".repeat(1 << 20));
    let settled = deployed(&server, &service, &token, archive(&[("package.json", broken)]));
    assert!(settled["status"] == "failed" && text(&settled, "error").len() < 4000, "{settled}");
    let grown = stored(&server).saturating_sub(before);
    assert!(grown < 8 << 20, "three deployments that failed take {grown} bytes in the database");
    assert_eq!(server.pid(), pid, "the server is still the same");
    server.api("GET", "/auth/me", Some(&token), None).ok();
}

fn limited() {
    let server = Server::with(&["limits.requests_per_minute=30"]);
    let token = server.admin();
    let service = server.service(&token, "site");
    let page = archive(&[("index.html", "hi".into())]);
    for path in [format!("/plan?service_id={service}"), format!("/uploads?service_id={service}")] {
        // The minute may end during the test, so send more requests than two minutes allow.
        let refused = (0..70).map(|_| server.api_raw("POST", &path, Some(&token), "application/gzip", Some(page.clone())));
        let refused = refused.into_iter().find(|reply| reply.status == 429);
        let refused = refused.unwrap_or_else(|| panic!("{path} is not limited"));
        assert!(refused.headers.contains_key("retry-after"), "{refused:?}");
    }
}

fn rootless() {
    let server = Server::unprivileged(&[]);
    let token = server.admin();
    let service = server.service(&token, "site");
    let files =
        [("Procfile", "web: node a.js\n".to_owned()), ("package.json", "{\"dependencies\":{\"express\":\"4\"}}".to_owned())];
    let made = plan(&server, &service, &token, archive(&files)).ok();
    assert_eq!(
        (made["processes"]["web"].as_str(), made["detection"]["framework"].as_str()),
        (Some("node a.js"), Some("express"))
    );
    let refused = plan(&server, &service, &token, archive(&[("Procfile", "nonsense\n".into())]));
    assert!(refused.status == 422 && refused.body.contains("Procfile:1"), "{refused:?}");
}

fn versions() {
    let server = Server::default();
    let folder = probe("1");
    std::fs::write(folder.path().join(".python-version"), "2.7.18\n").expect("written");
    let expected = ".python-version:1 requests Python 2.7.18, but Python 3.";
    let ran = server.deploy(folder.path(), "probe").ok();
    assert!(format!("{}{}", ran.out, ran.err).contains(expected), "{ran:?}");
    let at = folder.path().display().to_string();
    let planned = server.capsule(&["plan", &at]).ok();
    assert!(planned.out.contains(expected), "{planned:?}");
    let status = server.capsule(&["status", &at]).ok();
    assert!(status.out.contains(expected), "{status:?}");
    assert!(server.status(folder.path())["state"]["warnings"][0].as_str().is_some_and(|text| text.contains(expected)));
}
