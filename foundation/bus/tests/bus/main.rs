//! The bus on a real database.

mod events;
mod principals;
mod quotas;
mod retention;
mod sagas;

use std::path::Path;
use std::sync::Arc;

use capsule_bus::{Bus, Service};
use capsule_contracts::project::Location;
use capsule_contracts::{Problem, Target};
use capsule_store::{Databases, Keyring, Store};

/// A service with the bus's own tables, and whatever state a test needs.
struct TestService<T = ()> {
    store: Arc<Store>,
    bus: Bus,
    state: T,
}

impl<T: Send + Sync + 'static> Service for TestService<T> {
    fn store(&self) -> &Arc<Store> {
        &self.store
    }
    fn bus(&self) -> &Bus {
        &self.bus
    }
    async fn locate(&self, _: &Target) -> Result<Option<Location>, Problem> {
        Ok(None)
    }
}

/// Opens the service `name` on `bus`, with its database in `directory`.
async fn open_service<T>(directory: &Path, bus: &Bus, name: &'static str, state: T) -> Arc<TestService<T>> {
    let keyring = Keyring::open(&directory.join("key")).expect("a key");
    let databases = Databases::Embedded(directory.into());
    let store = Store::open(&databases, name, keyring, &[("bus", capsule_bus::MIGRATIONS)]).await.expect("opens");
    Arc::new(TestService { store: Arc::new(store), bus: bus.clone(), state })
}
