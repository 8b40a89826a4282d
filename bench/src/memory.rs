//! The memory of the platform: server, ingress and shims, without the applications. Target: less than 64 MB. Measured as
//! proportional set size, which counts memory shared by several processes once.

use std::path::Path;

use capsule_tests::{Server, binary, example};

pub fn measure() -> Vec<String> {
    let server = Server::default();
    std::thread::sleep(std::time::Duration::from_secs(3));
    let mut lines = vec![format!("idle after start                {}", memory(&server))];
    for name in ["express", "static"] {
        for _ in 0..5 {
            server.deploy(example(name).path(), name).ok();
        }
    }
    std::thread::sleep(std::time::Duration::from_secs(15));
    lines.push(format!("idle after ten deployments      {}", memory(&server)));
    lines
}

pub fn size() -> Vec<String> {
    let bytes = std::fs::metadata(binary()).map_or(0, |metadata| metadata.len());
    vec![format!("the binary                      {:.1} MB", bytes as f64 / 1e6)]
}

fn memory(server: &Server) -> String {
    let (mut server_kb, mut ingress_kb, mut shims_kb, mut shims) = (0, 0, 0, 0);
    for entry in std::fs::read_dir("/proc").expect("it is Linux").flatten() {
        let process = entry.path();
        let Some((kind, pid)) = role(server, &process) else { continue };
        let kb = proportional_kb(&process);
        match kind {
            Role::Server if pid == server.pid() => server_kb += kb,
            Role::Server => {}
            Role::Ingress => ingress_kb += kb,
            Role::Shim => {
                shims_kb += kb;
                shims += 1;
            }
        }
    }
    let total = server_kb + ingress_kb + shims_kb;
    format!(
        "{:.1} MB: server {:.1}, ingress {:.1}, {shims} shim process(es) {:.1}",
        megabytes(total),
        megabytes(server_kb),
        megabytes(ingress_kb),
        megabytes(shims_kb)
    )
}

enum Role {
    Server,
    Ingress,
    /// A shim or a sandbox.
    Shim,
}

/// The role and id of a process of this server. `None` for other processes.
fn role(server: &Server, process: &Path) -> Option<(Role, u32)> {
    let pid: u32 = process.file_name()?.to_str()?.parse().ok()?;
    let command = std::fs::read(process.join("cmdline")).ok()?;
    let words: Vec<&str> = command.split(|byte| *byte == 0).filter_map(|word| std::str::from_utf8(word).ok()).collect();
    let data = server.data().canonicalize().ok()?;
    match *words.get(1)? {
        "server" => Some((Role::Server, pid)),
        "ingress" => words.contains(&data.to_str()?).then_some((Role::Ingress, pid)),
        "shim" | "sandbox" => Some((Role::Shim, pid)),
        _ => None,
    }
}

fn proportional_kb(process: &Path) -> u64 {
    let rollup = std::fs::read_to_string(process.join("smaps_rollup")).unwrap_or_default();
    let line = rollup.lines().find(|line| line.starts_with("Pss:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or_default()
}

fn megabytes(kib: u64) -> f64 {
    kib as f64 * 1024.0 / 1e6
}
