//! How a message looks between processes: sealed, so that a broker and whoever else can reach it neither
//! reads nor makes one. Being on the broker proves nothing; the key, which only processes of one
//! installation have, does.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use capsule_contracts::{EventEnvelope, Problem, Uuid};
use capsule_store::{DerivedKey, Keyring};
use serde::{Deserialize, Serialize};

use crate::Reply;
use crate::context::{Command, Context, Principal};
use crate::transport::{Published, Refusal};

/// What travels before a message's body.
#[derive(Serialize, Deserialize)]
struct Head {
    /// Ties the reply to the request.
    id: Uuid,
    subject: String,
    correlation_id: String,
    traceparent: Option<String>,
    principal: Sender,
    /// Microseconds since the epoch.
    deadline: u64,
    command: Option<Command>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Sender {
    Anonymous,
    User { id: Uuid, session: Uuid, platform_admin: bool },
    Service(String),
}

/// Seals and opens what goes over a transport.
#[derive(Clone, Debug)]
pub struct Wire {
    key: DerivedKey,
}

/// A request as it arrived.
pub struct Incoming {
    pub id: Uuid,
    pub subject: String,
    pub context: Context,
    pub payload: Vec<u8>,
}

impl Wire {
    pub fn new(keyring: &Keyring) -> Self {
        Self { key: keyring.derive("bus") }
    }

    /// A request, and the id that its reply will be sealed for.
    pub fn request(&self, context: &Context, subject: &str, payload: &[u8]) -> Result<(Uuid, Vec<u8>), Problem> {
        let id = capsule_contracts::new_id();
        let remaining = context.deadline.saturating_duration_since(Instant::now());
        let head = Head {
            id,
            subject: subject.into(),
            correlation_id: context.correlation_id.clone(),
            traceparent: context.traceparent.clone(),
            principal: match context.principal {
                Principal::Anonymous => Sender::Anonymous,
                Principal::User { id, session, platform_admin } => Sender::User { id, session, platform_admin },
                Principal::Service(name) => Sender::Service(name.into()),
            },
            deadline: now().saturating_add(u64::try_from(remaining.as_micros()).unwrap_or(u64::MAX)),
            command: context.command.clone(),
        };
        let head = serde_json::to_vec(&head).map_err(|_| Problem::internal())?;
        let length = u32::try_from(head.len()).map_err(|_| Problem::internal())?.to_be_bytes();
        Ok((id, self.key.seal("request", &[&length, head.as_slice(), payload].concat())?))
    }

    /// What a request says, if a process of this installation made it.
    pub fn open_request(&self, sealed: &[u8]) -> Option<Incoming> {
        let open = self.key.open("request", sealed)?;
        let (length, rest) = open.split_first_chunk::<4>()?;
        let (head, payload) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
        let head: Head = serde_json::from_slice(head).ok()?;
        let remaining = std::time::Duration::from_micros(head.deadline.saturating_sub(now()));
        let principal = match head.principal {
            Sender::Anonymous => Principal::Anonymous,
            Sender::User { id, session, platform_admin } => Principal::User { id, session, platform_admin },
            Sender::Service(_) => Principal::Service("another process"),
        };
        let context = Context {
            correlation_id: head.correlation_id,
            traceparent: head.traceparent,
            principal,
            deadline: Instant::now() + remaining,
            command: head.command,
        };
        Some(Incoming { id: head.id, subject: head.subject, context, payload: payload.to_vec() })
    }

    /// A reply to the request of this id.
    pub fn reply(&self, id: Uuid, reply: &Reply) -> Result<Vec<u8>, Problem> {
        let body = match reply {
            Ok(payload) => [b"+", payload.as_slice()].concat(),
            Err(problem) => [b"-".as_slice(), &serde_json::to_vec(problem).map_err(|_| Problem::internal())?].concat(),
        };
        self.key.seal(&format!("reply/{id}"), &body)
    }

    /// What the reply to the request of this id says.
    pub fn open_reply(&self, id: Uuid, sealed: &[u8]) -> Reply {
        let damaged = || {
            tracing::error!("a reply does not open: another installation's, or another master key");
            Problem::unavailable("The service answered with something that is not understood.")
        };
        match self.key.open(&format!("reply/{id}"), sealed).as_deref().and_then(<[u8]>::split_first) {
            Some((b'+', payload)) => Ok(payload.to_vec()),
            Some((_, problem)) => Err(serde_json::from_slice(problem).map_err(|_| damaged())?),
            None => Err(damaged()),
        }
    }

    /// An item of a stream, by its place in it.
    pub fn item(&self, ticket: &str, place: u64, item: &[u8]) -> Result<Vec<u8>, Problem> {
        self.key.seal(&format!("stream/{ticket}/{place}"), item)
    }

    pub fn open_item(&self, ticket: &str, place: u64, sealed: &[u8]) -> Option<Vec<u8>> {
        self.key.open(&format!("stream/{ticket}/{place}"), sealed)
    }

    /// An event, signed.
    pub fn event(&self, envelope: &EventEnvelope) -> Result<Published, Problem> {
        let body = serde_json::to_vec(envelope).map_err(|_| Problem::internal())?;
        let signature = self.key.sign(&body);
        Ok(Published {
            kind: envelope.kind.clone(),
            key: envelope.partitionkey.unwrap_or(envelope.subject).to_string(),
            body,
            signature,
        })
    }

    /// What an event says, if a process of this installation said it.
    pub fn open_event(&self, body: &[u8], signature: &str) -> Result<EventEnvelope, Refusal> {
        if !self.key.verifies(body, signature) {
            return Err(Refusal::Never(Problem::forbidden("The event's signature does not hold.")));
        }
        serde_json::from_slice(body)
            .map_err(|cause| Refusal::Never(Problem::bad_request(format!("The envelope is not understood: {cause}."))))
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
    fn a_request_arrives_as_it_was_sent_and_only_within_the_installation() {
        let wire = wire();
        let principal = Principal::User { id: Uuid::from_u128(1), session: Uuid::from_u128(2), platform_admin: true };
        let context = Context::new("c-1".into(), principal);
        let (id, sealed) = wire.request(&context, "auth.get_profile", b"{\"secret\":1}").expect("seals");
        assert!(!sealed.windows(6).any(|window| window == b"secret"));
        let arrived = wire.open_request(&sealed).expect("opens");
        assert_eq!((arrived.id, arrived.subject.as_str(), arrived.context.principal), (id, "auth.get_profile", principal));
        assert_eq!(arrived.payload, b"{\"secret\":1}");
        assert!(self::wire().open_request(&sealed).is_none(), "another installation");
    }

    #[test]
    fn a_reply_belongs_to_its_request() {
        let wire = wire();
        let id = Uuid::from_u128(7);
        let sealed = wire.reply(id, &Err(Problem::not_found("thing"))).expect("seals");
        assert_eq!(wire.open_reply(id, &sealed), Err(Problem::not_found("thing")));
        assert_eq!(wire.open_reply(Uuid::from_u128(8), &sealed).expect_err("another's").code, "unavailable");
        let sealed = wire.reply(id, &Ok(b"yes".to_vec())).expect("seals");
        assert_eq!(wire.open_reply(id, &sealed), Ok(b"yes".to_vec()));
    }
}
