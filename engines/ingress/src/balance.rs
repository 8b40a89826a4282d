//! The live table: picks an instance for a request and knows how many each one is busy with.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::table::{Route, Table, Target};

/// An instance with the requests it is busy with, the same across revisions of the table.
#[derive(Debug)]
pub struct Backend {
    pub target: Target,
    busy: Arc<AtomicUsize>,
}

#[derive(Debug, Default)]
struct Live {
    table: Table,
    backends: HashMap<String, Vec<Backend>>,
    busy: HashMap<String, Arc<AtomicUsize>>,
}

/// The table in use. A pick and its count happen under one lock, so that once a new table is in
/// force, every request that the old one sent anywhere has been counted.
#[derive(Debug, Default)]
pub struct Balancer {
    live: RwLock<Live>,
    turn: AtomicUsize,
}

/// Where a request goes.
#[derive(Debug)]
pub enum Pick {
    /// To this instance; busy until the value is dropped.
    Instance(Busy),
    /// Nowhere: the host is known, but nothing takes requests. Or it is a site.
    Route(Route),
    /// To the gateway.
    Gateway,
    /// The host is not known.
    Unknown,
}

/// Counts as one request of an instance for as long as it lives.
#[derive(Debug)]
pub struct Busy {
    pub instance: String,
    pub port: u16,
    count: Arc<AtomicUsize>,
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Balancer {
    /// Puts a table in force.
    pub fn apply(&self, table: Table) {
        let mut live = self.live.write().unwrap_or_else(PoisonError::into_inner);
        let mut busy = HashMap::new();
        let mut backends = HashMap::new();
        for (host, route) in &table.routes {
            let list = route.targets.iter().map(|target| {
                let count = live.busy.get(&target.instance).cloned().unwrap_or_default();
                busy.insert(target.instance.clone(), count.clone());
                Backend { target: target.clone(), busy: count }
            });
            backends.insert(host.clone(), list.collect());
        }
        // Instances that left the table are remembered while they are still busy.
        for (instance, count) in &live.busy {
            if count.load(Ordering::Acquire) > 0 {
                busy.entry(instance.clone()).or_insert_with(|| count.clone());
            }
        }
        *live = Live { table, backends, busy };
    }

    /// The revision in force.
    pub fn revision(&self) -> u64 {
        self.live.read().unwrap_or_else(PoisonError::into_inner).table.revision
    }

    /// The port of an instance in the table, whatever its weight.
    pub fn port_of(&self, instance: &str) -> Option<u16> {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        live.backends.values().flatten().find(|backend| backend.target.instance == instance).map(|backend| backend.target.port)
    }

    /// How many requests an instance is busy with.
    pub fn busy(&self, instance: &str) -> usize {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        live.busy.get(instance).map_or(0, |count| count.load(Ordering::Acquire))
    }

    /// Finds out where a request for `host` (lower case, without a port) goes: to the least busy
    /// instance for its weight, in turn among equals.
    pub fn pick(&self, host: &str) -> Pick {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        let Some(route) = live.table.routes.get(host) else {
            let base = &live.table.base_domain;
            let address = host.parse::<std::net::IpAddr>().is_ok() || host.starts_with('[');
            return if address || host.is_empty() || base.is_empty() || host == base { Pick::Gateway } else { Pick::Unknown };
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
                let load =
                    |one: &Backend, other: &Backend| one.busy.load(Ordering::Relaxed) as u64 * u64::from(other.target.weight);
                load(a, b).cmp(&load(b, a))
            });
        match chosen {
            Some(backend) => {
                backend.busy.fetch_add(1, Ordering::AcqRel);
                Pick::Instance(Busy {
                    instance: backend.target.instance.clone(),
                    port: backend.target.port,
                    count: backend.busy.clone(),
                })
            }
            None => Pick::Route(route.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Balancer, Pick};
    use crate::table::{Route, State, Table, Target};

    fn table(revision: u64, targets: &[(&str, u32)]) -> Table {
        let targets = targets.iter().map(|(instance, weight)| Target { instance: (*instance).into(), port: 80, weight: *weight });
        let route = Route { state: State::Ready, targets: targets.collect(), site: None };
        Table { revision, base_domain: "localhost".into(), routes: [("app.localhost".into(), route)].into() }
    }

    fn instance(pick: &Pick) -> &str {
        match pick {
            Pick::Instance(busy) => &busy.instance,
            other => panic!("no instance: {other:?}"),
        }
    }

    #[test]
    fn requests_follow_the_weights_and_a_weight_of_zero_gets_none() {
        let balancer = Balancer::default();
        balancer.apply(table(1, &[("a", 1), ("b", 3), ("c", 0)]));
        let held: Vec<_> = (0..40).map(|_| balancer.pick("app.localhost")).collect();
        let count = |name| held.iter().filter(|pick| instance(pick) == name).count();
        assert_eq!((count("a"), count("b"), count("c")), (10, 30, 0));
    }

    #[test]
    fn an_instance_that_left_the_table_stays_busy_until_its_requests_end() {
        let balancer = Balancer::default();
        balancer.apply(table(1, &[("old", 1)]));
        let under_way = balancer.pick("app.localhost");
        balancer.apply(table(2, &[("new", 1)]));
        balancer.apply(table(3, &[("new", 1)]));
        assert_eq!(balancer.busy("old"), 1);
        assert_eq!(instance(&balancer.pick("app.localhost")), "new");
        drop(under_way);
        assert_eq!(balancer.busy("old"), 0);
    }

    #[test]
    fn addresses_and_the_base_domain_lead_to_the_gateway_and_strangers_nowhere() {
        let balancer = Balancer::default();
        balancer.apply(table(1, &[]));
        for host in ["localhost", "127.0.0.1", "[::1]", ""] {
            assert!(matches!(balancer.pick(host), Pick::Gateway), "{host}");
        }
        for host in ["other.localhost", "example.com"] {
            assert!(matches!(balancer.pick(host), Pick::Unknown), "{host}");
        }
    }
}
