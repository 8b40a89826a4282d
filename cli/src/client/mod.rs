//! The client of the API. It renews its session without the user where possible.

mod address;
mod local;
mod session;

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use capsule_contracts::list::MAX_LIMIT;
use capsule_contracts::{Page, Problem};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use ureq::http::Response;
use ureq::{Agent, Body, SendBody};

use crate::server::data;
use crate::terminal::{self, Failure};

pub use address::web_page;

use address::Address;
use session::Tokens;

const NOT_SIGNED_IN: &str = "not_signed_in";

/// The server that the command line and the environment choose.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// `--server`
    pub server: Option<String>,
    /// `--data`
    pub data: Option<PathBuf>,
    /// `--insecure-http`
    pub insecure_http: bool,
}

/// A server, and the session with it.
pub struct Client {
    agent: Agent,
    /// The server's base URL, without a slash at its end.
    server: String,
    /// The URL to show. Equal to `server`, except for a local server.
    name: String,
    /// The name under which the session is stored.
    session_name: String,
    tokens: Option<Tokens>,
    /// The id of the user whose session the server has accepted during this command.
    user_id: Option<String>,
    local_token: Option<String>,
    local_sign_in: LocalSignIn,
    /// The data directory of a local server.
    directory: Option<PathBuf>,
    /// Sessions may be sent without encryption.
    insecure_http: bool,
}

/// When the local token may open a session. That session is the local administrator's, whoever was signed in before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LocalSignIn {
    /// If there is no session, or the local token opened the one that ended.
    Automatic,
    /// In place of any session that has ended, because the user runs `capsule login`.
    Requested,
    Never,
}

impl LocalSignIn {
    /// Whether the local token may open a session after `ended`.
    fn permits(self, ended: Option<&Tokens>) -> bool {
        match self {
            Self::Automatic => ended.is_none_or(|tokens| tokens.by_local_token),
            Self::Requested => true,
            Self::Never => false,
        }
    }
}

/// An error response of the server.
#[derive(Debug)]
pub struct Refused(pub Problem);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.errors.is_empty() {
            f.write_str(&self.0.detail)?;
        }
        for (index, error) in self.0.errors.iter().enumerate() {
            write!(f, "{}{}: {}", if index == 0 { "" } else { "\n" }, error.field, error.message)?;
        }
        if let Some(hint) = &self.0.hint {
            write!(f, "\n{hint}")?;
        }
        if let (true, Some(id)) = (self.0.status >= 500, &self.0.correlation_id) {
            write!(f, "\n(correlation id {id})")?;
        }
        Ok(())
    }
}

impl std::error::Error for Refused {}

/// Whether an error is the server's response that a resource was not found.
pub fn is_not_found(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Refused>().is_some_and(|refused| refused.0.code == "not_found")
}

/// Whether an error is the server's response that the request needs the password.
pub fn requires_password(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Refused>().is_some_and(|refused| refused.0.code == "reauthentication_required")
}

/// Whether a retry is pointless: the server has responded, or the session has ended.
pub fn is_final(error: &anyhow::Error) -> bool {
    error.is::<Refused>() || error.downcast_ref::<Failure>().is_some_and(|failure| failure.code == NOT_SIGNED_IN)
}

impl Client {
    /// Finds the server: `--server`, or else the one of `--data`, or else the one of the user's default data directory,
    /// or else the one that the user last signed in to. An explicit choice never falls back to another server.
    ///
    /// # Errors
    /// When there is no such server, or its URL is invalid or insecure.
    pub fn find(choice: &Choice) -> anyhow::Result<Self> {
        let directory = choice.data.clone().unwrap_or_else(data::default_directory);
        let local = local::find(&directory);
        if let Some(server) = &choice.server {
            let address = Address::parse(server)?;
            return match local.filter(|local| local.url == address.url || local.address == address.url) {
                Some(local) => Self::local(&directory, local, Some(address.url)),
                None => Self::remote(&address, session::load(&address.url)?, choice),
            };
        }
        if let Some(local) = local {
            return Self::local(&directory, local, None);
        }
        if choice.data.is_some() {
            return Err(local::not_found(&directory).into());
        }
        match session::last()? {
            Some((name, tokens)) => Self::remote(&Address::parse(&name)?, Some(tokens), choice),
            None => Err(Failure::new(
                "no_server",
                format!(
                    "No server is running with the data directory {}, and you are not signed in to another.",
                    directory.display()
                ),
            )
            .hint("Start one with `capsule server`, or sign in with `capsule login --server URL`.")
            .into()),
        }
    }

