//! A Capsule server under test: its processes, command line, API and applications.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use ureq::Agent;

use crate::shape::{Dependencies, shape};
use crate::{
    CommandOutput, FAILPOINT_VARIABLE, NOBODY, Namespace, Reply, Signal, binary, eventually, has_failpoints, signal, text,
};

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
    /// Set once the first account is registered, which administers the installation.
    first: OnceLock<()>,
    /// A copy of the binary that an unprivileged user can run.
    unprivileged: Option<PathBuf>,
    /// The last field: backing servers stop after the server.
    _dependencies: Option<Dependencies>,
}

/// A process of a server.
#[derive(Debug)]
struct Process {
    /// The parts that run in it, as in `--only`; empty for all.
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
    /// Starts a server with these settings, as `name=value`, in addition to the defaults.
    #[must_use]
    pub fn with(settings: &[&str]) -> Self {
        let mut server = Self::new(settings);
        server.start();
        server
    }

    /// Creates a server without starting it.
    #[must_use]
    pub fn unstarted(settings: &[&str]) -> Self {
        Self::new(settings)
    }

    /// Starts a server as an unprivileged user.
    #[must_use]
    pub fn unprivileged(settings: &[&str]) -> Self {
        let mut server = Self::new(settings);
        let copy = server.home.path().join("binary");
        std::fs::copy(binary(), &copy).expect("the binary can be copied");
        for path in [server.data(), server.home.path(), &copy] {
            std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).expect("this needs root");
        }
        server.unprivileged = Some(copy);
        server.start();
        server
    }

    fn new(settings: &[&str]) -> Self {
        let folder = |name: &str| tempfile::Builder::new().prefix(name).tempdir().expect("a temporary folder");
        let (shape, dependencies) = shape(settings);
        let processes = if shape.processes.is_empty() { vec![""] } else { shape.processes };
        Self {
            data: folder("cap-"),
            home: folder("home-"),
            // Tests register users freely. The default, `invited`, has its own tests.
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
            _dependencies: dependencies,
        }
    }

    /// Adds a setting, which takes effect at the next start.
    pub fn add_setting(&mut self, setting: &str) {
        self.settings.push(setting.into());
    }

    /// Starts the processes that are not running, with the existing data, and waits until all are ready.
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

    /// Starts a process without waiting until it is ready.
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

    /// Whether every process reports that it is ready.
    fn is_ready(&self) -> bool {
        let announced = self.announced();
        announced.len() == self.processes.len()
            && announced.iter().all(|running| {
                let private = running["private"].as_str().unwrap_or_default();
                self.agent.get(format!("http://{private}/health/ready")).call().is_ok_and(|answer| answer.status() == 200)
            })
    }

    /// A metric of the process at this index of the shape; `None` if the process does not respond.
    #[must_use]
    pub fn metric(&self, at: usize, name: &str) -> Option<f64> {
        let announced = self.announced();
        let running = announced.iter().find(|running| running["pid"].as_u64() == Some(u64::from(self.pid_of(at))))?;
        let url = format!("http://{}/metrics", running["private"].as_str()?);
        let mut answer = self.agent.get(url).config().timeout_global(Some(Duration::from_secs(2))).build().call().ok()?;
        let text = answer.body_mut().read_to_string().ok()?;
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }

    /// Gets a private page of a server with one process.
    #[must_use]
    pub fn private(&self, path: &str) -> Reply {
        let announced = self.announced();
        let url = format!("http://{}{path}", announced[0]["private"].as_str().expect("an address"));
        let mut answer = self.agent.get(url).call().expect("a response");
        let body = answer.body_mut().read_to_string().expect("a body");
        Reply::new(&answer, body)
    }

    /// The files in which running processes announce their addresses.
    #[must_use]
    pub fn announced(&self) -> Vec<Value> {
        let pids: Vec<u64> = self.processes.iter().filter_map(|process| Some(u64::from(process.child.as_ref()?.id()))).collect();
        let Ok(entries) = std::fs::read_dir(self.data().join("run/processes")) else { return Vec::new() };
        let all = entries.flatten().filter_map(|entry| serde_json::from_slice::<Value>(&std::fs::read(entry.path()).ok()?).ok());
        // A killed process leaves its file behind.
        all.filter(|running| running["pid"].as_u64().is_some_and(|pid| pids.contains(&pid))).collect()
    }

    /// Like [`Server::start`], with this failpoint: see `services/deploy/src/failpoint.rs`.
    ///
    /// # Panics
    /// If the binary under test has no failpoints.
    pub fn start_with_failpoint(&mut self, point: &str) {
        assert!(
            has_failpoints(),
            "{} has no failpoints: run scripts/test, or `cargo build --workspace --all-targets`",
            binary().display()
        );
        self.environment.insert(FAILPOINT_VARIABLE.into(), point.into());
        self.start();
        self.environment.clear();
    }

    /// Sends SIGKILL to all processes. Instances and the ingress keep running.
    pub fn kill(&mut self) {
        for process in &mut self.processes {
            process.kill();
        }
    }

    /// Kills the process at this index of the shape with SIGKILL, and starts it again.
    pub fn restart_process(&mut self, at: usize) {
        self.processes[at].kill();
        self.spawn(at);
    }

    /// Stops the process at this index of the shape with SIGTERM, and starts it again.
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

    /// The readiness page of each process that responds.
    fn readiness(&self) -> Vec<String> {
        let ask = |running: &Value| {
            let url = format!("http://{}/health/ready", running["private"].as_str().unwrap_or_default());
            let answer = self.agent.get(url).call().and_then(|mut answer| answer.body_mut().read_to_string());
            format!("{}: {answer:?}", running["parts"])
        };
        self.announced().iter().map(ask).collect()
    }

    /// The number of processes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.processes.len()
    }

    /// The process id of the process at this index of the shape.
    #[must_use]
    pub fn pid_of(&self, at: usize) -> u32 {
        self.processes[at].child.as_ref().map_or(0, Child::id)
    }

    /// Sends SIGTERM to all processes and waits until they have ended.
    pub fn stop(&mut self) {
        let children: Vec<Child> = self.processes.iter_mut().filter_map(|process| process.child.take()).collect();
        for child in &children {
            signal(child.id(), Signal::TERM);
        }
        for mut child in children {
            let _ = child.wait();
        }
    }

    /// Waits until a process of the server ends by itself, then kills the others.
    pub fn wait_for_end(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while self.processes.iter_mut().all(Process::runs) {
            assert!(Instant::now() < deadline, "the server did not end");
            std::thread::sleep(Duration::from_millis(10));
        }
        self.kill();
    }

    /// The process id of a server with one process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid_of(0)
    }

    /// The data directory.
    #[must_use]
    pub fn data(&self) -> &Path {
        self.data.path()
    }

    /// The number of entries in a folder of the data directory whose names end with `end`.
    #[must_use]
    pub fn entries(&self, folder: &str, end: &str) -> usize {
        let Ok(entries) = std::fs::read_dir(self.data().join(folder)) else { return 0 };
        entries.flatten().filter(|entry| entry.file_name().to_string_lossy().ends_with(end)).count()
    }

    /// The number of stored uploads.
    #[must_use]
    pub fn blobs(&self) -> usize {
        let entries = std::fs::read_dir(self.data().join("blobs")).expect("there");
        entries.flatten().filter(|entry| entry.path().is_file()).count()
    }

    fn log(&self) -> PathBuf {
        self.home.path().join("server.log")
    }

    /// The log of the server.
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
        for name in ["CAPSULE_SERVER", FAILPOINT_VARIABLE, "XDG_DATA_HOME", "CAPSULE_LISTEN"] {
            command.env_remove(name);
        }
        command.envs(&self.environment);
        command
    }

    /// Runs a command of the CLI and waits for its end.
    #[must_use]
    pub fn capsule(&self, arguments: &[&str]) -> CommandOutput {
        CommandOutput::new(&self.command().args(arguments).stdin(Stdio::null()).output().expect("the binary runs"))
    }

    /// Runs a command of the CLI with the server's settings.
    #[must_use]
    pub fn capsule_with_settings(&self, arguments: &[&str], environment: &[(&str, &str)]) -> CommandOutput {
        let settings = self.settings.iter().flat_map(|setting| ["--set", setting]);
        self.capsule_with(&arguments.iter().copied().chain(settings).collect::<Vec<_>>(), "", environment)
    }

    /// Runs `capsule migrate`, with the server's settings.
    #[must_use]
    pub fn migrate(&self, command: &str) -> CommandOutput {
        self.capsule_with_settings(&["migrate", command, "--json"], &[])
    }

    /// Starts a command of the CLI with a pipe for its standard output.
    #[must_use]
    pub fn spawn_with_stdout(&self, arguments: &[&str]) -> Child {
        let mut command = self.command();
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        command.spawn().expect("the binary runs")
    }

    /// Starts a command of the CLI with a pipe for its standard error.
    #[must_use]
    pub fn spawn_with_stderr(&self, arguments: &[&str]) -> Child {
        let mut command = self.command();
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command.spawn().expect("the binary runs")
    }

    /// Runs a command of the CLI in a folder, without a terminal.
    #[must_use]
    pub fn capsule_in(&self, folder: &Path, arguments: &[&str]) -> CommandOutput {
        CommandOutput::new(
            &self.command().args(arguments).current_dir(folder).stdin(Stdio::null()).output().expect("the binary runs"),
        )
    }

    /// Runs a command of the CLI as an unprivileged user, not as the user of the server.
    #[must_use]
    pub fn capsule_as_nobody(&self, arguments: &[&str]) -> CommandOutput {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let copy = folder.path().join("capsule");
        std::fs::copy(binary(), &copy).expect("the binary can be copied");
        std::os::unix::fs::chown(folder.path(), Some(NOBODY), Some(NOBODY)).expect("this needs root");
        let mut command = Command::new("setpriv");
        command.args([format!("--reuid={NOBODY}"), format!("--regid={NOBODY}"), "--clear-groups".into()]).arg(&copy);
        command.env("HOME", folder.path()).env("XDG_CONFIG_HOME", folder.path()).env("CAPSULE_DATA", self.data());
        CommandOutput::new(&command.args(arguments).stdin(Stdio::null()).output().expect("the binary runs"))
    }

    /// Replaces the binary of an unprivileged server by another file, as an upgrade does.
    pub fn upgrade(&self) {
        let path = self.unprivileged.as_ref().expect("a copy of the binary");
        let new = path.with_extension("new");
        std::fs::copy(path, &new).expect("the binary can be copied");
        std::fs::rename(new, path).expect("renamed");
    }

    /// Like [`Server::capsule`], with standard input and environment variables.
    #[must_use]
    pub fn capsule_with(&self, arguments: &[&str], input: &str, environment: &[(&str, &str)]) -> CommandOutput {
        use std::io::Write;
        let mut command = self.command();
        command.args(arguments).envs(environment.iter().copied());
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary runs");
        let _ = child.stdin.take().expect("a pipe").write_all(input.as_bytes());
        CommandOutput::new(&child.wait_with_output().expect("it ends"))
    }

    /// Deploys a folder as service `name` of project `name`.
    #[must_use]
    pub fn deploy(&self, folder: &Path, name: &str) -> CommandOutput {
        let folder = folder.to_str().expect("a path");
        self.capsule(&["deploy", folder, "--project", name, "--service", name, "--yes"])
    }

    /// Sends a GET request to an application through the ingress.
    ///
    /// # Errors
    /// If there is no complete response.
    pub fn try_get(&self, host: &str, path: &str) -> Result<Reply, String> {
        let url = format!("http://127.0.0.1:{}{path}", self.port());
        let mut response = self.agent.get(url).header("host", host).call().map_err(|error| error.to_string())?;
        let body = response.body_mut().read_to_string().map_err(|error| error.to_string())?;
        Ok(Reply::new(&response, body))
    }

    /// Like [`Server::try_get`], and panics without a response.
    #[must_use]
    pub fn get(&self, host: &str, path: &str) -> Reply {
        self.try_get(host, path).unwrap_or_else(|error| panic!("{host}{path}: {error}"))
    }

    /// Sends a request to the API.
    #[must_use]
    pub fn api(&self, method: &str, path: &str, token: Option<&str>, body: Option<&Value>) -> Reply {
        let bytes = body.map(|body| body.to_string().into_bytes());
        self.api_raw(method, path, token, "application/json", bytes)
    }

    /// All items of a list, from all its pages.
    #[must_use]
    pub fn list(&self, path: &str, token: &str) -> Vec<Value> {
        let first = format!("{path}{}limit=200", if path.contains('?') { '&' } else { '?' });
        let (mut all, mut next) = (Vec::new(), first.clone());
        loop {
            let page = self.api("GET", &next, Some(token), None).ok();
            all.extend(page["items"].as_array().cloned().unwrap_or_default());
            match page["next_cursor"].as_str() {
                Some(cursor) => next = format!("{first}&cursor={cursor}"),
                None => return all,
            }
        }
    }

    /// Like [`Server::api`], with another header.
    #[must_use]
    pub fn api_with_header(&self, method: &str, path: &str, token: &str, header: (&str, &str), body: Option<&Value>) -> Reply {
        let bytes = body.map(|body| body.to_string().into_bytes());
        self.api_with(method, path, Some(token), &[header], "application/json", bytes)
    }

    /// Sends a POST request with an idempotency key to the API.
    ///
    /// # Errors
    /// If there is no complete response.
    pub fn try_command(&self, path: &str, token: &str, key: &str, body: &Value) -> Result<Reply, String> {
        let url = format!("http://127.0.0.1:{}/api/v1{path}", self.port());
        let request = self.agent.post(url).header("authorization", format!("Bearer {token}")).header("idempotency-key", key);
        let mut response = request.send_json(body).map_err(|error| error.to_string())?;
        let body = response.body_mut().read_to_string().map_err(|error| error.to_string())?;
        Ok(Reply::new(&response, body))
    }

    /// Like [`Server::api`], with a body of any media type.
    #[must_use]
    pub fn api_raw(&self, method: &str, path: &str, token: Option<&str>, kind: &str, body: Option<Vec<u8>>) -> Reply {
        self.api_with(method, path, token, &[], kind, body)
    }

    /// Like [`Server::api_raw`], with other headers.
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
        // A stream with `follow=true` would not end; tests do not request one here.
        let body = response.body_mut().with_config().limit(64 << 20).read_to_string().expect("a body");
        Reply::new(&response, body)
    }

    /// The secret that signs in the owner of the data directory.
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

    /// Registers a user who is not an administrator of the installation, and returns an access token.
    #[must_use]
    pub fn register(&self, email: &str) -> String {
        self.register_first_account();
        let body = serde_json::json!({"email": email, "password": "a long enough one 1"});
        text(&self.api("POST", "/auth/register", None, Some(&body)).ok(), "access_token")
    }
}

impl Server {
    /// Registers the first account with the set-up token, unless it exists.
    pub fn register_first_account(&self) {
        self.first.get_or_init(|| {
            let _ = self.admin();
            let body = serde_json::json!({
                "email": "first@example.com", "password": "a long enough one 1", "setup_token": self.local_token()
            });
            self.api("POST", "/auth/register", None, Some(&body)).ok();
        });
    }

    /// Invites a registered user to an organization and accepts as that user. Returns the reply to the invitation.
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

    /// Creates service `name` in project `name` of the personal organization of the token's user, and returns its id.
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

    /// The output of `capsule status` for the service of a folder.
    #[must_use]
    pub fn status(&self, folder: &Path) -> Value {
        self.capsule(&["status", folder.to_str().expect("a path"), "--json"]).ok().json()
    }

    /// The instances of the service of a folder.
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
