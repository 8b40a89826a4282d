//! The server's configuration: every setting with its type and default.

mod load;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use capsule_contracts::Uuid;
use capsule_contracts::identity::Registration;
use capsule_contracts::quotas::Quotas;
use capsule_deploy::PublicUrl;
use capsule_runtime::Relaxation;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use load::{Loaded, load};

/// All settings of a server.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Configuration {
    /// Where the ingress listens: applications and the API.
    pub listen: SocketAddr,
    /// Where health and metrics are told. Keep it private.
    pub private_listen: SocketAddr,
    /// Applications are hosts below it: `<service>-<environment>.<base_domain>`.
    pub base_domain: String,
    /// The address that users see where a proxy with TLS is before the ingress, such as `https://apps.example.com`;
    /// empty is the ingress's own. Addresses of applications and `CAPSULE_URL` have its scheme and port.
    pub public_url: String,
    /// The addresses of such proxies, as `10.0.0.0/8` or `127.0.0.1`: what they say of their visitors in
    /// `X-Forwarded-For` and `X-Forwarded-Proto` is believed. Nobody else's word is.
    pub trusted_proxies: Vec<String>,
    /// Who can make an account: `closed` is nobody, `invited` whoever a member has added to an organization, `open`
    /// anybody. The first account takes the set-up token in any case.
    pub registration: Registration,
    pub log: Log,
    pub traces: Traces,
    /// Where other processes of the installation reach this one's private pages, as `host:port`; the private
    /// address itself unless set.
    pub advertise: String,
    pub database: Database,
    pub broker: Broker,
    pub redis: Redis,
    pub limits: Limits,
    /// What an organization may use unless administrators set something else for it. See `capsule admin quotas`.
    #[serde(deserialize_with = "super::quotas::known")]
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
    /// Such as `info` or `info,capsule_deploy=debug`.
    pub levels: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Traces {
    /// Where spans are sent by OTLP over HTTP, such as `http://127.0.0.1:4318`; empty sends none.
    pub endpoint: String,
    /// Of a hundred traces that begin here, so many are kept.
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
    /// A PostgreSQL server, `postgres://user:password@host:port`; empty keeps one SQLite file for each
    /// service in the data directory.
    pub url: String,
    /// The most connections to PostgreSQL that one service holds.
    pub connections: u32,
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The address holds a password.
        write!(f, "Database({})", if self.url.is_empty() { "embedded" } else { "PostgreSQL" })
    }
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Broker {
    /// A RabbitMQ server, `amqp://user:password@host:port/vhost`, or a Kafka cluster, `kafka://host:port,host:port`;
    /// empty keeps messages within one process.
    pub url: String,
}

impl std::fmt::Debug for Broker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The address holds a password.
        write!(f, "Broker({})", if self.url.is_empty() { "in process" } else { "set" })
    }
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Redis {
    /// A Redis server for what processes share for a while, `redis://:password@host:port`; empty lets each go
    /// by itself.
    pub url: String,
}

impl std::fmt::Debug for Redis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The address holds a password.
        write!(f, "Redis({})", if self.url.is_empty() { "none" } else { "set" })
    }
}

/// Backups by schedule.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backup {
    /// A directory, or `s3://bucket/prefix` with its credentials in the environment; empty makes none.
    pub location: String,
    /// The minutes between two backups; once a day it is a full one.
    pub minutes: u32,
    /// So many days' backups are kept.
    pub keep_days: u32,
}

/// What clients may ask of the API. In a minute, or at a time, 0 is no limit.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Requests of one user, or of one address that nobody is signed in at.
    pub requests_per_minute: u32,
    /// Attempts of one address to sign in or to register.
    pub sign_ins_per_minute: u32,
    /// How many organizations one user may make, at any time, the personal one not counted; 0 is none.
    pub organizations_per_user: u32,
    /// Attempts to sign in to one account in an hour from addresses where nobody signed in to it lately.
    pub sign_ins_per_account_and_hour: u32,
    /// Uploads, and streams of logs, that one user may have open at the same time.
    pub concurrent_uploads: u32,
    pub concurrent_streams: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Uploads {
    pub max_mib: u32,
    /// An upload that arrives more slowly than this is ended.
    pub min_kib_per_second: u32,
    /// An upload that takes longer than this is ended.
    pub max_seconds: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// So much of the data directory's disk is never given away: below it, uploads and builds are refused, and
    /// whoever holds the most is stopped.
    pub reserve_mib: u32,
}

