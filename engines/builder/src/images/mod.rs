//! Images, built by Docker Engine: by `BuildKit`, which is part of it since 18.09, or by its classic builder.
//!
//! A build is told as it happens, step by step; it ends when it is cancelled, takes too long, or makes an
//! image that is too large. What builds leave behind is kept within bounds.

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
use progress::Told;

use crate::BuildError;

/// Every image that is built here has this label.
const LABEL: &str = "dev.capsule.built";

/// The API of Docker Engine 23.0.
const BOTH_AT_ONCE: (usize, usize) = (1, 42);

/// How long an eviction waits for builds, where it may not go on beside them.
const PAUSE: Duration = Duration::from_secs(60);

/// How often what is waited for is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// What a build may use at the most. `None` is no limit.
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

/// Who builds.
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
    /// What it will be called, as `name:tag`.
    pub name: String,
    pub context: Context,
    pub method: Method,
    pub limits: ImageLimits,
    /// Given to the build; they are in the image's history.
    pub arguments: BTreeMap<String, String>,
    /// Shown to steps that mount them; they are in no layer, and masked in what is told.
    pub secrets: BTreeMap<String, String>,
    /// By the registry's host.
    pub credentials: BTreeMap<String, Credentials>,
    /// Whether what was built before may be used again.
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
    /// Steps, and how many of them were done before.
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
    /// When none answers there.
    pub async fn at(socket: &Path) -> Result<Self, BuildError> {
        let unreachable = |error: bollard::errors::Error| {
            let text = format!(
                "Docker Engine does not answer at {}: {error}; is it running, and may this user use it?",
                socket.display()
            );
            BuildError::Host(text)
        };
        let path = socket.to_str().ok_or_else(|| BuildError::Host("the socket's path is no text".into()))?;
        let docker = Docker::connect_with_unix(path, 600, bollard::API_DEFAULT_VERSION).map_err(unreachable)?;
        let docker = docker.negotiate_version().await.map_err(unreachable)?;
        Ok(Self { docker, socket: socket.into() })
    }

    /// Builds an image; what happens is told as it happens.
    ///
    /// # Errors
    /// When a step fails, the build is cancelled, takes too long, or makes too much; the text is for the user.
    pub async fn build(&self, job: &ImageJob, tell: &(dyn Fn(&Event) + Sync)) -> Result<Built, BuildError> {
        let began = Instant::now();
        let told = Told::new(job, tell);
        let work = async {
            match job.method {
                Method::BuildKit => {
                    let _turn = self.turn(File::try_lock_shared).await?;
                    buildkit::build(self, job, &told).await
                }
                Method::Classic => classic::build(self, job, &told).await,
            }
        };
        let late = async {
            match job.limits.time {
                Some(time) => tokio::time::sleep(time).await,
                None => std::future::pending().await,
            }
        };
        // Dropped, the request ends, and the Engine ends the build with it.
        tokio::select! {
            result = work => result?,
            () = late => {
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
                "the image is larger than it may be ({size} MiB of {most} MiB); it was removed"
            )));
        }
        let (steps, cached) = told.counts();
        Ok(Built { id: image.id.unwrap_or_default(), size, took: began.elapsed(), steps, cached })
    }

    /// Removes an image by its name.
    ///
    /// # Errors
    /// When the Engine does not.
    pub async fn remove(&self, name: &str) -> Result<(), BuildError> {
        let options = RemoveImageOptions { force: true, ..RemoveImageOptions::default() };
        self.docker.remove_image(name, Some(options), None).await.map_err(host)?;
        Ok(())
    }

    /// Drops what builds left behind: the oldest of the cache beyond so many bytes, and layers of images that
    /// were built here and have no name any more. Returns how many bytes were freed.
    ///
    /// # Errors
    /// When the Engine does not, or builds without a pause and is too old to do both at once.
    pub async fn evict(&self, keep_bytes: u64) -> Result<u64, BuildError> {
        let _turn = tokio::time::timeout(PAUSE, self.turn(File::try_lock)).await.map_err(|_| {
            let seconds = PAUSE.as_secs();
            BuildError::Host(format!("nothing was dropped: in {seconds} s there was no pause between builds, and Docker Engine before 23.0 crashes when it does both at once"))
        })??;
        // By hand: the client library names the bound only as engines since 28.0 do, which take this name, too.
        let lost = |error: Lost| BuildError::Host(format!("Docker Engine: {error}"));
        let request = hyper::Request::post(format!("/build/prune?all=true&keep-storage={keep_bytes}"));
        let answer = self.send(request).await.map_err(lost)?;
        let status = answer.status();
        let answer = answer.into_body().collect().await.map_err(|error| lost(error.into()))?.to_bytes();
        let cache: serde_json::Value = serde_json::from_slice(&answer).unwrap_or_default();
        if !status.is_success() {
            let why = cache["message"].as_str().unwrap_or("no reason is told");
            return Err(BuildError::Host(format!("Docker Engine: {why} ({status})")));
        }
        // One that another build has just made gets its name a moment later.
        let filters = [("label", LABEL), ("dangling", "true"), ("until", "10m")];
        let filters = filters.map(|(name, value)| (name.to_owned(), vec![value.to_owned()]));
        let options = PruneImagesOptions { filters: Some(filters.into()) };
        let layers = match self.docker.prune_images(Some(options)).await {
            Ok(images) => images.space_reclaimed.and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or_default(),
            // Somebody else is at it.
            Err(bollard::errors::Error::DockerResponseServerError { status_code: 409, .. }) => 0,
            Err(error) => return Err(host(error)),
        };
        Ok(cache["SpaceReclaimed"].as_u64().unwrap_or_default() + layers)
    }

    /// Waits until a build or an eviction may begin, which may go on for as long as this is held.
    ///
    /// Engines before 23.0 crash when a build begins with what is being dropped (moby/buildkit#2153). What they
    /// do takes turns, by a lock of the folder that their socket lies in: every process of this host sees it,
    /// and it ends with the process, however that ends.
    async fn turn(&self, lock: fn(&File) -> Result<(), TryLockError>) -> Result<Option<File>, BuildError> {
        let version = self.docker.client_version();
        if (version.major_version, version.minor_version) >= BOTH_AT_ONCE {
            return Ok(None);
        }
        let socket = std::path::absolute(&self.socket)?;
        let folder = File::open(socket.parent().unwrap_or(&socket))?;
        loop {
            match lock(&folder) {
                Ok(()) => return Ok(Some(folder)),
                Err(TryLockError::WouldBlock) => tokio::time::sleep(LOOK).await,
                Err(TryLockError::Error(error)) => return Err(error.into()),
            }
        }
    }

    /// Sends what the client library has no words for, over a connection of its own.
    async fn send(&self, request: hyper::http::request::Builder) -> Result<hyper::Response<hyper::body::Incoming>, Lost> {
        let connection = UnixStream::connect(&self.socket).await?;
        let (mut sender, driver) = hyper::client::conn::http1::handshake(TokioIo::new(connection)).await?;
        tokio::spawn(driver.with_upgrades());
        Ok(sender.send_request(request.header("host", "docker").body(Empty::<Bytes>::new())?).await?)
    }
}

/// Why the Engine was not heard.
type Lost = Box<dyn std::error::Error + Send + Sync>;

#[expect(clippy::needless_pass_by_value, reason = "used as an error mapper")]
fn host(error: bollard::errors::Error) -> BuildError {
    BuildError::Host(format!("Docker Engine: {error}"))
}
