//! The live table: picks an instance for a request and knows how many each one is busy with.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::table::{Route, Table, Target};
use crate::upstream::GATEWAY;

/// Connections to one backend that are being made at a time,
const CONNECTING: usize = 16;
/// and requests that wait until it is their turn to connect.
const WAITING: usize = 256;

/// What one backend is loaded with, the same across revisions of the table and on all threads.
#[derive(Debug)]
struct Load {
    in_flight: AtomicUsize,
    waiting: AtomicUsize,
    connecting: Arc<Semaphore>,
}

impl Default for Load {
    fn default() -> Self {
        Self { in_flight: AtomicUsize::new(0), waiting: AtomicUsize::new(0), connecting: Arc::new(Semaphore::new(CONNECTING)) }
    }
}

/// An instance with its load.
#[derive(Debug)]
struct Backend {
    target: Target,
    name: Arc<str>,
    load: Arc<Load>,
}

#[derive(Debug, Default)]
struct Live {
    table: Table,
    backends: HashMap<String, Vec<Backend>>,
    loads: HashMap<String, Arc<Load>>,
}

/// The table in use. A pick and its count happen under one lock, so that once a new table is in
/// force, every request that the old one sent anywhere has been counted.
#[derive(Debug)]
pub struct Balancer {
    live: RwLock<Live>,
    turn: AtomicUsize,
    gateway: (Arc<str>, Arc<Load>),
    /// The most requests in flight to one backend.
    most: usize,
}

/// Where a request goes.
#[derive(Debug)]
pub enum Pick {
    /// To this instance; in flight until the value is dropped.
    Instance(InFlightGuard),
    /// Nowhere: the host is known, but nothing takes requests. Or it is a site.
    Route(Route),
    /// To the gateway.
    Gateway(InFlightGuard),
    /// Nowhere: as many requests are in flight as may be.
    Saturated,
    /// The host is not known.
    Unknown,
}

/// Counts as one request of a backend for as long as it lives.
#[derive(Debug)]
pub struct InFlightGuard {
    /// The instance's name, or [`GATEWAY`].
    pub instance: Arc<str>,
    pub port: u16,
    load: Arc<Load>,
}

/// As many requests wait for a backend as may.
#[derive(Debug)]
pub struct Saturated;

impl InFlightGuard {
    fn new(instance: &Arc<str>, port: u16, load: &Arc<Load>) -> Self {
        load.in_flight.fetch_add(1, Ordering::AcqRel);
        Self { instance: instance.clone(), port, load: load.clone() }
    }

    /// Whether the backend is the gateway.
    pub fn is_gateway(&self) -> bool {
        &*self.instance == GATEWAY
    }