    fn local(directory: &Path, local: local::Local, given_url: Option<String>) -> anyhow::Result<Self> {
        let name = given_url.unwrap_or_else(|| local.url.clone());
        // A session may be stored under another name of the server. The local token must not replace it.
        let (mut session_name, mut tokens) = (name.clone(), None);
        for known in [&name, &local.url, &local.address] {
            tokens = session::load(known)?;
            if tokens.is_some() {
                session_name.clone_from(known);
                break;
            }
        }
        Ok(Self {
            // No proxy for a server on this host.
            agent: agent(false, false),
            server: local.address,
            name,
            session_name,
            tokens,
            user_id: None,
            local_token: Some(local.token),
            local_sign_in: LocalSignIn::Automatic,
            directory: Some(directory.into()),
            insecure_http: false,
        })
    }

    fn remote(address: &Address, tokens: Option<Tokens>, choice: &Choice) -> anyhow::Result<Self> {
        // `--insecure-http` at sign-in applies to the whole session.
        let insecure_http = choice.insecure_http || tokens.as_ref().is_some_and(|tokens| tokens.insecure_http);
        address.check_encryption(insecure_http)?;
        if address.is_unencrypted() {
            terminal::warn(&format!(
                "The connection to {} is not encrypted: passwords and sessions can be read in transit.",
                address.url
            ));
        }
        Ok(Self {
            agent: agent(address.is_https, !address.is_loopback),
            server: address.url.clone(),
            name: address.url.clone(),
            session_name: address.url.clone(),
            tokens,
            user_id: None,
            local_token: None,
            local_sign_in: LocalSignIn::Never,
            directory: None,
            insecure_http: address.is_unencrypted(),
        })
    }

    /// The server's URL, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the server is on this host and the user can sign in without a password.
    pub fn is_local(&self) -> bool {
        self.local_token.is_some()
    }

    /// The data directory of a server on this host.
    pub fn directory(&self) -> Option<&Path> {
        self.directory.as_deref()
    }

    /// The secret that signs in the owner of a server on this host.
    pub fn local_token(&self) -> Option<&str> {
        self.local_token.as_deref()
    }

    /// The local token, which replaces the password in a session that it has opened.
    pub fn password_substitute(&self) -> Option<&str> {
        self.local_token().filter(|_| self.tokens.as_ref().is_some_and(|tokens| tokens.by_local_token))
    }

    /// Lets the local token replace any session that has ended: the user runs `capsule login`.
    pub fn sign_in_locally(&mut self) {
        self.local_sign_in = LocalSignIn::Requested;
    }

    /// Requires an existing session: the local token does not open one.
    pub fn require_session(&mut self) {
        self.local_sign_in = LocalSignIn::Never;
    }

    pub fn get<T: DeserializeOwned>(&mut self, path: &str) -> anyhow::Result<T> {
        self.call("GET", path, None)
    }

    /// All items of a list, from all its pages.
    pub fn list<T: DeserializeOwned>(&mut self, path: &str) -> anyhow::Result<Vec<T>> {
        let separator = if path.contains('?') { '&' } else { '?' };
        let (mut all, first) = (Vec::new(), format!("{path}{separator}limit={MAX_LIMIT}"));
        let mut page = self.get::<Page<T>>(&first)?;
        loop {
            all.append(&mut page.items);
            match page.next_cursor {
                Some(cursor) => page = self.get(&format!("{first}&cursor={cursor}"))?,
                None => return Ok(all),
            }
        }
    }

    pub fn post<T: DeserializeOwned>(&mut self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        self.call("POST", path, Some(&serde_json::to_vec(body)?))
    }

