//! Builds images with Docker Engine: with `BuildKit`, which it includes since 18.09, or its classic builder.
//!
//! A build reports its progress step by step, and ends when it is cancelled, reaches its timeout, or makes an image that is
//! too large. The build cache has a size limit.

mod buildkit;
mod classic;
mod context;
mod progress;

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bollard::Docker;
use bollard::auth::DockerCredentials;
use bollard::query_parameters::{PruneImagesOptions, RemoveImageOptions};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

pub use context::{Context, DOCKERFILE};
pub use progress::Event;
use progress::Progress;

use crate::BuildError;

/// The label of all images that Capsule builds.
const LABEL: &str = "dev.capsule.built";

/// The API version of Docker Engine 23.0, the first that can prune its cache during a build.
const CONCURRENT_PRUNE_API: (usize, usize) = (1, 42);

/// How long an eviction waits for running builds if the Engine cannot do both at once.
const EVICTION_TIMEOUT: Duration = Duration::from_secs(60);

/// How often a lock is tried again.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Limits of a build. `None` is no limit.
#[derive(Clone, Copy, Debug, Default)]
pub struct ImageLimits {
    /// Wall-clock time.
    pub time: Option<Duration>,
    /// Bytes of memory of a step.
    pub memory: Option<u64>,
    /// Hundredths of a core, of a step.
    pub cpu_percent: Option<u32>,
    /// Bytes of the finished image.
    pub disk: Option<u64>,
}

/// The builder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    BuildKit,
    Classic,
}

/// A user and a password for a registry.
#[derive(Clone)]
pub struct Credentials {
    pub username: String,
    pub password: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credentials({})", self.username)
    }
}

/// One image to build.
#[derive(Debug)]
pub struct ImageJob {
    /// The name of the image, as `name:tag`.
    pub name: String,
    pub context: Context,
    pub method: Method,
    pub limits: ImageLimits,
    /// Build arguments. They are visible in the image's history.
    pub arguments: BTreeMap<String, String>,
    /// Build secrets, for steps that mount them. They are in no layer, and masked in reported progress.
    pub secrets: BTreeMap<String, String>,
    /// Credentials by the host of the registry.
    pub credentials: BTreeMap<String, Credentials>,
    /// Whether the build cache is used.
    pub cached: bool,
    pub cancel: CancellationToken,
}

impl ImageJob {
    /// A job without secrets or limits.
    #[must_use]
    pub fn new(name: &str, context: Context, method: Method) -> Self {
        Self {
            name: name.to_owned(),
            context,
            method,
            limits: ImageLimits::default(),
            arguments: BTreeMap::new(),
            secrets: BTreeMap::new(),
            credentials: BTreeMap::new(),
            cached: true,
            cancel: CancellationToken::new(),
        }
    }

    fn credentials(&self) -> Vec<(String, DockerCredentials)> {
        let one = |(host, given): (&String, &Credentials)| {
            let credentials = DockerCredentials {
                username: Some(given.username.clone()),
                password: Some(given.password.clone()),
                serveraddress: Some(host.clone()),
                ..DockerCredentials::default()
            };
            (host.clone(), credentials)
        };
        self.credentials.iter().map(one).collect()
    }
}

/// A finished image.
#[derive(Clone, Debug)]
pub struct Built {
    /// `sha256:…`
    pub id: String,
    /// Bytes.
    pub size: u64,
    pub took: Duration,
    /// The number of steps, and how many of them came from the cache.
    pub steps: usize,
    pub cached: usize,
}

/// A Docker Engine to build with.
#[derive(Clone, Debug)]
pub struct Engine {
    docker: Docker,
    socket: PathBuf,
}

impl Engine {
    /// The Engine that listens on this Unix socket.
    ///
    /// # Errors
    /// When no Engine responds there.
    pub async fn at(socket: &Path) -> Result<Self, BuildError> {
        let unreachable = |error: bollard::errors::Error| {
            let text = format!(
                "Docker Engine does not answer at {}: {error}; is it running, and may this user use it?",
                socket.display()
            );
            BuildError::Host(text)
        };
        let path = socket.to_str().ok_or_else(|| BuildError::Host("the path of the socket is not UTF-8".into()))?;
        let docker = Docker::connect_with_unix(path, 600, bollard::API_DEFAULT_VERSION).map_err(unreachable)?;
        let docker = docker.negotiate_version().await.map_err(unreachable)?;
        Ok(Self { docker, socket: socket.into() })
    }

    /// Builds an image and calls `report` for each event.
    ///
    /// # Errors
    /// When a step fails, the build is cancelled or reaches its timeout, or the image is too large; the text is for the user.
    pub async fn build(&self, job: &ImageJob, report: &(dyn Fn(&Event) + Sync)) -> Result<Built, BuildError> {
        let began = Instant::now();
        let progress = Progress::new(job, report);
        let work = async {
            match job.method {
                Method::BuildKit => {
                    let _lock = self.lock_engine(File::try_lock_shared).await?;
                    buildkit::build(self, job, &progress).await
                }
                Method::Classic => classic::build(self, job, &progress).await,
            }
        };
        let timeout = async {
            match job.limits.time {
                Some(time) => tokio::time::sleep(time).await,
                None => std::future::pending().await,
            }
        };
        // If the request is dropped, the Engine stops the build.
        tokio::select! {
            result = work => result?,
            () = timeout => {
                let seconds = job.limits.time.unwrap_or_default().as_secs();
                return Err(BuildError::Failed(format!("the build was stopped: it took longer than {seconds} s")));
            }
            () = job.cancel.cancelled() => return Err(BuildError::Failed("the build was cancelled".into())),
        }
        let image = self.docker.inspect_image(&job.name).await.map_err(host)?;
        let size = image.size.and_then(|size| u64::try_from(size).ok()).unwrap_or_default();
        if let Some(most) = job.limits.disk.filter(|most| size > *most) {
            self.remove(&job.name).await?;
            let (size, most) = (size >> 20, most >> 20);
            return Err(BuildError::Failed(format!(
                "the image has {size} MiB, more than the limit of {most} MiB; it was removed"
            )));
        }
        let (steps, cached) = progress.counts();
        Ok(Built { id: image.id.unwrap_or_default(), size, took: began.elapsed(), steps, cached })
    }

