//! The API as the commands call it. Signs in again by itself where it can.

mod address;
mod local;
mod session;

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use capsule_contracts::Problem;
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

/// Which server is meant, as the command line and the environment say.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// `--server`
    pub server: Option<String>,
    /// `--data`
    pub data: Option<PathBuf>,
    /// `--insecure-http`
    pub insecure_http: bool,
}

/// A server, and who we are there.
pub struct Client {
    agent: Agent,
    /// The server's base URL, without a slash at its end.
    server: String,
    /// Kept under this name; the same as `server`, but for a local server.
    name: String,
    tokens: Option<Tokens>,
    local_token: Option<String>,
    /// The data directory of a local server.
    directory: Option<PathBuf>,
    /// Sessions may be sent without encryption.
    insecure_http: bool,
}

/// A request that the server refused.
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

/// Whether an error is the server's answer that there is no such thing.
pub fn is_not_found(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Refused>().is_some_and(|refused| refused.0.code == "not_found")
}

/// Whether an error is the server's answer that the act takes the password once more.
pub fn takes_password(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Refused>().is_some_and(|refused| refused.0.code == "reauthentication_required")
}

impl Client {
    /// The server that was named, or else the one of the data directory. Only where neither is given, and no server
    /// runs with this user's data directory, is it the one signed in to last: what was named never falls back.
    pub fn find(choice: &Choice) -> anyhow::Result<Self> {
        let directory = choice.data.clone().unwrap_or_else(data::default_directory);
        let local = local::find(&directory);
        if let Some(server) = &choice.server {
            let address = Address::parse(server)?;
            return match local.filter(|local| local.url == address.url || local.address == address.url) {
                Some(local) => Ok(Self::local(&directory, local, session::load(&address.url)?, Some(address.url))),
                None => Self::remote(&address, session::load(&address.url)?, choice),
            };
        }
        if let Some(local) = local {
            let tokens = session::load(&local.url)?;
            return Ok(Self::local(&directory, local, tokens, None));
        }
        if choice.data.is_some() {
            return Err(local::why_not(&directory).into());
        }
        match session::last()? {
            Some((name, tokens)) => Self::remote(&Address::parse(&name)?, Some(tokens), choice),
            None => Err(Failure::new(
                "no_server",
                format!("No server runs with the data directory {}, and you are not signed in to any.", directory.display()),
            )
            .hint("Start a server with `capsule server`, or sign in to one with `capsule login --server URL`.")
            .into()),
        }
    }

    fn local(directory: &Path, local: local::Local, tokens: Option<Tokens>, name: Option<String>) -> Self {
        Self {
            // What is of this host is reached without a proxy.
            agent: agent(false, false),
            server: local.address,
            name: name.unwrap_or(local.url),
            tokens,
            local_token: Some(local.token),
            directory: Some(directory.into()),
            insecure_http: false,
        }
    }

    fn remote(address: &Address, tokens: Option<Tokens>, choice: &Choice) -> anyhow::Result<Self> {
        // Who signed in this way goes on this way.
        let insecure_http = choice.insecure_http || tokens.as_ref().is_some_and(|tokens| tokens.insecure_http);
        address.permit(insecure_http)?;
        if address.is_in_clear() {
            terminal::warn(&format!(
                "{} is reached without encryption: passwords and sessions can be read on the way.",
                address.url
            ));
        }
        Ok(Self {
            agent: agent(address.is_https, !address.is_loopback),
            server: address.url.clone(),
            name: address.url.clone(),
            tokens,
            local_token: None,
            directory: None,
            insecure_http: address.is_in_clear(),
        })
    }

    /// The server's URL, for people.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the server is of this host and can be signed in to without a password.
    pub fn is_local(&self) -> bool {
        self.local_token.is_some()
    }

    /// The data directory, where the server is of this host.
    pub fn directory(&self) -> Option<&Path> {
        self.directory.as_deref()
    }

    /// The secret that signs the owner of this host's server in, if this is that server.
    pub fn local_token(&self) -> Option<&str> {
        self.local_token.as_deref()
    }

