//! A Capsule server: its processes, its command line, its API and its applications.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use ureq::Agent;

use crate::shape::{Ground, shape};
use crate::{NOBODY, Namespace, Ran, Reply, Signal, binary, eventually, signal, text};

/// A running server.
#[derive(Debug)]
pub struct Server {
    data: TempDir,
    home: TempDir,
    settings: Vec<String>,
    environment: BTreeMap<String, String>,
    processes: Vec<Process>,
    port: u16,
    agent: Agent,
    /// Made before any other account is registered: it administers the installation.
    first: OnceLock<()>,
    /// A copy of the binary that a user without rights may run as such.
    unprivileged: Option<PathBuf>,
    /// Last: what it stands on ends after it.
    _ground: Option<Ground>,
}

/// A process of a server: the only one, or one of many.
#[derive(Debug)]
struct Process {
    /// What runs in it, as `--only` takes it; empty for everything.
    parts: &'static str,
    namespace: Option<String>,
    child: Option<Child>,
}

impl Default for Server {
    fn default() -> Self {
        Self::with(&[])
    }
}

impl Server {
    /// Starts a server with these settings beyond the defaults, as `name=value`.
    #[must_use]
    pub fn with(settings: &[&str]) -> Self {
        let mut server = Self::new(settings);
        server.start();
        server
    }

    /// A server that is not started yet.
    #[must_use]
    pub fn unstarted(settings: &[&str]) -> Self {
        Self::new(settings)
    }

