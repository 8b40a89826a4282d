//! `capsule server`: the services and the gateway, in one process or spread over several.

pub mod backups;
pub mod configuration;
pub mod data;
mod down;
mod ingress;
mod listeners;
mod quotas;

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use capsule_blob::Blobs;
use capsule_bus::transport::Transport;
use capsule_bus::{Bus, Service};
use capsule_cache::{Cache, Rate};
use capsule_contracts::operations::SERVICES;
use capsule_kafka::Kafka;
use capsule_observe::{Check, Traces};
use capsule_rabbitmq::RabbitMq;
use capsule_runtime::Limits;
use capsule_runtime::trees::Usage;
use capsule_store::{Databases, Keyring, Migrations};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use down::down;
pub use ingress::{outdated_ingress, replace_ingress};

use configuration::{Configuration, Loaded, LogFormat};
use data::{Claim, Data, Public, Running};

use crate::arguments::Part;
use crate::terminal;

/// How often the address of the ingress is checked.
const INGRESS_CHECK_PERIOD: Duration = Duration::from_secs(2);
/// How long requests in flight may take once the server stops.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);

/// The databases and their migrations.
pub const DATABASES: [(&str, Migrations); 4] = [
    (capsule_identity::NAME, capsule_identity::MIGRATIONS),
    (capsule_organization::NAME, capsule_organization::MIGRATIONS),
    (capsule_project::NAME, capsule_project::MIGRATIONS),
    (capsule_deploy::NAME, capsule_deploy::MIGRATIONS),
];

/// Runs a server, or only the parts in `only`, until SIGTERM or SIGINT. Applications and the ingress keep running.
///
/// # Errors
/// When the configuration does not fit the parts, or a part cannot start.
pub fn run(directory: &Path, loaded: Loaded, only: &[Part]) -> anyhow::Result<()> {
    let configuration = &loaded.configuration;
    // Programs that the server starts must not inherit file descriptors of its caller.
    capsule_runtime::descriptors::close_on_exec();
    let format = match configuration.log.format {
        LogFormat::Pretty => capsule_observe::Format::Pretty,
        LogFormat::Json => capsule_observe::Format::Json,
    };
    let parts: Vec<Part> = Part::ALL.into_iter().filter(|part| only.is_empty() || only.contains(part)).collect();
    let traces = Traces {
        endpoint: configuration.traces.endpoint.clone(),
        percent: configuration.traces.percent,
        name: match only {
            [] => "capsule".into(),
            _ => format!("capsule-{}", names(&parts)),
        },
    };
    let traces = Some(&traces).filter(|traces| !traces.endpoint.is_empty());
    let _exporting =
        capsule_observe::start(format, &configuration.log.levels, traces).map_err(|error| anyhow!("log.levels: {error}"))?;
    let claim = if parts.len() == Part::ALL.len() && configuration.broker.url.is_empty() { Claim::Alone } else { Claim::Shared };
    if claim == Claim::Shared && configuration.broker.url.is_empty() {
        bail!("--only needs a broker between the processes. Set broker.url.");
    }
    if claim == Claim::Shared && configuration.database.url.is_empty() {
        bail!("Several processes need a PostgreSQL server. Set database.url.");
    }
    if configuration.public_url()?.is_some_and(|url| url.is_https()) && configuration.trusted_proxies.is_empty() {
        tracing::warn!(
            "public_url is https but trusted_proxies is empty: applications see http and the proxy's address. Set trusted_proxies"
        );
    }
    let data = Data::claim(directory, claim)?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(serve(data, loaded, &parts))
}

