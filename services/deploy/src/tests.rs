//! Commands that race, on a real database: whatever is committed later stands.

use std::path::Path;
use std::sync::Arc;

use capsule_blob::Blobs;
use capsule_builder::planner::Planner;
use capsule_builder::{Builder, Settings, Toolchains, Versions};
use capsule_bus::{Bus, Context, SystemGrant};
use capsule_contracts::access::EnvironmentKind;
use capsule_contracts::deploy::{Phase, Status};
use capsule_contracts::project::{Configuration, ServicesRemoved};
use capsule_contracts::{Problem, Timestamp, Uuid};
use capsule_runtime::{Limits, ProcessRuntime};
use capsule_store::{Databases, Keyring, Statement, Store, unscoped};

use crate::deployments::{self, Environment, New, Row, Sealed};
use crate::phases::{Failure, active};
use crate::placements::{self, Placement};
use crate::{Deploys, Ingress, MIGRATIONS, NAME, Options, commands, controller, reconcile, removal};

const ORGANIZATION: Uuid = Uuid::from_u128(1);
const PROJECT: Uuid = Uuid::from_u128(2);
const SERVICE: Uuid = Uuid::from_u128(3);
const ENVIRONMENT: Uuid = Uuid::from_u128(4);

/// A deployment row that is in no database.
pub fn row(id: u128, service: Uuid) -> Row {
    Row {
        id: Uuid::from_u128(id),
        organization_id: ORGANIZATION,
        service_id: service,
        environment_id: ENVIRONMENT,
        number: 1,
        status: "pending".into(),
        phase: "queued".into(),
        trigger_kind: "upload".into(),
        upload_digest: String::new(),
        release_id: Uuid::from_u128(id),
        plan: None,
        sealed_environment: Vec::new(),
        cancelling: false,
        error: None,
        created_by: Uuid::nil(),
        created_at: 0,
        finished_at: None,
        next_attempt_at: 0,
    }
}

/// The deploy service without its loops and without an ingress.
async fn deploys(data: &Path) -> Arc<Deploys> {
    let databases = Databases::Embedded(data.into());
    let options = Options {
        data: data.into(),
        databases: databases.clone(),
        program: "/nonexistent".into(),
        listen: "127.0.0.1:0".parse().expect("an address"),
        base_domain: "localhost".into(),
        public_url: None,
        trusted_proxies: Vec::new(),
        build_limits: Limits::default(),
        build_cache_bytes: 0,
        run_limits: Limits::default(),
        disk_reserve_bytes: 0,
        builds: 1,
        upload_bytes: 1 << 20,
        host_quarantine_days: 30,
        toolchains: Settings::default(),
        relaxations: Default::default(),
        health_seconds: 1,
        drain_seconds: 1,
    };
    let keyring = Keyring::open(&data.join("key")).expect("a key");
    let runtime = ProcessRuntime::new(data.join("run/i"), "/nonexistent".into()).expect("a directory");
    let toolchains = Toolchains::discover(&data.join("toolchains"), Settings::default()).expect("a directory");
    Arc::new(Deploys {
        store: Arc::new(Store::open(&databases, NAME, keyring, MIGRATIONS).await.expect("opens")),
        bus: Bus::new(),
        blobs: Blobs::open(&data.join("blobs")).expect("a directory"),
        builder: Builder { runtime: runtime.clone(), toolchains, limits: Limits::default(), layers: data.join("layers") },
        planner: Planner::new("/nonexistent".into(), &data.join("run/plans"), 1).expect("a directory"),
        versions: Versions::default(),
        runtime,
        ingress: Ingress::new(&options),
        controller: controller::Controller::new(1),
        publishing: tokio::sync::Mutex::new(()),
        options,
    })
}

fn grant() -> SystemGrant {
    SystemGrant::new(ORGANIZATION, "test")
}

fn context() -> Context {
    Context::background("test")
}

fn configuration() -> Configuration {
    Configuration {
        organization_id: ORGANIZATION,
        project_id: PROJECT,
        service_id: SERVICE,
        service_name: "app".into(),
        environment_id: ENVIRONMENT,
        environment_name: "production".into(),
        environment_kind: EnvironmentKind::Production,
        archived: false,
        environment: Default::default(),
        secrets: Vec::new(),
    }
}

/// Asks for a deployment.
async fn ask(deploys: &Deploys) -> Result<Row, Problem> {
    let tx = deploys.store.begin().await?;
    let placement = placements::ensure(deploys, &tx, &grant(), &configuration()).await?;
    let new = New {
        trigger: "upload",
        upload_digest: String::new(),
        release: None,
        environment: Environment::Plain(Sealed::default()),
        created_by: Uuid::nil(),
    };
    let row = deployments::insert(deploys, &tx, &context(), &grant(), &placement, new).await?;
    tx.commit().await?;
    Ok(row)
}

