//! Deployments: from an upload to instances that take requests.
//!
//! A level-triggered controller. The database says what ought to be (placements, deployments,
//! instances); shims and the ingress say what is; a loop makes the second match the first. Every
//! phase may be run twice without harm, and is recorded before it begins, so the control plane may
//! be killed at any instant.

mod attempts;
mod build_queue;
mod closing;
mod commands;
mod controller;
mod deployments;
mod disk;
mod hosts;
mod ingress;
mod instances;
mod logs;
mod phases;
mod placements;
mod public_url;
mod queries;
mod quotas;
mod reconcile;
mod removal;
mod routes;
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
use capsule_bus::{Bus, Context, Router, Service};
use capsule_contracts::organization::OrganizationDeleted;
use capsule_contracts::project::{Locate, Place, ServicesRemoved};
use capsule_contracts::{Problem, Target, Uuid};
use capsule_runtime::{Limits, ProcessRuntime, Relaxation};
use capsule_store::{Databases, Keyring, Migrations, Store, StoreError, unscoped};
use ipnet::IpNet;

pub use ingress::Ingress;
pub use public_url::PublicUrl;

/// How this service is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where files are kept.
    pub data: PathBuf,
    /// Where the database is.
    pub databases: Databases,
    /// The binary that has the roles of shim, sandbox and ingress.
    pub program: PathBuf,
    /// The ingress's public address.
    pub listen: SocketAddr,
    /// Applications are hosts below it.
    pub base_domain: String,
    /// The address that users see; the ingress's own unless set.
    pub public_url: Option<PublicUrl>,
    /// The networks of proxies before the ingress that are believed.
    pub trusted_proxies: Vec<IpNet>,
    /// What a build may use.
    pub build_limits: Limits,
    /// The most bytes on disk of all caches of builds together.
    pub build_cache_bytes: u64,
    /// What an instance may use beyond what its plan says.
    pub run_limits: Limits,
    /// Bytes of the disk that are never given away.
    pub disk_reserve_bytes: u64,
    /// How many builds run at a time.
    pub builds: usize,
    /// The most bytes of one upload.
    pub upload_bytes: u64,
    /// Days for which the host of what was removed is kept for its organization.
    pub host_quarantine_days: u32,
    /// What builds are given by the operator.
    pub toolchains: Settings,
    /// What services may do beyond the filter of system calls.
    pub relaxations: BTreeMap<Uuid, Vec<Relaxation>>,
    /// Seconds an instance may take to become healthy.
    pub health_seconds: u64,
    /// Seconds old instances may take to finish their requests.
    pub drain_seconds: u64,
}

/// The deploy service.
#[derive(Debug)]
pub struct Deploys {
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
    publishing: tokio::sync::Mutex<()>,
}

impl Service for Deploys {
    fn store(&self) -> &Arc<Store> {
        &self.store
    }

    fn bus(&self) -> &Bus {
        &self.bus
    }

    /// Deployments and uploads are this service's own; what they lie in is the project service's.
    async fn locate(&self, target: &Target) -> Result<Option<Place>, Problem> {
        let upward = match target {
            Target::Deployment(id) => {
                let row = unscoped!(
                    "finds out whose it is",
                    "SELECT d.service_id, p.environment_name FROM deployments d JOIN placements p \
                     ON p.service_id = d.service_id AND p.environment_id = d.environment_id WHERE d.id = $1",
                    *id
                );
                match self.store.read().first::<placements::Name>(row).await? {
                    Some(name) => Target::ServiceIn(name.service_id, name.environment_name),
                    None => return Ok(None),
                }
            }
            Target::Upload(id) => {
                let row = unscoped!("finds out whose it is", "SELECT service_id FROM uploads WHERE id = $1", *id);
                match self.store.read().value::<Uuid>(row).await? {
                    Some(service) => Target::Service(service),
                    None => return Ok(None),
                }
            }
            other => other.clone(),
        };
        match self.bus.request(&Context::background("deploy"), &Locate { target: upward }).await {
            Ok(place) => Ok(Some(place)),
            Err(problem) if problem.code == "not_found" => Ok(None),
            Err(problem) => Err(problem),
        }
    }
}