async fn serve(mut data: Data, loaded: Loaded, parts: &[Part]) -> anyhow::Result<()> {
    let Loaded { configuration, origins } = loaded;
    let origin = |setting: &str| origins.get(setting).map_or("default", String::as_str);
    let metrics = capsule_observe::metrics().map_err(|error| anyhow!(error))?;
    let directory = data.path().to_owned();
    let local_token = data.local_token()?;
    let keyring = Keyring::open(&directory.join("keys/master.key")).context("cannot read or create the master key")?;
    let blobs = Blobs::open(&directory.join("blobs")).context("cannot open the blob directory")?;
    let blobs = blobs.with_reserve(u64::from(configuration.disk.reserve_mib) << 20);
    let address = configuration.private_listen;
    let private = TcpListener::bind(address)
        .await
        .map_err(|error| listeners::cannot_listen("private_listen", address, origin("private_listen"), &error))?;
    let private_address = private.local_addr()?;
    let bus = bus(&configuration, &keyring, private_address, parts)?;
    let databases = databases(&directory, &configuration);
    let cache = match configuration.redis.url.as_str() {
        "" => Cache::none(),
        url => Cache::at(url).map_err(|error| anyhow!("redis.url {error}"))?,
    };
    let stopping = CancellationToken::new();
    let serving = TaskTracker::new();

    let mut checks = Vec::new();
    if bus.broker_ready().is_some() {
        let bus = bus.clone();
        checks.push(check("broker".into(), move || std::future::ready(bus.broker_ready().unwrap_or_default())));
    }
    // Listen on the gateway's socket before the ingress starts, so that no request is refused.
    let socket = data.gateway_socket();
    let gateway_listener = parts.contains(&Part::Gateway).then(|| listen(&socket)).transpose()?;
    let (mut public, mut deploying) = (None, None);
    for part in parts {
        let failed = |error| anyhow!("{error}");
        let store = match part {
            Part::Identity => {
                let (cache, keyring, token) = (cache.clone(), keyring.clone(), local_token.clone());
                let started = capsule_identity::start(&databases, &bus, cache, keyring, token, configuration.registration).await;
                started.map_err(failed)?.store().clone()
            }
            Part::Organization => {
                let limits = capsule_organization::Limits {
                    quotas: configuration.quotas.clone(),
                    organizations_per_user: configuration.limits.organizations_per_user,
                };
                let started = capsule_organization::start(&databases, &bus, keyring.clone(), limits).await;
                started.map_err(failed)?.store().clone()
            }
            Part::Project => capsule_project::start(&databases, &bus, keyring.clone()).await.map_err(failed)?.store().clone(),
            Part::Deploy => {
                let options = deploy_options(&directory, databases.clone(), &configuration)?;
                let started = capsule_deploy::start(options, &bus, keyring.clone(), blobs.clone()).await;
                let deploys = started.map_err(|error| match listeners::try_listen(configuration.listen) {
                    // The ingress could not start.
                    Err(why) => listeners::cannot_listen("listen", configuration.listen, origin("listen"), &why).into(),
                    Ok(()) => failed(error),
                })?;
                let address = deploys.listen().await.context("the ingress does not respond")?;
                public = Some(public_addresses(&configuration, address));
                deploying = Some(deploys.clone());
                let asked = deploys.clone();
                checks.push(check("ingress".into(), move || {
                    let deploys = asked.clone();
                    async move { deploys.listen().await.is_ok() }
                }));
                deploys.store().clone()
            }
            // Started last: by then, its services are registered or the broker is being connected.
            Part::Gateway => continue,
        };
        checks.push(check(format!("{} database", part.name()), move || {
            let store = store.clone();
            async move { store.is_ready().await }
        }));
    }
    bus.start_event_delivery();
    if let Some(gateway_listener) = gateway_listener {
        let limits = capsule_gateway::Limits {
            requests: Rate(configuration.limits.requests_per_minute),
            sign_ins: Rate(configuration.limits.sign_ins_per_minute),
            account: Rate(configuration.limits.sign_ins_per_account_and_hour),
            concurrent_uploads: configuration.limits.concurrent_uploads,
            concurrent_streams: configuration.limits.concurrent_streams,
        };
        let uploads = &configuration.uploads;
        let options = capsule_gateway::Options {
            bus: bus.clone(),
            blobs,
            keyring,
            cache: cache.clone(),
            limits,
            upload_bytes: u64::from(uploads.max_mib) << 20,
            upload_bytes_per_second: u64::from(uploads.min_kib_per_second) << 10,
            upload_deadline: Duration::from_secs(u64::from(uploads.max_seconds)),
            allowed_origins: configuration.allowed_origins()?,
        };
        let gateway = capsule_gateway::router(options, checks.clone());
        let gateway = axum::serve(gateway_listener, gateway).with_graceful_shutdown(stopping.clone().cancelled_owned());
        let stopping = stopping.clone();
        serving.spawn(async move {
            let mut gateway = std::pin::pin!(gateway.into_future());
            tokio::select! {
                _ = &mut gateway => return,
                () = stopping.cancelled() => {}
            }
            // Accept no new connections, and finish the requests in flight.
            let _ = std::fs::remove_file(socket);
            let _ = gateway.await;
        });
    }
    // In the processes that have the files. A lock keeps several of them from creating a backup at once.
    if parts.contains(&Part::Deploy) && !configuration.backup.location.is_empty() {
        let (settings, key) = (configuration.backup.clone(), backup_key(&directory));
        let installation = backups::installation(&directory, &configuration);
        tokio::spawn(async move { backups::run(settings, &key, installation).await });
    }
    let pages = capsule_observe::pages(metrics, checks).merge(bus.stream_routes());
    // Served until the process ends: clients may still be fetching streams.
    tokio::spawn(axum::serve(private, pages).into_future());

    let mut running = Running {
        pid: std::process::id(),
        host: data::host(),
        parts: parts.iter().map(|part| part.name().to_owned()).collect(),
        private: private_address.to_string(),
        public,
        listen: configuration.listen.to_string(),
        build: capsule_ingress::build_id(),
    };
    data.announce(&running)?;
    print_ready(&data, &running);
    if let Some(deploys) = &deploying
        && let Some(outdated) = deploys.outdated_ingress().await
    {
        let replace = ingress::how_to_replace(&directory);
        tracing::warn!("{outdated} {replace}");
        if terminal::is_stdout_terminal() {
            let _ = terminal::print(&format!("warning: {outdated}\n{replace}"));
        }
    }
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut ingress_check = tokio::time::interval(INGRESS_CHECK_PERIOD);
    ingress_check.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            // An ingress that was replaced may listen on another address.
            _ = ingress_check.tick(), if deploying.is_some() => {
                let Some(deploys) = &deploying else { continue };
                let Ok(address) = deploys.listen().await else { continue };
                let current = public_addresses(&configuration, address);
                if running.public.as_ref().is_none_or(|public| public.address != current.address) {
                    running.public = Some(current);
                    data.announce(&running)?;
                }
            }
        }
    }
    tracing::info!("stopping the server; applications keep running");
    stopping.cancel();
    serving.close();
    let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, async { tokio::join!(serving.wait(), bus.drain()) }).await;
    Ok(())
}

