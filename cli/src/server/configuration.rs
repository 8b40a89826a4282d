//! The server's configuration: every setting with its type and default.

mod load;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use axum::http::{HeaderValue, Uri};
use capsule_contracts::Uuid;
use capsule_contracts::identity::Registration;
use capsule_contracts::quotas::Quotas;
use capsule_deploy::PublicUrl;
use capsule_runtime::Relaxation;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use load::{Loaded, load};

/// The settings of a server.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Configuration {
    /// Address of the ingress, which serves applications and the API.
    pub listen: SocketAddr,
    /// Address of the health and metrics pages. Keep it private.
    pub private_listen: SocketAddr,
    /// Parent domain of applications: `<service>-<environment>.<base_domain>`.
    pub base_domain: String,
    /// The URL that users see behind a TLS proxy, such as `https://apps.example.com`. Empty: the ingress's own. URLs of
    /// applications and `CAPSULE_URL` use its scheme and port.
    pub public_url: String,
    /// Proxies whose `X-Forwarded-For` and `X-Forwarded-Proto` are trusted: addresses or networks, such as `127.0.0.1`
    /// or `10.0.0.0/8`.
    pub trusted_proxies: Vec<String>,
    /// Origins of web pages that may call the API (CORS), such as `https://console.example.com`. Empty: none.
    pub allowed_origins: Vec<String>,
    /// Who can create an account: `closed` nobody, `invited` people whom a member has added to an organization, `open`
    /// everyone. The first account always needs the set-up token.
    pub registration: Registration,
    pub log: Log,
    pub traces: Traces,
    /// The `host:port` at which other processes of the installation reach `private_listen`. Empty: `private_listen`.
    pub advertise: String,
    pub database: Database,
    pub broker: Broker,
    pub redis: Redis,
    pub limits: Limits,
    /// Default quotas of an organization. `capsule admin quotas` sets others.
    #[serde(deserialize_with = "super::quotas::deserialize")]
    pub quotas: Quotas,
    pub backup: Backup,
    pub uploads: Uploads,
    pub disk: Disk,
    pub build: Build,
    pub run: Run,
    pub deploy: Deploy,
    pub sandbox: Sandbox,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    pub format: LogFormat,
    /// Log filter, such as `info` or `info,capsule_deploy=debug`.
    pub levels: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Traces {
    /// OTLP/HTTP endpoint that receives spans, such as `http://127.0.0.1:4318`. Empty: none are sent.
    pub endpoint: String,
    /// Percentage of traces starting in this process that are sampled.
    pub percent: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    Pretty,
    Json,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Database {
    /// A PostgreSQL server, `postgres://user:password@host:port`. Empty: one SQLite file per service in the data
    /// directory.
    pub url: String,
    /// Maximum number of PostgreSQL connections per service.
    pub connections: u32,
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The URL contains a password.
        write!(f, "Database({})", if self.url.is_empty() { "embedded" } else { "PostgreSQL" })
    }
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Broker {
    /// A RabbitMQ server, `amqp://user:password@host:port/vhost`, or a Kafka cluster, `kafka://host:port,host:port`.
    /// Empty: all services run in one process.
    pub url: String,
}

impl std::fmt::Debug for Broker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The URL contains a password.
        write!(f, "Broker({})", if self.url.is_empty() { "in process" } else { "set" })
    }
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Redis {
    /// A Redis server for state that processes share, such as rate limits, `redis://:password@host:port`. Empty: each
    /// process has its own.
    pub url: String,
}

impl std::fmt::Debug for Redis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The URL contains a password.
        write!(f, "Redis({})", if self.url.is_empty() { "none" } else { "set" })
    }
}

/// Scheduled backups.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backup {
    /// A directory, or `s3://bucket/prefix` with credentials in the environment. Empty: no backups.
    pub location: String,
    /// Minutes between two backups. One backup a day is full.
    pub minutes: u32,
    /// Retention in days.
    pub keep_days: u32,
}