/// The time between two looks at the host's packet filter.
const FILTER_PERIOD: Duration = Duration::from_secs(30);

/// The service's name, which is its database's as well.
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

/// Opens the service's database, finds the ingress and the instances that run, puts the service on
/// the bus, and begins to reconcile.
///
/// # Errors
/// When its database or its directories cannot be opened, or the ingress cannot listen.
pub async fn start(options: Options, bus: &Bus, keyring: Keyring, blobs: Blobs) -> Result<Arc<Deploys>, StoreError> {
    let failed = |what: &str, error: &dyn std::fmt::Display| StoreError(format!("deploy: {what}: {error}"));
    let store = Store::open(&options.databases, NAME, keyring, MIGRATIONS).await?;
    let unprepared = capsule_runtime::prepare_host().err();
    if let Some(warning) = &unprepared {
        tracing::warn!("{warning}");
    }
    tokio::spawn(keep_host_prepared(unprepared));
    for (service, relaxations) in &options.relaxations {
        tracing::warn!(%service, ?relaxations, "the sandboxes of this service are relaxed by the setting sandbox.relax");
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
    let deploys = Arc::new(Deploys {
        store: Arc::new(store),
        bus: bus.clone(),
        blobs,
        runtime,
        builder,
        planner,
        versions: Versions::default(),
        ingress,
        controller,
        publishing: tokio::sync::Mutex::new(()),
        options,
    });
    deploys.ingress.ensure().await.map_err(|error| failed("the ingress", &error))?;

    Router::new(deploys.clone())
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
        .consume::<ServicesRemoved>(|deploys, tx, event| Box::pin(removal::services(deploys, tx, event)))
        .consume::<OrganizationDeleted>(|deploys, tx, event| Box::pin(removal::organization(deploys, tx, event)))
        .purge(|deploys, now| Box::pin(reconcile::purge(deploys, now)))
        .start_with(|deploys| Box::pin(lead(deploys)));
    Ok(deploys)
}

/// What one process of all that run this service does: it carries deployments out and puts right what is
/// not as it ought to be.
async fn lead(deploys: Arc<Deploys>) {
    while let Err(problem) = routes::catch_up(&deploys).await {
        tracing::warn!(%problem, "the routing table cannot be told to the ingress; trying again");
        tokio::time::sleep(reconcile::PERIOD).await;
    }
    tokio::join!(controller::run(&deploys), reconcile::run(&deploys));
}

/// Looks at the host's packet filter from time to time: programs that manage the host's rules replace all of them.
/// What fails is logged once: the start has said it, or the look before.
async fn keep_host_prepared(mut failed: Option<String>) {
    loop {
        tokio::time::sleep(FILTER_PERIOD).await;
        match tokio::task::spawn_blocking(capsule_runtime::keep_host_prepared).await {
            Ok(Ok(restored)) => {
                if restored {
                    tracing::warn!("the packet filter of sandboxes was missing or outdated and is in force again");
                }
                failed = None;
            }
            Ok(Err(why)) if failed.as_ref() != Some(&why) => {
                tracing::warn!("{why}");
                failed = Some(why);
            }
            Ok(Err(_)) | Err(_) => {}
        }
    }
}

impl Deploys {
    /// The address the ingress listens on.
    pub async fn listen(&self) -> std::io::Result<SocketAddr> {
        let hello = self.ingress.hello().await.map_err(std::io::Error::other)?;
        hello.listen.parse().map_err(std::io::Error::other)
    }

    /// What a service may do beyond the filter of system calls: its instances, builds and release commands.
    fn relaxations(&self, service: Uuid) -> Vec<Relaxation> {
        self.options.relaxations.get(&service).cloned().unwrap_or_default()
    }

    /// How the ingress that runs differs from the one that this server would start; nothing if it does not.
    pub async fn outdated_ingress(&self) -> Option<String> {
        self.ingress.outdated().await
    }

    /// Where a host answers.
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