async fn run(deploys: &Deploys, statement: Statement) {
    let tx = deploys.store.begin().await.expect("begins");
    tx.run(statement).await.expect("runs");
    tx.commit().await.expect("committed");
}

/// A deployment whose candidate is healthy: the switch comes next.
async fn before_switch(deploys: &Deploys) -> Row {
    let row = ask(deploys).await.expect("accepted");
    let placement = placement(deploys).await;
    let row = deployments::enter(deploys, &placement, &row, Phase::HealthCheck, None).await.ok().expect("it goes on");
    let insert = unscoped!(
        "test",
        "INSERT INTO instances (id, organization_id, service_id, environment_id, deployment_id, process, port, role, created_at) \
         VALUES ($1, $2, $3, $4, $5, 'web', 1, 'candidate', 0)",
        format!("i{}", row.number),
        ORGANIZATION,
        SERVICE,
        ENVIRONMENT,
        row.id
    );
    run(deploys, insert).await;
    row
}

async fn placement(deploys: &Deploys) -> Placement {
    placements::get(deploys, &grant(), SERVICE, ENVIRONMENT).await.expect("there")
}

async fn halt(deploys: &Deploys) {
    commands::halt(deploys, &context(), &grant(), SERVICE, "production").await.expect("stopped");
}

async fn status(deploys: &Deploys, row: &Row) -> (String, bool) {
    let row = deployments::get(deploys, &grant(), row.id).await.expect("there");
    (row.status, row.cancelling)
}

async fn role(deploys: &Deploys, row: &Row) -> String {
    let role = unscoped!("test", "SELECT role FROM instances WHERE deployment_id = $1", row.id);
    deploys.store.read().value(role).await.expect("answers").expect("there")
}

/// A service that serves, and the deployment that does.
async fn serving(deploys: &Deploys) -> Row {
    let row = before_switch(deploys).await;
    active::switch(deploys, &row).await.ok().expect("switched");
    active::settle(deploys, &row).await.expect("settled");
    assert_eq!((status(deploys, &row).await.0.as_str(), role(deploys, &row).await.as_str()), ("running", "serving"));
    row
}

#[tokio::test]
async fn a_stop_before_the_switch_of_a_rollout_cancels_it() {
    let data = tempfile::tempdir().expect("a folder");
    let deploys = deploys(data.path()).await;
    let old = serving(&deploys).await;
    let new = before_switch(&deploys).await;
    let queued = ask(&deploys).await.expect("accepted");
    halt(&deploys).await;
    assert_eq!(status(&deploys, &queued).await, ("cancelled".into(), false), "what is queued is settled at once");
    assert_eq!(status(&deploys, &new).await, ("deploying".into(), true));
    assert!(matches!(active::switch(&deploys, &new).await, Err(Failure::Cancelled)));
    for row in [&new, &queued] {
        let entered = deployments::enter(&deploys, &placement(&deploys).await, row, Phase::Active, None).await;
        assert!(matches!(entered, Err(Failure::Cancelled)));
    }
    // The routing table cannot be published here.
    let _ = controller::settle(&deploys, &new, Status::Cancelled, "cancelled").await;
    assert_eq!(status(&deploys, &new).await.0, "cancelled");
    assert_eq!((role(&deploys, &old).await.as_str(), role(&deploys, &new).await.as_str()), ("retiring", "retiring"));
    let stopped = placement(&deploys).await;
    assert_eq!((stopped.wanted.as_str(), stopped.active_deployment_id), ("stopped", Some(old.id)));
    // What is asked for later starts it.
    let later = before_switch(&deploys).await;
    active::switch(&deploys, &later).await.ok().expect("switched");
    assert_eq!(placement(&deploys).await.wanted, "running");
}