    pub fn put<T: DeserializeOwned>(&mut self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        self.call("PUT", path, Some(&serde_json::to_vec(body)?))
    }

    pub fn patch<T: DeserializeOwned>(&mut self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        self.call("PATCH", path, Some(&serde_json::to_vec(body)?))
    }

    pub fn delete<T: DeserializeOwned>(&mut self, path: &str) -> anyhow::Result<T> {
        self.call("DELETE", path, None)
    }

    /// Like [`Client::delete`], with a body for what must not be in a URL.
    pub fn delete_with<T: DeserializeOwned>(&mut self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        self.call("DELETE", path, Some(&serde_json::to_vec(body)?))
    }

    fn call<T: DeserializeOwned>(&mut self, method: &str, path: &str, body: Option<&[u8]>) -> anyhow::Result<T> {
        let mut response = self.send_signed_in(|client| client.send(method, path, body))?;
        let text = response
            .body_mut()
            .with_config()
            .limit(64 << 20)
            .read_to_string()
            .context("the connection closed before the response was complete")?;
        serde_json::from_str(&text).with_context(|| {
            format!("invalid response of the server at {} to {method} {path}; it may be of another version", self.name)
        })
    }

    /// The items of a stream, as they arrive.
    pub fn stream<T: DeserializeOwned>(
        &mut self,
        path: &str,
    ) -> anyhow::Result<impl Iterator<Item = anyhow::Result<T>> + use<T>> {
        let response = self.send_signed_in(|client| client.send("GET", path, None))?;
        let lines = BufReader::new(response.into_body().into_reader()).lines();
        Ok(lines.map(|line| Ok(serde_json::from_str(&line.context("lost the connection to the server")?)?)))
    }

    /// Uploads an archive of `length` bytes that `open` opens.
    pub fn upload<T: DeserializeOwned, R: Read>(
        &mut self,
        path: &str,
        length: u64,
        open: impl Fn() -> std::io::Result<R>,
    ) -> anyhow::Result<T> {
        // Renew the session before the upload: an expired one would waste it.
        let _: Value = self.get("/auth/me")?;
        let mut reader = open()?;
        let request = self
            .agent
            .post(format!("{}/api/v1{path}", self.server))
            .header("content-type", "application/gzip")
            .header("content-length", length.to_string())
            .header("authorization", self.authorization().unwrap_or_default());
        let response = request.send(SendBody::from_reader(&mut reader)).map_err(|error| self.unreachable(&error))?;
        let mut response = check_status(response)?;
        Ok(serde_json::from_str(&response.body_mut().read_to_string()?)?)
    }

    /// Sends a request. Signs in first, or renews the session and retries, where necessary.
    fn send_signed_in(&mut self, send: impl Fn(&Self) -> anyhow::Result<Response<Body>>) -> anyhow::Result<Response<Body>> {
        if self.tokens.is_none() {
            self.renew_session()?;
        }
        let mut response = send(self)?;
        if response.status() == 401 {
            self.renew_session()?;
            response = send(self)?;
        }
        if response.status() != 401 {
            self.user_id = self.tokens.as_ref().and_then(|tokens| tokens.user_id.clone());
        }
        check_status(response)
    }

    fn send(&self, method: &str, path: &str, body: Option<&[u8]>) -> anyhow::Result<Response<Body>> {
        let url = format!("{}/api/v1{path}", self.server);
        let mut request = ureq::http::Request::builder().method(method).uri(url);
        if let Some(authorization) = self.authorization() {
            request = request.header("authorization", authorization);
        }
        let result = match body {
            Some(body) if method == "DELETE" => {
                let mut request = self.agent.delete(format!("{}/api/v1{path}", self.server));
                if let Some(authorization) = self.authorization() {
                    request = request.header("authorization", authorization);
                }
                request.header("content-type", "application/json").force_send_body().send(body)
            }
            Some(body) => self.agent.run(request.header("content-type", "application/json").body(body)?),
            None => self.agent.run(request.body(())?),
        };
        result.map_err(|error| self.unreachable(&error))
    }

    fn authorization(&self) -> Option<String> {
        self.tokens.as_ref().map(|tokens| format!("Bearer {}", tokens.access_token))
    }

