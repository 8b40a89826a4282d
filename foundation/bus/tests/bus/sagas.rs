//! Sagas on a real database.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use capsule_bus::saga::{self, Run, Saga, Step};
use capsule_bus::{Bus, Context, Router};
use capsule_contracts::{Problem, Uuid};
use capsule_store::unscoped;

use crate::{TestService, open_service};

struct Steps {
    log: Mutex<Vec<String>>,
    /// The outcome of the last step.
    last: Result<(), Problem>,
}

impl Steps {
    fn record(&self, run: &Run, action: &str) -> Result<(), Problem> {
        let input: String = run.input()?;
        self.log.lock().expect("not poisoned").push(format!("{action} {input}"));
        Ok(())
    }
}

type SagaService = TestService<Steps>;

static SAGA: Saga<SagaService> = Saga {
    name: "test",
    timeout: Duration::from_secs(60),
    steps: &[
        Step {
            name: "first",
            act: |service, run| Box::pin(async move { service.state.record(run, "first") }),
            undo: Some(|service, run| Box::pin(async move { service.state.record(run, "undo first") })),
        },
        Step {
            name: "last",
            act: |service, run| {
                Box::pin(async move {
                    service.state.record(run, "last")?;
                    service.state.last.clone()
                })
            },
            undo: Some(|service, run| Box::pin(async move { service.state.record(run, "undo last") })),
        },
    ],
};

async fn saga_service(directory: &Path, last: Result<(), Problem>) -> Arc<SagaService> {
    open_service(directory, &Bus::new(), "test", Steps { log: Mutex::default(), last }).await
}

async fn begin(service: &SagaService) -> Uuid {
    let tx = service.store.begin().await.expect("begins");
    let id = saga::begin(&tx, &Context::background("test"), &SAGA, &"it").await.expect("started");
    tx.commit().await.expect("committed");
    id
}

async fn final_state(service: &SagaService, id: Uuid) -> String {
    loop {
        let ended = unscoped!("test", "SELECT state FROM sagas WHERE id = :id AND ended_at IS NOT NULL", id);
        if let Some(state) = service.store.read().value::<String>(ended).await.expect("answers") {
            return state;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saga_runs_its_steps_in_order() {
    let directory = tempfile::tempdir().expect("a folder");
    let service = saga_service(directory.path(), Ok(())).await;
    Router::new(service.clone()).saga(&SAGA).start();
    let id = begin(&service).await;
    assert_eq!(final_state(&service, id).await, "done");
    assert_eq!(*service.state.log.lock().expect("not poisoned"), ["first it", "last it"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_permanent_failure_undoes_the_steps_in_reverse_order() {
    let directory = tempfile::tempdir().expect("a folder");
    let service = saga_service(directory.path(), Err(Problem::conflict("No."))).await;
    Router::new(service.clone()).saga(&SAGA).start();
    let id = begin(&service).await;
    assert_eq!(final_state(&service, id).await, "undone");
    assert_eq!(*service.state.log.lock().expect("not poisoned"), ["first it", "last it", "undo last it", "undo first it"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saga_resumes_at_its_stored_step_after_a_restart() {
    let directory = tempfile::tempdir().expect("a folder");
    let first = saga_service(directory.path(), Ok(())).await;
    let id = begin(&first).await;
    let moved = unscoped!("test", "UPDATE sagas SET step = 1 WHERE id = :id", id);
    let tx = first.store.begin().await.expect("begins");
    tx.run(moved).await.expect("written");
    tx.commit().await.expect("committed");
    drop(first);
    let second = saga_service(directory.path(), Ok(())).await;
    Router::new(second.clone()).saga(&SAGA).start();
    assert_eq!(final_state(&second, id).await, "done");
    assert_eq!(*second.state.log.lock().expect("not poisoned"), ["last it"]);
}
