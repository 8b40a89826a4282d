//! Databases of earlier versions, which used SeaORM, remain readable, and values are stored in the same way.

use capsule_contracts::Uuid;
use capsule_store::{Databases, FromRow, Keyring, Migration, Store, unscoped};

/// The migration of the file.
const TABLES: Migration = Migration {
    version: 1,
    name: "create_things",
    sql: "CREATE TABLE things (id UUID PRIMARY KEY NOT NULL, name TEXT NOT NULL, small INTEGER, large BIGINT, yes BOOLEAN NOT NULL, raw BYTEA, details TEXT, part DOUBLE PRECISION);",
};

#[derive(Debug, PartialEq, FromRow)]
struct Thing {
    id: Uuid,
    name: String,
    small: Option<i32>,
    large: Option<i64>,
    yes: bool,
    raw: Option<Vec<u8>>,
    details: Option<serde_json::Value>,
    part: Option<f64>,
}

fn thing(id: Uuid) -> Thing {
    let details = serde_json::json!({"a": [1, null, "ü"], "b": true});
    Thing {
        id,
        name: "näme".into(),
        small: Some(-7),
        large: Some(i64::MAX),
        yes: true,
        raw: Some(vec![0, 1, 255]),
        details: Some(details),
        part: Some(0.5),
    }
}

async fn open(folder: &std::path::Path) -> Store {
    let keyring = Keyring::open(&folder.join("key")).expect("a keyring");
    let databases = Databases::Embedded(folder.into());
    Store::open(&databases, "test", keyring, &[("test", &[TABLES])]).await.expect("opens")
}

#[tokio::test]
async fn a_file_of_an_earlier_version_is_read() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("test.db"), include_bytes!("by_sea_orm.db")).expect("written");
    let store = open(folder.path()).await;
    let things: Vec<Thing> =
        store.read().all(unscoped!("test", "SELECT :columns FROM things ORDER BY id DESC")).await.expect("reads");
    let id = Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0001);
    let (id_2, name) = (Uuid::from_u128(2), String::new());
    let empty = Thing { id: id_2, name, small: None, large: None, yes: false, raw: None, details: None, part: None };
    assert_eq!(things, [thing(id), empty]);
    let found = unscoped!("test", "SELECT :columns FROM things WHERE id = :id AND yes = :yes", id, yes = true);
    assert_eq!(store.read().first::<Thing>(found).await.expect("reads"), Some(thing(id)));
}

#[tokio::test]
async fn values_are_stored_as_by_an_earlier_version() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("test.db"), include_bytes!("by_sea_orm.db")).expect("written");
    let store = open(folder.path()).await;
    let Thing { id, name, small, large, yes, raw, details, part } = thing(Uuid::from_u128(3));
    let tx = store.begin().await.expect("begins");
    tx.run(unscoped!(
        "test",
        "INSERT INTO things (id, name, small, large, yes, raw, details, part) \
         VALUES (:id, :name, :small, :large, :yes, :raw, :details, :part)",
        id,
        name,
        small,
        large,
        yes,
        raw,
        details,
        part
    ))
    .await
    .expect("inserts");
    tx.commit().await.expect("commits");
    // `IS` compares storage classes, too.
    let same = unscoped!(
        "test",
        "SELECT COUNT(*) FROM things a JOIN things b ON a.name = b.name AND a.small IS b.small AND a.large IS b.large \
         AND a.yes IS b.yes AND a.raw IS b.raw AND a.details IS b.details AND a.part IS b.part \
         AND typeof(a.id) = typeof(b.id) AND length(a.id) = length(b.id) WHERE a.id < b.id"
    );
    assert_eq!(store.read().value::<i64>(same).await.expect("reads"), Some(1));
}