    fn unreachable(&self, error: &ureq::Error) -> anyhow::Error {
        let hint = match &self.directory {
            Some(directory) => format!("Check its log, or start it: capsule server --data {}", directory.display()),
            None => "Check the URL, and that the server is running. `capsule server` starts one on this host.".into(),
        };
        Failure::new("unreachable", format!("The server at {} does not answer: {error}.", self.name)).hint(hint).into()
    }

    /// Renews the session with the refresh token, or else with the local token. A session that has ended stays stored
    /// until the user signs in or out; otherwise, the next command would run as the local administrator.
    fn renew_session(&mut self) -> anyhow::Result<()> {
        let _lock = session::lock()?;
        // Another command may have renewed it already, and a refresh token works only once.
        let stored = session::load(&self.session_name)?;
        if let Some(stored) = &stored
            && self.tokens.as_ref().is_some_and(|tokens| tokens.access_token != stored.access_token)
        {
            self.require_same_user(stored)?;
            self.tokens = Some(stored.clone());
            return Ok(());
        }
        if let Some(tokens) = &stored {
            let response =
                self.send("POST", "/auth/refresh", Some(json!({"refresh_token": tokens.refresh_token}).to_string().as_bytes()))?;
            if response.status() != 401 {
                return self.store(check_status(response)?, tokens.by_local_token);
            }
        }
        // Another command may have signed out since this one started.
        let ended = stored.or_else(|| self.tokens.clone());
        match self.local_token.clone() {
            Some(token) if self.local_sign_in.permits(ended.as_ref()) => {
                let response = self.send("POST", "/auth/local", Some(json!({"token": token}).to_string().as_bytes()))?;
                self.store(check_status(response)?, true)
            }
            _ => Err(self.not_signed_in(ended.is_some()).into()),
        }
    }

    fn not_signed_in(&self, session_ended: bool) -> Failure {
        let message = match session_ended {
            true => format!("Your session at {} has ended.", self.name),
            false => format!("You are not signed in to {}.", self.name),
        };
        let local = match self.is_local() {
            true => " Without --email, this signs in as the local administrator.",
            false => "",
        };
        Failure::new(NOT_SIGNED_IN, message).hint(format!("Run `capsule login --server {}`.{local}", self.name))
    }

    /// Fails if this command has sent requests as another user.
    fn require_same_user(&self, next: &Tokens) -> Result<(), Failure> {
        if self.user_id.is_none() || self.user_id == next.user_id {
            return Ok(());
        }
        Err(Failure::new(NOT_SIGNED_IN, format!("Your session at {} has ended: another account signed in.", self.name))
            .hint("Run `capsule whoami` to see the account, then run the command again."))
    }

    /// Opens a session by signing in or registering.
    pub fn open_session(&mut self, path: &str, body: &Value) -> anyhow::Result<()> {
        let _lock = session::lock()?;
        let response = self.send("POST", path, Some(body.to_string().as_bytes()))?;
        self.user_id = None;
        self.store(check_status(response)?, false)
    }

    fn store(&mut self, mut response: Response<Body>, by_local_token: bool) -> anyhow::Result<()> {
        let session: Value = serde_json::from_str(&response.body_mut().read_to_string()?)
            .context("invalid response of the server; it may be of another version")?;
        let user_id = session["user"]["id"].as_str().map(str::to_owned);
        let tokens: Tokens =
            serde_json::from_value(session).context("invalid response of the server; it may be of another version")?;
        let tokens = Tokens { insecure_http: self.insecure_http, by_local_token, user_id, ..tokens };
        self.require_same_user(&tokens)?;
        session::store(&self.session_name, &tokens)?;
        self.tokens = Some(tokens);
        Ok(())
    }

    /// Ends the session on the server and removes it here.
    pub fn sign_out(&mut self) -> anyhow::Result<()> {
        let _lock = session::lock()?;
        let response = self.tokens.is_some().then(|| self.send("POST", "/auth/logout", Some(b"{}")));
        session::remove(&self.session_name)?;
        self.tokens = None;
        // With an expired token, there is no session to end.
        match response {
            Some(Ok(response)) if response.status() != 401 => check_status(response).map(|_| ()),
            Some(Err(error)) => Err(error.context("Signed out here, but the session on the server is still open")),
            _ => Ok(()),
        }
    }
}

