//! The balancer: picks a backend for each request and counts the requests in flight.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::table::{Endpoint, Route, Table};
use crate::upstream::GATEWAY;

/// The most simultaneous connection attempts to one backend.
const MAX_CONNECTING: usize = 16;
/// The most requests that wait for a permit to connect to one backend.
const MAX_WAITING: usize = 256;

/// The load of one backend. All threads share it, and it survives new revisions of the table.
#[derive(Debug)]
struct Load {
    in_flight: AtomicUsize,
    waiting: AtomicUsize,
    connecting: Arc<Semaphore>,
}

impl Default for Load {
    fn default() -> Self {
        Self {
            in_flight: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            connecting: Arc::new(Semaphore::new(MAX_CONNECTING)),
        }
    }
}

/// An endpoint with its load.
#[derive(Debug)]
struct Backend {
    endpoint: Endpoint,
    name: Arc<str>,
    load: Arc<Load>,
}

#[derive(Debug, Default)]
struct Live {
    table: Table,
    backends: HashMap<String, Vec<Backend>>,
    loads: HashMap<String, Arc<Load>>,
}

/// The routing table in force. A backend is picked and the request counted under one lock, so once a new table is in
/// force, every request that was routed by the old one is counted.
#[derive(Debug)]
pub struct Balancer {
    live: RwLock<Live>,
    next: AtomicUsize,
    gateway: (Arc<str>, Arc<Load>),
    /// The most requests in flight to one backend.
    max_in_flight: usize,
}

/// Where to route a request.
#[derive(Debug)]
pub enum Pick {
    /// To this instance. The request is in flight until the guard is dropped.
    Instance(InFlightGuard),
    /// The host is known, but is a site or has no instance that serves requests.
    Route(Route),
    /// To the gateway.
    Gateway(InFlightGuard),
    /// The backend has the most requests in flight that it may.
    Saturated,
    /// The host is not in the table.
    Unknown,
}

/// Counts one request in flight to a backend, until it is dropped.
#[derive(Debug)]
pub struct InFlightGuard {
    /// The instance's name, or [`GATEWAY`].
    pub instance: Arc<str>,
    pub port: u16,
    load: Arc<Load>,
}

