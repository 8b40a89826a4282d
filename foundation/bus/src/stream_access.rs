//! Ends open streams when their reader loses access. While streams are open, one task of the process periodically
//! requests the live sessions from the identity service and the roles from the organization service, for all
//! streams at once. It ends with the last stream.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use capsule_contracts::identity::{CheckSessions, LiveSessions};
use capsule_contracts::organization::{GetMembership, GetMemberships};
use capsule_contracts::{Message, Problem, Role, Uuid};
use tokio::sync::oneshot;

use crate::Bus;
use crate::access::Condition;
use crate::context::{Context, Principal};

/// How often access to open streams is checked; a stream ends within a second of its loss.
const CHECK_PERIOD: Duration = Duration::from_millis(400);
/// How long the check waits for each service.
const CHECK_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a stream stays open while its access cannot be confirmed.
const CONFIRMATION_LEASE: Duration = Duration::from_secs(60);

/// The open streams of this process.
#[derive(Debug, Default)]
pub struct StreamAccess {
    open: Mutex<OpenStreams>,
}

#[derive(Debug, Default)]
struct OpenStreams {
    next_id: u64,
    streams: HashMap<u64, Stream>,
    /// Whether the checking task runs.
    checking: bool,
}

#[derive(Debug)]
struct Stream {
    user: Uuid,
    /// `None` for an API key.
    session: Option<Uuid>,
    condition: Condition,
    /// When access was last confirmed.
    confirmed: Instant,
    /// Dropped to end the stream.
    _alive: oneshot::Sender<()>,
}

/// An open stream, whose access is checked until this is dropped.
#[derive(Debug)]
pub struct CheckedStream {
    access: Arc<StreamAccess>,
    id: u64,
    ended: oneshot::Receiver<()>,
}

impl CheckedStream {
    /// Resolves when the reader loses access to the stream.
    pub async fn access_lost(&mut self) {
        let _ = (&mut self.ended).await;
    }
}

impl Drop for CheckedStream {
    fn drop(&mut self) {
        self.access.open().streams.remove(&self.id);
    }
}

impl StreamAccess {
    fn open(&self) -> MutexGuard<'_, OpenStreams> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks `condition` for the principal of `context` until the result is dropped. `None` where there is nothing to
    /// check.
    pub fn begin(bus: &Bus, context: &Context, condition: Condition) -> Option<CheckedStream> {
        let (user, session) = match context.principal {
            Principal::User { id, session, .. } => (id, Some(session)),
            Principal::ApiKey { owner, .. } => (owner, None),
            Principal::Anonymous | Principal::Service(_) => return None,
        };
        if condition == Condition::None {
            return None;
        }
        let access = bus.stream_access.clone();
        let (alive, ended) = oneshot::channel();
        let (id, start) = {
            let mut open = access.open();
            let id = open.next_id;
            open.next_id += 1;
            open.streams.insert(id, Stream { user, session, condition, confirmed: Instant::now(), _alive: alive });
            (id, !std::mem::replace(&mut open.checking, true))
        };
        if start {
            let (access, bus) = (access.clone(), bus.clone());
            tokio::spawn(async move { access.run(&bus).await });
        }
        Some(CheckedStream { access, id, ended })
    }

    async fn run(&self, bus: &Bus) {
        loop {
            tokio::time::sleep(CHECK_PERIOD).await;
            let (next_id, sessions, memberships) = {
                let mut open = self.open();
                if open.streams.is_empty() {
                    open.checking = false;
                    return;
                }
                (open.next_id, open.sessions(), open.memberships())
            };
            let (sessions, memberships) = (CheckSessions { ids: sessions }, GetMemberships { wanted: memberships });
            let (sessions, memberships) = tokio::join!(request(bus, &sessions), request(bus, &memberships));
            let roles = memberships.map(|page| {
                let roles =
                    page.items.into_iter().map(|membership| ((membership.organization_id, membership.user_id), membership.role));
                roles.collect::<HashMap<_, _>>()
            });
            self.open().apply(next_id, sessions.as_ref().ok(), roles.as_ref().ok());
        }
    }
}

async fn request<M: Message>(bus: &Bus, message: &M) -> Result<M::Reply, Problem> {
    let context = Context { deadline: Instant::now() + CHECK_TIMEOUT, ..Context::background("bus") };
    bus.request(&context, message).await
}

type Roles = HashMap<(Uuid, Uuid), Option<Role>>;

impl OpenStreams {
    fn sessions(&self) -> Vec<Uuid> {
        self.streams.values().filter_map(|stream| stream.session).collect::<HashSet<_>>().into_iter().collect()
    }

    fn memberships(&self) -> Vec<GetMembership> {
        let memberships = self.streams.values().filter_map(|stream| match stream.condition {
            Condition::Member { organization, .. } => Some(GetMembership { organization_id: organization, user_id: stream.user }),
            Condition::None | Condition::Session | Condition::PlatformAdmin => None,
        });
        memberships.collect::<HashSet<_>>().into_iter().collect()
    }

