//! `capsule build`: builds an image of a folder with Docker Engine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use capsule_builder::images::{Context, Credentials, Engine, Event, ImageJob, ImageLimits, Method};
use capsule_buildplan::{Folder, ImageOptions};
use serde_json::json;

use super::plan::{base_images, plan_folder};
use crate::arguments::Build;
use crate::folder::Application;
use crate::terminal::Terminal;

pub fn build(build: &Build, terminal: Terminal) -> anyhow::Result<()> {
    // Without a folder, build the application of the current one.
    let folder = match &build.folder {
        here if here == Path::new(".") => Application::find(here)?.folder,
        named => named.clone(),
    };
    let plan = plan_folder(&folder)?;
    let context = match &plan.build.dockerfile {
        Some(file) => Context::of(&folder, file)?,
        None => {
            let options = ImageOptions {
                images: base_images(&build.images)?,
                buildkit: !build.classic,
                // Builds of one image name share their caches, and only they do.
                scope: build
                    .tag
                    .rsplit_once(':')
                    .filter(|(_, tag)| !tag.contains('/'))
                    .map_or(&*build.tag, |(name, _)| name)
                    .to_owned(),
                secrets: build.secrets.clone(),
                arguments: build.arguments.clone(),
                opentelemetry: build.opentelemetry,
            };
            let image = capsule_buildplan::dockerfile(&Folder::new(&folder), &plan, &options).map_err(|error| anyhow!(error))?;
            Context::with(&folder, &image.dockerfile, &image.dockerignore)?
        }
    };
    let method = if build.classic { Method::Classic } else { Method::BuildKit };
    let variable = |name: &String| {
        let value = std::env::var(name).with_context(|| format!("The environment variable {name} is not set."))?;
        anyhow::Ok((name.clone(), value))
    };
    let mut job = ImageJob::new(&build.tag, context, method);
    job.arguments = build.arguments.iter().map(variable).collect::<Result<_, _>>()?;
    job.secrets = build.secrets.iter().map(variable).collect::<Result<_, _>>()?;
    job.credentials = credentials()?;
    job.cached = !build.no_cache;
    job.limits = ImageLimits {
        time: Some(Duration::from_secs(build.seconds)),
        memory: build.memory_mib.map(|mib| mib << 20),
        cpu_percent: build.cpu_percent,
        disk: build.size_mib.map(|mib| mib << 20),
    };
    let asynchronous = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Events go to standard error. Standard output has only the result.
    let report = |event: &Event| {
        let text = match event {
            Event::Step { step, name } => format!("#{step} {name}"),
            Event::Output { step, text } => format!("#{step} │ {text}"),
            Event::Done { step, cached: true, .. } => format!("#{step} cached"),
            Event::Done { step, seconds, .. } => format!("#{step} done in {seconds:.1} s"),
        };
        terminal.event(event, &text);
    };
    let built = asynchronous.block_on(async {
        let engine = Engine::at(&build.engine).await?;
        let cancel = job.cancel.clone();
        tokio::spawn(async move {
            let _ = tokio::signal::ctrl_c().await;
            cancel.cancel();
        });
        let built = engine.build(&job, &report).await?;
        if let Some(keep) = build.keep_mib {
            // The image is built all the same.
            if let Err(error) = engine.evict(keep << 20).await {
                terminal.note(&format!("warning: Cannot shrink the build cache to {keep} MiB: {error}"));
            }
        }
        anyhow::Ok(built)
    })?;
    let result = json!({
        "name": build.tag, "id": built.id, "bytes": built.size, "seconds": built.took.as_secs_f64(), "steps": built.steps, "cached": built.cached,
    });
    terminal.show(&result, |_| {
        format!(
            "Built {} ({} MiB) in {:.1} s; {} of {} steps were cached.",
            build.tag,
            built.size >> 20,
            built.took.as_secs_f64(),
            built.cached,
            built.steps
        )
    })
}

/// The registry credentials of `docker login`, from `$DOCKER_CONFIG/config.json` or `~/.docker/config.json`.
fn credentials() -> anyhow::Result<BTreeMap<String, Credentials>> {
    let folder = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from);
    let folder = folder.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".docker")));
    let Some(path) = folder.map(|folder| folder.join("config.json")).filter(|path| path.is_file()) else {
        return Ok(BTreeMap::new());
    };
    let read = || format!("Cannot read {}", path.display());
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).with_context(read)?).with_context(read)?;
    let known = config["auths"].as_object().into_iter().flatten();
    Ok(known
        .filter_map(|(host, auth)| {
            // Without `auth`, a credential helper keeps the password.
            let plain = BASE64_STANDARD.decode(auth["auth"].as_str()?).ok()?;
            let (username, password) =
                String::from_utf8(plain).ok()?.split_once(':').map(|(name, word)| (name.to_owned(), word.to_owned()))?;
            // Docker Hub is stored under the address of its API version 1.
            let host = host.trim_start_matches("https://").trim_end_matches("/v1/").to_owned();
            Some((host, Credentials { username, password }))
        })
        .collect())
}
