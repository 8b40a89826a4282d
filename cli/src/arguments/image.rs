//! Arguments of `capsule plan` and `capsule build`.

use std::path::PathBuf;

/// Arguments of `capsule build`.
#[derive(Debug, clap::Args)]
pub struct Build {
    /// The folder to build
    #[arg(default_value = ".")]
    pub folder: PathBuf,
    /// Name and tag of the image
    #[arg(long, short, value_name = "NAME:TAG")]
    pub tag: String,
    /// The Unix socket of Docker Engine
    #[arg(long, value_name = "SOCKET", default_value = "/var/run/docker.sock")]
    pub engine: PathBuf,
    /// Replace a base image, such as node=registry.example.com/node:22@sha256:…
    #[arg(long = "image", value_name = "NAME=IMAGE")]
    pub images: Vec<String>,
    /// Mount this environment variable in the build as a secret; no layer contains it
    #[arg(long = "secret", value_name = "NAME")]
    pub secrets: Vec<String>,
    /// Pass this environment variable as a build argument
    #[arg(long = "build-arg", value_name = "NAME")]
    pub arguments: Vec<String>,
    /// Use Docker's classic builder instead of BuildKit
    #[arg(long)]
    pub classic: bool,
    /// Do not use the build cache
    #[arg(long)]
    pub no_cache: bool,
    /// Add OpenTelemetry instrumentation to the program
    #[arg(long)]
    pub opentelemetry: bool,
    /// Timeout of the build
    #[arg(long, value_name = "SECONDS", default_value = "1800")]
    pub seconds: u64,
    /// Memory limit of a build step
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(6..))]
    pub memory_mib: Option<u64>,
    /// CPU limit of a build step, in percent of a core
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..))]
    pub cpu_percent: Option<u32>,
    /// Maximum size of the image
    #[arg(long, value_name = "MIB")]
    pub size_mib: Option<u64>,
    /// Shrink the build cache to this size after the build
    #[arg(long, value_name = "MIB")]
    pub keep_mib: Option<u64>,
}

/// The source that is planned.
#[derive(Clone, Debug, clap::Args)]
pub struct PlanSource {
    /// The folder to plan, or an archive of it (tar, tar.gz, zip)
    #[arg(default_value = ".")]
    pub folder: PathBuf,
    /// Plan the folder as it is in this commit
    #[arg(long, value_name = "REVISION")]
    pub commit: Option<String>,
    /// List the monorepo members affected by a change of this file; can be repeated
    #[arg(long, value_name = "FILE", conflicts_with = "dockerfile")]
    pub changed: Vec<String>,
    /// List the monorepo members affected by changes since this commit
    #[arg(long, value_name = "REVISION", conflicts_with = "dockerfile")]
    pub since: Option<String>,
}

/// Options of the Dockerfile that `capsule plan --dockerfile` prints.
#[derive(Debug, Default, clap::Args)]
pub struct DockerfileOptions {
    /// Print the Dockerfile generated from the plan
    #[arg(long)]
    pub dockerfile: bool,
    /// Replace a base image, such as node=registry.example.com/node:22@sha256:…
    #[arg(long = "image", value_name = "NAME=IMAGE", requires = "dockerfile")]
    pub images: Vec<String>,
    /// Mount this secret in the build; no layer contains it
    #[arg(long = "secret", value_name = "NAME", requires = "dockerfile")]
    pub secrets: Vec<String>,
    /// Declare this build argument
    #[arg(long = "build-arg", value_name = "NAME", requires = "dockerfile")]
    pub arguments: Vec<String>,
    /// Generate it for Docker's classic builder, without cache mounts
    #[arg(long, requires = "dockerfile")]
    pub classic: bool,
    /// Add OpenTelemetry instrumentation to the program
    #[arg(long, requires = "dockerfile")]
    pub opentelemetry: bool,
}
