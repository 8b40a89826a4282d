//! The server's configuration: defaults, then a file, then the environment, then flags; later goes
//! before earlier. Every setting is known here, with its type and where its value came from.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use capsule_contracts::Uuid;
use capsule_contracts::identity::Registration;
use capsule_contracts::quotas::Quotas;
use capsule_deploy::PublicUrl;
use capsule_runtime::Relaxation;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

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

/// A configuration, and for each setting where its value came from.
pub struct Loaded {
    pub configuration: Configuration,
    pub origins: BTreeMap<String, String>,
}

/// Reads the configuration of the server with this data directory. `flags` are settings by their
/// dotted names.
pub fn load(data: &Path, file: Option<&Path>, flags: &[(String, String)]) -> anyhow::Result<Loaded> {
    load_with(data, file, flags, |name| std::env::var(name).ok())
}

fn load_with(
    data: &Path,
    file: Option<&Path>,
    flags: &[(String, String)],
    environment: impl Fn(&str) -> Option<String>,
) -> anyhow::Result<Loaded> {
    let defaults = Table::try_from(Configuration::default())?;
    let mut settings = BTreeMap::new();
    collect("", &defaults, &mut settings);
    let mut origins: BTreeMap<String, String> = settings.keys().map(|name| (name.clone(), "default".to_owned())).collect();
    let mut table = defaults;

    let path = file.map_or_else(|| data.join("capsule.toml"), Path::to_path_buf);
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            let read: Table = toml::from_str(&text).map_err(|error| located(&path, &text, &error))?;
            let mut found = BTreeMap::new();
            collect("", &read, &mut found);
            for (name, value) in found {
                put(&mut table, &name, value);
                // One setting at a time, so that what is wrong is told with its line.
                if let Err(error) = table.clone().try_into::<Configuration>() {
                    let key = name.rsplit('.').next().unwrap_or(&name);
                    let line = text
                        .lines()
                        .position(|line| line.trim_start().starts_with(key))
                        .map_or(String::new(), |n| format!(":{}", n + 1));
                    bail!("{}{line}: {name}: {}", path.display(), error.message());
                }
                origins.insert(name, path.display().to_string());
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && file.is_none() => {}
        Err(error) => return Err(error).with_context(|| format!("the configuration {} cannot be read", path.display())),
    }

    for (name, default) in &settings {
        let variable = format!("CAPSULE_{}", name.replace('.', "_").to_uppercase());
        if let Some(text) = environment(&variable) {
            set(&mut table, name, default, &text).with_context(|| format!("the environment variable {variable}"))?;
            origins.insert(name.clone(), format!("the environment variable {variable}"));
        }
    }
    for (name, text) in flags {
        let in_environment = name.strip_prefix("build.environment.").filter(|rest| !rest.is_empty());
        let relaxed = name.strip_prefix("sandbox.relax.").filter(|service| !service.is_empty());
        let of_map = in_environment.map(|_| Value::String(String::new())).or_else(|| relaxed.map(|_| Value::Array(Vec::new())));
        let default = settings.get(name).cloned().or(of_map);
        let Some(default) = default else {
            let known = settings.keys().cloned().collect::<Vec<_>>().join(", ");
            bail!("there is no setting `{name}`; there are {known}");
        };
        set(&mut table, name, &default, text).with_context(|| format!("the setting {name}"))?;
        origins.insert(name.clone(), "the command line".into());
    }
    let configuration: Configuration = table.try_into()?;
    check(&configuration)?;
    Ok(Loaded { configuration, origins })
}

