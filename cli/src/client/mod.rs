//! The API as the commands call it. Signs in again by itself where it can.

mod local;
mod session;

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use capsule_contracts::Problem;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use ureq::http::Response;
use ureq::{Agent, Body, SendBody};

use session::Tokens;

/// A server, and who we are there.
pub struct Client {
    agent: Agent,
    /// The server's base URL, without a slash at its end.
    server: String,
    /// Kept under this name; the same as `server`, but for a local server.
    name: String,
    tokens: Option<Tokens>,
    local_token: Option<String>,
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

impl Client {
    /// The server that was named, or the one of this host's data directory, or the one signed in to
    /// last.
    pub fn find(server: Option<&str>, data: &Path) -> anyhow::Result<Self> {
        let agent: Agent =
            Agent::config_builder().http_status_as_error(false).timeout_connect(Some(Duration::from_secs(10))).build().into();
        if let Some(server) = server {
            let server = normal(server)?;
            let local = local::find(data).filter(|local| local.url == server || local.address == server);
            let (address, local_token) = match local {
                Some(local) => (local.address, Some(local.token)),
                None => (server.clone(), None),
            };
            return Ok(Self { agent, tokens: session::load(&server)?, server: address, name: server, local_token });
        }
        if let Some(local) = local::find(data) {
            let tokens = session::load(&local.url)?;
            return Ok(Self { agent, server: local.address, name: local.url, tokens, local_token: Some(local.token) });
        }
        match session::last()? {
            Some((name, tokens)) => Ok(Self { agent, server: name.clone(), name, tokens: Some(tokens), local_token: None }),
            None => bail!(
                "no server runs with the data directory {}, and you are signed in nowhere\n\
                 Start a server with `capsule server`, or sign in to one with `capsule login --server URL`",
                data.display()
            ),
        }
    }

    /// The server's URL, for people.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the server is of this host and can be signed in to without a password.
    pub fn is_local(&self) -> bool {
        self.local_token.is_some()
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
            Some(body) => self.agent.run(request.header("content-type", "application/json").body(body)?),
            None => self.agent.run(request.body(())?),
        };
        sent.map_err(|error| self.unreachable(&error))
    }

    fn authorization(&self) -> Option<String> {
        self.tokens.as_ref().map(|tokens| format!("Bearer {}", tokens.access_token))
    }

    fn unreachable(&self, error: &ureq::Error) -> anyhow::Error {
        anyhow!("the server at {} does not answer: {error}", self.name)
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
            None => bail!("you are not signed in to {0}\nSign in with `capsule login --server {0}`", self.name),
        }
    }

    /// Signs in with a password, or makes an account.
    pub fn enter(&mut self, path: &str, body: &Value) -> anyhow::Result<()> {
        let _turn = session::lock()?;
        let response = self.send("POST", path, Some(body.to_string().as_bytes()))?;
        self.keep(accepted(response)?)
    }

    fn keep(&mut self, mut response: Response<Body>) -> anyhow::Result<()> {
        let tokens: Tokens =
            serde_json::from_str(&response.body_mut().read_to_string()?).context("the server's answer is unknown")?;
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

fn normal(server: &str) -> anyhow::Result<String> {
    let server = server.trim_end_matches('/');
    let server = if server.contains("://") { server.to_owned() } else { format!("http://{server}") };
    let uri: ureq::http::Uri = server.parse().with_context(|| format!("`{server}` is no URL"))?;
    match (uri.scheme_str(), uri.host(), uri.path()) {
        (Some("http" | "https"), Some(_), "/" | "") => Ok(server),
        _ => bail!("`{server}` is no server's URL; give one such as https://capsule.example.com"),
    }
}

/// A refusal is an error.
fn accepted(mut response: Response<Body>) -> anyhow::Result<Response<Body>> {
    if response.status().is_success() {
        return Ok(response);
    }
    let status = response.status();
    let text = response.body_mut().read_to_string().unwrap_or_default();
    match serde_json::from_str::<Problem>(&text) {
        Ok(problem) => Err(Refused(problem).into()),
        Err(_) => bail!("the server answered with {status}; is it a Capsule server?"),
    }
}
