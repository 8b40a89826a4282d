//! The deploy service: from an upload to instances that serve requests.
//!
//! It is a level-triggered controller, as in Kubernetes. The database holds the desired state (services in environments,
//! deployments, instances); shims and the ingress report the actual state; the reconciler makes the actual state match
//! the desired one. Each phase of a deployment is idempotent and stored before it begins, so the process can be killed at
//! any time.

mod attempts;
mod build_queue;
mod closing;
mod commands;
mod controller;
mod deployments;
mod disk;
mod failpoint;
mod hosts;
mod ingress;
mod instances;
mod logs;
mod phases;
mod public_url;
mod queries;
mod quotas;
mod reconcile;
mod removal;
mod routes;
mod service_environments;
#[cfg(test)]
mod tests;
mod texts;
mod uploads;
mod user_ids;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use capsule_blob::Blobs;
use capsule_builder::planner::Planner;
use capsule_builder::{Builder, Settings, Toolchains, Versions};
use capsule_bus::{Bus, Context, Router, Service, SystemAccess};
use capsule_contracts::organization::OrganizationDeleted;
use capsule_contracts::project::{Locate, Location, ServiceRenamed, ServicesRemoved};
use capsule_contracts::{Problem, Target, Uuid};
use capsule_runtime::{Limits, ProcessRuntime, Relaxation};
use capsule_store::{Databases, Keyring, Migrations, Store, StoreError, unscoped};
use ipnet::IpNet;

pub use ingress::Ingress;
pub use public_url::PublicUrl;

/// The configuration of the deploy service.
#[derive(Clone, Debug)]
pub struct Options {
    /// The data directory.
    pub data: PathBuf,
    /// The location of the databases.
    pub databases: Databases,
    /// The `capsule` binary, which is also shim, sandbox and ingress.
    pub program: PathBuf,
    /// The address on which the ingress listens.
    pub listen: SocketAddr,
    /// The domain below which applications have their hosts.
    pub base_domain: String,
    /// The public URL; by default that of the ingress.
    pub public_url: Option<PublicUrl>,
    /// The networks of proxies whose forwarding headers the ingress trusts.
    pub trusted_proxies: Vec<IpNet>,
    /// The limits of a build.
    pub build_limits: Limits,
    /// The maximum size of all build caches together.
    pub build_cache_bytes: u64,
    /// The limits of an instance that its plan does not set.
    pub run_limits: Limits,
    /// Free disk space to keep: below it, uploads and builds are refused and instances evicted.
    pub disk_reserve_bytes: u64,
    /// How many builds run at a time.
    pub builds: usize,
    /// The most bytes of one upload.
    pub upload_bytes: u64,
    /// Days for which the host of what was removed is kept for its organization.
    pub host_quarantine_days: u32,
    /// What builds are given by the operator.
    pub toolchains: Settings,
    /// Relaxations of the system call filter, by service.
    pub relaxations: BTreeMap<Uuid, Vec<Relaxation>>,
    /// The time for an instance to become healthy, in seconds.
    pub health_seconds: u64,
    /// The time for a retiring instance to finish its in-flight requests, in seconds.
    pub drain_seconds: u64,
}

/// The deploy service.
#[derive(Debug)]
pub struct DeployService {
    store: Arc<Store>,
    bus: Bus,
    options: Options,
    blobs: Blobs,
    runtime: ProcessRuntime,
    builder: Builder,
    planner: Planner,
    versions: Versions,
    ingress: Ingress,
    controller: controller::Controller,
    publish_lock: tokio::sync::Mutex<()>,
}

impl Service for DeployService {
    fn store(&self) -> &Arc<Store> {
        &self.store
    }

    fn bus(&self) -> &Bus {
        &self.bus
    }

