//! `capsule server`: all services, the gateway and the private pages in one process.

pub mod configuration;
pub mod data;
mod down;

use std::future::Future;
use std::io::IsTerminal;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use capsule_blob::Blobs;
use capsule_bus::Bus;
use capsule_deploy::Deploys;
use capsule_observe::Check;
use capsule_runtime::Limits;
use capsule_store::{Databases, Keyring};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};

pub use down::down;

use configuration::{Configuration, LogFormat};
use data::{Data, Running};

/// Requests under way may take this long once the server is told to stop.
const GOODBYE: Duration = Duration::from_secs(10);

/// Runs a server until it is told to stop. Applications and the ingress go on without it.
pub fn run(directory: &Path, configuration: Configuration) -> anyhow::Result<()> {
    let format = match configuration.log.format {
        LogFormat::Pretty => capsule_observe::Format::Pretty,
        LogFormat::Json => capsule_observe::Format::Json,
    };
    capsule_observe::logs(format, &configuration.log.levels).map_err(|error| anyhow!("log.levels: {error}"))?;
    let data = Data::claim(directory)?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(serve(&data, configuration))
}

async fn serve(data: &Data, configuration: Configuration) -> anyhow::Result<()> {
    let metrics = capsule_observe::metrics().map_err(|error| anyhow!(error))?;
    let directory = data.path();
    let local_token = data.local_token()?;
    let keyring = Keyring::open(&directory.join("keys/master.key")).context("the master key cannot be read or made")?;
    let blobs = Blobs::open(&directory.join("blobs")).context("the directory of blobs cannot be opened")?;
    let bus = Bus::new();
    let private = TcpListener::bind(configuration.private_listen)
        .await
        .with_context(|| format!("private_listen: cannot listen on {}", configuration.private_listen))?;

    let databases = databases(directory, &configuration);

    // The gateway's socket is there before the ingress is: nobody meets a closed door.
    let socket = directory.join("run/gateway.sock");
    let _ = std::fs::remove_file(&socket);
    let public = UnixListener::bind(&socket).context("the gateway's socket cannot be made")?;
    std::fs::set_permissions(&socket, PermissionsExt::from_mode(0o600))?;

    capsule_identity::start(&databases, &bus, keyring.clone(), local_token.clone()).await.map_err(|error| anyhow!("{error}"))?;
    capsule_organization::start(&databases, &bus, keyring.clone()).await.map_err(|error| anyhow!("{error}"))?;
    capsule_project::start(&databases, &bus, keyring.clone()).await.map_err(|error| anyhow!("{error}"))?;
    let deploys = capsule_deploy::start(deploy_options(directory, databases, &configuration)?, &bus, keyring, blobs.clone())
        .await
        .map_err(|error| anyhow!("{error}"))?;

    let address = deploys.listen().await.context("the ingress does not answer")?;
    let running = Running { pid: std::process::id(), url: url(&configuration.base_domain, address), address: reachable(address) };
    let checks = checks(&deploys);
    let upload_bytes = u64::from(configuration.uploads.max_mib) << 20;
    let gateway = capsule_gateway::router(bus, blobs, upload_bytes, checks.clone());
    let pages = capsule_observe::pages(metrics, checks);
    let stopping = tokio_util::sync::CancellationToken::new();
    let gateway = axum::serve(public, gateway).with_graceful_shutdown(stopping.clone().cancelled_owned());
    let pages_address = private.local_addr()?;
    let pages = axum::serve(private, pages).with_graceful_shutdown(stopping.clone().cancelled_owned());
    let serving = tokio::spawn(async move { tokio::join!(gateway.into_future(), pages.into_future()) });

    data.announce(&running)?;
    greet(data, &running, pages_address);
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping; applications keep running");
    stopping.cancel();
    let _ = tokio::time::timeout(GOODBYE, serving).await;
    Ok(())
}

/// Where a server keeps its databases.
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
    let build = &configuration.build;
    Ok(capsule_deploy::Options {
        data: directory.into(),
        databases,
        program: program()?,
        listen: configuration.listen,
        base_domain: configuration.base_domain.clone(),
        build_limits: Limits {
            memory: Some(u64::from(build.memory_mib) << 20),
            cpu_percent: Some(build.cpu_percent),
            processes: Some(4096),
            seconds: Some(u64::from(build.seconds)),
            low_priority: true,
        },
        builds: build.concurrent as usize,
        toolchains: capsule_builder::Settings {
            ca_bundle: Some(build.ca_bundle.clone()).filter(|path| !path.as_os_str().is_empty()),
            environment: build.environment.clone(),
        },
        health_seconds: u64::from(configuration.deploy.health_seconds),
        drain_seconds: u64::from(configuration.deploy.drain_seconds),
    })
}

/// This binary. After an upgrade in place, its path is the new one's.
fn program() -> anyhow::Result<std::path::PathBuf> {
    let path = std::env::current_exe().context("the path of this program is not known")?;
    let text = path.to_string_lossy();
    Ok(text.strip_suffix(" (deleted)").map_or_else(|| path.clone(), Into::into))
}

fn checks(deploys: &Arc<Deploys>) -> Vec<Check> {
    let deploys = deploys.clone();
    let ingress = move || {
        let deploys = deploys.clone();
        Box::pin(async move { deploys.listen().await.is_ok() }) as Pin<Box<dyn Future<Output = bool> + Send>>
    };
    vec![("ingress", Arc::new(ingress))]
}

fn url(domain: &str, address: SocketAddr) -> String {
    match address.port() {
        80 => format!("http://{domain}"),
        port => format!("http://{domain}:{port}"),
    }
}

/// Where a program of this host reaches a listener.
fn reachable(address: SocketAddr) -> String {
    let ip = if address.ip().is_unspecified() { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { address.ip() };
    format!("http://{}", SocketAddr::new(ip, address.port()))
}

fn greet(data: &Data, running: &Running, private: SocketAddr) {
    tracing::info!(url = running.url, private = %private, data = %data.path().display(), "Capsule is ready");
    if std::io::stdout().is_terminal() {
        println!("Capsule is ready at {0}\n  API documentation  {0}/api/documentation/", running.url);
        println!("  health, metrics    http://{private}/metrics");
        println!("  data               {}", data.path().display());
        println!("  set-up token       in {}", data.path().join("local-token").display());
        println!("In another terminal, in your application's folder: capsule deploy");
    }
}