fn check(configuration: &Configuration) -> anyhow::Result<()> {
    let domain = &configuration.base_domain;
    let well_formed = domain.len() <= 200
        && domain.split('.').all(|label| {
            !label.is_empty()
                && label.len() <= 63
                && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        });
    if !well_formed {
        bail!("base_domain must be a domain name in lower case such as `apps.example.com`, not `{domain}`");
    }
    if configuration.deploy.host_quarantine_days > 36_500 {
        bail!("deploy.host_quarantine_days must be at most 36500, which is a hundred years");
    }
    for (name, value) in [
        ("uploads.max_mib", configuration.uploads.max_mib),
        ("uploads.max_seconds", configuration.uploads.max_seconds),
        ("build.concurrent", configuration.build.concurrent),
        ("build.memory_mib", configuration.build.memory_mib),
        ("build.disk_mib", configuration.build.disk_mib),
        ("build.tmp_mib", configuration.build.tmp_mib),
        ("run.disk_mib", configuration.run.disk_mib),
        ("run.tmp_mib", configuration.run.tmp_mib),
        ("build.cpu_percent", configuration.build.cpu_percent),
        ("build.seconds", configuration.build.seconds),
        ("backup.minutes", configuration.backup.minutes),
        ("backup.keep_days", configuration.backup.keep_days),
        ("database.connections", configuration.database.connections),
        ("deploy.health_seconds", configuration.deploy.health_seconds),
    ] {
        if value == 0 {
            bail!("{name} must be at least 1");
        }
    }
    configuration.public_url()?;
    configuration.trusted_proxies()?;
    if configuration.listen == configuration.private_listen && configuration.listen.port() != 0 {
        bail!("listen and private_listen are both {}: health and metrics take an address of their own", configuration.listen);
    }
    let url = &configuration.database.url;
    let host = url.strip_prefix("postgres://").or_else(|| url.strip_prefix("postgresql://"));
    if !url.is_empty()
        && host
            .is_none_or(|rest| rest.is_empty() || rest.split('?').next().unwrap_or_default().trim_end_matches('/').contains('/'))
    {
        // Not shown: it may hold a password.
        bail!(
            "database.url must look like postgres://user:password@host:5432, without a database's name: each service has its own"
        );
    }
    let endpoint = &configuration.traces.endpoint;
    if !endpoint.is_empty() && !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
        bail!("traces.endpoint must look like http://127.0.0.1:4318, not `{endpoint}`");
    }
    let url = &configuration.broker.url;
    if !url.is_empty() && !["amqp://", "amqps://", "kafka://"].iter().any(|scheme| url.starts_with(scheme)) {
        // Not shown: it may hold a password.
        bail!("broker.url must look like amqp://user:password@host:5672/vhost or kafka://host:9092,host:9092");
    }
    if !configuration.redis.url.is_empty() {
        capsule_cache::Cache::at(&configuration.redis.url).map_err(|error| anyhow::anyhow!("redis.url {error}"))?;
    }
    let bundle = &configuration.build.ca_bundle;
    if !bundle.as_os_str().is_empty() && !bundle.is_file() {
        bail!("build.ca_bundle: there is no file {}", bundle.display());
    }
    Ok(())
}

/// The settings of a table by their dotted names.
fn collect(prefix: &str, table: &Table, into: &mut BTreeMap<String, Value>) {
    for (name, value) in table {
        let name = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        match value {
            Value::Table(inner) => collect(&name, inner, into),
            value => {
                into.insert(name, value.clone());
            }
        }
    }
}

fn put(table: &mut Table, name: &str, value: Value) {
    match name.split_once('.') {
        // A name with dots of its own can only be a variable's.
        Some((section, rest)) => {
            if let Value::Table(inner) = table.entry(section).or_insert_with(|| Value::Table(Table::new())) {
                put(inner, rest, value);
            } else {
                table.insert(section.into(), Value::Table(Table::from_iter([(rest.to_owned(), value)])));
            }
        }
        None => {
            table.insert(name.into(), value);
        }
    }
}

/// Puts a text where a value of `default`'s type belongs.
fn set(table: &mut Table, name: &str, default: &Value, text: &str) -> anyhow::Result<()> {
    let value = match default {
        Value::Integer(_) => Value::Integer(text.parse().with_context(|| format!("`{text}` is not a whole number"))?),
        Value::Array(_) => {
            let elements = text.split(',').map(str::trim).filter(|element| !element.is_empty());
            Value::Array(elements.map(|element| Value::String(element.into())).collect())
        }
        _ => Value::String(text.into()),
    };
    put(table, name, value);
    table.clone().try_into::<Configuration>().map_err(|error| anyhow::anyhow!("`{text}`: {}", error.message()))?;
    Ok(())
}

fn located(path: &Path, text: &str, error: &toml::de::Error) -> anyhow::Error {
    let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
    anyhow::anyhow!("{}:{line}: {}", path.display(), error.message())
}

#[cfg(test)]
mod tests {
    use super::load_with;
    use std::path::Path;

