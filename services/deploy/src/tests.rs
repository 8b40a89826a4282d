//! Races between commands, on a real database: the later commit has precedence.

use std::path::Path;
use std::sync::Arc;

use capsule_blob::Blobs;
use capsule_builder::planner::Planner;
use capsule_builder::{Builder, Settings, Toolchains, Versions};
use capsule_bus::{Bus, Context};
use capsule_contracts::access::EnvironmentKind;
use capsule_contracts::deploy::{Phase, Status};
use capsule_contracts::project::{Configuration, ServicesRemoved};
use capsule_contracts::{Problem, Timestamp, Uuid};
use capsule_runtime::{Limits, ProcessRuntime};
use capsule_store::{Databases, Keyring, Scope, Statement, Store, unscoped};

use crate::deployments::{self, Environment, EnvironmentSnapshot, NewDeployment, Row};
use crate::phases::{Failure, active};
use crate::service_environments::{self, ServiceEnvironment};
use crate::{DeployService, Ingress, MIGRATIONS, NAME, Options, commands, controller, reconcile, removal};

const ORGANIZATION: Uuid = Uuid::from_u128(1);
const PROJECT: Uuid = Uuid::from_u128(2);
const SERVICE: Uuid = Uuid::from_u128(3);
const ENVIRONMENT: Uuid = Uuid::from_u128(4);