    /// Waits until one more connection to the backend may be made, in the order of arrival.
    pub async fn permit_to_connect(&self) -> Result<OwnedSemaphorePermit, Saturated> {
        struct Waiting<'a>(&'a AtomicUsize);
        impl Drop for Waiting<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::AcqRel);
            }
        }
        if let Ok(permit) = self.load.connecting.clone().try_acquire_owned() {
            return Ok(permit);
        }
        let before = self.load.waiting.fetch_add(1, Ordering::AcqRel);
        let _waiting = Waiting(&self.load.waiting);
        if before >= WAITING {
            return Err(Saturated);
        }
        self.load.connecting.clone().acquire_owned().await.map_err(|_| Saturated)
    }
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        self.load.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Balancer {
    /// An empty table, with at most so many requests in flight to one backend.
    pub fn new(most: usize) -> Self {
        Self { live: RwLock::default(), turn: AtomicUsize::new(0), gateway: (GATEWAY.into(), Arc::default()), most }
    }

    /// Puts a table in force.
    pub fn apply(&self, table: Table) {
        let mut live = self.live.write().unwrap_or_else(PoisonError::into_inner);
        let mut loads = HashMap::new();
        let mut backends = HashMap::new();
        for (host, route) in &table.routes {
            let list = route.targets.iter().map(|target| {
                let load = live.loads.get(&target.instance).cloned().unwrap_or_default();
                loads.insert(target.instance.clone(), load.clone());
                Backend { target: target.clone(), name: target.instance.as_str().into(), load }
            });
            backends.insert(host.clone(), list.collect());
        }
        // Instances that left the table are remembered while they have requests in flight.
        for (instance, load) in &live.loads {
            if load.in_flight.load(Ordering::Acquire) > 0 {
                loads.entry(instance.clone()).or_insert_with(|| load.clone());
            }
        }
        *live = Live { table, backends, loads };
    }

    /// Whether an address is that of a proxy whose word on its own clients is taken.
    pub fn trusts(&self, address: IpAddr) -> bool {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        live.table.trusted_proxies.iter().any(|network| network.contains(&address))
    }

    /// The revision in force.
    pub fn revision(&self) -> u64 {
        self.live.read().unwrap_or_else(PoisonError::into_inner).table.revision
    }

    /// An instance in the table, whatever its weight.
    pub fn instance(&self, instance: &str) -> Option<InFlightGuard> {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        let backend = live.backends.values().flatten().find(|backend| &*backend.name == instance)?;
        Some(InFlightGuard::new(&backend.name, backend.target.port, &backend.load))
    }

    /// How many requests are in flight to an instance.
    pub fn in_flight(&self, instance: &str) -> usize {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        live.loads.get(instance).map_or(0, |load| load.in_flight.load(Ordering::Acquire))
    }

    /// Finds out where a request for `host` (lower case, without a port) goes: to the least busy
    /// instance for its weight, in turn among equals.
    pub fn pick(&self, host: &str) -> Pick {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        let Table { base_domain, public_host, routes, .. } = &live.table;
        let is_address = || host.parse::<IpAddr>().is_ok() || host.starts_with('[');
        // First: no application is named as the platform.
        if host.is_empty() || host == base_domain || host == public_host || is_address() {
            let (name, load) = &self.gateway;
            let is_saturated = load.in_flight.load(Ordering::Relaxed) >= self.most;
            return if is_saturated { Pick::Saturated } else { Pick::Gateway(InFlightGuard::new(name, 80, load)) };
        }
        let Some(route) = routes.get(host) else {
            return if base_domain.is_empty() {
                Pick::Gateway(InFlightGuard::new(&self.gateway.0, 80, &self.gateway.1))
            } else {
                Pick::Unknown
            };
        };
        if route.site.is_some() {
            return Pick::Route(route.clone());
        }
        let empty = Vec::new();
        let backends = live.backends.get(host).unwrap_or(&empty);
        let offset = self.turn.fetch_add(1, Ordering::Relaxed);
        let chosen = (0..backends.len())
            .map(|index| &backends[(index + offset) % backends.len()])
            .filter(|backend| backend.target.weight > 0)
            .min_by(|a, b| {
                let share = |one: &Backend, other: &Backend| {
                    one.load.in_flight.load(Ordering::Relaxed) as u64 * u64::from(other.target.weight)
                };
                share(a, b).cmp(&share(b, a))
            });
        match chosen {
            Some(backend) if backend.load.in_flight.load(Ordering::Relaxed) >= self.most => Pick::Saturated,
            Some(backend) => Pick::Instance(InFlightGuard::new(&backend.name, backend.target.port, &backend.load)),
            None => Pick::Route(route.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use super::{Balancer, Pick};
    use crate::table::{Route, State, Table, Target};

    fn table(revision: u64, targets: &[(&str, u32)]) -> Table {
        let targets = targets.iter().map(|(instance, weight)| Target { instance: (*instance).into(), port: 80, weight: *weight });
        let route = Route { state: State::Ready, targets: targets.collect(), site: None };
        Table { revision, base_domain: "localhost".into(), routes: [("app.localhost".into(), route)].into(), ..Table::default() }
    }

    fn instance(pick: &Pick) -> &str {
        match pick {
            Pick::Instance(guard) => &guard.instance,
            other => panic!("no instance: {other:?}"),
        }
    }

    #[test]
    fn requests_follow_the_weights_and_a_weight_of_zero_gets_none() {
        let balancer = Balancer::new(1000);
        balancer.apply(table(1, &[("a", 1), ("b", 3), ("c", 0)]));
        let held: Vec<_> = (0..40).map(|_| balancer.pick("app.localhost")).collect();
        let count = |name| held.iter().filter(|pick| instance(pick) == name).count();
        assert_eq!((count("a"), count("b"), count("c")), (10, 30, 0));
    }

    #[test]
    fn an_instance_that_left_the_table_has_requests_in_flight_until_its_requests_end() {
        let balancer = Balancer::new(1000);
        balancer.apply(table(1, &[("old", 1)]));
        let in_flight = balancer.pick("app.localhost");
        balancer.apply(table(2, &[("new", 1)]));
        balancer.apply(table(3, &[("new", 1)]));
        assert_eq!(balancer.in_flight("old"), 1);
        assert_eq!(instance(&balancer.pick("app.localhost")), "new");
        drop(in_flight);
        assert_eq!(balancer.in_flight("old"), 0);
    }

    #[test]
    fn addresses_and_the_base_domain_lead_to_the_gateway_and_strangers_nowhere() {
        let balancer = Balancer::new(1000);
        balancer.apply(table(1, &[]));
        let mut named_as_the_platform = table(2, &[("a", 1)]);
        named_as_the_platform.public_host = "app.localhost".into();
        balancer.apply(named_as_the_platform);
        for host in ["localhost", "127.0.0.1", "[::1]", "", "app.localhost"] {
            assert!(matches!(balancer.pick(host), Pick::Gateway(_)), "{host}");
        }
        for host in ["other.localhost", "example.com"] {
            assert!(matches!(balancer.pick(host), Pick::Unknown), "{host}");
        }
    }

    #[tokio::test]
    async fn a_backend_takes_so_many_requests_and_makes_so_many_connections_at_a_time() {
        let balancer = Balancer::new(600);
        balancer.apply(table(1, &[("a", 1)]));
        let guards: Vec<_> = (0..600)
            .map(|_| match balancer.pick("app.localhost") {
                Pick::Instance(guard) => guard,
                other => panic!("{other:?}"),
            })
            .collect();
        assert!(matches!(balancer.pick("app.localhost"), Pick::Saturated));
        let mut asked: Vec<_> = guards.iter().map(|guard| Box::pin(guard.permit_to_connect())).collect();
        let mut connecting = Vec::new();
        let (mut waiting, mut refused) = (0, 0);
        for asked in &mut asked {
            match poll_once(asked.as_mut()) {
                Poll::Ready(Ok(permit)) => connecting.push(permit),
                Poll::Ready(Err(super::Saturated)) => refused += 1,
                Poll::Pending => waiting += 1,
            }
        }
        assert_eq!((connecting.len(), waiting, refused), (16, 256, 328));
        drop(connecting);
        drop(asked);
        assert!(guards[0].permit_to_connect().await.is_ok());
        drop(guards);
        assert_eq!(balancer.in_flight("a"), 0);
    }

    fn poll_once<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop()))
    }
}