    fn load(file: &str, environment: &[(&str, &str)], flags: &[(&str, &str)]) -> anyhow::Result<super::Loaded> {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("capsule.toml"), file).expect("written");
        let flags: Vec<_> = flags.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        load_with(folder.path(), None, &flags, |name| {
            environment.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn flags_go_before_the_environment_before_the_file_before_defaults() {
        let file = "base_domain = \"file.test\"\n[build]\nseconds = 10\nmemory_mib = 20\n[build.environment]\nMIRROR = \"m\"\n";
        let environment = [("CAPSULE_BUILD_SECONDS", "11"), ("CAPSULE_BUILD_MEMORY_MIB", "21")];
        let loaded = load(file, &environment, &[("build.seconds", "12")]).expect("all are fine");
        let build = &loaded.configuration.build;
        assert_eq!((build.seconds, build.memory_mib), (12, 21));
        assert_eq!(loaded.configuration.base_domain, "file.test");
        assert_eq!(build.environment["MIRROR"], "m");
        assert_eq!(loaded.configuration.deploy.drain_seconds, 30);
        assert_eq!(loaded.origins["build.seconds"], "the command line");
        assert_eq!(loaded.origins["deploy.drain_seconds"], "default");
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place() {
        let told = |file: &str, environment: &[(&str, &str)], flags: &[(&str, &str)]| {
            format!("{:#}", load(file, environment, flags).err().expect("wrong"))
        };
        assert!(told("\n\nlissten = \"x\"", &[], &[]).contains("capsule.toml:3: lissten: unknown field"));
        assert!(told("[build]\nseconds = \"long\"", &[], &[]).contains("capsule.toml:2: build.seconds"));
        assert!(told("a = [", &[], &[]).contains("capsule.toml:1"));
        assert!(told("", &[("CAPSULE_LISTEN", "everywhere")], &[]).contains("CAPSULE_LISTEN: `everywhere`"));
        assert!(told("", &[], &[("nothing", "1")]).contains("there is no setting `nothing`; there are advertise"));
        assert!(told("", &[], &[("build.seconds", "0")]).contains("at least 1"));
        assert!(told("base_domain = \"Not a domain\"", &[], &[]).contains("base_domain"));
        assert!(told("public_url = \"apps.example.com\"", &[], &[]).contains("public_url must look like https://"));
        assert!(told("", &[("CAPSULE_TRUSTED_PROXIES", "10.0.0.0/8, everybody")], &[]).contains("not `everybody`"));
        assert!(told("registration = \"everybody\"", &[], &[]).contains("`closed`, `invited`, `open`"));
        let quota = told("[quotas]\nprojects = 5\nprojetcs = 5", &[], &[]);
        assert!(quota.contains("capsule.toml:3: quotas.projetcs") && quota.contains("memory_mib"), "{quota}");
        assert!(told("", &[("CAPSULE_QUOTAS_CONCURRENT_BUILDS", "0")], &[]).contains("at least 1"));
    }

    #[test]
    fn sandboxes_are_relaxed_by_the_id_of_a_service() {
        let service = "0190f3a8-0000-7000-8000-000000000001";
        let relaxed = |file: &str, flags: &[(&str, &str)]| {
            load(file, &[], flags).map(|loaded| format!("{:?}", loaded.configuration.sandbox.relax.values().next()))
        };
        let file = format!("[sandbox.relax]\n\"{service}\" = [\"io_uring\", \"user_namespaces\"]\n");
        assert_eq!(relaxed(&file, &[]).expect("fine"), "Some([IoUring, UserNamespaces])");
        let name = format!("sandbox.relax.{service}");
        assert_eq!(relaxed("", &[(&name, "keyrings, ptrace")]).expect("fine"), "Some([Keyrings, Ptrace])");
        let unknown = relaxed("", &[(&name, "everything")]).expect_err("unknown");
        assert!(format!("{unknown:#}").contains("unknown variant `everything`"), "{unknown:#}");
        assert!(relaxed("[sandbox.relax]\nshop = [\"io_uring\"]\n", &[]).is_err(), "not an id");
    }

    #[test]
    fn a_list_is_separated_by_commas_in_the_environment_and_in_flags() {
        for loaded in [
            load("trusted_proxies = [\"10.0.0.0/8\", \"fd00::/8\", \"127.0.0.1\"]", &[], &[]),
            load("", &[("CAPSULE_TRUSTED_PROXIES", "10.0.0.0/8,fd00::/8, 127.0.0.1")], &[]),
            load("", &[], &[("trusted_proxies", "10.0.0.0/8,fd00::/8,127.0.0.1")]),
        ] {
            let networks = loaded.expect("a list").configuration.trusted_proxies().expect("networks");
            assert_eq!(networks.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.0.0/8", "fd00::/8", "127.0.0.1/32"]);
        }
    }

    #[test]
    fn inodes_go_with_the_disk_unless_they_are_set() {
        assert_eq!(super::inodes(0, 10_240), 655_360);
        assert_eq!(super::inodes(0, 1), 10_000);
        assert_eq!(super::inodes(7, 10_240), 7);
    }

    #[test]
    fn a_file_that_was_named_must_be_there() {
        let missing = Path::new("/nowhere/capsule.toml");
        assert!(load_with(Path::new("/"), Some(missing), &[], |_| None).is_err());
    }
}
