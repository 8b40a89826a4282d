//! A stream ends with the right to read it. While streams are open, one task of the process asks the owners of the
//! facts, all at once: the identity service which sessions live, the organization service which roles there are.
//! It sleeps in between, and ends with the last stream.

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

/// How often the right to open streams is checked; a stream ends within a second of its loss.
const CHECK_PERIOD: Duration = Duration::from_millis(400);
/// How long an owner is waited for.
const CHECK_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a stream goes on while nobody confirms the right to it.
const CONFIRMATION_LEASE: Duration = Duration::from_secs(60);

/// The open streams of this process.
#[derive(Debug, Default)]
pub struct Watch {
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    next: u64,
    streams: HashMap<u64, Stream>,
    /// Whether the task runs.
    checking: bool,
}

#[derive(Debug)]
struct Stream {
    user: Uuid,
    session: Uuid,
    condition: Condition,
    confirmed: Instant,
    /// Dropped to end the stream.
    _alive: oneshot::Sender<()>,
}

/// An open stream; it is checked until this is dropped.
#[derive(Debug)]
pub struct Watched {
    watch: Arc<Watch>,
    id: u64,
    ended: oneshot::Receiver<()>,
}

impl Watched {
    /// Resolves when the right to read the stream is lost.
    pub async fn lost(&mut self) {
        let _ = (&mut self.ended).await;
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.watch.open().streams.remove(&self.id);
    }
}

impl Watch {
    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks `condition` for the principal of `context` until the result is dropped. `None` where nothing can be lost.
    pub fn begin(bus: &Bus, context: &Context, condition: Condition) -> Option<Watched> {
        let Principal::User { id: user, session, .. } = context.principal else { return None };
        if condition == Condition::None {
            return None;
        }
        let watch = bus.watch.clone();
        let (alive, ended) = oneshot::channel();
        let (id, start) = {
            let mut open = watch.open();
            let id = open.next;
            open.next += 1;
            open.streams.insert(id, Stream { user, session, condition, confirmed: Instant::now(), _alive: alive });
            (id, !std::mem::replace(&mut open.checking, true))
        };
        if start {
            let (watch, bus) = (watch.clone(), bus.clone());
            tokio::spawn(async move { watch.run(&bus).await });
        }
        Some(Watched { watch, id, ended })
    }

    async fn run(&self, bus: &Bus) {
        loop {
            tokio::time::sleep(CHECK_PERIOD).await;
            let (asked, sessions, memberships) = {
                let mut open = self.open();
                if open.streams.is_empty() {
                    open.checking = false;
                    return;
                }
                (open.next, open.sessions(), open.memberships())
            };
            let (sessions, memberships) = (CheckSessions { ids: sessions }, GetMemberships { wanted: memberships });
            let (sessions, memberships) = tokio::join!(ask(bus, &sessions), ask(bus, &memberships));
            let roles = memberships.map(|page| {
                let roles = page.items.into_iter().map(|known| ((known.organization_id, known.user_id), known.role));
                roles.collect::<HashMap<_, _>>()
            });
            self.open().apply(asked, sessions.as_ref().ok(), roles.as_ref().ok());
        }
    }
}

async fn ask<M: Message>(bus: &Bus, message: &M) -> Result<M::Reply, Problem> {
    let context = Context { deadline: Instant::now() + CHECK_TIMEOUT, ..Context::background("bus") };
    bus.request(&context, message).await
}

type Roles = HashMap<(Uuid, Uuid), Option<Role>>;

impl Open {
    fn sessions(&self) -> Vec<Uuid> {
        self.streams.values().map(|stream| stream.session).collect::<HashSet<_>>().into_iter().collect()
    }

    fn memberships(&self) -> Vec<GetMembership> {
        let wanted = self.streams.values().filter_map(|stream| match stream.condition {
            Condition::Member { organization, .. } => Some(GetMembership { organization_id: organization, user_id: stream.user }),
            Condition::None | Condition::Session | Condition::PlatformAdmin => None,
        });
        wanted.collect::<HashSet<_>>().into_iter().collect()
    }

    /// Ends the streams whose condition does not hold, and those that nobody could confirm for too long. Streams from the
    /// id `asked` on were opened since the owners were asked, and are not in the answers.
    fn apply(&mut self, asked: u64, live: Option<&LiveSessions>, roles: Option<&Roles>) {
        self.streams.retain(|id, stream| {
            if *id >= asked {
                return true;
            }
            let session = live.map(|live| live.ids.contains(&stream.session));
            let condition = match stream.condition {
                Condition::None | Condition::Session => Some(true),
                Condition::PlatformAdmin => live.map(|live| live.platform_admins.contains(&stream.session)),
                Condition::Member { organization, least } => {
                    let role = roles.and_then(|roles| roles.get(&(organization, stream.user)));
                    role.map(|role| role.is_some_and(|role| role >= least))
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

    use super::{CONFIRMATION_LEASE, Condition, Open, Roles, Stream};

    const USER: Uuid = Uuid::from_u128(1);
    const SESSION: Uuid = Uuid::from_u128(2);
    const ORGANIZATION: Uuid = Uuid::from_u128(3);

    fn open(condition: Condition, confirmed: Instant) -> Open {
        let stream = Stream { user: USER, session: SESSION, condition, confirmed, _alive: oneshot::channel().0 };
        Open { next: 1, streams: HashMap::from([(0, stream)]), checking: true }
    }

    fn live(admin: bool) -> LiveSessions {
        LiveSessions { ids: vec![SESSION], platform_admins: if admin { vec![SESSION] } else { Vec::new() } }
    }

    fn goes_on(condition: Condition, live: Option<&LiveSessions>, role: Option<Option<Role>>) -> bool {
        let roles: Option<Roles> = role.map(|role| HashMap::from([((ORGANIZATION, USER), role)]));
        let mut open = open(condition, Instant::now());
        open.apply(1, live, roles.as_ref());
        !open.streams.is_empty()
    }

    #[test]
    fn a_stream_ends_with_its_session_its_membership_and_its_role() {
        let member = Condition::Member { organization: ORGANIZATION, least: Role::Developer };
        assert!(goes_on(member, Some(&live(false)), Some(Some(Role::Admin))));
        assert!(!goes_on(member, Some(&live(false)), Some(Some(Role::Viewer))), "the role was lowered");
        assert!(!goes_on(member, Some(&live(false)), Some(None)), "the member was removed");
        assert!(!goes_on(member, Some(&LiveSessions::default()), Some(Some(Role::Owner))), "the session ended");
        assert!(!goes_on(Condition::Session, Some(&LiveSessions::default()), None), "the session ended");
        assert!(goes_on(Condition::PlatformAdmin, Some(&live(true)), None));
        assert!(!goes_on(Condition::PlatformAdmin, Some(&live(false)), None), "no administrator any more");
    }

    #[test]
    fn a_stream_that_nobody_confirms_goes_on_for_a_while_only() {
        assert!(goes_on(Condition::Session, None, None));
        let long_ago = Instant::now().checked_sub(CONFIRMATION_LEASE).expect("the machine runs for longer");
        let mut open = open(Condition::Session, long_ago);
        open.apply(1, None, None);
        assert!(open.streams.is_empty());
    }

    #[test]
    fn a_stream_that_was_opened_since_the_question_is_not_ended_by_the_answer() {
        let mut open = open(Condition::Session, Instant::now());
        open.apply(0, Some(&LiveSessions::default()), None);
        assert_eq!(open.streams.len(), 1);
    }
}