    /// Ends the streams whose condition does not hold, and those that could not be confirmed for longer than
    /// [`CONFIRMATION_LEASE`]. `next_id` is the first id that was not in the requests: later streams are left as they are.
    fn apply(&mut self, next_id: u64, live: Option<&LiveSessions>, roles: Option<&Roles>) {
        self.streams.retain(|id, stream| {
            if *id >= next_id {
                return true;
            }
            let session = match stream.session {
                Some(session) => live.map(|live| live.ids.contains(&session)),
                None => Some(true),
            };
            let condition = match stream.condition {
                Condition::None | Condition::Session => Some(true),
                Condition::PlatformAdmin => {
                    live.map(|live| stream.session.is_some_and(|session| live.platform_admins.contains(&session)))
                }
                Condition::Member { organization, min_role } => {
                    let role = roles.and_then(|roles| roles.get(&(organization, stream.user)));
                    role.map(|role| role.is_some_and(|role| role >= min_role))
                }
            };
            match (session, condition) {
                (Some(false), _) | (_, Some(false)) => false,
                (Some(true), Some(true)) => {
                    stream.confirmed = Instant::now();
                    true
                }
                _ => stream.confirmed.elapsed() < CONFIRMATION_LEASE,
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::time::Instant;

    use capsule_contracts::identity::LiveSessions;
    use capsule_contracts::{Role, Uuid};
    use tokio::sync::oneshot;

    use super::{CONFIRMATION_LEASE, Condition, OpenStreams, Roles, Stream};

    const USER: Uuid = Uuid::from_u128(1);
    const SESSION: Uuid = Uuid::from_u128(2);
    const ORGANIZATION: Uuid = Uuid::from_u128(3);

    fn open(condition: Condition, confirmed: Instant) -> OpenStreams {
        let stream = Stream { user: USER, session: Some(SESSION), condition, confirmed, _alive: oneshot::channel().0 };
        OpenStreams { next_id: 1, streams: HashMap::from([(0, stream)]), checking: true }
    }

    fn live(admin: bool) -> LiveSessions {
        LiveSessions { ids: vec![SESSION], platform_admins: if admin { vec![SESSION] } else { Vec::new() } }
    }

    fn stays_open(condition: Condition, live: Option<&LiveSessions>, role: Option<Option<Role>>) -> bool {
        let roles: Option<Roles> = role.map(|role| HashMap::from([((ORGANIZATION, USER), role)]));
        let mut open = open(condition, Instant::now());
        open.apply(1, live, roles.as_ref());
        !open.streams.is_empty()
    }

    #[test]
    fn a_stream_ends_with_its_session_its_membership_and_its_role() {
        let member = Condition::Member { organization: ORGANIZATION, min_role: Role::Developer };
        assert!(stays_open(member, Some(&live(false)), Some(Some(Role::Admin))));
        assert!(!stays_open(member, Some(&live(false)), Some(Some(Role::Viewer))), "the role was lowered");
        assert!(!stays_open(member, Some(&live(false)), Some(None)), "the member was removed");
        assert!(!stays_open(member, Some(&LiveSessions::default()), Some(Some(Role::Owner))), "the session ended");
        assert!(!stays_open(Condition::Session, Some(&LiveSessions::default()), None), "the session ended");
        assert!(stays_open(Condition::PlatformAdmin, Some(&live(true)), None));
        assert!(!stays_open(Condition::PlatformAdmin, Some(&live(false)), None), "no longer an administrator");
    }

    #[test]
    fn a_stream_of_an_api_key_ends_with_its_owners_membership() {
        let member = Condition::Member { organization: ORGANIZATION, min_role: Role::Developer };
        for (role, stays) in [(Some(Role::Developer), true), (Some(Role::Viewer), false), (None, false)] {
            let mut open = open(member, Instant::now());
            open.streams.values_mut().for_each(|stream| stream.session = None);
            assert!(open.sessions().is_empty());
            open.apply(1, Some(&LiveSessions::default()), Some(&HashMap::from([((ORGANIZATION, USER), role)])));
            assert_eq!(!open.streams.is_empty(), stays, "{role:?}");
        }
    }

    #[test]
    fn an_unconfirmed_stream_ends_after_the_lease() {
        assert!(stays_open(Condition::Session, None, None));
        let long_ago = Instant::now().checked_sub(CONFIRMATION_LEASE).expect("the machine runs for longer");
        let mut open = open(Condition::Session, long_ago);
        open.apply(1, None, None);
        assert!(open.streams.is_empty());
    }

    #[test]
    fn a_check_does_not_end_streams_opened_after_its_request() {
        let mut open = open(Condition::Session, Instant::now());
        open.apply(0, Some(&LiveSessions::default()), None);
        assert_eq!(open.streams.len(), 1);
    }
}
