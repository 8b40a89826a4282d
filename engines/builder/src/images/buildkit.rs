//! Builds with `BuildKit`. The client library runs the build; a second connection follows its progress.

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

use super::progress::Progress;
use super::{ConnectionError, Engine, ImageJob, ImageLimits, LABEL};
use crate::BuildError;

/// How often new control groups of steps are searched for. A step takes longer than this to start.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

pub async fn build(engine: &Engine, job: &ImageJob, progress: &Progress<'_>) -> Result<(), BuildError> {
    let folder = tempfile::Builder::new().prefix("capsule-build-").tempdir()?;
    let mut options =
        ImageBuildFrontendOptions::builder().dockerfile(job.context.dockerfile.as_ref()).label(LABEL, "1").nocache(!job.cached);
    for (name, value) in &job.arguments {
        options = options.buildarg(name, value);
    }
    for (index, (name, value)) in job.secrets.iter().enumerate() {
        // A file that only this user may read; it is removed when the build ends.
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
    let seen = Mutex::new(Outcome::default());
    let solve = Moby::new(&engine.docker).docker_build(
        &job.name,
        options.build(),
        ImageBuildLoadInput::Upload(Bytes::from(job.context.archive.clone())),
        Some(credentials),
        Some(build),
    );
    let follow = async {
        // The build goes on without progress.
        if let Err(error) = follow(engine, &id, progress, &seen).await {
            progress.step_started("status", &format!("the progress of the build cannot be followed: {error}"));
        }
    };
    let limit = async {
        while let Some(watch) = &mut watch {
            watch.limit_new_groups();
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        std::future::pending().await
    };
    let (solved, ()) = tokio::select! {
        done = async { tokio::join!(solve, follow) } => done,
        never = limit => never,
    };
    let seen = seen.into_inner().unwrap_or_else(PoisonError::into_inner);
    let limited = watch.map(Watch::outcome);
    if let Some(Some(Err(why))) = limited {
        return Err(BuildError::Failed(format!("a step was stopped, because its limits could not be set: {why}")));
    }
    solved.map_err(|error| BuildError::Failed(progress.masked(&seen.failed.unwrap_or_else(|| error.to_string()))))?;
    if seen.ran && limited == Some(None) {
        return Err(limits_unavailable("no control group of a step was found"));
    }
    Ok(())
}

/// What the steps of a build did.
#[derive(Default)]
struct Outcome {
    /// The step that failed, and why.
    failed: Option<String>,
    /// Whether a command ran, not from the cache.
    ran: bool,
}

/// Starts to limit the steps of builds. `BuildKit` has no limits of memory and CPU, but runs each step in a control group
/// with a recognizable name.
fn watch(limits: &ImageLimits) -> Result<Option<Watch>, BuildError> {
    if limits.memory.is_none() && limits.cpu_percent.is_none() {
        return Ok(None);
    }
    let limits = Limits { memory: limits.memory, cpu_percent: limits.cpu_percent, ..Limits::default() };
    // Below the Engine's own group; where systemd manages groups, `<slice>:docker:<id>` beside it.
    let is_step = |path: &str| path.contains("/buildkit/") || path.contains(".slice:docker:");
    Watch::start(&["", "docker/buildkit"], is_step, &limits).map(Some).map_err(|why| limits_unavailable(&why))
}

fn limits_unavailable(why: &str) -> BuildError {
    BuildError::Host(format!("limits of memory and CPU cannot be set for BuildKit here: {why}; use --classic"))
}

/// Reports progress until the build ends.
async fn follow(engine: &Engine, id: &str, progress: &Progress<'_>, seen: &Mutex<Outcome>) -> Result<(), ConnectionError> {
    let request = hyper::Request::post("/grpc").header("connection", "Upgrade").header("upgrade", "h2c");
    let response = engine.send(request).await?;
    let mut upgraded = Some(hyper::upgrade::on(response).await?);
    let connector = tower::service_fn(move |_| {
        // There is only this one connection.
        std::future::ready(upgraded.take().ok_or_else(|| std::io::Error::other("the Engine closed the connection")))
    });
    let channel = tonic::transport::Endpoint::from_static("http://docker").connect_with_connector(connector).await?;
    let mut events = ControlClient::new(channel).status(StatusRequest { r#ref: id.to_owned() }).await?.into_inner();
    while let Some(status) = events.next().await {
        let status = status?;
        for vertex in &status.vertexes {
            if vertex.started.is_some() || vertex.cached {
                progress.step_started(&vertex.digest, &vertex.name);
            }
        }
        for line in &status.logs {
            progress.step_output(&line.vertex, &String::from_utf8_lossy(&line.msg));
        }
        for vertex in &status.vertexes {
            if vertex.completed.is_some() {
                progress.step_finished(&vertex.digest, seconds(vertex), vertex.cached);
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
