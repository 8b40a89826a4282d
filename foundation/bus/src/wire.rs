//! The format of messages between processes. Requests and replies are sealed and events are signed with a key that
//! only the processes of one installation have, so other clients of the broker can neither read nor forge them.
//!
//! While an installation is upgraded, processes of two versions exchange messages. A reader ignores members that it does
//! not know. A change that an older reader cannot ignore gets a new major version, which the older reader refuses. Every
//! version keeps the sealing, the length before the header, and the header's members `version` and `id`. A reply has the
//! version of its request.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use capsule_contracts::message::is_label;
use capsule_contracts::text::truncated;
use capsule_contracts::{EventEnvelope, Permissions, Problem, Uuid};
use capsule_store::{DerivedKey, Keyring};
use serde::{Deserialize, Serialize};

use crate::Reply;
use crate::context::{Command, Context, Principal};
use crate::transport::{OutgoingEvent, Rejection};

/// The version of the format: major and minor.
type Version = (u16, u16);

/// The version that this process writes. It reads every minor version of the same or an older major version.
const VERSION: Version = (1, 1);

/// The version of requests without one.
fn first_version() -> Version {
    (1, 0)
}

/// The major version of the envelope of events (`CloudEvents`).
const EVENT_VERSION: &str = "1";

/// The header before a request's payload.
#[derive(Serialize, Deserialize)]
struct RequestHeader {
    #[serde(default = "first_version")]
    version: Version,
    /// The reply is sealed for this id.
    id: Uuid,
    subject: String,
    correlation_id: String,
    traceparent: Option<String>,
    principal: SenderPrincipal,
    /// Microseconds since the Unix epoch.
    deadline: u64,
    command: Option<Command>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    if_match: Option<String>,
}

/// The members of a header that every version has.
#[derive(Deserialize)]
struct Preamble {
    #[serde(default = "first_version")]
    version: Version,
    id: Uuid,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum SenderPrincipal {
    Anonymous,
    User { id: Uuid, session: Uuid, platform_admin: bool },
    ApiKey { id: Uuid, owner: Uuid, organization: Uuid, scopes: Permissions },
    Service(String),
}

/// Seals, signs and opens messages.
#[derive(Clone, Debug)]
pub struct Wire {
    key: DerivedKey,
}

/// A received request.
#[derive(Debug)]
pub struct IncomingRequest {
    pub id: Uuid,
    pub subject: String,
    pub context: Context,
    pub payload: Vec<u8>,
}

/// A request of this installation that this process cannot read.
#[derive(Debug)]
pub struct RefusedRequest {
    pub id: Uuid,
    /// The reply.
    pub problem: Problem,
}

impl Wire {
    pub fn new(keyring: &Keyring) -> Self {
        Self { key: keyring.derive("bus") }
    }

    /// Seals a request; also returns the id that its reply will be sealed for.
    pub fn seal_request(&self, context: &Context, subject: &str, payload: &[u8]) -> Result<(Uuid, Vec<u8>), Problem> {
        let id = capsule_contracts::new_id();
        let remaining = context.deadline.saturating_duration_since(Instant::now());
        let header = RequestHeader {
            version: VERSION,
            id,
            subject: subject.into(),
            correlation_id: context.correlation_id.clone(),
            traceparent: context.traceparent.clone(),
            principal: match context.principal {
                Principal::Anonymous => SenderPrincipal::Anonymous,
                Principal::User { id, session, platform_admin } => SenderPrincipal::User { id, session, platform_admin },
                Principal::ApiKey { id, owner, organization, scopes } => {
                    SenderPrincipal::ApiKey { id, owner, organization, scopes }
                }
                Principal::Service(name) => SenderPrincipal::Service(name.into()),
            },
            deadline: now().saturating_add(u64::try_from(remaining.as_micros()).unwrap_or(u64::MAX)),
            command: context.command.clone(),
            if_match: context.if_match.clone(),
        };
        let header = serde_json::to_vec(&header).map_err(|_| Problem::internal())?;
        let length = u32::try_from(header.len()).map_err(|_| Problem::internal())?.to_be_bytes();
        Ok((id, self.key.seal("request", &[&length, header.as_slice(), payload].concat())?))
    }

    /// Opens a request. `None` if it does not come from a process of this installation.
    pub fn open_request(&self, sealed: &[u8]) -> Option<Result<IncomingRequest, RefusedRequest>> {
        let open = self.key.open("request", sealed)?;
        let (length, rest) = open.split_first_chunk::<4>()?;
        let (header, payload) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
        Some(match serde_json::from_slice::<RequestHeader>(header) {
            Ok(header) if header.version.0 <= VERSION.0 => read_request(header, payload),
            Ok(header) => Err(RefusedRequest { id: header.id, problem: newer_version("request", header.version) }),
            Err(cause) => {
                let Preamble { version, id } = serde_json::from_slice(header).ok()?;
                let problem = match version.0 > VERSION.0 {
                    true => newer_version("request", version),
                    false => other_version(format!("The request of another process cannot be read: {cause}.")),
                };
                Err(RefusedRequest { id, problem })
            }
        })
    }