#[tokio::test]
async fn a_stop_after_the_switch_stands_when_the_switch_is_repeated() {
    let data = tempfile::tempdir().expect("a folder");
    let deploys = deploys(data.path()).await;
    let row = before_switch(&deploys).await;
    active::switch(&deploys, &row).await.ok().expect("switched");
    halt(&deploys).await;
    // The server ended before the deployment was settled, and its worker begins the phase again.
    active::switch(&deploys, &row).await.ok().expect("it is switched");
    active::settle(&deploys, &row).await.expect("settled");
    assert_eq!(status(&deploys, &row).await, ("running".into(), false), "it ran");
    assert_eq!((placement(&deploys).await.wanted.as_str(), role(&deploys, &row).await.as_str()), ("stopped", "retiring"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_at_the_same_time_as_the_switch_always_wins() {
    let data = tempfile::tempdir().expect("a folder");
    let deploys = deploys(data.path()).await;
    for _ in 0..40 {
        let row = before_switch(&deploys).await;
        let switching = tokio::spawn({
            let (deploys, row) = (deploys.clone(), row.clone());
            async move {
                if active::switch(&deploys, &row).await.is_ok() {
                    let _ = active::settle(&deploys, &row).await;
                }
            }
        });
        halt(&deploys).await;
        switching.await.expect("ends");
        let _ = controller::settle(&deploys, &row, Status::Cancelled, "cancelled").await;
        assert_eq!(placement(&deploys).await.wanted, "stopped");
        assert_eq!(role(&deploys, &row).await, "retiring");
        assert!(matches!(status(&deploys, &row).await.0.as_str(), "cancelled" | "running"));
    }
}

#[tokio::test]
async fn instances_that_must_not_run_are_retired_whatever_made_them() {
    let data = tempfile::tempdir().expect("a folder");
    let deploys = deploys(data.path()).await;
    let row = serving(&deploys).await;
    reconcile::enforce(&deploys).await.expect("enforced");
    assert_eq!(role(&deploys, &row).await, "serving");
    run(&deploys, unscoped!("test", "UPDATE placements SET wanted = 'stopped'")).await;
    reconcile::enforce(&deploys).await.expect("enforced");
    assert_eq!(role(&deploys, &row).await, "retiring");
    let candidate = before_switch(&deploys).await;
    reconcile::enforce(&deploys).await.expect("enforced");
    assert_eq!(role(&deploys, &candidate).await, "candidate", "it is being started again");
    run(&deploys, unscoped!("test", "UPDATE deployments SET finished_at = 1 WHERE id = $1", candidate.id)).await;
    reconcile::enforce(&deploys).await.expect("enforced");
    assert_eq!(role(&deploys, &candidate).await, "retiring");
}

#[tokio::test]
async fn a_service_is_started_once_however_often_it_is_asked_for() {
    let data = tempfile::tempdir().expect("a folder");
    let deploys = deploys(data.path()).await;
    serving(&deploys).await;
    let is_to_be_started = async || {
        let tx = deploys.store.begin().await.expect("begins");
        commands::is_to_be_started(&tx, &grant(), &placement(&deploys).await).await.expect("answers")
    };
    assert!(!is_to_be_started().await, "it runs");
    halt(&deploys).await;
    assert!(is_to_be_started().await);
    ask(&deploys).await.expect("accepted");
    assert!(!is_to_be_started().await, "it is being started");
    halt(&deploys).await;
    assert!(is_to_be_started().await, "that was cancelled");
}

#[tokio::test]
async fn what_was_removed_is_not_brought_back_by_a_deployment() {
    for (service_id, environment_id) in [(Some(SERVICE), None), (None, Some(ENVIRONMENT)), (None, None)] {
        for deployed_before in [true, false] {
            let data = tempfile::tempdir().expect("a folder");
            let deploys = deploys(data.path()).await;
            let row = if deployed_before { Some(before_switch(&deploys).await) } else { None };
            let event = ServicesRemoved { organization_id: ORGANIZATION, project_id: PROJECT, service_id, environment_id };
            let tx = deploys.store.begin().await.expect("begins");
            removal::services(&deploys, &tx, event).await.expect("marked");
            tx.commit().await.expect("committed");
            // Its configuration was read before it was removed.
            assert_eq!(ask(&deploys).await.expect_err("removed").code, "not_found");
            if let Some(row) = row {
                assert!(matches!(active::switch(&deploys, &row).await, Err(Failure::Cancelled)));
                assert!(status(&deploys, &row).await.1, "it is being cancelled");
                reconcile::enforce(&deploys).await.expect("enforced");
                assert_eq!(role(&deploys, &row).await, "retiring");
            }
            let later = Timestamp::now().plus_seconds(8 * 24 * 3600);
            removal::purge(&deploys, later).await.expect("purged");
            let kept = unscoped!("test", "SELECT COUNT(*) FROM removals");
            assert_eq!(deploys.store.read().value::<i64>(kept).await.expect("answers"), Some(0));
        }
    }
}

#[tokio::test]
async fn a_settled_deployment_stays_as_it_is() {
    let data = tempfile::tempdir().expect("a folder");
    let deploys = deploys(data.path()).await;
    let row = serving(&deploys).await;
    let before = before_switch(&deploys).await;
    let _ = controller::settle(&deploys, &before, Status::Failed, "because").await;
    for row in [&row, &before] {
        let is = status(&deploys, row).await;
        let _ = controller::settle(&deploys, row, Status::Cancelled, "cancelled").await;
        let entered = deployments::enter(&deploys, &placement(&deploys).await, row, Phase::Building, None).await;
        assert!(matches!(entered, Err(Failure::Cancelled)));
        assert!(deployments::goes_on(&deploys.store.begin().await.expect("begins"), row).await.is_ok_and(|goes_on| !goes_on));
        assert_eq!(status(&deploys, row).await, is);
    }
    // One that was read before it changed cannot be settled by what was read.
    let stale = ask(&deploys).await.expect("accepted");
    deployments::enter(&deploys, &placement(&deploys).await, &stale, Phase::Building, None).await.ok().expect("it goes on");
    let tx = deploys.store.begin().await.expect("begins");
    let placement = placement(&deploys).await;
    let refused = deployments::finish(&deploys, &tx, &context(), &placement, &stale, Status::Cancelled, None).await;
    assert_eq!(refused.expect_err("it changed").code, "conflict");
}

#[tokio::test]
async fn a_phase_that_ends_the_server_is_given_up_after_ten_times() {
    let data = tempfile::tempdir().expect("a folder");
    let deploys = deploys(data.path()).await;
    let row = ask(&deploys).await.expect("accepted");
    let placement = placement(&deploys).await;
    let mut delays = Vec::new();
    for _ in 0..10 {
        // The first phase succeeds, the second does not end: as after a crash, all begins anew.
        let row = deployments::enter(&deploys, &placement, &row, Phase::PullingSource, None).await.ok().expect("tried");
        deployments::enter(&deploys, &placement, &row, Phase::Building, Some(Phase::PullingSource)).await.ok().expect("tried");
        let next = deployments::get(&deploys, &grant(), row.id).await.expect("there").next_attempt_at;
        delays.push((next - Timestamp::now().0 + 500_000).div_euclid(1_000_000));
    }
    assert!(delays[0] == 0 && delays.is_sorted() && delays[9] > 200, "{delays:?}");
    let row = deployments::enter(&deploys, &placement, &row, Phase::PullingSource, None).await.ok().expect("it always succeeded");
    let Err(Failure::Failed(why)) = deployments::enter(&deploys, &placement, &row, Phase::Building, None).await else {
        panic!("it is tried for ever")
    };
    assert!(why.contains("ended 10 times") && why.contains("building"), "{why}");
}

#[tokio::test]
async fn attempts_that_the_platform_hinders_are_bounded_and_are_no_ends_of_the_server() {
    let data = tempfile::tempdir().expect("a folder");
    let deploys = deploys(data.path()).await;
    let row = ask(&deploys).await.expect("accepted");
    let placement = placement(&deploys).await;
    let problem = Problem::unavailable("The ingress does not answer.");
    let mut delays = Vec::new();
    for attempt in 1.. {
        let row = deployments::enter(&deploys, &placement, &row, Phase::HealthCheck, None).await.ok().expect("tried");
        let tx = deploys.store.begin().await.expect("begins");
        let given_up = crate::attempts::hinder(&tx, &row, Phase::HealthCheck, &problem).await.expect("counted");
        tx.commit().await.expect("committed");
        let next = deployments::get(&deploys, &grant(), row.id).await.expect("there").next_attempt_at;
        delays.push(next - Timestamp::now().0);
        if let Some(why) = given_up {
            assert!(attempt == 20 && why.contains("The ingress does not answer."), "{attempt}: {why}");
            break;
        }
    }
    assert!(delays[0] > 0 && delays[19] > delays[3], "{delays:?}");
}

#[tokio::test]
async fn what_nothing_refers_to_is_removed_by_the_time_that_is_given() {
    let data = tempfile::tempdir().expect("a folder");
    let deploys = deploys(data.path()).await;
    let mut writer = deploys.blobs.begin("one").await.expect("begun");
    writer.write(b"left behind").await.expect("written");
    let (digest, _) = writer.commit().await.expect("kept");
    let mut writer = deploys.blobs.begin("two").await.expect("begun");
    writer.write(b"used").await.expect("written");
    let (used, _) = writer.commit().await.expect("kept");
    let insert = unscoped!(
        "test",
        "INSERT INTO uploads (id, organization_id, service_id, digest, bytes, created_at) VALUES ($1, $2, $3, $4, 4, $5)",
        Uuid::from_u128(9),
        ORGANIZATION,
        SERVICE,
        used.as_str(),
        Timestamp::now().0
    );
    run(&deploys, insert).await;
    let row = ask(&deploys).await.expect("accepted");
    let left = data.path().join("work/left");
    for directory in [&left, &deploys.work_directory(row.id)] {
        std::fs::create_dir_all(directory.join("source")).expect("made");
    }
    let is_there = || [deploys.blobs.path(&digest).is_ok(), deploys.blobs.path(&used).is_ok(), left.exists()];
    for (hours, expected) in [(0, [true, true, true]), (2, [false, true, false]), (25, [false, false, false])] {
        reconcile::purge(&deploys, Timestamp::now().plus_seconds(hours * 3600)).await.expect("purged");
        assert_eq!(is_there(), expected, "after {hours} hours");
    }
    assert!(deploys.work_directory(row.id).exists(), "it is worked on");
}