    /// Removes an image by its name.
    ///
    /// # Errors
    /// When the Engine fails.
    pub async fn remove(&self, name: &str) -> Result<(), BuildError> {
        let options = RemoveImageOptions { force: true, ..RemoveImageOptions::default() };
        self.docker.remove_image(name, Some(options), None).await.map_err(host)?;
        Ok(())
    }

    /// Prunes the build cache to `keep_bytes`, oldest entries first, and images that Capsule built and that have no name any
    /// more. Returns how many bytes were freed.
    ///
    /// # Errors
    /// When the Engine fails, or cannot prune during a build and no pause between builds comes in time.
    pub async fn evict(&self, keep_bytes: u64) -> Result<u64, BuildError> {
        let _lock = tokio::time::timeout(EVICTION_TIMEOUT, self.lock_engine(File::try_lock)).await.map_err(|_| {
            let seconds = EVICTION_TIMEOUT.as_secs();
            BuildError::Host(format!("the build cache was not pruned: there was no pause between builds for {seconds} s, and Docker Engine before 23.0 cannot prune during a build; update it"))
        })??;
        // Not by the client library: its name of this parameter is that of engines since 28.0. All engines accept this name.
        let unreachable = |error: ConnectionError| BuildError::Host(format!("Docker Engine: {error}"));
        let request = hyper::Request::post(format!("/build/prune?all=true&keep-storage={keep_bytes}"));
        let answer = self.send(request).await.map_err(unreachable)?;
        let status = answer.status();
        let answer = answer.into_body().collect().await.map_err(|error| unreachable(error.into()))?.to_bytes();
        let cache: serde_json::Value = serde_json::from_slice(&answer).unwrap_or_default();
        if !status.is_success() {
            let why = cache["message"].as_str().unwrap_or("no reason given");
            return Err(BuildError::Host(format!("Docker Engine: {why} ({status})")));
        }
        // An image that another build has just made has no name yet.
        let filters = [("label", LABEL), ("dangling", "true"), ("until", "10m")];
        let filters = filters.map(|(name, value)| (name.to_owned(), vec![value.to_owned()]));
        let options = PruneImagesOptions { filters: Some(filters.into()) };
        let layers = match self.docker.prune_images(Some(options)).await {
            Ok(images) => images.space_reclaimed.and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or_default(),
            // Another prune is running.
            Err(bollard::errors::Error::DockerResponseServerError { status_code: 409, .. }) => 0,
            Err(error) => return Err(host(error)),
        };
        Ok(cache["SpaceReclaimed"].as_u64().unwrap_or_default() + layers)
    }

    /// Waits for the lock that a build (shared) or an eviction (exclusive) holds while it runs.
    ///
    /// Engines before 23.0 crash if a build uses cache that is being pruned (moby/buildkit#2153). The lock is on the folder
    /// of the Engine's socket: it holds for all processes of this host, and is released when its process ends.
    async fn lock_engine(&self, lock: fn(&File) -> Result<(), TryLockError>) -> Result<Option<File>, BuildError> {
        let version = self.docker.client_version();
        if (version.major_version, version.minor_version) >= CONCURRENT_PRUNE_API {
            return Ok(None);
        }
        let socket = std::path::absolute(&self.socket)?;
        let folder = File::open(socket.parent().unwrap_or(&socket))?;
        loop {
            match lock(&folder) {
                Ok(()) => return Ok(Some(folder)),
                Err(TryLockError::WouldBlock) => tokio::time::sleep(POLL_INTERVAL).await,
                Err(TryLockError::Error(error)) => return Err(error.into()),
            }
        }
    }

    /// Sends a request that the client library does not support, over a new connection.
    async fn send(
        &self,
        request: hyper::http::request::Builder,
    ) -> Result<hyper::Response<hyper::body::Incoming>, ConnectionError> {
        let connection = UnixStream::connect(&self.socket).await?;
        let (mut sender, driver) = hyper::client::conn::http1::handshake(TokioIo::new(connection)).await?;
        tokio::spawn(driver.with_upgrades());
        Ok(sender.send_request(request.header("host", "docker").body(Empty::<Bytes>::new())?).await?)
    }
}

/// Why a request to the Engine failed.
type ConnectionError = Box<dyn std::error::Error + Send + Sync>;

#[expect(clippy::needless_pass_by_value, reason = "used as an error mapper")]
fn host(error: bollard::errors::Error) -> BuildError {
    BuildError::Host(format!("Docker Engine: {error}"))
}