/// Limits of API clients. 0 disables a limit, except `organizations_per_user`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Requests per user, or per address for requests without a session.
    pub requests_per_minute: u32,
    /// Attempts to sign in or to register per address.
    pub sign_ins_per_minute: u32,
    /// Organizations that a user may create, besides the personal one. 0: none.
    pub organizations_per_user: u32,
    /// Attempts per hour to sign in to one account, from addresses that have not signed in to it recently.
    pub sign_ins_per_account_and_hour: u32,
    /// Concurrent uploads per user; below, concurrent log streams.
    pub concurrent_uploads: u32,
    pub concurrent_streams: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Uploads {
    pub max_mib: u32,
    /// Minimum rate of an upload. A slower one is aborted.
    pub min_kib_per_second: u32,
    /// Timeout of an upload.
    pub max_seconds: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Free space to keep on the data directory's disk. Below it, uploads and builds are refused, and the instance that
    /// uses the most disk is stopped.
    pub reserve_mib: u32,
}

/// Limits of an instance, besides memory and CPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Maximum disk usage of an instance's writes to `/app`, including unlinked open files.
    pub disk_mib: u32,
    /// Maximum number of files and directories an instance writes to `/app`. 0: 64 for each MiB of disk, at least 10,000.
    pub inodes: u32,
    /// The size of `/tmp`, and of the home directory. Both are in memory.
    pub tmp_mib: u32,
}

/// The limit of inodes: `set`, or for 0 in proportion to the disk limit, about as many as a file system has.
pub fn inodes(set: u32, disk_mib: u32) -> u64 {
    match set {
        0 => (u64::from(disk_mib) * 64).max(10_000),
        set => u64::from(set),
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Build {
    /// Number of concurrent builds.
    pub concurrent: u32,
    /// Memory limit of a build. Builds run with a lower priority than applications.
    pub memory_mib: u32,
    pub cpu_percent: u32,
    pub seconds: u32,
    /// Maximum disk usage of a build and its cache, including unlinked open files.
    pub disk_mib: u32,
    /// Maximum number of files and directories of a build and its cache. 0: 64 for each MiB of disk, at least 10,000.
    pub inodes: u32,
    /// The size of `/tmp`, and of the home directory. Both are in memory.
    pub tmp_mib: u32,
    /// Maximum disk usage of all caches. The least recently used are removed first.
    pub cache_mib: u32,
    /// Bundle of certificate authorities for builds and applications. Default: the host's. Empty: the tools use their
    /// own.
    pub ca_bundle: PathBuf,
    /// Environment variables of every build, such as the URL of a registry mirror.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deploy {
    /// Seconds until a new instance must be healthy.
    pub health_seconds: u32,
    /// Seconds in which an old instance can finish its requests in flight.
    pub drain_seconds: u32,
    /// Days for which the host of a deleted service stays reserved for its organization. 0: it is not reserved.
    pub host_quarantine_days: u32,
}

/// Isolation of applications and builds from the host.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sandbox {
    /// System calls that a service may use besides the allowed ones, by the service's id: `io_uring`, `user_namespaces`,
    /// `ptrace`, `keyrings`, `perf_events`, `userfaultfd`, `memory_policy`, `personality`, or `unconfined` for all. A
    /// change applies to instances that start after it.
    #[serde(default)]
    pub relax: BTreeMap<Uuid, Vec<Relaxation>>,
}

impl Default for Configuration {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            private_listen: SocketAddr::from(([127, 0, 0, 1], 8081)),
            base_domain: "localhost".into(),
            public_url: String::new(),
            trusted_proxies: Vec::new(),
            allowed_origins: Vec::new(),
            registration: Registration::Invited,
            log: Log { format: LogFormat::Pretty, levels: "info".into() },
            traces: Traces { endpoint: String::new(), percent: 100 },
            advertise: String::new(),
            database: Database { url: String::new(), connections: 8 },
            broker: Broker { url: String::new() },
            redis: Redis { url: String::new() },
            backup: Backup { location: String::new(), minutes: 60, keep_days: 7 },
            limits: Limits {
                requests_per_minute: 3000,
                sign_ins_per_minute: 30,
                sign_ins_per_account_and_hour: 100,
                organizations_per_user: 20,
                concurrent_uploads: 8,
                concurrent_streams: 64,
            },
            quotas: Quotas::defaults(),
            uploads: Uploads { max_mib: 512, min_kib_per_second: 4, max_seconds: 3600 },
            disk: Disk { reserve_mib: 1024 },
            run: Run { disk_mib: 5120, inodes: 0, tmp_mib: 1024 },
            build: Build {
                concurrent: 1,
                memory_mib: 4096,
                disk_mib: 10_240,
                inodes: 0,
                tmp_mib: 2048,
                cache_mib: 20_480,
                cpu_percent: u32::try_from(cores * 100).unwrap_or(100),
                seconds: 1800,
                ca_bundle: host_authorities(),
                environment: BTreeMap::new(),
            },
            deploy: Deploy { health_seconds: 60, drain_seconds: 30, host_quarantine_days: 30 },
            sandbox: Sandbox::default(),
        }
    }
}