    /// Seals the reply to the request of this id.
    pub fn seal_reply(&self, id: Uuid, reply: &Reply) -> Result<Vec<u8>, Problem> {
        let body = match reply {
            Ok(payload) => [b"+", payload.as_slice()].concat(),
            Err(problem) => [b"-".as_slice(), &serde_json::to_vec(problem).map_err(|_| Problem::internal())?].concat(),
        };
        self.key.seal(&format!("reply/{id}"), &body)
    }

    /// Opens the reply to the request of this id.
    pub fn open_reply(&self, id: Uuid, sealed: &[u8]) -> Reply {
        let unreadable = || {
            tracing::error!("a reply cannot be decrypted: it comes from another installation, or the master keys differ");
            Problem::unavailable("The service returned an unreadable reply.")
        };
        match self.key.open(&format!("reply/{id}"), sealed).as_deref().and_then(<[u8]>::split_first) {
            Some((b'+', payload)) => Ok(payload.to_vec()),
            Some((b'-', problem)) => Err(serde_json::from_slice(problem).map_err(|_| unreadable())?),
            Some(_) => Err(other_version("The reply of another process cannot be read.".into())),
            None => Err(unreadable()),
        }
    }

    /// Seals an item of a stream for its index in the stream.
    pub fn seal_item(&self, ticket: &str, index: u64, item: &[u8]) -> Result<Vec<u8>, Problem> {
        self.key.seal(&format!("stream/{ticket}/{index}"), item)
    }

    /// Opens an item of a stream. `None` if it was not sealed for this index.
    pub fn open_item(&self, ticket: &str, index: u64, sealed: &[u8]) -> Option<Vec<u8>> {
        self.key.open(&format!("stream/{ticket}/{index}"), sealed)
    }

    /// Signs an event.
    pub fn sign_event(&self, envelope: &EventEnvelope) -> Result<OutgoingEvent, Problem> {
        let body = serde_json::to_vec(envelope).map_err(|_| Problem::internal())?;
        let signature = self.key.sign(&body);
        Ok(OutgoingEvent {
            kind: envelope.kind.clone(),
            key: envelope.partitionkey.unwrap_or(envelope.subject).to_string(),
            body,
            signature,
        })
    }

    /// Reads an event and checks its signature.
    pub fn open_event(&self, body: &[u8], signature: &str) -> Result<EventEnvelope, Rejection> {
        if !self.key.verifies(body, signature) {
            return Err(Rejection::Permanent(Problem::forbidden("The event's signature is invalid.")));
        }
        let envelope: EventEnvelope = serde_json::from_slice(body)
            .map_err(|cause| Rejection::Permanent(Problem::bad_request(format!("Invalid event envelope: {cause}."))))?;
        if envelope.specversion.split('.').next() != Some(EVENT_VERSION) {
            return Err(Rejection::Permanent(Problem::bad_request(format!(
                "The event envelope has version {}; this process reads version {EVENT_VERSION}.x. \
                 Run the same version of Capsule in every process of the installation.",
                truncated(envelope.specversion)
            ))));
        }
        Ok(envelope)
    }
}

/// The request of a header that this process can read.
fn read_request(header: RequestHeader, payload: &[u8]) -> Result<IncomingRequest, RefusedRequest> {
    let id = header.id;
    let unknown = || RefusedRequest { id, problem: other_version("The request's sender has an invalid name.".into()) };
    let remaining = std::time::Duration::from_micros(header.deadline.saturating_sub(now()));
    let principal = match header.principal {
        SenderPrincipal::Anonymous => Principal::Anonymous,
        SenderPrincipal::User { id, session, platform_admin } => Principal::User { id, session, platform_admin },
        SenderPrincipal::ApiKey { id, owner, organization, scopes } => Principal::ApiKey { id, owner, organization, scopes },
        SenderPrincipal::Service(name) => Principal::Service(service_name(&name).ok_or_else(unknown)?),
    };
    let context = Context {
        correlation_id: header.correlation_id,
        traceparent: header.traceparent,
        principal,
        deadline: Instant::now() + remaining,
        command: header.command,
        if_match: header.if_match,
    };
    Ok(IncomingRequest { id, subject: header.subject, context, payload: payload.to_vec() })
}

/// The most service names of an installation.
const MAX_SERVICES: usize = 64;

/// The names of other processes' services. They are kept, so that a principal is `Copy`.
static SERVICE_NAMES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());

/// A service's name that lives as long as the process. `None` if the name is invalid.
fn service_name(name: &str) -> Option<&'static str> {
    let mut names = SERVICE_NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = names.get(name) {
        return Some(known);
    }
    if names.len() >= MAX_SERVICES || !is_label(name) {
        return None;
    }
    let name: &'static str = Box::leak(name.to_owned().into_boxed_str());
    names.insert(name);
    Some(name)
}

/// The problem of a message in a newer major version than this process reads.
fn newer_version(what: &str, (major, minor): Version) -> Problem {
    other_version(format!(
        "The {what} has version {major}.{minor} of the format between processes; this process reads versions up to {}.x.",
        VERSION.0
    ))
}

/// A problem that ends once the processes run the same version.
fn other_version(detail: String) -> Problem {
    tracing::error!(detail, "a message of another version of Capsule cannot be read");
    Problem::unavailable(detail).hint("Run the same version of Capsule in every process of the installation.")
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
