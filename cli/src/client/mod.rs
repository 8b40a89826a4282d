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

const NOT_SIGNED_IN: &str = "not_signed_in";

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
    /// For people; the same as `server`, but for a local server.
    name: String,
    /// The name under which the session is kept.
    kept_as: String,
    tokens: Option<Tokens>,
    /// Whose session the server has accepted during this command.
    acted_as: Option<String>,
    local_token: Option<String>,
    local_sign_in: LocalSignIn,
    /// The data directory of a local server.
    directory: Option<PathBuf>,
    /// Sessions may be sent without encryption.
    insecure_http: bool,
}

/// When the local token may open a session. It does so as the local administrator, whoever was signed in before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LocalSignIn {
    /// Where there was no session, or the local token had opened it.
    Unasked,
    /// In place of any session that has ended: the person signs in.
    Asked,
    Never,
}

impl LocalSignIn {
    /// Whether the local token may open a session after `ended`.
    fn permits(self, ended: Option<&Tokens>) -> bool {
        match self {
            Self::Unasked => ended.is_none_or(|tokens| tokens.by_local_token),
            Self::Asked => true,
            Self::Never => false,
        }
    }
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

/// Whether to wait for the server is in vain: it has answered, or the session has ended.
pub fn is_final(error: &anyhow::Error) -> bool {
    error.is::<Refused>() || error.downcast_ref::<Failure>().is_some_and(|failure| failure.code == NOT_SIGNED_IN)
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
                Some(local) => Self::local(&directory, local, Some(address.url)),
                None => Self::remote(&address, session::load(&address.url)?, choice),
            };
        }
        if let Some(local) = local {
            return Self::local(&directory, local, None);
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

    fn local(directory: &Path, local: local::Local, named: Option<String>) -> anyhow::Result<Self> {
        let name = named.unwrap_or_else(|| local.url.clone());
        // Whoever signed in under another of its names is signed in: the local token does not take their place.
        let (mut kept_as, mut tokens) = (name.clone(), None);
        for known in [&name, &local.url, &local.address] {
            tokens = session::load(known)?;
            if tokens.is_some() {
                kept_as.clone_from(known);
                break;
            }
        }
        Ok(Self {
            // What is of this host is reached without a proxy.
            agent: agent(false, false),
            server: local.address,
            name,
            kept_as,
            tokens,
            acted_as: None,
            local_token: Some(local.token),
            local_sign_in: LocalSignIn::Unasked,
            directory: Some(directory.into()),
            insecure_http: false,
        })
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
            kept_as: address.url.clone(),
            tokens,
            acted_as: None,
            local_token: None,
            local_sign_in: LocalSignIn::Never,
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

    /// What stands for the password: the local token, in a session that it has opened.
    pub fn password_substitute(&self) -> Option<&str> {
        self.local_token().filter(|_| self.tokens.as_ref().is_some_and(|tokens| tokens.by_local_token))
    }

    /// The person signs in: where their session has ended, the local token opens another, whatever opened that one.
    pub fn sign_in_locally(&mut self) {
        self.local_sign_in = LocalSignIn::Asked;
    }

    /// Only a session that the person has counts: the local token opens none.
    pub fn require_session(&mut self) {
        self.local_sign_in = LocalSignIn::Never;
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
        let mut response = send(self)?;
        if response.status() == 401 {
            self.sign_in_again()?;
            response = send(self)?;
        }
        if response.status() != 401 {
            self.acted_as = self.tokens.as_ref().and_then(|tokens| tokens.user_id.clone());
        }
        accepted(response)
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

    /// Exchanges the refresh token, or else uses the local one. A session that has ended stays kept until the person
    /// signs in anew or out: without it, the next command would be the local administrator's.
    fn sign_in_again(&mut self) -> anyhow::Result<()> {
        let _turn = session::lock()?;
        // Another command may have been faster, and a refresh token works only once.
        let kept = session::load(&self.kept_as)?;
        if let Some(kept) = &kept
            && self.tokens.as_ref().is_some_and(|tokens| tokens.access_token != kept.access_token)
        {
            self.require_same_user(kept)?;
            self.tokens = Some(kept.clone());
            return Ok(());
        }
        if let Some(tokens) = &kept {
            let response =
                self.send("POST", "/auth/refresh", Some(json!({"refresh_token": tokens.refresh_token}).to_string().as_bytes()))?;
            if response.status() != 401 {
                return self.keep(accepted(response)?, tokens.by_local_token);
            }
        }
        // Another command may have signed out: this one began in that session.
        let ended = kept.or_else(|| self.tokens.clone());
        match self.local_token.clone() {
            Some(token) if self.local_sign_in.permits(ended.as_ref()) => {
                let response = self.send("POST", "/auth/local", Some(json!({"token": token}).to_string().as_bytes()))?;
                self.keep(accepted(response)?, true)
            }
            _ => Err(self.not_signed_in(ended.is_some()).into()),
        }
    }

    fn not_signed_in(&self, has_ended: bool) -> Failure {
        let message = match has_ended {
            true => format!("Your session at {} has ended.", self.name),
            false => format!("You are not signed in to {}.", self.name),
        };
        let local = match self.is_local() {
            true => " Without --email, it signs in as the local administrator.",
            false => "",
        };
        Failure::new(NOT_SIGNED_IN, message).hint(format!("Run `capsule login --server {}`.{local}", self.name))
    }

    /// A command that has acted as one user does not go on as another.
    fn require_same_user(&self, next: &Tokens) -> Result<(), Failure> {
        if self.acted_as.is_none() || self.acted_as == next.user_id {
            return Ok(());
        }
        Err(Failure::new(NOT_SIGNED_IN, format!("Your session at {} has ended: another account has signed in.", self.name))
            .hint("Check with `capsule whoami` who is signed in, and run the command again."))
    }

    /// Signs in with a password, or makes an account.
    pub fn enter(&mut self, path: &str, body: &Value) -> anyhow::Result<()> {
        let _turn = session::lock()?;
        let response = self.send("POST", path, Some(body.to_string().as_bytes()))?;
        self.acted_as = None;
        self.keep(accepted(response)?, false)
    }

    fn keep(&mut self, mut response: Response<Body>, by_local_token: bool) -> anyhow::Result<()> {
        let session: Value =
            serde_json::from_str(&response.body_mut().read_to_string()?).context("the server's answer is unknown")?;
        let user_id = session["user"]["id"].as_str().map(str::to_owned);
        let tokens: Tokens = serde_json::from_value(session).context("the server's answer is unknown")?;
        let tokens = Tokens { insecure_http: self.insecure_http, by_local_token, user_id, ..tokens };
        self.require_same_user(&tokens)?;
        session::keep(&self.kept_as, &tokens)?;
        self.tokens = Some(tokens);
        Ok(())
    }

    /// Ends the session, there and here.
    pub fn leave(&mut self) -> anyhow::Result<()> {
        let _turn = session::lock()?;
        let told = self.tokens.is_some().then(|| self.send("POST", "/auth/logout", Some(b"{}")));
        session::forget(&self.kept_as)?;
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
            kept_as: "http://localhost:8080".into(),
            tokens,
            acted_as: None,
            local_token: Some("the local token".into()),
            local_sign_in: LocalSignIn::Unasked,
            directory: None,
            insecure_http: false,
        }
    }

    #[test]
    fn the_local_token_does_not_take_the_place_of_a_person_by_itself() {
        let (local, person) = (tokens(true), tokens(false));
        assert!(LocalSignIn::Unasked.permits(None) && LocalSignIn::Unasked.permits(Some(&local)));
        assert!(!LocalSignIn::Unasked.permits(Some(&person)));
        assert!(LocalSignIn::Asked.permits(Some(&person)));
        assert!(!LocalSignIn::Never.permits(None) && !LocalSignIn::Never.permits(Some(&local)));
    }

    #[test]
    fn the_local_token_stands_for_the_password_only_in_a_session_that_it_opened() {
        assert_eq!(client(Some(tokens(true))).password_substitute(), Some("the local token"));
        assert_eq!(client(Some(tokens(false))).password_substitute(), None);
        assert_eq!(client(None).password_substitute(), None);
    }

    #[test]
    fn a_command_does_not_go_on_as_another_user() {
        let mut client = client(Some(tokens(false)));
        client.require_same_user(&tokens(true)).expect("nothing was done yet");
        client.acted_as = Some("ada".into());
        client.require_same_user(&tokens(true)).expect("the same user");
        let other = Tokens { user_id: Some("bob".into()), ..tokens(true) };
        let refused = client.require_same_user(&other).expect_err("another user");
        assert_eq!(refused.code, NOT_SIGNED_IN);
        assert!(is_final(&anyhow::Error::from(refused)));
    }

    #[test]
    fn whoever_is_not_signed_in_is_told_how_to() {
        let ended = client(None).not_signed_in(true).to_string();
        assert!(ended.starts_with("Your session at http://localhost:8080 has ended."), "{ended}");
        assert!(ended.contains("Run `capsule login --server http://localhost:8080`."), "{ended}");
    }
}
