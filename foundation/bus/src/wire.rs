//! The format of messages between processes. Requests and replies are sealed and events are signed with a key that
//! only the processes of one installation have, so other clients of the broker can neither read nor forge them.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use capsule_contracts::{EventEnvelope, Problem, Uuid};
use capsule_store::{DerivedKey, Keyring};
use serde::{Deserialize, Serialize};

use crate::Reply;
use crate::context::{Command, Context, Principal};
use crate::transport::{OutgoingEvent, Rejection};

/// The header before a request's payload.
#[derive(Serialize, Deserialize)]
struct RequestHeader {
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

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum SenderPrincipal {
    Anonymous,
    User { id: Uuid, session: Uuid, platform_admin: bool },
    Service(String),
}

/// Seals, signs and opens messages.
#[derive(Clone, Debug)]
pub struct Wire {
    key: DerivedKey,
}

/// A received request.
pub struct IncomingRequest {
    pub id: Uuid,
    pub subject: String,
    pub context: Context,
    pub payload: Vec<u8>,
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
            id,
            subject: subject.into(),
            correlation_id: context.correlation_id.clone(),
            traceparent: context.traceparent.clone(),
            principal: match context.principal {
                Principal::Anonymous => SenderPrincipal::Anonymous,
                Principal::User { id, session, platform_admin } => SenderPrincipal::User { id, session, platform_admin },
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
    pub fn open_request(&self, sealed: &[u8]) -> Option<IncomingRequest> {
        let open = self.key.open("request", sealed)?;
        let (length, rest) = open.split_first_chunk::<4>()?;
        let (header, payload) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
        let header: RequestHeader = serde_json::from_slice(header).ok()?;
        let remaining = std::time::Duration::from_micros(header.deadline.saturating_sub(now()));
        let principal = match header.principal {
            SenderPrincipal::Anonymous => Principal::Anonymous,
            SenderPrincipal::User { id, session, platform_admin } => Principal::User { id, session, platform_admin },
            SenderPrincipal::Service(_) => Principal::Service("another process"),
        };
        let context = Context {
            correlation_id: header.correlation_id,
            traceparent: header.traceparent,
            principal,
            deadline: Instant::now() + remaining,
            command: header.command,
            if_match: header.if_match,
        };
        Some(IncomingRequest { id: header.id, subject: header.subject, context, payload: payload.to_vec() })
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
            Some((_, problem)) => Err(serde_json::from_slice(problem).map_err(|_| unreadable())?),
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
        serde_json::from_slice(body)
            .map_err(|cause| Rejection::Permanent(Problem::bad_request(format!("Invalid event envelope: {cause}."))))
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::Wire;
    use crate::context::{Context, Principal};
    use capsule_contracts::{Problem, Uuid};
    use capsule_store::Keyring;

    fn wire() -> Wire {
        let folder = tempfile::tempdir().expect("a folder");
        Wire::new(&Keyring::open(&folder.path().join("key")).expect("a key"))
    }

    #[test]
    fn a_request_is_readable_only_within_the_installation() {
        let wire = wire();
        let principal = Principal::User { id: Uuid::from_u128(1), session: Uuid::from_u128(2), platform_admin: true };
        let context = Context::new("c-1".into(), principal);
        let (id, sealed) = wire.seal_request(&context, "auth.get_profile", b"{\"secret\":1}").expect("seals");
        assert!(!sealed.windows(6).any(|window| window == b"secret"));
        let received = wire.open_request(&sealed).expect("opens");
        assert_eq!((received.id, received.subject.as_str(), received.context.principal), (id, "auth.get_profile", principal));
        assert_eq!(received.payload, b"{\"secret\":1}");
        assert!(self::wire().open_request(&sealed).is_none(), "another installation");
    }

    #[test]
    fn a_reply_opens_only_for_its_request() {
        let wire = wire();
        let id = Uuid::from_u128(7);
        let sealed = wire.seal_reply(id, &Err(Problem::not_found("thing"))).expect("seals");
        assert_eq!(wire.open_reply(id, &sealed), Err(Problem::not_found("thing")));
        assert_eq!(wire.open_reply(Uuid::from_u128(8), &sealed).expect_err("another's").code, "unavailable");
        let sealed = wire.seal_reply(id, &Ok(b"yes".to_vec())).expect("seals");
        assert_eq!(wire.open_reply(id, &sealed), Ok(b"yes".to_vec()));
    }
}