    /// Deployments and uploads are looked up here, services and environments in the project service.
    async fn locate(&self, target: &Target) -> Result<Option<Location>, Problem> {
        let parent = match target {
            Target::Deployment(id) => {
                let row = unscoped!(
                    "the lookup of the tenant itself",
                    "SELECT d.service_id, p.environment_name FROM deployments d JOIN placements p \
                     ON p.service_id = d.service_id AND p.environment_id = d.environment_id WHERE d.id = :id",
                    id = *id
                );
                match self.store.read().first::<service_environments::Name>(row).await? {
                    Some(name) => Target::ServiceIn(name.service_id, name.environment_name),
                    None => return Ok(None),
                }
            }
            Target::Upload(id) => {
                let row = unscoped!("the lookup of the tenant itself", "SELECT service_id FROM uploads WHERE id = :id", id = *id);
                match self.store.read().value::<Uuid>(row).await? {
                    Some(service_id) => Target::Service(service_id),
                    None => return Ok(None),
                }
            }
            other => other.clone(),
        };
        match self.bus.request(&Context::background("deploy"), &Locate { target: parent }).await {
            Ok(location) => Ok(Some(location)),
            Err(problem) if problem.code == "not_found" => Ok(None),
            Err(problem) => Err(problem),
        }
    }
}

/// The interval between checks of the host's packet filter.
const FILTER_CHECK_PERIOD: Duration = Duration::from_secs(30);

/// The name of the service and of its database.
pub const NAME: &str = "deploy";

/// The migrations of its database.
pub const MIGRATIONS: Migrations = &[
    ("bus", capsule_bus::MIGRATIONS),
    (
        NAME,
        capsule_store::migrations![
            1 "create_deployments",
            2 "count_user_ids",
            3 "count_use_and_quarantine_hosts",
            4 "close_services",
            5 "count_attempts_and_remember_removals",
            6 "detect_restores",
        ],
    ),
];

/// Opens the database, starts the ingress unless it runs, registers the service on the bus, and begins to reconcile.
///
/// # Errors
/// If its database or its directories cannot be opened, or the ingress cannot listen.
pub async fn start(options: Options, bus: &Bus, keyring: Keyring, blobs: Blobs) -> Result<Arc<DeployService>, StoreError> {
    let failed = |what: &str, error: &dyn std::fmt::Display| StoreError(format!("deploy: {what}: {error}"));
    let store = Store::open(&options.databases, NAME, keyring, MIGRATIONS).await?;
    let unprepared = capsule_runtime::prepare_host().err();
    if let Some(warning) = &unprepared {
        tracing::warn!("{warning}");
    }
    tokio::spawn(keep_host_prepared(unprepared));
    for (service_id, relaxations) in &options.relaxations {
        tracing::warn!(%service_id, ?relaxations, "the sandboxes of this service are relaxed by the setting sandbox.relax");
    }
    let runtime = ProcessRuntime::new(options.data.join("run/i"), options.program.clone())
        .map_err(|error| failed("the run directory", &error))?;
    let toolchains = Toolchains::discover(&options.data.join("toolchains"), options.toolchains.clone())
        .map_err(|error| failed("the toolchains directory", &error))?;
    let layers = options.data.join("layers");
    let builder = Builder { runtime: runtime.clone(), toolchains, limits: options.build_limits, layers };
    let plans = std::thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 4));
    let planner = Planner::new(options.program.clone(), &options.data.join("run/plans"), plans)
        .map_err(|error| failed("the planner's directory", &error))?;
    let ingress = Ingress::new(&options);
    let controller = controller::Controller::new(options.builds);
    let service = Arc::new(DeployService {
        store: Arc::new(store),
        bus: bus.clone(),
        blobs,
        runtime,
        builder,
        planner,
        versions: Versions::default(),
        ingress,
        controller,
        publish_lock: tokio::sync::Mutex::new(()),
        options,
    });
    service.ingress.ensure().await.map_err(|error| failed("the ingress", &error))?;

    Router::new(service.clone())
        .keep_quotas()
        .handle(uploads::begin_upload)
        .handle(uploads::complete_upload)
        .handle(uploads::forget_upload)
        .handle(uploads::plan_upload)
        .handle(commands::deploy)
        .handle(commands::rollback)
        .handle(commands::redeploy)
        .handle(commands::cancel_deployment)
        .handle(commands::restart)
        .handle(commands::stop)
        .handle(commands::start)
        .handle(queries::list_deployments)
        .handle(queries::get_deployment)
        .handle(queries::list_deployment_events)
        .handle(queries::get_service_state)
        .handle(removal::count_placements)
        .handle(quotas::count_use)
        .handle(removal::remove_from_environment)
        .handle(closing::list_service_environments)
        .handle(closing::close_service)
        .stream(logs::stream_deployment_log)
        .stream(logs::stream_service_log)
        .consume::<ServiceRenamed>(|_, tx, delivery| Box::pin(service_environments::rename_service(tx, delivery)))
        .consume::<ServicesRemoved>(|service, tx, delivery| Box::pin(removal::on_services_removed(service, tx, delivery)))
        .consume::<OrganizationDeleted>(|service, tx, delivery| Box::pin(removal::on_organization_deleted(service, tx, delivery)))
        .purge(|service, now| Box::pin(reconcile::purge(service, now)))
        .start_with(|service, system| Box::pin(run_as_leader(service, system)));
    Ok(service)
}