    /// Starts a server as a user without rights.
    #[must_use]
    pub fn unprivileged(settings: &[&str]) -> Self {
        let mut server = Self::new(settings);
        let copy = server.home.path().join("binary");
        std::fs::copy(binary(), &copy).expect("the binary can be copied");
        for path in [server.data(), server.home.path(), &copy] {
            std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).expect("it takes root");
        }
        server.unprivileged = Some(copy);
        server.start();
        server
    }

    fn new(settings: &[&str]) -> Self {
        let folder = |name: &str| tempfile::Builder::new().prefix(name).tempdir().expect("a temporary folder");
        let (shape, ground) = shape(settings);
        let processes = if shape.processes.is_empty() { vec![""] } else { shape.processes };
        Self {
            data: folder("cap-"),
            home: folder("home-"),
            // Tests register whomever they need; what a server does by default is tested by itself.
            settings: ["listen=127.0.0.1:0", "private_listen=127.0.0.1:0", "registration=open"]
                .iter()
                .chain(settings)
                .map(|setting| (*setting).to_owned())
                .chain(shape.settings)
                .collect(),
            environment: BTreeMap::new(),
            processes: processes
                .iter()
                .enumerate()
                .map(|(at, parts)| Process {
                    parts,
                    namespace: shape.namespace.clone().filter(|_| at + 1 == processes.len()),
                    child: None,
                })
                .collect(),
            port: 0,
            agent: Agent::config_builder()
                .http_status_as_error(false)
                .timeout_global(Some(Duration::from_secs(120)))
                .max_redirects(0)
                .build()
                .into(),
            first: OnceLock::new(),
            unprivileged: None,
            _ground: ground,
        }
    }

    /// Starts it with this setting, too, from its next life on.
    pub fn set(&mut self, setting: &str) {
        self.settings.push(setting.into());
    }

    /// Starts the server anew, or what of it does not run, with the data it has. Waits until it answers.
    pub fn start(&mut self) {
        for at in 0..self.processes.len() {
            if !self.processes[at].runs() {
                self.spawn(at);
            }
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.is_ready() {
            let ended = self.processes.iter_mut().any(|process| !process.runs());
            let in_time = !ended && Instant::now() < deadline;
            assert!(in_time, "the server does not start: {:?}\n{}", self.readiness(), self.log_text());
            std::thread::sleep(Duration::from_millis(10));
        }
        let public = self.announced().iter().find_map(|running| running["public"]["address"].as_str().map(str::to_owned));
        self.port = public.and_then(|address| address.rsplit(':').next()?.parse().ok()).expect("a port");
    }

    /// Starts a process without waiting for it.
    fn spawn(&mut self, at: usize) {
        let mut command = self.command();
        if let Some(namespace) = &self.processes[at].namespace {
            let mut inside = Command::new("ip");
            inside.args(["netns", "exec", namespace]).arg(command.get_program());
            inside.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
            command = inside;
        }
        command.arg("server");
        if !self.processes[at].parts.is_empty() {
            command.args(["--only", self.processes[at].parts]);
        }
        for setting in &self.settings {
            command.arg("--set").arg(setting);
        }
        if self.processes[at].namespace.is_some() {
            command.arg("--set").arg(format!("private_listen={}:0", Namespace::INSIDE));
        }
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log()).expect("the log can be written");
        command.stderr(log).stdout(Stdio::null()).stdin(Stdio::null());
        self.processes[at].child = Some(command.spawn().expect("the binary starts"));
    }

    /// Whether every process says that it is ready.
    fn is_ready(&self) -> bool {
        let announced = self.announced();
        announced.len() == self.processes.len()
            && announced.iter().all(|running| {
                let private = running["private"].as_str().unwrap_or_default();
                self.agent.get(format!("http://{private}/health/ready")).call().is_ok_and(|answer| answer.status() == 200)
            })
    }

    /// A metric of one of the processes, by its place in the shape; nothing if it does not answer.
    #[must_use]
    pub fn metric(&self, at: usize, name: &str) -> Option<f64> {
        let announced = self.announced();
        let running = announced.iter().find(|running| running["pid"].as_u64() == Some(u64::from(self.pid_of(at))))?;
        let url = format!("http://{}/metrics", running["private"].as_str()?);
        let mut answer = self.agent.get(url).config().timeout_global(Some(Duration::from_secs(2))).build().call().ok()?;
        let text = answer.body_mut().read_to_string().ok()?;
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }

    /// Asks the private pages of a server of one process.
    #[must_use]
    pub fn private(&self, path: &str) -> Reply {
        let announced = self.announced();
        let url = format!("http://{}{path}", announced[0]["private"].as_str().expect("an address"));
        let mut answer = self.agent.get(url).call().expect("an answer");
        let body = answer.body_mut().read_to_string().expect("a body");
        Reply::new(&answer, body)
    }

    /// What the processes that run say of themselves.
    #[must_use]
    pub fn announced(&self) -> Vec<Value> {
        let pids: Vec<u64> = self.processes.iter().filter_map(|process| Some(u64::from(process.child.as_ref()?.id()))).collect();
        let Ok(entries) = std::fs::read_dir(self.data().join("run/processes")) else { return Vec::new() };
        let all = entries.flatten().filter_map(|entry| serde_json::from_slice::<Value>(&std::fs::read(entry.path()).ok()?).ok());
        // One that was killed leaves its file behind.
        all.filter(|running| running["pid"].as_u64().is_some_and(|pid| pids.contains(&pid))).collect()
    }

    /// As [`Server::start`], with variables in its environment for this life of it.
    pub fn start_with(&mut self, environment: &[(&str, &str)]) {
        self.environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        self.start();
        self.environment.clear();
    }

    /// SIGKILL. Instances and ingress go on.
    pub fn kill(&mut self) {
        for process in &mut self.processes {
            process.kill();
        }
    }

    /// SIGKILL to one of the processes, by its place in the shape, and its next life.
    pub fn restart_process(&mut self, at: usize) {
        self.processes[at].kill();
        self.spawn(at);
    }

    /// SIGTERM to one of the processes, its end, and its next life.
    pub fn replace_process(&mut self, at: usize) {
        if let Some(mut child) = self.processes[at].child.take() {
            signal(child.id(), Signal::TERM);
            let _ = child.wait();
        }
        self.spawn(at);
    }

    /// Waits until every process is ready.
    pub fn wait_until_ready(&self) {
        let deadline = Instant::now() + Duration::from_secs(90);
        while !self.is_ready() {
            assert!(Instant::now() < deadline, "not ready: {:?}", self.readiness());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// What each process that answers says to whether it is ready.
    fn readiness(&self) -> Vec<String> {
        let ask = |running: &Value| {
            let url = format!("http://{}/health/ready", running["private"].as_str().unwrap_or_default());
            let answer = self.agent.get(url).call().and_then(|mut answer| answer.body_mut().read_to_string());
            format!("{}: {answer:?}", running["parts"])
        };
        self.announced().iter().map(ask).collect()
    }

    /// How many processes there are.
    #[must_use]
    pub fn size(&self) -> usize {
        self.processes.len()
    }

    /// The id of one of the processes, by its place in the shape.
    #[must_use]
    pub fn pid_of(&self, at: usize) -> u32 {
        self.processes[at].child.as_ref().map_or(0, Child::id)
    }

    /// SIGTERM, and its end.
    pub fn stop(&mut self) {
        let children: Vec<Child> = self.processes.iter_mut().filter_map(|process| process.child.take()).collect();
        for child in &children {
            signal(child.id(), Signal::TERM);
        }
        for mut child in children {
            let _ = child.wait();
        }
    }

    /// Waits until a process of the server has ended by itself; the others are ended as well.
    pub fn wait_for_end(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while self.processes.iter_mut().all(Process::runs) {
            assert!(Instant::now() < deadline, "the server did not end");
            std::thread::sleep(Duration::from_millis(10));
        }
        self.kill();
    }

    /// The server's process id, where it is one process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid_of(0)
    }

    /// The data directory.
    #[must_use]
    pub fn data(&self) -> &Path {
        self.data.path()
    }

    /// How many entries a folder of the data directory has whose names end so.
    #[must_use]
    pub fn entries(&self, folder: &str, end: &str) -> usize {
        let Ok(entries) = std::fs::read_dir(self.data().join(folder)) else { return 0 };
        entries.flatten().filter(|entry| entry.file_name().to_string_lossy().ends_with(end)).count()
    }

    /// How many uploads are kept.
    #[must_use]
    pub fn blobs(&self) -> usize {
        let entries = std::fs::read_dir(self.data().join("blobs")).expect("there");
        entries.flatten().filter(|entry| entry.path().is_file()).count()
    }

    fn log(&self) -> PathBuf {
        self.home.path().join("server.log")
    }

    /// What the server logged.
    #[must_use]
    pub fn log_text(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap_or_default()
    }

    /// The ingress's port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    fn command(&self) -> Command {
        let mut command = match &self.unprivileged {
            None => Command::new(binary()),
            Some(copy) => {
                let mut command = Command::new("setpriv");
                command.args([format!("--reuid={NOBODY}"), format!("--regid={NOBODY}"), "--clear-groups".into()]).arg(copy);
                command
            }
        };
        command.env("HOME", self.home.path()).env("XDG_CONFIG_HOME", self.home.path()).env("CAPSULE_DATA", self.data());
        for name in ["CAPSULE_SERVER", "CAPSULE_FAILPOINT", "XDG_DATA_HOME", "CAPSULE_LISTEN"] {
            command.env_remove(name);
        }
        command.envs(&self.environment);
        command
    }

    /// Runs a command of the CLI to its end.
    #[must_use]
    pub fn capsule(&self, arguments: &[&str]) -> Ran {
        Ran::new(&self.command().args(arguments).stdin(Stdio::null()).output().expect("the binary runs"))
    }

    /// Runs a command of the CLI that takes the server's settings.
    #[must_use]
    pub fn capsule_set(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Ran {
        let settings = self.settings.iter().flat_map(|setting| ["--set", setting]);
        self.capsule_with(&arguments.iter().copied().chain(settings).collect::<Vec<_>>(), "", environment)
    }

    /// Runs `capsule migrate`, with the server's settings.
    #[must_use]
    pub fn migrate(&self, command: &str) -> Ran {
        self.capsule_set(&["migrate", command, "--json"], &[])
    }

    /// Begins a command of the CLI whose standard output is read while it runs.
    #[must_use]
    pub fn begin(&self, arguments: &[&str]) -> Child {
        let mut command = self.command();
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        command.spawn().expect("the binary runs")
    }

    /// Begins a command of the CLI whose standard error is read while it runs.
    #[must_use]
    pub fn begin_told(&self, arguments: &[&str]) -> Child {
        let mut command = self.command();
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command.spawn().expect("the binary runs")
    }

    /// Runs a command of the CLI in a folder, without a terminal.
    #[must_use]
    pub fn capsule_in(&self, folder: &Path, arguments: &[&str]) -> Ran {
        Ran::new(&self.command().args(arguments).current_dir(folder).stdin(Stdio::null()).output().expect("the binary runs"))
    }

    /// Runs a command of the CLI as a user without rights, who is not the server's.
    #[must_use]
    pub fn capsule_as_nobody(&self, arguments: &[&str]) -> Ran {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let copy = folder.path().join("capsule");
        std::fs::copy(binary(), &copy).expect("the binary can be copied");
        std::os::unix::fs::chown(folder.path(), Some(NOBODY), Some(NOBODY)).expect("it takes root");
        let mut command = Command::new("setpriv");
        command.args([format!("--reuid={NOBODY}"), format!("--regid={NOBODY}"), "--clear-groups".into()]).arg(&copy);
        command.env("HOME", folder.path()).env("XDG_CONFIG_HOME", folder.path()).env("CAPSULE_DATA", self.data());
        Ran::new(&command.args(arguments).stdin(Stdio::null()).output().expect("the binary runs"))
    }

    /// Puts another file in the place of the binary of an unprivileged server, as an upgrade does.
    pub fn upgrade(&self) {
        let path = self.unprivileged.as_ref().expect("a copy of the binary");
        let new = path.with_extension("new");
        std::fs::copy(path, &new).expect("the binary can be copied");
        std::fs::rename(new, path).expect("renamed");
    }

    /// As [`Server::capsule`], with a text at its standard input, and variables.
    #[must_use]
    pub fn capsule_with(&self, arguments: &[&str], input: &str, environment: &[(&str, &str)]) -> Ran {
        use std::io::Write;
        let mut command = self.command();
        command.args(arguments).envs(environment.iter().copied());
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary runs");
        let _ = child.stdin.take().expect("a pipe").write_all(input.as_bytes());
        Ran::new(&child.wait_with_output().expect("it ends"))
    }

    /// Deploys a folder as the service of this name, of the project of the same name.
    #[must_use]
    pub fn deploy(&self, folder: &Path, name: &str) -> Ran {
        let folder = folder.to_str().expect("a path");
        self.capsule(&["deploy", folder, "--project", name, "--service", name, "--yes"])
    }

    /// Asks an application, through the ingress.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn try_get(&self, host: &str, path: &str) -> Result<Reply, String> {
        let url = format!("http://127.0.0.1:{}{path}", self.port());
        let mut response = self.agent.get(url).header("host", host).call().map_err(|error| error.to_string())?;
        let body = response.body_mut().read_to_string().map_err(|error| error.to_string())?;
        Ok(Reply::new(&response, body))
    }

    /// Asks an application, through the ingress; there must be an answer.
    #[must_use]
    pub fn get(&self, host: &str, path: &str) -> Reply {
        self.try_get(host, path).unwrap_or_else(|error| panic!("{host}{path}: {error}"))
    }

    /// Asks the API.
    #[must_use]
    pub fn api(&self, method: &str, path: &str, token: Option<&str>, body: Option<&Value>) -> Reply {
        let bytes = body.map(|body| body.to_string().into_bytes());
        self.api_raw(method, path, token, "application/json", bytes)
    }

    /// As [`Server::api`], with another header.
    #[must_use]
    pub fn api_header(&self, method: &str, path: &str, token: &str, header: (&str, &str), body: Option<&Value>) -> Reply {
        let bytes = body.map(|body| body.to_string().into_bytes());
        self.api_with(method, path, Some(token), &[header], "application/json", bytes)
    }

    /// As [`Server::api`] for a command with this idempotency key, where there may be no answer.
    ///
    /// # Errors
    /// When there is none.
    pub fn try_command(&self, path: &str, token: &str, key: &str, body: &Value) -> Result<Reply, String> {
        let url = format!("http://127.0.0.1:{}/api/v1{path}", self.port());
        let request = self.agent.post(url).header("authorization", format!("Bearer {token}")).header("idempotency-key", key);
        let mut response = request.send_json(body).map_err(|error| error.to_string())?;
        let body = response.body_mut().read_to_string().map_err(|error| error.to_string())?;
        Ok(Reply::new(&response, body))
    }

    /// Asks the API with a body of any kind.
    #[must_use]
    pub fn api_raw(&self, method: &str, path: &str, token: Option<&str>, kind: &str, body: Option<Vec<u8>>) -> Reply {
        self.api_with(method, path, token, &[], kind, body)
    }

    /// As [`Server::api_raw`], with other headers.
    fn api_with(
        &self,
        method: &str,
        path: &str,
        token: Option<&str>,
        headers: &[(&str, &str)],
        kind: &str,
        body: Option<Vec<u8>>,
    ) -> Reply {
        let url = format!("http://127.0.0.1:{}/api/v1{path}", self.port());
        let mut request = ureq::http::Request::builder().method(method).uri(url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let answer = match body {
            Some(body) if method == "DELETE" => {
                let (parts, ()) = request.body(()).expect("a request").into_parts();
                let mut request = self.agent.delete(parts.uri);
                for (name, value) in &parts.headers {
                    request = request.header(name, value);
                }
                request.header("content-type", kind).force_send_body().send(&body)
            }
            Some(body) => self.agent.run(request.header("content-type", kind).body(body).expect("a request")),
            None => self.agent.run(request.body(()).expect("a request")),
        };
        let mut response = answer.unwrap_or_else(|error| panic!("{method} {path}: {error}"));
        // A stream that follows has no end; none is asked for here.
        let body = response.body_mut().with_config().limit(64 << 20).read_to_string().expect("a body");
        Reply::new(&response, body)
    }

    /// The secret that signs the owner of the data directory in.
    #[must_use]
    pub fn local_token(&self) -> String {
        std::fs::read_to_string(self.data().join("local-token")).expect("the token is there")
    }

    /// An access token of the local administrator.
    #[must_use]
    pub fn admin(&self) -> String {
        let body = serde_json::json!({"token": self.local_token()});
        text(&self.api("POST", "/auth/local", None, Some(&body)).ok(), "access_token")
    }

    /// An access token of a new user, who does not administer the installation.
    #[must_use]
    pub fn register(&self, email: &str) -> String {
        self.first_account();
        let body = serde_json::json!({"email": email, "password": "a long enough one 1"});
        text(&self.api("POST", "/auth/register", None, Some(&body)).ok(), "access_token")
    }
}

