//! A fair semaphore for builds. Organizations get permits in turn: however many builds of one organization wait, the next
//! build of another waits for at most one of each.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use capsule_contracts::Uuid;
use tokio::sync::oneshot;

/// A semaphore for builds that is fair between organizations.
#[derive(Clone, Debug)]
pub struct BuildQueue {
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    free: usize,
    /// The number of permits that each organization holds.
    held: HashMap<Uuid, usize>,
    /// The waiters by organization, in the order of their turns.
    waiting: VecDeque<(Uuid, VecDeque<Waiter>)>,
}

#[derive(Debug)]
struct Waiter {
    deployment: Uuid,
    /// The maximum number of permits for its organization, including this one.
    limit: usize,
    grant: oneshot::Sender<Permit>,
}

/// The permit for one build. Dropping it returns it to the queue.
#[derive(Debug)]
pub struct Permit {
    queue: BuildQueue,
    organization: Uuid,
}

impl Drop for Permit {
    fn drop(&mut self) {
        {
            let mut state = self.queue.state();
            state.free += 1;
            if let Some(held) = state.held.get_mut(&self.organization) {
                *held -= 1;
                if *held == 0 {
                    state.held.remove(&self.organization);
                }
            }
        }
        self.queue.grant();
    }
}

impl BuildQueue {
    /// Creates a queue with this number of permits.
    pub fn new(permits: usize) -> Self {
        Self { state: Arc::new(Mutex::new(State { free: permits, held: HashMap::new(), waiting: VecDeque::new() })) }
    }

    /// Waits for a permit; the organization can hold at most `limit`. `None` if [`BuildQueue::retain`] removed the waiter.
    pub async fn acquire(&self, organization: Uuid, deployment: Uuid, limit: usize) -> Option<Permit> {
        let (grant, granted) = oneshot::channel();
        let waiter = Waiter { deployment, limit: limit.max(1), grant };
        {
            let mut state = self.state();
            match state.waiting.iter_mut().find(|(id, _)| *id == organization) {
                Some((_, waiters)) => waiters.push_back(waiter),
                None => state.waiting.push_back((organization, [waiter].into())),
            }
        }
        self.grant();
        granted.await.ok()
    }

    /// Removes the waiters of the deployments for which `is_waiting` is false.
    pub fn retain(&self, is_waiting: impl Fn(Uuid) -> bool) {
        let mut state = self.state();
        for (_, waiters) in &mut state.waiting {
            waiters.retain(|waiter| is_waiting(waiter.deployment));
        }
        state.waiting.retain(|(_, waiters)| !waiters.is_empty());
    }

    /// The number of permits that an organization holds.
    pub fn running(&self, organization: Uuid) -> usize {
        self.state().held.get(&organization).copied().unwrap_or_default()
    }

    /// Grants the free permits. They are sent without the lock: a permit without a receiver is dropped, which locks again.
    fn grant(&self) {
        loop {
            let Some((organization, waiter)) = self.state().next() else { return };
            let _ = waiter.grant.send(Permit { queue: self.clone(), organization });
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes a permit for the organization that holds the fewest permits, of those below their limits. Among several, the
    /// one that has waited longest is first, and then moves to the end.
    fn next(&mut self) -> Option<(Uuid, Waiter)> {
        for (_, waiters) in &mut self.waiting {
            waiters.retain(|waiter| !waiter.grant.is_closed());
        }
        self.waiting.retain(|(_, waiters)| !waiters.is_empty());
        if self.free == 0 {
            return None;
        }
        let held = |organization: &Uuid| self.held.get(organization).copied().unwrap_or_default();
        let (index, _) = self
            .waiting
            .iter()
            .enumerate()
            .filter(|(_, (id, waiters))| waiters.front().is_some_and(|waiter| held(id) < waiter.limit))
            .min_by_key(|(_, (id, _))| held(id))?;
        let (organization, mut waiters) = self.waiting.remove(index)?;
        let waiter = waiters.pop_front()?;
        if !waiters.is_empty() {
            self.waiting.push_back((organization, waiters));
        }
        self.free -= 1;
        *self.held.entry(organization).or_default() += 1;
        Some((organization, waiter))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use capsule_contracts::Uuid;

    use super::BuildQueue;

    fn id(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    /// Lets the other tasks run: the runtime of a test has one thread.
    async fn settle() {
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn many_builds_of_one_organization_delay_another_organization_by_one_build() {
        let queue = BuildQueue::new(1);
        let order = Arc::new(Mutex::new(Vec::new()));
        let first = queue.acquire(id(1), id(100), 9).await.expect("free");
        for (organization, deployment) in (101..150).map(|deployment| (1, deployment)).chain([(2, 200), (3, 300), (2, 201)]) {
            let (queue, order) = (queue.clone(), order.clone());
            tokio::spawn(async move {
                let permit = queue.acquire(id(organization), id(deployment), 9).await;
                order.lock().expect("not poisoned").push(organization);
                tokio::task::yield_now().await;
                drop(permit);
            });
            settle().await;
        }
        drop(first);
        while order.lock().expect("not poisoned").len() < 52 {
            settle().await;
        }
        assert_eq!(order.lock().expect("not poisoned")[..6], [1, 2, 3, 1, 2, 1]);
    }

    #[tokio::test]
    async fn an_organization_holds_no_more_permits_than_its_limit() {
        let queue = BuildQueue::new(3);
        let held = [queue.acquire(id(1), id(10), 2).await, queue.acquire(id(1), id(11), 2).await];
        let mut third = Box::pin(queue.acquire(id(1), id(12), 2));
        assert!(poll_once_settled(&mut third).await.is_none(), "a permit is free, but not for this organization");
        let other = queue.acquire(id(2), id(20), 2).await.expect("the free one");
        assert_eq!((queue.running(id(1)), queue.running(id(2))), (2, 1));
        drop(held);
        assert!(third.await.is_some());
        drop(other);
        assert_eq!(queue.running(id(2)), 0);
    }

    #[tokio::test]
    async fn a_waiter_that_gives_up_takes_no_permit() {
        let queue = BuildQueue::new(1);
        let held = queue.acquire(id(1), id(10), 1).await;
        let mut dropped = Box::pin(queue.acquire(id(2), id(20), 1));
        assert!(poll_once_settled(&mut dropped).await.is_none());
        drop(dropped);
        let mut superseded = Box::pin(queue.acquire(id(3), id(30), 1));
        assert!(poll_once_settled(&mut superseded).await.is_none());
        queue.retain(|deployment| deployment != id(30));
        assert!(superseded.await.is_none());
        drop(held);
        assert!(queue.acquire(id(4), id(40), 1).await.is_some());
        assert!(queue.acquire(id(4), id(41), 1).await.is_some(), "a dropped permit is free again");
    }

    /// The output of a future if it is ready once the other tasks have run.
    async fn poll_once_settled<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
        tokio::select! {
            biased;
            output = future => Some(output),
            () = settle() => None,
        }
    }
}