/// Runs the controller and the reconciler, in the process that is the leader.
async fn run_as_leader(service: Arc<DeployService>, system: SystemAccess) {
    while let Err(problem) = routes::catch_up(&service).await {
        tracing::warn!(%problem, "cannot publish the routing table to the ingress; trying again");
        tokio::time::sleep(reconcile::PERIOD).await;
    }
    tokio::join!(controller::run(&service, &system), reconcile::run(&service, &system));
}

/// Checks the host's packet filter periodically and restores it: programs that manage the host's rules replace all of
/// them. A repeated failure is logged once; `last_error` is the one of the preparation at start.
async fn keep_host_prepared(mut last_error: Option<String>) {
    loop {
        tokio::time::sleep(FILTER_CHECK_PERIOD).await;
        match tokio::task::spawn_blocking(capsule_runtime::restore_host).await {
            Ok(Ok(restored)) => {
                if restored {
                    tracing::warn!("the packet filter of sandboxes was missing or outdated; it has been restored");
                }
                last_error = None;
            }
            Ok(Err(why)) if last_error.as_ref() != Some(&why) => {
                tracing::warn!("{why}");
                last_error = Some(why);
            }
            Ok(Err(_)) | Err(_) => {}
        }
    }
}

impl DeployService {
    /// The address the ingress listens on.
    pub async fn listen(&self) -> std::io::Result<SocketAddr> {
        let hello = self.ingress.hello().await.map_err(std::io::Error::other)?;
        hello.listen.parse().map_err(std::io::Error::other)
    }

    /// The relaxations of the system call filter for a service's instances, builds and release commands.
    fn relaxations(&self, service_id: Uuid) -> Vec<Relaxation> {
        self.options.relaxations.get(&service_id).cloned().unwrap_or_default()
    }

    /// How the running ingress differs from the one that this server would start. `None` if it does not.
    pub async fn outdated_ingress(&self) -> Option<String> {
        self.ingress.outdated().await
    }

    /// The URL of a host.
    fn url(&self, host: &str) -> String {
        if let Some(public) = &self.options.public_url {
            return public.of(host);
        }
        match self.ingress.port() {
            80 => format!("http://{host}"),
            port => format!("http://{host}:{port}"),
        }
    }

    fn release_directory(&self, release: Uuid) -> PathBuf {
        self.options.data.join("releases").join(release.to_string())
    }

    fn work_directory(&self, deployment: Uuid) -> PathBuf {
        self.options.data.join("work").join(deployment.to_string())
    }

    fn build_log(&self, deployment: Uuid) -> PathBuf {
        self.options.data.join("logs/deployments").join(deployment.to_string())
    }

    fn instance_log(&self, instance: &str) -> PathBuf {
        self.options.data.join("logs/instances").join(instance)
    }
}
