//! Building with `BuildKit`: the build itself by the client library, what it tells by a second connection.

use std::collections::HashMap;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use bollard::grpc::BuildRef;
use bollard::grpc::build::{ImageBuildFrontendOptions, ImageBuildLoadInput, SecretSource};
use bollard::grpc::driver::Build;
use bollard::grpc::driver::moby::Moby;
use bollard::models::SystemInfoCgroupDriverEnum;
use bollard_buildkit_proto::moby::buildkit::v1::control_client::ControlClient;
use bollard_buildkit_proto::moby::buildkit::v1::{StatusRequest, Vertex};
use bytes::Bytes;
use capsule_runtime::{Held, Limits};
use futures_util::StreamExt;

use super::progress::Told;
use super::{Engine, ImageJob, ImageLimits, LABEL, Lost};
use crate::BuildError;

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
    let _limited = match limit(engine, &job.limits).await {
        Ok(limited) => limited,
        Err(why) => {
            return Err(BuildError::Host(format!(
                "BuildKit cannot be limited in memory and CPU here: {why}; the classic builder can (--classic)"
            )));
        }
    };
    let credentials = job.credentials();
    let credentials: HashMap<&str, _> = credentials.iter().map(|(host, given)| (host.as_str(), given.clone())).collect();
    let build = BuildRef::default();
    let id = build.as_ref().to_owned();
    let failed = std::sync::Mutex::new(None);
    let solve = Moby::new(&engine.docker).docker_build(
        &job.name,
        options.build(),
        ImageBuildLoadInput::Upload(Bytes::from(job.context.archive.clone())),
        Some(credentials),
        Some(build),
    );
    let follow = async {
        // A build that cannot be followed is still a build.
        if let Err(error) = follow(engine, &id, told, &failed).await {
            told.begun("status", &format!("what happens cannot be followed: {error}"));
        }
    };
    let (solved, ()) = tokio::join!(solve, follow);
    solved.map_err(|error| {
        let step = failed.lock().ok().and_then(|mut failed| failed.take());
        BuildError::Failed(told.masked(&step.unwrap_or_else(|| error.to_string())))
    })
}

/// Limits what `BuildKit` runs. It has no limits of its own, and its steps run in groups below one that
/// the Engine keeps for it: that one is limited for as long as the value lives.
async fn limit(engine: &Engine, limits: &ImageLimits) -> Result<Option<Held>, String> {
    if limits.memory.is_none() && limits.cpu_percent.is_none() {
        return Ok(None);
    }
    let told = engine.docker.info().await.map_err(|error| error.to_string())?;
    if told.cgroup_driver != Some(SystemInfoCgroupDriverEnum::CGROUPFS) {
        return Err("the Engine's steps share no control group, since systemd manages its groups".into());
    }
    let limits = Limits { memory: limits.memory, cpu_percent: limits.cpu_percent, ..Limits::default() };
    Held::limit(Path::new("docker/buildkit"), &limits).map(Some)
}

/// Tells what happens, until the build is over.
async fn follow(engine: &Engine, id: &str, told: &Told<'_>, failed: &std::sync::Mutex<Option<String>>) -> Result<(), Lost> {
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
            if !vertex.error.is_empty()
                && let Ok(mut failed) = failed.lock()
            {
                *failed = Some(format!("{}: {}", vertex.name, vertex.error));
            }
        }
    }
    Ok(())
}

fn seconds(vertex: &Vertex) -> f64 {
    let (Some(began), Some(ended)) = (&vertex.started, &vertex.completed) else { return 0.0 };
    (ended.seconds - began.seconds) as f64 + f64::from(ended.nanos - began.nanos) / 1e9
}
