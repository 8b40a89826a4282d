//! Reads the configuration: defaults, then a file, then environment variables, then flags. Later sources override
//! earlier ones.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, bail};
use toml::{Table, Value};

use super::Configuration;

/// A configuration, with the source of each setting.
pub struct Loaded {
    pub configuration: Configuration,
    /// By dotted name: `default`, the path of the file, the environment variable, or the command line.
    pub origins: BTreeMap<String, String>,
}

/// Loads the configuration of a server. `flags` are settings by their dotted names.
///
/// # Errors
/// When a source cannot be read, or a setting is unknown or invalid. The error names the setting and its source.
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
                insert(&mut table, &name, value);
                // Check one setting at a time, so that the error has its line.
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
        Err(error) => return Err(error).with_context(|| format!("cannot read the configuration file {}", path.display())),
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
            bail!("Unknown setting `{name}`. Known settings: {known}.");
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
        bail!("deploy.host_quarantine_days must be at most 36500 (100 years)");
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
    configuration.allowed_origins()?;
    if configuration.listen == configuration.private_listen && configuration.listen.port() != 0 {
        bail!(
            "listen and private_listen are both {}. Set private_listen to another address, for health and metrics.",
            configuration.listen
        );
    }
    let url = &configuration.database.url;
    let host = url.strip_prefix("postgres://").or_else(|| url.strip_prefix("postgresql://"));
    if !url.is_empty()
        && host
            .is_none_or(|rest| rest.is_empty() || rest.split('?').next().unwrap_or_default().trim_end_matches('/').contains('/'))
    {
        // The value is not shown: it may contain a password.
        bail!(
            "database.url must look like postgres://user:password@host:5432, without a database name, because each service has its own database"
        );
    }
    let endpoint = &configuration.traces.endpoint;
    if !endpoint.is_empty() && !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
        bail!("traces.endpoint must look like http://127.0.0.1:4318, not `{endpoint}`");
    }
    let url = &configuration.broker.url;
    if !url.is_empty() && !["amqp://", "amqps://", "kafka://"].iter().any(|scheme| url.starts_with(scheme)) {
        // The value is not shown: it may contain a password.
        bail!("broker.url must look like amqp://user:password@host:5672/vhost or kafka://host:9092,host:9092");
    }
    if !configuration.redis.url.is_empty() {
        capsule_cache::Cache::at(&configuration.redis.url).map_err(|error| anyhow::anyhow!("redis.url {error}"))?;
    }
    let bundle = &configuration.build.ca_bundle;
    if !bundle.as_os_str().is_empty() && !bundle.is_file() {
        bail!("build.ca_bundle: the file {} does not exist", bundle.display());
    }
    Ok(())
}

/// Collects the settings of a table by their dotted names.
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

fn insert(table: &mut Table, name: &str, value: Value) {
    match name.split_once('.') {
        // Only names of environment variables and services contain further dots.
        Some((section, rest)) => {
            if let Value::Table(inner) = table.entry(section).or_insert_with(|| Value::Table(Table::new())) {
                insert(inner, rest, value);
            } else {
                table.insert(section.into(), Value::Table(Table::from_iter([(rest.to_owned(), value)])));
            }
        }
        None => {
            table.insert(name.into(), value);
        }
    }
}

/// Sets a setting from text, with the type of its default.
fn set(table: &mut Table, name: &str, default: &Value, text: &str) -> anyhow::Result<()> {
    let value = match default {
        Value::Integer(_) => Value::Integer(text.parse().with_context(|| format!("`{text}` is not a whole number"))?),
        Value::Array(_) => {
            let elements = text.split(',').map(str::trim).filter(|element| !element.is_empty());
            Value::Array(elements.map(|element| Value::String(element.into())).collect())
        }
        _ => Value::String(text.into()),
    };
    insert(table, name, value);
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
    fn flags_override_the_environment_which_overrides_the_file_which_overrides_defaults() {
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
    fn errors_name_the_setting_and_its_source() {
        let error = |file: &str, environment: &[(&str, &str)], flags: &[(&str, &str)]| {
            format!("{:#}", load(file, environment, flags).err().expect("wrong"))
        };
        assert!(error("\n\nlissten = \"x\"", &[], &[]).contains("capsule.toml:3: lissten: unknown field"));
        assert!(error("[build]\nseconds = \"long\"", &[], &[]).contains("capsule.toml:2: build.seconds"));
        assert!(error("a = [", &[], &[]).contains("capsule.toml:1"));
        assert!(error("", &[("CAPSULE_LISTEN", "everywhere")], &[]).contains("CAPSULE_LISTEN: `everywhere`"));
        assert!(error("", &[], &[("nothing", "1")]).contains("Unknown setting `nothing`. Known settings: advertise"));
        assert!(error("", &[], &[("build.seconds", "0")]).contains("at least 1"));
        assert!(error("base_domain = \"Not a domain\"", &[], &[]).contains("base_domain"));
        assert!(error("public_url = \"apps.example.com\"", &[], &[]).contains("public_url must look like https://"));
        assert!(error("", &[("CAPSULE_TRUSTED_PROXIES", "10.0.0.0/8, everybody")], &[]).contains("not `everybody`"));
        assert!(error("registration = \"everybody\"", &[], &[]).contains("`closed`, `invited`, `open`"));
        let quota = error("[quotas]\nprojects = 5\nprojetcs = 5", &[], &[]);
        assert!(quota.contains("capsule.toml:3: quotas.projetcs") && quota.contains("memory_mib"), "{quota}");
        assert!(error("", &[("CAPSULE_QUOTAS_CONCURRENT_BUILDS", "0")], &[]).contains("at least 1"));
    }

    #[test]
    fn sandboxes_are_relaxed_by_service_id() {
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
    fn a_configuration_file_that_was_given_must_exist() {
        let missing = Path::new("/nowhere/capsule.toml");
        assert!(load_with(Path::new("/"), Some(missing), &[], |_| None).is_err());
    }
}