impl Server {
    /// Makes the first account with a password, unless it was: it takes the set-up token.
    pub fn first_account(&self) {
        self.first.get_or_init(|| {
            let _ = self.admin();
            let body = serde_json::json!({
                "email": "first@example.com", "password": "a long enough one 1", "setup_token": self.local_token()
            });
            self.api("POST", "/auth/register", None, Some(&body)).ok();
        });
    }

    /// Adds a registered user to an organization, and accepts for them. What adding them was answered with.
    pub fn add_member(&self, owner: &str, organization: &str, email: &str, role: &str, member: &str) -> Value {
        let body = serde_json::json!({"email": email, "role": role});
        let added = self.api("POST", &format!("/organizations/{organization}/members"), Some(owner), Some(&body)).ok();
        let invitations = self.api("GET", "/invitations", Some(member), None).ok();
        let invitations = invitations["items"].as_array().cloned().unwrap_or_default();
        let invitation = invitations.iter().find(|invitation| invitation["organization_id"] == organization);
        let id = text(invitation.expect("the invitation is there"), "id");
        self.api("POST", &format!("/invitations/{id}/accept"), Some(member), Some(&serde_json::json!({}))).ok();
        added
    }

    /// A new service of this name, in a project of this name in the personal organization of whoever
    /// has the token.
    #[must_use]
    pub fn service(&self, token: &str, name: &str) -> String {
        let organizations = eventually("the personal organization is there", || {
            let page = self.api("GET", "/organizations", Some(token), None).ok();
            page["items"].as_array().filter(|items| !items.is_empty()).cloned()
        });
        let body = serde_json::json!({"organization_id": organizations[0]["id"], "name": name});
        let project = self.api("POST", "/projects", Some(token), Some(&body)).ok();
        let body = serde_json::json!({"project_id": project["id"], "name": name});
        text(&self.api("POST", "/services", Some(token), Some(&body)).ok(), "id")
    }

    /// What `capsule status` tells of the service that a folder is.
    #[must_use]
    pub fn status(&self, folder: &Path) -> Value {
        self.capsule(&["status", folder.to_str().expect("a path"), "--json"]).ok().json()
    }

    /// The instances of the service that a folder is.
    #[must_use]
    pub fn instances(&self, folder: &Path) -> Vec<Value> {
        self.status(folder)["state"]["instances"].as_array().expect("a list").clone()
    }
}

impl Process {
    fn runs(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.try_wait().is_ok_and(|ended| ended.is_none()))
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the server's log ---\n{}", self.log_text());
        }
        self.stop();
        let _ = self.command().args(["server", "down"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
}