/// What one instance of an application may use beyond the memory and CPU of its plan.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// The most disk of what it writes into `/app`, unlinked files included.
    pub disk_mib: u32,
    /// The most files and folders of what it writes into `/app`; 0 is 64 for each MiB of disk, at least 10,000.
    pub inodes: u32,
    /// The size of `/tmp` and of the home directory, each. They are memory.
    pub tmp_mib: u32,
}

/// The inodes that go with so much disk, unless they are set. A file system has about as many.
pub fn inodes(set: u32, disk_mib: u32) -> u64 {
    match set {
        0 => (u64::from(disk_mib) * 64).max(10_000),
        set => u64::from(set),
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Build {
    /// How many builds run at a time.
    pub concurrent: u32,
    /// What one build may use; it gives way to running applications in any case.
    pub memory_mib: u32,
    pub cpu_percent: u32,
    pub seconds: u32,
    /// The most disk of one build with its cache, unlinked files included.
    pub disk_mib: u32,
    /// The most files and folders of one build with its cache; 0 is 64 for each MiB of disk, at least 10,000.
    pub inodes: u32,
    /// The size of `/tmp` and of the home directory, each. They are memory.
    pub tmp_mib: u32,
    /// The most disk of all caches together; those used longest ago go first.
    pub cache_mib: u32,
    /// A bundle of certificate authorities for builds and applications; empty leaves the tools to their
    /// own. The host's own unless set.
    pub ca_bundle: PathBuf,
    /// Variables of every build, such as those that name a registry mirror.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deploy {
    /// How long a new instance may take to become healthy.
    pub health_seconds: u32,
    /// How long an old one may take to finish its requests.
    pub drain_seconds: u32,
    /// Days for which the host of a deleted service is kept for its organization; 0 gives it to whoever asks first.
    pub host_quarantine_days: u32,
}

/// What holds applications and builds apart from the host.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sandbox {
    /// What a service may do beyond the filter of system calls, by the service's id: `io_uring`, `user_namespaces`,
    /// `ptrace`, `keyrings`, `perf_events`, `userfaultfd`, `memory_policy`, `personality`, or all by `unconfined`. It
    /// holds for what is started from then on.
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
    /// The address that users see, if it is set.
    pub fn public_url(&self) -> anyhow::Result<Option<PublicUrl>> {
        match self.public_url.as_str() {
            "" => Ok(None),
            text => text.parse().map(Some).map_err(|error| anyhow::anyhow!("public_url {error}; not `{text}`")),
        }
    }

    /// The networks of proxies that are believed.
    pub fn trusted_proxies(&self) -> anyhow::Result<Vec<IpNet>> {
        let network = |text: &String| {
            let one = text.parse::<IpAddr>().map(IpNet::from).or_else(|_| text.parse::<IpNet>());
            one.map_err(|_| anyhow::anyhow!("trusted_proxies must be addresses or networks such as 10.0.0.0/8, not `{text}`"))
        };
        self.trusted_proxies.iter().map(network).collect()
    }
}

/// What this host trusts, builds trust as well: many tools bring authorities of their own only.
fn host_authorities() -> PathBuf {
    let named = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
    let usual = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem"];
    named.into_iter().chain(usual.map(PathBuf::from)).find(|path| path.is_file()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #[test]
    fn inodes_go_with_the_disk_unless_they_are_set() {
        assert_eq!(super::inodes(0, 10_240), 655_360);
        assert_eq!(super::inodes(0, 1), 10_000);
        assert_eq!(super::inodes(7, 10_240), 7);
    }
}
