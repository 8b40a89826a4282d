//! Requests per second through the ingress, compared with nginx as a proxy for the same upstream on the same machine, and
//! for files. Target: at least half of nginx. Both use the same cores, which wrk shares.

use std::io::Write;
use std::process::{Child, Command, Stdio};

use capsule_tests::{Server, example, free_port};
use tempfile::TempDir;

use crate::sample::Sample;

const RUNS: usize = 5;

/// The upstream's configuration: an nginx with a constant response, deployed as an application.
const UPSTREAM: &str = "worker_processes 1; daemon off; error_log /dev/null; pid PLACE/pid;
events { worker_connections 1024; }
http {
    access_log off; keepalive_requests 1000000;
    client_body_temp_path PLACE; proxy_temp_path PLACE; fastcgi_temp_path PLACE; uwsgi_temp_path PLACE; scgi_temp_path PLACE;
    server { listen PORT; location / { return 200 'a small answer'; } }
}
";

/// The configuration of the nginx to compare with.
const PEER: &str = "worker_processes auto; daemon off; error_log /dev/null; pid PLACE/pid;
events { worker_connections 1024; }
http {
    access_log off; keepalive_requests 1000000; sendfile on;
    client_body_temp_path PLACE; proxy_temp_path PLACE; fastcgi_temp_path PLACE; uwsgi_temp_path PLACE; scgi_temp_path PLACE;
    upstream app { server 127.0.0.1:UPSTREAM; keepalive 256; keepalive_requests 1000000; }
    server {
        listen PORT;
        location / { proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection ''; proxy_set_header Host $host;
                     proxy_set_header X-Forwarded-For $remote_addr; }
        location /files/ { alias ROOT/; }
    }
}
";

pub fn measure() -> Vec<String> {
    if !["nginx", "wrk"].iter().all(|program| Command::new(program).arg("-v").output().is_ok()) {
        return vec!["skipped: nginx or wrk is missing. Run \"scripts/bootstrap bench\" to install them".into()];
    }
    let server = Server::default();
    let application = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: &str| std::fs::write(application.path().join(name), text).expect("written");
    write("nginx.conf", UPSTREAM);
    write(
        "capsule.toml",
        "[processes]\nweb = \"sed -e s/PORT/$PORT/ -e s,PLACE,/tmp,g nginx.conf > /tmp/nginx.conf && exec nginx -c /tmp/nginx.conf\"\n",
    );
    server.deploy(application.path(), "upstream").ok();
    let site = example("static");
    server.deploy(site.path(), "site").ok();

    let place = tempfile::tempdir().expect("a folder");
    let (upstream, peer) = (free_port(), free_port());
    let _upstream = Nginx::start(&place, "upstream", UPSTREAM, &[("PORT", &upstream.to_string())]);
    let root = site.path().display().to_string();
    let changes = [("UPSTREAM", upstream.to_string()), ("ROOT", root), ("PORT", peer.to_string())];
    let changes: Vec<(&str, &str)> = changes.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let _peer = Nginx::start(&place, "peer", PEER, &changes);
    std::thread::sleep(std::time::Duration::from_millis(500));

    [
        ("proxied requests", "upstream-production.localhost", "/", "/"),
        ("files", "site-production.localhost", "/assets/style.css", "/files/assets/style.css"),
    ]
    .into_iter()
    .map(|(name, host, path, peer_path)| {
        let (mut own, mut other) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            own.push(wrk(server.port(), host, path));
            other.push(wrk(peer, "localhost", peer_path));
        }
        let (own, other) = (Sample::of(own), Sample::of(other));
        format!(
            "{name:<17} Capsule {}; nginx {}; ratio {:.2}",
            own.text("requests/s"),
            other.text("requests/s"),
            own.median() / other.median()
        )
    })
    .collect()
}

/// An nginx process that is stopped on drop.
struct Nginx(Child);

impl Nginx {
    fn start(place: &TempDir, name: &str, configuration: &str, changes: &[(&str, &str)]) -> Self {
        let folder = place.path().join(name);
        std::fs::create_dir(&folder).expect("made");
        let mut text = configuration.replace("PLACE", &folder.display().to_string());
        for (word, value) in changes {
            text = text.replace(word, value);
        }
        // The default user of nginx cannot read the temporary directory.
        let text = if text.contains("alias") { format!("user root;\n{text}") } else { text };
        let file = folder.join("nginx.conf");
        std::fs::File::create(&file).and_then(|mut file| file.write_all(text.as_bytes())).expect("written");
        Self(Command::new("nginx").arg("-c").arg(file).stderr(Stdio::null()).spawn().expect("nginx starts"))
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        let _ = self.0.wait();
    }
}

/// Measures requests per second over five seconds. Panics if a request fails.
fn wrk(port: u16, host: &str, path: &str) -> f64 {
    let url = format!("http://127.0.0.1:{port}{path}");
    let output =
        Command::new("wrk").args(["-t2", "-c64", "-d5s", "-H", &format!("Host: {host}"), &url]).output().expect("wrk runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!text.contains("Non-2xx") && !text.contains("Socket errors"), "{text}");
    let line = text.lines().find_map(|line| line.strip_prefix("Requests/sec:"));
    line.and_then(|rest| rest.trim().parse().ok()).unwrap_or_else(|| panic!("{text}"))
}