impl Configuration {
    /// The parsed `public_url`, if it is set.
    pub fn public_url(&self) -> anyhow::Result<Option<PublicUrl>> {
        match self.public_url.as_str() {
            "" => Ok(None),
            text => text.parse().map(Some).map_err(|error| anyhow::anyhow!("public_url {error}; not `{text}`")),
        }
    }

    /// The parsed `allowed_origins`.
    pub fn allowed_origins(&self) -> anyhow::Result<Vec<HeaderValue>> {
        let origin = |text: &String| {
            let uri = text.parse::<Uri>().ok();
            let origin = uri.and_then(|uri| Some(format!("{}://{}", uri.scheme_str()?, uri.authority()?).to_lowercase()));
            // Browsers send it without a path and in lower case.
            let valid = origin.as_deref() == Some(text) && text.starts_with("http") && !text.contains('@');
            HeaderValue::from_str(text).ok().filter(|_| valid).ok_or_else(|| {
                anyhow::anyhow!("allowed_origins must be origins such as https://console.example.com, not `{text}`")
            })
        };
        self.allowed_origins.iter().map(origin).collect()
    }

    /// The parsed `trusted_proxies`.
    pub fn trusted_proxies(&self) -> anyhow::Result<Vec<IpNet>> {
        let network = |text: &String| {
            let one = text.parse::<IpAddr>().map(IpNet::from).or_else(|_| text.parse::<IpNet>());
            one.map_err(|_| anyhow::anyhow!("trusted_proxies must be addresses or networks such as 10.0.0.0/8, not `{text}`"))
        };
        self.trusted_proxies.iter().map(network).collect()
    }
}

/// The host's bundle of certificate authorities. Many tools trust only their own bundle by default.
fn host_authorities() -> PathBuf {
    let named = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
    let candidates = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem"];
    named.into_iter().chain(candidates.map(PathBuf::from)).find(|path| path.is_file()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #[test]
    fn allowed_origins_are_scheme_and_host_only() {
        let parse =
            |text: &str| super::Configuration { allowed_origins: vec![text.into()], ..Default::default() }.allowed_origins();
        for (text, valid) in [
            ("https://console.example.com", true),
            ("http://localhost:3000", true),
            ("https://console.example.com/", false),
            ("https://Console.example.com", false),
            ("https://user@example.com", false),
            ("example.com", false),
            ("*", false),
            ("null", false),
        ] {
            assert_eq!(parse(text).is_ok(), valid, "{text}");
        }
    }

    #[test]
    fn inodes_follow_the_disk_limit_unless_they_are_set() {
        assert_eq!(super::inodes(0, 10_240), 655_360);
        assert_eq!(super::inodes(0, 1), 10_000);
        assert_eq!(super::inodes(7, 10_240), 7);
    }
}