/// The most requests that may wait for a permit do so.
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

    /// Waits for a permit to connect to the backend, in the order of arrival.
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
        if before >= MAX_WAITING {
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
    /// Creates a balancer with an empty table and at most `max_in_flight` requests in flight to one backend.
    pub fn new(max_in_flight: usize) -> Self {
        Self { live: RwLock::default(), next: AtomicUsize::new(0), gateway: (GATEWAY.into(), Arc::default()), max_in_flight }
    }

    /// Replaces the routing table.
    pub fn apply(&self, table: Table) {
        let mut live = self.live.write().unwrap_or_else(PoisonError::into_inner);
        let mut loads = HashMap::new();
        let mut backends = HashMap::new();
        for (host, route) in &table.routes {
            let list = route.endpoints.iter().map(|endpoint| {
                let load = live.loads.get(&endpoint.instance).cloned().unwrap_or_default();
                loads.insert(endpoint.instance.clone(), load.clone());
                Backend { endpoint: endpoint.clone(), name: endpoint.instance.as_str().into(), load }
            });
            backends.insert(host.clone(), list.collect());
        }
        // The loads of instances that left the table are kept while requests are in flight.
        for (instance, load) in &live.loads {
            if load.in_flight.load(Ordering::Acquire) > 0 {
                loads.entry(instance.clone()).or_insert_with(|| load.clone());
            }
        }
        *live = Live { table, backends, loads };
    }

    /// Whether an address belongs to a trusted proxy.
    pub fn trusts(&self, address: IpAddr) -> bool {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        live.table.trusted_proxies.iter().any(|network| network.contains(&address))
    }

    /// The revision in force.
    pub fn revision(&self) -> u64 {
        self.live.read().unwrap_or_else(PoisonError::into_inner).table.revision
    }

    /// Counts a request to an instance of the table, whatever its weight.
    pub fn instance(&self, instance: &str) -> Option<InFlightGuard> {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        let backend = live.backends.values().flatten().find(|backend| &*backend.name == instance)?;
        Some(InFlightGuard::new(&backend.name, backend.endpoint.port, &backend.load))
    }

    /// How many requests are in flight to an instance.
    pub fn in_flight(&self, instance: &str) -> usize {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        live.loads.get(instance).map_or(0, |load| load.in_flight.load(Ordering::Acquire))
    }

    /// Picks where to route a request for `host` (in lower case, without a port): to the instance with the fewest requests
    /// in flight for its weight, round robin among equals.
    pub fn pick(&self, host: &str) -> Pick {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        let Table { base_domain, public_host, routes, .. } = &live.table;
        let is_address = || host.parse::<IpAddr>().is_ok() || host.starts_with('[');
        // Before the routes: no application can take a host of the gateway.
        if host.is_empty() || host == base_domain || host == public_host || is_address() {
            let (name, load) = &self.gateway;
            let is_saturated = load.in_flight.load(Ordering::Relaxed) >= self.max_in_flight;
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
        let offset = self.next.fetch_add(1, Ordering::Relaxed);
        let chosen = (0..backends.len())
            .map(|index| &backends[(index + offset) % backends.len()])
            .filter(|backend| backend.endpoint.weight > 0)
            .min_by(|a, b| {
                let share = |one: &Backend, other: &Backend| {
                    one.load.in_flight.load(Ordering::Relaxed) as u64 * u64::from(other.endpoint.weight)
                };
                share(a, b).cmp(&share(b, a))
            });
        match chosen {
            Some(backend) if backend.load.in_flight.load(Ordering::Relaxed) >= self.max_in_flight => Pick::Saturated,
            Some(backend) => Pick::Instance(InFlightGuard::new(&backend.name, backend.endpoint.port, &backend.load)),
            None => Pick::Route(route.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use super::{Balancer, Pick};
    use crate::table::{Endpoint, Route, State, Table};

    fn table(revision: u64, weights: &[(&str, u32)]) -> Table {
        let endpoint = |(instance, weight): &(&str, u32)| Endpoint { instance: (*instance).into(), port: 80, weight: *weight };
        let route = Route { state: State::Ready, endpoints: weights.iter().map(endpoint).collect(), site: None };
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
        let picks: Vec<_> = (0..40).map(|_| balancer.pick("app.localhost")).collect();
        let count = |name| picks.iter().filter(|pick| instance(pick) == name).count();
        assert_eq!((count("a"), count("b"), count("c")), (10, 30, 0));
    }

    #[test]
    fn the_requests_of_an_instance_that_left_the_table_stay_in_flight_until_they_end() {
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
    fn addresses_and_the_base_domain_are_the_gateway_and_other_hosts_are_unknown() {
        let balancer = Balancer::new(1000);
        balancer.apply(table(1, &[]));
        let mut host_of_the_gateway = table(2, &[("a", 1)]);
        host_of_the_gateway.public_host = "app.localhost".into();
        balancer.apply(host_of_the_gateway);
        for host in ["localhost", "127.0.0.1", "[::1]", "", "app.localhost"] {
            assert!(matches!(balancer.pick(host), Pick::Gateway(_)), "{host}");
        }
        for host in ["other.localhost", "example.com"] {
            assert!(matches!(balancer.pick(host), Pick::Unknown), "{host}");
        }
    }

    #[tokio::test]
    async fn requests_and_connection_attempts_of_a_backend_are_limited() {
        let balancer = Balancer::new(600);
        balancer.apply(table(1, &[("a", 1)]));
        let guards: Vec<_> = (0..600)
            .map(|_| match balancer.pick("app.localhost") {
                Pick::Instance(guard) => guard,
                other => panic!("{other:?}"),
            })
            .collect();
        assert!(matches!(balancer.pick("app.localhost"), Pick::Saturated));
        let mut attempts: Vec<_> = guards.iter().map(|guard| Box::pin(guard.permit_to_connect())).collect();
        let mut connecting = Vec::new();
        let (mut waiting, mut refused) = (0, 0);
        for attempt in &mut attempts {
            match poll_once(attempt.as_mut()) {
                Poll::Ready(Ok(permit)) => connecting.push(permit),
                Poll::Ready(Err(super::Saturated)) => refused += 1,
                Poll::Pending => waiting += 1,
            }
        }
        assert_eq!((connecting.len(), waiting, refused), (16, 256, 328));
        drop(connecting);
        drop(attempts);
        assert!(guards[0].permit_to_connect().await.is_ok());
        drop(guards);
        assert_eq!(balancer.in_flight("a"), 0);
    }

    fn poll_once<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop()))
    }
}