/// A deployment row that is in no database.
pub fn row(id: u128, service_id: Uuid) -> Row {
    Row {
        id: Uuid::from_u128(id),
        organization_id: ORGANIZATION,
        service_id,
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

/// The deploy service without its background tasks and without an ingress.
async fn open_service(data: &Path) -> Arc<DeployService> {
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
    Arc::new(DeployService {
        store: Arc::new(Store::open(&databases, NAME, keyring, MIGRATIONS).await.expect("opens")),
        bus: Bus::new(),
        blobs: Blobs::open(&data.join("blobs")).expect("a directory"),
        builder: Builder { runtime: runtime.clone(), toolchains, limits: Limits::default(), layers: data.join("layers") },
        planner: Planner::new("/nonexistent".into(), &data.join("run/plans"), 1).expect("a directory"),
        versions: Versions::default(),
        runtime,
        ingress: Ingress::new(&options),
        controller: controller::Controller::new(1),
        publish_lock: tokio::sync::Mutex::new(()),
        options,
    })
}

/// Access to an organization in tests.
pub struct TestScope(pub Uuid);

impl Scope for TestScope {
    fn organization(&self) -> Uuid {
        self.0
    }
}

fn grant() -> TestScope {
    TestScope(ORGANIZATION)
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

/// Inserts a deployment.
async fn deploy(service: &DeployService) -> Result<Row, Problem> {
    let tx = service.store.begin().await?;
    let service_environment = service_environments::ensure(service, &tx, &grant(), &configuration()).await?;
    let new = NewDeployment {
        trigger: "upload",
        upload_digest: String::new(),
        release: None,
        environment: Environment::Current(EnvironmentSnapshot::default()),
        created_by: Uuid::nil(),
    };
    let row = deployments::insert(service, &tx, &context(), &grant(), &service_environment, new).await?;
    tx.commit().await?;
    Ok(row)
}

async fn run(service: &DeployService, statement: Statement) {
    let tx = service.store.begin().await.expect("begins");
    tx.run(statement).await.expect("runs");
    tx.commit().await.expect("committed");
}

/// A deployment whose candidate is healthy, before its promotion.
async fn ready_to_promote(service: &DeployService) -> Row {
    let row = deploy(service).await.expect("accepted");
    let service_environment = service_environment(service).await;
    let row = deployments::enter_phase(service, &grant(), &service_environment, &row, Phase::HealthCheck, None)
        .await
        .ok()
        .expect("it goes on");
    let insert = unscoped!(
        "test",
        "INSERT INTO instances (id, organization_id, service_id, environment_id, deployment_id, process, port, role, created_at) \
         VALUES (:id, :organization_id, :service_id, :environment_id, :deployment_id, 'web', 1, 'candidate', 0)",
        id = format!("i{}", row.number),
        organization_id = ORGANIZATION,
        service_id = SERVICE,
        environment_id = ENVIRONMENT,
        deployment_id = row.id
    );
    run(service, insert).await;
    row
}

async fn service_environment(service: &DeployService) -> ServiceEnvironment {
    service_environments::get(service, &grant(), SERVICE, ENVIRONMENT).await.expect("there")
}

async fn stop(service: &DeployService) {
    commands::stop_service(service, &context(), &grant(), SERVICE, "production").await.expect("stopped");
}

async fn status(service: &DeployService, row: &Row) -> (String, bool) {
    let row = deployments::get(service, &grant(), row.id).await.expect("there");
    (row.status, row.cancelling)
}

async fn role(service: &DeployService, row: &Row) -> String {
    let role = unscoped!("test", "SELECT role FROM instances WHERE deployment_id = :deployment_id", deployment_id = row.id);
    service.store.read().value(role).await.expect("answers").expect("there")
}

/// A deployment that is running.
async fn serving(service: &DeployService) -> Row {
    let row = ready_to_promote(service).await;
    active::promote(service, &grant(), &row).await.ok().expect("promoted");
    active::settle(service, &grant(), &row).await.expect("settled");
    assert_eq!((status(service, &row).await.0.as_str(), role(service, &row).await.as_str()), ("running", "serving"));
    row
}

#[tokio::test]
async fn a_stop_before_the_promotion_cancels_a_rollout() {
    let data = tempfile::tempdir().expect("a folder");
    let service = open_service(data.path()).await;
    let old = serving(&service).await;
    let new = ready_to_promote(&service).await;
    let queued = deploy(&service).await.expect("accepted");
    stop(&service).await;
    assert_eq!(status(&service, &queued).await, ("cancelled".into(), false), "a queued deployment is settled at once");
    assert_eq!(status(&service, &new).await, ("deploying".into(), true));
    assert!(matches!(active::promote(&service, &grant(), &new).await, Err(Failure::Cancelled)));
    for row in [&new, &queued] {
        let entered =
            deployments::enter_phase(&service, &grant(), &service_environment(&service).await, row, Phase::Active, None).await;
        assert!(matches!(entered, Err(Failure::Cancelled)));
    }
    // The routing table cannot be published here.
    let _ = controller::settle(&service, &grant(), &new, Status::Cancelled, "cancelled").await;
    assert_eq!(status(&service, &new).await.0, "cancelled");
    assert_eq!((role(&service, &old).await.as_str(), role(&service, &new).await.as_str()), ("retiring", "retiring"));
    let stopped = service_environment(&service).await;
    assert_eq!((stopped.desired_state.as_str(), stopped.active_deployment_id), ("stopped", Some(old.id)));
    // A later deployment starts the service.
    let later = ready_to_promote(&service).await;
    active::promote(&service, &grant(), &later).await.ok().expect("promoted");
    assert_eq!(service_environment(&service).await.desired_state, "running");
}

#[tokio::test]
async fn a_stop_after_the_promotion_stays_in_force_when_the_promotion_is_repeated() {
    let data = tempfile::tempdir().expect("a folder");
    let service = open_service(data.path()).await;
    let row = ready_to_promote(&service).await;
    active::promote(&service, &grant(), &row).await.ok().expect("promoted");
    stop(&service).await;
    // The server crashed before the deployment was settled, and its worker begins the phase again.
    active::promote(&service, &grant(), &row).await.ok().expect("promoted before");
    active::settle(&service, &grant(), &row).await.expect("settled");
    assert_eq!(status(&service, &row).await, ("running".into(), false), "it ran");
    assert_eq!(
        (service_environment(&service).await.desired_state.as_str(), role(&service, &row).await.as_str()),
        ("stopped", "retiring")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_that_races_with_the_promotion_stops_the_service() {
    let data = tempfile::tempdir().expect("a folder");
    let service = open_service(data.path()).await;
    for _ in 0..40 {
        let row = ready_to_promote(&service).await;
        let promoting = tokio::spawn({
            let (service, row) = (service.clone(), row.clone());
            async move {
                if active::promote(&service, &grant(), &row).await.is_ok() {
                    let _ = active::settle(&service, &grant(), &row).await;
                }
            }
        });
        stop(&service).await;
        promoting.await.expect("ends");
        let _ = controller::settle(&service, &grant(), &row, Status::Cancelled, "cancelled").await;
        assert_eq!(service_environment(&service).await.desired_state, "stopped");
        assert_eq!(role(&service, &row).await, "retiring");
        assert!(matches!(status(&service, &row).await.0.as_str(), "cancelled" | "running"));
    }
}

#[tokio::test]
async fn instances_that_must_not_run_are_retired() {
    let data = tempfile::tempdir().expect("a folder");
    let service = open_service(data.path()).await;
    let row = serving(&service).await;
    reconcile::retire_unwanted(&service).await.expect("retired");
    assert_eq!(role(&service, &row).await, "serving");
    run(&service, unscoped!("test", "UPDATE placements SET wanted = 'stopped'")).await;
    reconcile::retire_unwanted(&service).await.expect("retired");
    assert_eq!(role(&service, &row).await, "retiring");
    let candidate = ready_to_promote(&service).await;
    reconcile::retire_unwanted(&service).await.expect("retired");
    assert_eq!(role(&service, &candidate).await, "candidate", "it is being started again");
    run(&service, unscoped!("test", "UPDATE deployments SET finished_at = 1 WHERE id = :id", id = candidate.id)).await;
    reconcile::retire_unwanted(&service).await.expect("retired");
    assert_eq!(role(&service, &candidate).await, "retiring");
}

#[tokio::test]
async fn repeated_starts_start_a_service_once() {
    let data = tempfile::tempdir().expect("a folder");
    let service = open_service(data.path()).await;
    serving(&service).await;
    let needs_start = async || {
        let tx = service.store.begin().await.expect("begins");
        commands::needs_start(&tx, &grant(), &service_environment(&service).await).await.expect("answers")
    };
    assert!(!needs_start().await, "it runs");
    stop(&service).await;
    assert!(needs_start().await);
    deploy(&service).await.expect("accepted");
    assert!(!needs_start().await, "it is being started");
    stop(&service).await;
    assert!(needs_start().await, "that was cancelled");
}

#[tokio::test]
async fn a_deployment_does_not_revert_a_removal() {
    for (service_id, environment_id) in [(Some(SERVICE), None), (None, Some(ENVIRONMENT)), (None, None)] {
        for deployed_before in [true, false] {
            let data = tempfile::tempdir().expect("a folder");
            let service = open_service(data.path()).await;
            let row = if deployed_before { Some(ready_to_promote(&service).await) } else { None };
            let event = ServicesRemoved { organization_id: ORGANIZATION, project_id: PROJECT, service_id, environment_id };
            let tx = service.store.begin().await.expect("begins");
            removal::remove_services(&service, &tx, &grant(), &event).await.expect("marked");
            tx.commit().await.expect("committed");
            // The configuration was read before the removal.
            assert_eq!(deploy(&service).await.expect_err("removed").code, "not_found");
            if let Some(row) = row {
                assert!(matches!(active::promote(&service, &grant(), &row).await, Err(Failure::Cancelled)));
                assert!(status(&service, &row).await.1, "it is being cancelled");
                reconcile::retire_unwanted(&service).await.expect("retired");
                assert_eq!(role(&service, &row).await, "retiring");
            }
            let later = Timestamp::now().plus_seconds(8 * 24 * 3600);
            removal::purge(&service, later).await.expect("purged");
            let kept = unscoped!("test", "SELECT COUNT(*) FROM removals");
            assert_eq!(service.store.read().value::<i64>(kept).await.expect("answers"), Some(0));
        }
    }
}

#[tokio::test]
async fn a_settled_deployment_does_not_change() {
    let data = tempfile::tempdir().expect("a folder");
    let service = open_service(data.path()).await;
    let row = serving(&service).await;
    let before = ready_to_promote(&service).await;
    let _ = controller::settle(&service, &grant(), &before, Status::Failed, "because").await;
    for row in [&row, &before] {
        let is = status(&service, row).await;
        let _ = controller::settle(&service, &grant(), row, Status::Cancelled, "cancelled").await;
        let entered =
            deployments::enter_phase(&service, &grant(), &service_environment(&service).await, row, Phase::Building, None).await;
        assert!(matches!(entered, Err(Failure::Cancelled)));
        assert!(
            deployments::is_in_progress(&service.store.begin().await.expect("begins"), &grant(), row)
                .await
                .is_ok_and(|goes_on| !goes_on)
        );
        assert_eq!(status(&service, row).await, is);
    }
    // A row that has changed since it was read cannot be settled.
    let stale = deploy(&service).await.expect("accepted");
    deployments::enter_phase(&service, &grant(), &service_environment(&service).await, &stale, Phase::Building, None)
        .await
        .ok()
        .expect("it goes on");
    let tx = service.store.begin().await.expect("begins");
    let service_environment = service_environment(&service).await;
    let refused = deployments::finish(&service, &tx, &context(), &grant(), &service_environment, &stale, Status::Cancelled).await;
    assert_eq!(refused.expect_err("it changed").code, "conflict");
}

#[tokio::test]
async fn a_phase_that_crashes_the_server_is_tried_ten_times() {
    let data = tempfile::tempdir().expect("a folder");
    let service = open_service(data.path()).await;
    let row = deploy(&service).await.expect("accepted");
    let service_environment = service_environment(&service).await;
    let mut delays = Vec::new();
    for _ in 0..10 {
        // The first phase succeeds and the second crashes the server, so both begin again.
        let row = deployments::enter_phase(&service, &grant(), &service_environment, &row, Phase::PullingSource, None)
            .await
            .ok()
            .expect("tried");
        deployments::enter_phase(&service, &grant(), &service_environment, &row, Phase::Building, Some(Phase::PullingSource))
            .await
            .ok()
            .expect("tried");
        let next = deployments::get(&service, &grant(), row.id).await.expect("there").next_attempt_at;
        delays.push((next - Timestamp::now().0 + 500_000).div_euclid(1_000_000));
    }
    assert!(delays[0] == 0 && delays.is_sorted() && delays[9] > 200, "{delays:?}");
    let row = deployments::enter_phase(&service, &grant(), &service_environment, &row, Phase::PullingSource, None)
        .await
        .ok()
        .expect("it always succeeded");
    let Err(Failure::Failed(why)) =
        deployments::enter_phase(&service, &grant(), &service_environment, &row, Phase::Building, None).await
    else {
        panic!("it is tried for ever")
    };
    assert!(why.contains("ended 10 times") && why.contains("building"), "{why}");
}

#[tokio::test]
async fn attempts_that_fail_because_of_the_platform_are_bounded_and_do_not_count_as_crashes() {
    let data = tempfile::tempdir().expect("a folder");
    let service = open_service(data.path()).await;
    let row = deploy(&service).await.expect("accepted");
    let service_environment = service_environment(&service).await;
    let problem = Problem::unavailable("The ingress does not answer.");
    let mut delays = Vec::new();
    for attempt in 1.. {
        let row = deployments::enter_phase(&service, &grant(), &service_environment, &row, Phase::HealthCheck, None)
            .await
            .ok()
            .expect("tried");
        let tx = service.store.begin().await.expect("begins");
        let given_up =
            crate::attempts::record_hindered(&tx, &grant(), &row, Phase::HealthCheck, &problem).await.expect("counted");
        tx.commit().await.expect("committed");
        let next = deployments::get(&service, &grant(), row.id).await.expect("there").next_attempt_at;
        delays.push(next - Timestamp::now().0);
        if let Some(why) = given_up {
            assert!(attempt == 20 && why.contains("The ingress does not answer."), "{attempt}: {why}");
            break;
        }
    }
    assert!(delays[0] > 0 && delays[19] > delays[3], "{delays:?}");
}

#[tokio::test]
async fn files_without_references_are_deleted_after_their_retention() {
    let data = tempfile::tempdir().expect("a folder");
    let service = open_service(data.path()).await;
    let mut writer = service.blobs.begin("one").await.expect("begun");
    writer.write(b"left behind").await.expect("written");
    let (digest, _) = writer.commit().await.expect("kept");
    let mut writer = service.blobs.begin("two").await.expect("begun");
    writer.write(b"used").await.expect("written");
    let (used, _) = writer.commit().await.expect("kept");
    let insert = unscoped!(
        "test",
        "INSERT INTO uploads (id, organization_id, service_id, digest, bytes, created_at) \
         VALUES (:id, :organization_id, :service_id, :digest, 4, :created_at)",
        id = Uuid::from_u128(9),
        organization_id = ORGANIZATION,
        service_id = SERVICE,
        digest = used.as_str(),
        created_at = Timestamp::now().0
    );
    run(&service, insert).await;
    let row = deploy(&service).await.expect("accepted");
    let left = data.path().join("work/left");
    for directory in [&left, &service.work_directory(row.id)] {
        std::fs::create_dir_all(directory.join("source")).expect("made");
    }
    let is_there = || [service.blobs.path(&digest).is_ok(), service.blobs.path(&used).is_ok(), left.exists()];
    for (hours, expected) in [(0, [true, true, true]), (2, [false, true, false]), (25, [false, false, false])] {
        reconcile::purge(&service, Timestamp::now().plus_seconds(hours * 3600)).await.expect("purged");
        assert_eq!(is_there(), expected, "after {hours} hours");
    }
    assert!(service.work_directory(row.id).exists(), "it is worked on");
}
