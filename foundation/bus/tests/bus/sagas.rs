//! Sagas on a real database: done to the end, or undone, wherever they were left.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use capsule_bus::saga::{self, Run, Saga, Step};
use capsule_bus::{Bus, Context, Router, Service};
use capsule_contracts::project::Place;
use capsule_contracts::{Problem, Target, Uuid};
use capsule_store::{Store, unscoped};

use crate::open;

struct Toy {
    store: Arc<Store>,
    bus: Bus,
    log: Mutex<Vec<String>>,
    /// What the last step answers.
    last: Result<(), Problem>,
}

impl Service for Toy {
    fn store(&self) -> &Arc<Store> {
        &self.store
    }
    fn bus(&self) -> &Bus {
        &self.bus
    }
    async fn locate(&self, _: &Target) -> Result<Option<Place>, Problem> {
        Ok(None)
    }
}

impl Toy {
    fn say(&self, run: &Run, what: &str) -> Result<(), Problem> {
        let input: String = run.input()?;
        self.log.lock().expect("alive").push(format!("{what} {input}"));
        Ok(())
    }
}

static SAGA: Saga<Toy> = Saga {
    name: "toy",
    patience: Duration::from_secs(60),
    steps: &[
        Step {
            name: "first",
            act: |toy, run| Box::pin(async move { toy.say(run, "first") }),
            undo: Some(|toy, run| Box::pin(async move { toy.say(run, "undo first") })),
        },
        Step {
            name: "last",
            act: |toy, run| {
                Box::pin(async move {
                    toy.say(run, "last")?;
                    toy.last.clone()
                })
            },
            undo: Some(|toy, run| Box::pin(async move { toy.say(run, "undo last") })),
        },
    ],
};

async fn toy(directory: &std::path::Path, last: Result<(), Problem>) -> Arc<Toy> {
    let store = open(directory, "toy").await;
    Arc::new(Toy { store, bus: Bus::new(), log: Mutex::default(), last })
}

async fn begin(toy: &Toy) -> Uuid {
    let tx = toy.store.begin().await.expect("begins");
    let id = saga::begin(&tx, &Context::background("toy"), &SAGA, &"it").await.expect("begun");
    tx.commit().await.expect("committed");
    id
}

async fn state(toy: &Toy, id: Uuid) -> String {
    loop {
        let ended = unscoped!("test", "SELECT state FROM sagas WHERE id = $1 AND ended_at IS NOT NULL", id);
        if let Some(state) = toy.store.read().value::<String>(ended).await.expect("answers") {
            return state;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_succeeds_is_done_step_by_step() {
    let directory = tempfile::tempdir().expect("a folder");
    let toy = toy(directory.path(), Ok(())).await;
    Router::new(toy.clone()).saga(&SAGA).start();
    let id = begin(&toy).await;
    assert_eq!(state(&toy, id).await, "done");
    assert_eq!(*toy.log.lock().expect("alive"), ["first it", "last it"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_never_succeed_is_undone_last_step_first() {
    let directory = tempfile::tempdir().expect("a folder");
    let toy = toy(directory.path(), Err(Problem::conflict("No."))).await;
    Router::new(toy.clone()).saga(&SAGA).start();
    let id = begin(&toy).await;
    assert_eq!(state(&toy, id).await, "undone");
    assert_eq!(*toy.log.lock().expect("alive"), ["first it", "last it", "undo last it", "undo first it"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_left_is_gone_on_with() {
    let directory = tempfile::tempdir().expect("a folder");
    let first = toy(directory.path(), Ok(())).await;
    let id = begin(&first).await;
    let moved = unscoped!("test", "UPDATE sagas SET step = 1 WHERE id = $1", id);
    let tx = first.store.begin().await.expect("begins");
    tx.run(moved).await.expect("written");
    tx.commit().await.expect("committed");
    drop(first);
    let second = toy(directory.path(), Ok(())).await;
    Router::new(second.clone()).saga(&SAGA).start();
    assert_eq!(state(&second, id).await, "done");
    assert_eq!(*second.log.lock().expect("alive"), ["last it"]);
}