/// Listens on a Unix socket that only this user can connect to.
fn listen(socket: &Path) -> anyhow::Result<UnixListener> {
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).context("cannot create the gateway's socket")?;
    std::fs::set_permissions(socket, PermissionsExt::from_mode(0o600))?;
    Ok(listener)
}

/// The bus between the parts of this process, and those of other processes.
fn bus(configuration: &Configuration, keyring: &Keyring, private: SocketAddr, parts: &[Part]) -> anyhow::Result<Bus> {
    let url = &configuration.broker.url;
    if url.is_empty() {
        return Ok(Bus::new());
    }
    let address = match configuration.advertise.as_str() {
        "" => private.to_string(),
        address => address.to_owned(),
    };
    let name = format!("capsule {} ({})", names(parts), std::process::id());
    let transport: Arc<dyn Transport> = if url.starts_with("kafka://") {
        Arc::new(Kafka::connect(url, &name).map_err(|error| anyhow!("broker.url: {error}"))?)
    } else {
        Arc::new(RabbitMq::connect(url, &name, &SERVICES))
    };
    Ok(Bus::with_transport(transport, keyring, address))
}

fn names(parts: &[Part]) -> String {
    parts.iter().map(|part| part.name()).collect::<Vec<_>>().join(",")
}

fn check<F>(name: String, ask: impl Fn() -> F + Send + Sync + 'static) -> Check
where
    F: Future<Output = bool> + Send + 'static,
{
    (name, Arc::new(move || Box::pin(ask()) as Pin<Box<dyn Future<Output = bool> + Send>>))
}

/// The path of an installation's backup key.
pub fn backup_key(directory: &Path) -> std::path::PathBuf {
    directory.join("keys/backup.key")
}

/// The databases of a server.
pub fn databases(directory: &Path, configuration: &Configuration) -> Databases {
    match configuration.database.url.as_str() {
        "" => Databases::Embedded(directory.into()),
        url => Databases::Postgres { url: url.into(), connections: configuration.database.connections },
    }
}

fn deploy_options(
    directory: &Path,
    databases: Databases,
    configuration: &Configuration,
) -> anyhow::Result<capsule_deploy::Options> {
    let (build, run) = (&configuration.build, &configuration.run);
    Ok(capsule_deploy::Options {
        data: directory.into(),
        databases,
        program: program()?,
        listen: configuration.listen,
        base_domain: configuration.base_domain.clone(),
        public_url: configuration.public_url()?,
        trusted_proxies: configuration.trusted_proxies()?,
        build_limits: Limits {
            memory: Some(u64::from(build.memory_mib) << 20),
            cpu_percent: Some(build.cpu_percent),
            processes: Some(4096),
            seconds: Some(u64::from(build.seconds)),
            low_priority: true,
            disk: Some(Usage {
                bytes: u64::from(build.disk_mib) << 20,
                inodes: configuration::inodes(build.inodes, build.disk_mib),
            }),
            temporary: Some(u64::from(build.tmp_mib) << 20),
        },
        run_limits: Limits {
            disk: Some(Usage { bytes: u64::from(run.disk_mib) << 20, inodes: configuration::inodes(run.inodes, run.disk_mib) }),
            temporary: Some(u64::from(run.tmp_mib) << 20),
            ..Limits::default()
        },
        disk_reserve_bytes: u64::from(configuration.disk.reserve_mib) << 20,
        build_cache_bytes: u64::from(build.cache_mib) << 20,
        builds: build.concurrent as usize,
        upload_bytes: u64::from(configuration.uploads.max_mib) << 20,
        host_quarantine_days: configuration.deploy.host_quarantine_days,
        toolchains: capsule_builder::Settings {
            ca_bundle: Some(build.ca_bundle.clone()).filter(|path| !path.as_os_str().is_empty()),
            environment: build.environment.clone(),
        },
        relaxations: configuration.sandbox.relax.clone(),
        health_seconds: u64::from(configuration.deploy.health_seconds),
        drain_seconds: u64::from(configuration.deploy.drain_seconds),
    })
}

/// The path of this binary. After an upgrade in place, it is the new binary's.
fn program() -> anyhow::Result<std::path::PathBuf> {
    let path = std::env::current_exe().context("cannot determine the path of this program")?;
    let text = path.to_string_lossy();
    Ok(text.strip_suffix(" (deleted)").map_or_else(|| path.clone(), Into::into))
}

fn url(domain: &str, address: SocketAddr) -> String {
    match address.port() {
        80 => format!("http://{domain}"),
        port => format!("http://{domain}:{port}"),
    }
}

/// The addresses of an ingress that listens on `address`.
fn public_addresses(configuration: &Configuration, address: SocketAddr) -> Public {
    // Validated when the configuration was loaded.
    let public = configuration.public_url().ok().flatten();
    let url = public.map_or_else(|| url(&configuration.base_domain, address), |public| public.to_string());
    Public { url, address: local_url(address) }
}

/// The URL at which programs on this host reach a listener.
fn local_url(address: SocketAddr) -> String {
    let ip = if address.ip().is_unspecified() { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { address.ip() };
    format!("http://{}", SocketAddr::new(ip, address.port()))
}

fn print_ready(data: &Data, running: &Running) {
    let url = running.public.as_ref().map_or("", |public| public.url.as_str());
    tracing::info!(url, parts = running.parts.join(","), private = running.private, data = %data.path().display(), "Capsule is ready");
    if terminal::is_stdout_terminal() && !url.is_empty() {
        let _ = terminal::print(&format!(
            "Capsule is ready at {url}\n  API documentation  {url}/api/documentation/\n  health, metrics    http://{}/metrics\n  \
             data               {}\n  set-up token       in {}\nIn another terminal, in your application's folder: capsule deploy",
            running.private,
            data.path().display(),
            data.path().join("local-token").display()
        ));
    }
}
