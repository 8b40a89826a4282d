//! Building with `BuildKit`: the build itself by the client library, what it tells by a second connection.

use std::collections::HashMap;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bollard::grpc::BuildRef;
use bollard::grpc::build::{ImageBuildFrontendOptions, ImageBuildLoadInput, SecretSource};
use bollard::grpc::driver::Build;
use bollard::grpc::driver::moby::Moby;
use bollard_buildkit_proto::moby::buildkit::v1::control_client::ControlClient;
use bollard_buildkit_proto::moby::buildkit::v1::{StatusRequest, Vertex};
use bytes::Bytes;
use capsule_runtime::{Limits, Watch};
use futures_util::StreamExt;

use super::progress::Told;
use super::{Engine, ImageJob, ImageLimits, LABEL, Lost};
use crate::BuildError;

/// How often the groups of steps are looked for: a step takes longer to begin.
const LOOK: Duration = Duration::from_millis(20);

pub async fn build(engine: &Engine, job: &ImageJob, told: &Told<'_>) -> Result<(), BuildError> {
    let folder = tempfile::Builder::new().prefix("capsule-build-").tempdir()?;
    let mut options =
        ImageBuildFrontendOptions::builder().dockerfile(job.context.dockerfile.as_ref()).label(LABEL, "1").nocache(!job.cached);
    for (name, value) in &job.arguments {
        options = options.buildarg(name, value);
    }
    for (index, (name, value)) in job.secrets.iter().enumerate() {
        // A file that only this user may read, for as long as the build takes.
        let path = folder.path().join(index.to_string());
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        file.write_all(value.as_bytes())?;
        options = options.set_secret(name, &SecretSource::File(path));
    }
    let credentials = job.credentials();
    let credentials: HashMap<&str, _> = credentials.iter().map(|(host, given)| (host.as_str(), given.clone())).collect();
    let build = BuildRef::default();
    let id = build.as_ref().to_owned();
    let mut watch = watch(&job.limits)?;
    let seen = Mutex::new(Seen::default());
    let solve = Moby::new(&engine.docker).docker_build(
        &job.name,
        options.build(),
        ImageBuildLoadInput::Upload(Bytes::from(job.context.archive.clone())),
        Some(credentials),
        Some(build),
    );
    let follow = async {
        // A build that cannot be followed is still a build.
        if let Err(error) = follow(engine, &id, told, &seen).await {
            told.begun("status", &format!("what happens cannot be followed: {error}"));
        }
    };
    let limit = async {
        while let Some(watch) = &mut watch {
            watch.look();
            tokio::time::sleep(LOOK).await;
        }
        std::future::pending().await
    };
    let (solved, ()) = tokio::select! {
        done = async { tokio::join!(solve, follow) } => done,
        never = limit => never,
    };
    let seen = seen.into_inner().unwrap_or_else(PoisonError::into_inner);
    let limited = watch.map(Watch::seen);
    if let Some(Some(Err(why))) = limited {
        return Err(BuildError::Failed(format!("a step was ended, since it could not be held to its limits: {why}")));
    }
    solved.map_err(|error| BuildError::Failed(told.masked(&seen.failed.unwrap_or_else(|| error.to_string()))))?;
    if seen.ran && limited == Some(None) {
        return Err(unlimited("no control group of a step was found"));
    }
    Ok(())
}

/// What is remembered of a build's steps.
#[derive(Default)]
struct Seen {
    /// The step that failed, and why.
    failed: Option<String>,
    /// Whether a command was run.
    ran: bool,
}

/// `BuildKit` has no limits of memory and CPU, but runs each step in a control group that can be told by its
/// name.
fn watch(limits: &ImageLimits) -> Result<Option<Watch>, BuildError> {
    if limits.memory.is_none() && limits.cpu_percent.is_none() {
        return Ok(None);
    }
    let limits = Limits { memory: limits.memory, cpu_percent: limits.cpu_percent, ..Limits::default() };
    // Below the Engine's own; where systemd manages its groups, `<slice>:docker:<id>` beside the Engine.
    let is_step = |path: &str| path.contains("/buildkit/") || path.contains(".slice:docker:");
    Watch::begin(&["", "docker/buildkit"], is_step, &limits).map(Some).map_err(|why| unlimited(&why))
}

fn unlimited(why: &str) -> BuildError {
    BuildError::Host(format!("BuildKit cannot be held to limits of memory and CPU here: {why}; --classic builds with them"))
}

/// Tells what happens, until the build is over.
async fn follow(engine: &Engine, id: &str, told: &Told<'_>, seen: &Mutex<Seen>) -> Result<(), Lost> {
    let request = hyper::Request::post("/grpc").header("connection", "Upgrade").header("upgrade", "h2c");
    let response = engine.send(request).await?;
    let mut upgraded = Some(hyper::upgrade::on(response).await?);
    let connector = tower::service_fn(move |_| {
        // One connection; there is no other to be had.
        std::future::ready(upgraded.take().ok_or_else(|| std::io::Error::other("the Engine closed the connection")))
    });
    let channel = tonic::transport::Endpoint::from_static("http://docker").connect_with_connector(connector).await?;
    let mut events = ControlClient::new(channel).status(StatusRequest { r#ref: id.to_owned() }).await?.into_inner();
    while let Some(status) = events.next().await {
        let status = status?;
        for vertex in &status.vertexes {
            if vertex.started.is_some() || vertex.cached {
                told.begun(&vertex.digest, &vertex.name);
            }
        }
        for line in &status.logs {
            told.output(&line.vertex, &String::from_utf8_lossy(&line.msg));
        }
        for vertex in &status.vertexes {
            if vertex.completed.is_some() {
                told.done(&vertex.digest, seconds(vertex), vertex.cached);
            }
            let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.ran |= !vertex.cached && vertex.completed.is_some() && vertex.name.contains("] RUN ");
            if !vertex.error.is_empty() {
                seen.failed = Some(format!("{}: {}", vertex.name, vertex.error));
            }
        }
    }
    Ok(())
}

fn seconds(vertex: &Vertex) -> f64 {
    let (Some(began), Some(ended)) = (&vertex.started, &vertex.completed) else { return 0.0 };
    (ended.seconds - began.seconds) as f64 + f64::from(ended.nanos - began.nanos) / 1e9
}
