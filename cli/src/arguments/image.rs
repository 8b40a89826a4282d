//! Arguments of `capsule plan` and `capsule build`.

use std::path::PathBuf;

/// Building an image.
#[derive(Debug, clap::Args)]
pub struct Build {
    /// The folder to build
    #[arg(default_value = ".")]
    pub folder: PathBuf,
    /// What the image will be called
    #[arg(long, short, value_name = "NAME:TAG")]
    pub tag: String,
    /// The Unix socket of Docker Engine
    #[arg(long, value_name = "SOCKET", default_value = "/var/run/docker.sock")]
    pub engine: PathBuf,
    /// Use this base image, as `name=image`: `node=registry.example.com/node:22@sha256:…`
    #[arg(long = "image", value_name = "NAME=IMAGE")]
    pub images: Vec<String>,
    /// Show the build this environment variable as a secret, by mount: no layer keeps it
    #[arg(long = "secret", value_name = "NAME")]
    pub secrets: Vec<String>,
    /// Give the build this environment variable as an argument
    #[arg(long = "build-arg", value_name = "NAME")]
    pub arguments: Vec<String>,
    /// Build with Docker's classic builder
    #[arg(long)]
    pub classic: bool,
    /// Do everything anew
    #[arg(long)]
    pub no_cache: bool,
    /// Instrument the program for OpenTelemetry
    #[arg(long)]
    pub opentelemetry: bool,
    /// The longest that it may take
    #[arg(long, value_name = "SECONDS", default_value = "1800")]
    pub seconds: u64,
    /// The most memory that a step may use
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(6..))]
    pub memory_mib: Option<u64>,
    /// The most that a step may use of the processors, in hundredths of a core
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..))]
    pub cpu_percent: Option<u32>,
    /// The largest that the image may be
    #[arg(long, value_name = "MIB")]
    pub size_mib: Option<u64>,
    /// After the build, keep no more of its cache than this
    #[arg(long, value_name = "MIB")]
    pub keep_mib: Option<u64>,
}

/// What is planned.
#[derive(Clone, Debug, clap::Args)]
pub struct PlanOf {
    /// The folder to look at, or an archive of it (tar, tar.gz, zip)
    #[arg(default_value = ".")]
    pub folder: PathBuf,
    /// Look at the folder as it is in this commit
    #[arg(long, value_name = "REVISION")]
    pub commit: Option<String>,
    /// List the members of a monorepo that a change of this file touches; may be given several times
    #[arg(long, value_name = "FILE", conflicts_with = "dockerfile")]
    pub changed: Vec<String>,
    /// List the members that are touched by what has changed since this commit
    #[arg(long, value_name = "REVISION", conflicts_with = "dockerfile")]
    pub since: Option<String>,
}

/// What an image is made of.
#[derive(Debug, Default, clap::Args)]
pub struct PlanImage {
    /// Print the Dockerfile that the plan makes
    #[arg(long)]
    pub dockerfile: bool,
    /// Use this base image, as `name=image`: `node=registry.example.com/node:22@sha256:…`
    #[arg(long = "image", value_name = "NAME=IMAGE", requires = "dockerfile")]
    pub images: Vec<String>,
    /// Give the build this secret, by mount: no layer keeps it
    #[arg(long = "secret", value_name = "NAME", requires = "dockerfile")]
    pub secrets: Vec<String>,
    /// Give the build this argument
    #[arg(long = "build-arg", value_name = "NAME", requires = "dockerfile")]
    pub arguments: Vec<String>,
    /// Write it for Docker's classic builder, without caches that outlive a build
    #[arg(long, requires = "dockerfile")]
    pub classic: bool,
    /// Instrument the program for OpenTelemetry
    #[arg(long, requires = "dockerfile")]
    pub opentelemetry: bool,
}