    pub fn get<T: DeserializeOwned>(&mut self, path: &str) -> anyhow::Result<T> {
        self.call("GET", path, None)
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

    /// As [`Client::delete`], with a body: what must not be in an address.
    pub fn delete_with<T: DeserializeOwned>(&mut self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        self.call("DELETE", path, Some(&serde_json::to_vec(body)?))
    }

    fn call<T: DeserializeOwned>(&mut self, method: &str, path: &str, body: Option<&[u8]>) -> anyhow::Result<T> {
        let mut response = self.signed_in(|client| client.send(method, path, body))?;
        let text =
            response.body_mut().with_config().limit(64 << 20).read_to_string().context("the server's answer was cut short")?;
        serde_json::from_str(&text)
            .with_context(|| format!("the server at {} answered {method} {path} in an unknown way", self.name))
    }

    /// The items of a stream, one by one as they come.
    pub fn stream<T: DeserializeOwned>(
        &mut self,
        path: &str,
    ) -> anyhow::Result<impl Iterator<Item = anyhow::Result<T>> + use<T>> {
        let response = self.signed_in(|client| client.send("GET", path, None))?;
        let lines = BufReader::new(response.into_body().into_reader()).lines();
        Ok(lines.map(|line| Ok(serde_json::from_str(&line.context("the connection to the server was lost")?)?)))
    }

    /// Sends an archive of `length` bytes. `open` opens it anew for every attempt.
    pub fn upload<T: DeserializeOwned, R: Read>(
        &mut self,
        path: &str,
        length: u64,
        open: impl Fn() -> std::io::Result<R>,
    ) -> anyhow::Result<T> {
        // Signing in again in the middle of an upload would waste it: settle that before.
        let _: Value = self.get("/auth/me")?;
        let mut reader = open()?;
        let request = self
            .agent
            .post(format!("{}/api/v1{path}", self.server))
            .header("content-type", "application/gzip")
            .header("content-length", length.to_string())
            .header("authorization", self.authorization().unwrap_or_default());
        let response = request.send(SendBody::from_reader(&mut reader)).map_err(|error| self.unreachable(&error))?;
        let mut response = accepted(response)?;
        Ok(serde_json::from_str(&response.body_mut().read_to_string()?)?)
    }

    /// Sends a request; signs in or anew where it must and can.
    fn signed_in(&mut self, send: impl Fn(&Self) -> anyhow::Result<Response<Body>>) -> anyhow::Result<Response<Body>> {
        if self.tokens.is_none() {
            self.sign_in_again()?;
        }
        let response = send(self)?;
        if response.status() != 401 {
            return accepted(response);
        }
        self.sign_in_again()?;
        accepted(send(self)?)
    }

    fn send(&self, method: &str, path: &str, body: Option<&[u8]>) -> anyhow::Result<Response<Body>> {
        let url = format!("{}/api/v1{path}", self.server);
        let mut request = ureq::http::Request::builder().method(method).uri(url);
        if let Some(authorization) = self.authorization() {
            request = request.header("authorization", authorization);
        }
        let sent = match body {
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
        sent.map_err(|error| self.unreachable(&error))
    }

    fn authorization(&self) -> Option<String> {
        self.tokens.as_ref().map(|tokens| format!("Bearer {}", tokens.access_token))
    }

    fn unreachable(&self, error: &ureq::Error) -> anyhow::Error {
        let hint = match &self.directory {
            Some(directory) => format!("Look into its log, or start it: capsule server --data {}", directory.display()),
            None => "Check the URL and whether the server runs; a server of this host is started by `capsule server`.".into(),
        };
        Failure::new("unreachable", format!("The server at {} does not answer: {error}.", self.name)).hint(hint).into()
    }

    /// Exchanges the refresh token, or else uses the local one.
    fn sign_in_again(&mut self) -> anyhow::Result<()> {
        let _turn = session::lock()?;
        // Another command may have been faster, and a refresh token works only once.
        let kept = session::load(&self.name)?;
        if let Some(kept) = &kept
            && self.tokens.as_ref().is_some_and(|tokens| tokens.access_token != kept.access_token)
        {
            self.tokens = Some(kept.clone());
            return Ok(());
        }
        if let Some(tokens) = kept {
            let response =
                self.send("POST", "/auth/refresh", Some(json!({"refresh_token": tokens.refresh_token}).to_string().as_bytes()))?;
            if response.status().is_success() {
                return self.keep(response);
            }
            session::forget(&self.name)?;
        }
        match self.local_token.clone() {
            Some(token) => {
                let response = self.send("POST", "/auth/local", Some(json!({"token": token}).to_string().as_bytes()))?;
                self.keep(accepted(response)?)
            }
            None => Err(Failure::new("not_signed_in", format!("You are not signed in to {}.", self.name))
                .hint(format!("Sign in with `capsule login --server {}`.", self.name))
                .into()),
        }
    }

    /// Signs in with a password, or makes an account.
    pub fn enter(&mut self, path: &str, body: &Value) -> anyhow::Result<()> {
        let _turn = session::lock()?;
        let response = self.send("POST", path, Some(body.to_string().as_bytes()))?;
        self.keep(accepted(response)?)
    }

    /// Forgets a session that the server has ended.
    pub fn forget(&mut self) -> anyhow::Result<()> {
        let _turn = session::lock()?;
        self.tokens = None;
        session::forget(&self.name)
    }

    fn keep(&mut self, mut response: Response<Body>) -> anyhow::Result<()> {
        let mut tokens: Tokens =
            serde_json::from_str(&response.body_mut().read_to_string()?).context("the server's answer is unknown")?;
        tokens.insecure_http = self.insecure_http;
        session::keep(&self.name, &tokens)?;
        self.tokens = Some(tokens);
        Ok(())
    }

    /// Ends the session, there and here.
    pub fn leave(&mut self) -> anyhow::Result<()> {
        let _turn = session::lock()?;
        let told = self.tokens.is_some().then(|| self.send("POST", "/auth/logout", Some(b"{}")));
        session::forget(&self.name)?;
        self.tokens = None;
        // An expired token has nothing to end.
        match told {
            Some(Ok(response)) if response.status() != 401 => accepted(response).map(|_| ()),
            Some(Err(error)) => Err(error.context("signed out here, but the server could not be told")),
            _ => Ok(()),
        }
    }
}

/// How servers are reached. Redirects are not followed: they could lead a password or a session elsewhere, or to
/// where it is read on the way.
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

/// A refusal is an error.
fn accepted(mut response: Response<Body>) -> anyhow::Result<Response<Body>> {
    if response.status().is_success() {
        return Ok(response);
    }
    let status = response.status();
    if status.is_redirection() {
        let to = response.headers().get("location").and_then(|to| to.to_str().ok()).unwrap_or("another address");
        return Err(Failure::new("redirected", format!("The server redirects to {to}. Nothing was sent there."))
            .hint("If that is your server, name it with --server URL.")
            .into());
    }
    let text = response.body_mut().read_to_string().unwrap_or_default();
    match serde_json::from_str::<Problem>(&text) {
        Ok(problem) => Err(Refused(problem).into()),
        Err(_) => bail!("The server answered with {status}. Is it a Capsule server?"),
    }
}