/// The HTTP agent. It does not follow redirects: they could send a password or a session to another server, or
/// unencrypted.
fn agent(is_https: bool, through_proxies: bool) -> Agent {
    let mut config = Agent::config_builder()
        .http_status_as_error(false)
        .timeout_connect(Some(Duration::from_secs(10)))
        .max_redirects(0)
        .https_only(is_https);
    if !through_proxies {
        config = config.proxy(None);
    }
    config.build().into()
}

/// Returns a successful response, and turns others into errors.
fn check_status(mut response: Response<Body>) -> anyhow::Result<Response<Body>> {
    if response.status().is_success() {
        return Ok(response);
    }
    let status = response.status();
    if status.is_redirection() {
        let to = response.headers().get("location").and_then(|to| to.to_str().ok()).unwrap_or("another address");
        return Err(Failure::new("redirected", format!("The server redirects to {to}. The redirect was not followed."))
            .hint("If that is your server, use it with --server URL.")
            .into());
    }
    let text = response.body_mut().read_to_string().unwrap_or_default();
    match serde_json::from_str::<Problem>(&text) {
        Ok(problem) => Err(Refused(problem).into()),
        Err(_) => bail!("Unexpected response {status}. Check that the URL is that of a Capsule server."),
    }
}

#[cfg(test)]
mod tests {
    use super::{Client, LocalSignIn, NOT_SIGNED_IN, Tokens, agent, is_final};

    fn tokens(by_local_token: bool) -> Tokens {
        Tokens {
            access_token: "a".into(),
            refresh_token: "b".into(),
            insecure_http: false,
            by_local_token,
            user_id: Some("ada".into()),
        }
    }

    fn client(tokens: Option<Tokens>) -> Client {
        Client {
            agent: agent(false, false),
            server: "http://127.0.0.1:8080".into(),
            name: "http://localhost:8080".into(),
            session_name: "http://localhost:8080".into(),
            tokens,
            user_id: None,
            local_token: Some("the local token".into()),
            local_sign_in: LocalSignIn::Automatic,
            directory: None,
            insecure_http: false,
        }
    }

    #[test]
    fn the_local_token_does_not_replace_a_users_session_automatically() {
        let (local, user) = (tokens(true), tokens(false));
        assert!(LocalSignIn::Automatic.permits(None) && LocalSignIn::Automatic.permits(Some(&local)));
        assert!(!LocalSignIn::Automatic.permits(Some(&user)));
        assert!(LocalSignIn::Requested.permits(Some(&user)));
        assert!(!LocalSignIn::Never.permits(None) && !LocalSignIn::Never.permits(Some(&local)));
    }

    #[test]
    fn the_local_token_replaces_the_password_only_in_a_session_that_it_opened() {
        assert_eq!(client(Some(tokens(true))).password_substitute(), Some("the local token"));
        assert_eq!(client(Some(tokens(false))).password_substitute(), None);
        assert_eq!(client(None).password_substitute(), None);
    }

    #[test]
    fn a_command_does_not_continue_as_another_user() {
        let mut client = client(Some(tokens(false)));
        client.require_same_user(&tokens(true)).expect("nothing was done yet");
        client.user_id = Some("ada".into());
        client.require_same_user(&tokens(true)).expect("the same user");
        let other = Tokens { user_id: Some("bob".into()), ..tokens(true) };
        let refused = client.require_same_user(&other).expect_err("another user");
        assert_eq!(refused.code, NOT_SIGNED_IN);
        assert!(is_final(&anyhow::Error::from(refused)));
    }

    #[test]
    fn the_error_of_an_ended_session_has_the_command_to_sign_in() {
        let ended = client(None).not_signed_in(true).to_string();
        assert!(ended.starts_with("Your session at http://localhost:8080 has ended."), "{ended}");
        assert!(ended.contains("Run `capsule login --server http://localhost:8080`."), "{ended}");
    }
}
