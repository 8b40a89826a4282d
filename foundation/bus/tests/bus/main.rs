//! The bus on a real database.

mod events;
mod quotas;
mod retention;
mod sagas;

use std::path::Path;
use std::sync::Arc;

use capsule_store::{Databases, Keyring, Store};

/// A service's database in a folder, with the bus's own tables.
async fn open(directory: &Path, name: &'static str) -> Arc<Store> {
    let keyring = Keyring::open(&directory.join("key")).expect("a key");
    let databases = Databases::Embedded(directory.into());
    Arc::new(Store::open(&databases, name, keyring, &[("bus", capsule_bus::MIGRATIONS)]).await.expect("opens"))
}
