//! Builds with the Engine's classic builder, which runs each step in a container of its own.

use std::time::Instant;

use bollard::query_parameters::BuildImageOptions;
use bytes::Bytes;
use futures_util::StreamExt;
use http_body_util::{Either, Full};

use super::progress::Progress;
use super::{Engine, ImageJob, LABEL};
use crate::BuildError;

pub async fn build(engine: &Engine, job: &ImageJob, progress: &Progress<'_>) -> Result<(), BuildError> {
    if !job.secrets.is_empty() {
        return Err(BuildError::Failed("build secrets need BuildKit: the classic builder would keep them in a layer".into()));
    }
    let memory = job.limits.memory.map(i32::try_from).transpose().map_err(|_| {
        BuildError::Failed("the classic builder supports memory limits up to 2047 MiB; use BuildKit for larger ones".into())
    })?;
    let options = BuildImageOptions {
        dockerfile: job.context.dockerfile.clone(),
        t: Some(job.name.clone()),
        nocache: !job.cached,
        rm: true,
        forcerm: true,
        buildargs: Some(job.arguments.iter().map(|(name, value)| (name.clone(), value.clone())).collect()),
        labels: Some([(LABEL.to_owned(), "1".to_owned())].into()),
        memory,
        memswap: memory,
        cpuperiod: job.limits.cpu_percent.map(|_| 100_000),
        cpuquota: job.limits.cpu_percent.and_then(|percent| i32::try_from(u64::from(percent) * 1000).ok()),
        ..BuildImageOptions::default()
    };
    let credentials = Some(job.credentials().into_iter().collect()).filter(|_| !job.credentials.is_empty());
    let archive = Either::Left(Full::new(Bytes::from(job.context.archive.clone())));
    let mut events = engine.docker.build_image(options, credentials, Some(archive));
    // The running step: its name, its start, and whether it came from the cache.
    let mut current: Option<(String, Instant, bool)> = None;
    let end = |current: &mut Option<(String, Instant, bool)>| {
        if let Some((name, since, cached)) = current.take() {
            progress.step_finished(&name, since.elapsed().as_secs_f64(), cached);
        }
    };
    while let Some(event) = events.next().await {
        let event = event.map_err(|error| {
            let step = current.as_ref().map_or(String::new(), |(name, ..)| format!("{name}: "));
            let text = match &error {
                bollard::errors::Error::DockerStreamError { error } => error.clone(),
                other => other.to_string(),
            };
            BuildError::Failed(progress.masked(&format!("{step}{text}")))
        })?;
        let Some(text) = event.stream else { continue };
        if text.starts_with("Step ") {
            end(&mut current);
            let name = text.trim_end();
            progress.step_started(name, name);
            current = Some((name.to_owned(), Instant::now(), false));
        } else if let Some((name, _, cached)) = &mut current {
            match text.trim() {
                " ---> Using cache" | "---> Using cache" => *cached = true,
                // Ids of containers and layers.
                internal if internal.starts_with("---> ") || internal.starts_with("Removing intermediate") => {}
                _ => progress.step_output(name, &text),
            }
        }
    }
    end(&mut current);
    Ok(())
}
