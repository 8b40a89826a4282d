//! Host names of applications: unique in the installation, some kept for the platform, and kept for its
//! organization for a time after whatever had one was removed. A stranger who took a name that others still link
//! to would get their visitors, and with them cookies and sign-ins.

use capsule_contracts::message::to_label;
use capsule_contracts::project::Configuration;
use capsule_contracts::{Problem, Timestamp, Uuid};
use capsule_store::{Scope, Store, Transaction, scoped, unscoped};

use crate::reconcile;

/// First labels that mean the platform, mail or proofs of who has a domain to others, whatever the base domain is.
const RESERVED: [&str; 32] = [
    "_acme-challenge",
    "_dmarc",
    "_domainkey",
    "_mta-sts",
    "acme-challenge",
    "admin",
    "api",
    "auth",
    "autoconfig",
    "autodiscover",
    "capsule",
    "capsule-admin",
    "capsule-api",
    "console",
    "dashboard",
    "docs",
    "ftp",
    "imap",
    "isatap",
    "localhost",
    "login",
    "mail",
    "mta-sts",
    "ns1",
    "ns2",
    "pop",
    "registry",
    "smtp",
    "status",
    "webmail",
    "wpad",
    "www",
];

/// Whether a first label is the platform's own.
pub fn is_reserved(label: &str) -> bool {
    RESERVED.binary_search(&label).is_ok() || label.starts_with('_')
}

/// `<service>-<environment>.<base domain>` in the transaction that takes it, with a number behind where it is
/// taken, reserved, or in quarantine for another organization. A DNS label has 63 bytes at the most.
///
/// # Errors
/// When too many have the same name.
pub async fn take(
    tx: &Transaction<'_>,
    scope: &impl Scope,
    base_domain: &str,
    configuration: &Configuration,
) -> Result<String, Problem> {
    let mut label =
        format!("{}-{}", to_label(&configuration.service_name, "app"), to_label(&configuration.environment_name, "env"));
    label.truncate(56);
    let label = label.trim_end_matches('-');
    for n in 1..100_000 {
        let label = if n == 1 { label.to_owned() } else { format!("{label}-{n}") };
        let host = format!("{label}.{base_domain}");
        if !is_reserved(&label) && is_free(tx, scope, &host).await? {
            // Its organization has it again.
            tx.run(scoped!(scope, "DELETE FROM host_quarantine WHERE organization_id = :tenant AND host = $1", host.as_str()))
                .await?;
            return Ok(host);
        }
    }
    Err(Problem::conflict("Too many services have this name; choose another."))
}

async fn is_free(tx: &Transaction<'_>, scope: &impl Scope, host: &str) -> Result<bool, Problem> {
    let taken = unscoped!("hosts are unique over all tenants", "SELECT 1 FROM placements WHERE host = $1", host);
    let quarantined = unscoped!(
        "hosts are unique over all tenants",
        "SELECT 1 FROM host_quarantine WHERE host = $1 AND organization_id <> $2 AND free_at > $3",
        host,
        scope.organization(),
        Timestamp::now().0
    );
    Ok(!tx.read().exists(taken).await? && !tx.read().exists(quarantined).await?)
}

/// Keeps a host for its organization from now on, in the transaction that gives it up.
///
/// # Errors
/// When the row cannot be written.
pub async fn quarantine(tx: &Transaction<'_>, scope: &impl Scope, host: &str, days: u32) -> Result<(), Problem> {
    let free_at = Timestamp::now().plus_seconds(i64::from(days) * 24 * 3600).0;
    tx.run(scoped!(
        scope,
        "INSERT INTO host_quarantine (host, organization_id, free_at) VALUES ($1, :tenant, $2) \
         ON CONFLICT (host) DO UPDATE SET organization_id = excluded.organization_id, free_at = excluded.free_at",
        host,
        free_at
    ))
    .await?;
    Ok(())
}

/// What the row of a removed placement has for a host, which is unique: its own may be taken again at once.
pub fn placeholder(service: Uuid, environment: Uuid) -> String {
    format!("removed/{service}/{environment}")
}

/// Deletes the hosts whose quarantine is over.
///
/// # Errors
/// If the database does not answer.
pub async fn prune(store: &Store) -> Result<(), Problem> {
    let now = Timestamp::now().0;
    let exists = unscoped!("the platform's own work", "SELECT 1 FROM host_quarantine WHERE free_at <= $1 LIMIT 1", now);
    let delete = unscoped!("the platform's own work", "DELETE FROM host_quarantine WHERE free_at <= $1", now);
    reconcile::delete_if_any(store, exists, delete).await
}

#[cfg(test)]
mod tests {
    use capsule_bus::SystemGrant;
    use capsule_contracts::access::EnvironmentKind;
    use capsule_contracts::project::Configuration;
    use capsule_contracts::{Uuid, new_id};
    use capsule_store::{Databases, Keyring, Store, unscoped};

    use super::{RESERVED, is_reserved};

    const DAYS: u32 = 30;

    #[test]
    fn the_platforms_own_labels_are_reserved() {
        assert!(RESERVED.is_sorted(), "they are searched");
        for label in ["www", "api", "admin", "capsule", "mail", "_acme-challenge", "_anything", "mta-sts"] {
            assert!(is_reserved(label), "{label}");
        }
        for label in ["shop-production", "www-production", "api-2", "capsule-production"] {
            assert!(!is_reserved(label), "{label}");
        }
    }

    async fn open(folder: &std::path::Path) -> Store {
        let keyring = Keyring::open(&folder.join("key")).expect("a key");
        Store::open(&Databases::Embedded(folder.into()), crate::NAME, keyring, crate::MIGRATIONS).await.expect("opens")
    }

    fn configuration(organization_id: Uuid, service: &str, environment: &str) -> Configuration {
        Configuration {
            organization_id,
            project_id: new_id(),
            service_id: new_id(),
            service_name: service.into(),
            environment_id: new_id(),
            environment_name: environment.into(),
            environment_kind: EnvironmentKind::Production,
            archived: false,
            environment: Default::default(),
            secrets: Vec::new(),
        }
    }

    async fn take(store: &Store, organization: Uuid, service: &str, environment: &str) -> String {
        let tx = store.begin().await.expect("begins");
        let grant = SystemGrant::new(organization, "test");
        let configuration = configuration(organization, service, environment);
        let host = super::take(&tx, &grant, "example.com", &configuration).await.expect("a host");
        tx.commit().await.expect("committed");
        host
    }

    async fn give_up(store: &Store, organization: Uuid, host: &str) {
        let tx = store.begin().await.expect("begins");
        super::quarantine(&tx, &SystemGrant::new(organization, "test"), host, DAYS).await.expect("kept");
        tx.commit().await.expect("committed");
    }

    #[tokio::test]
    async fn a_host_that_was_given_up_is_only_its_own_organizations_until_it_is_free() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(folder.path()).await;
        let (one, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        for host in ["shop-production.example.com", "shop-production-2.example.com"] {
            give_up(&store, one, host).await;
        }
        // Whatever the parts of the name are.
        for (service, environment) in [("shop", "production"), ("shop-production", "2")] {
            let host = take(&store, other, service, environment).await;
            assert!(!["shop-production.example.com", "shop-production-2.example.com"].contains(&host.as_str()), "{host}");
        }
        assert_eq!(take(&store, one, "shop", "production").await, "shop-production.example.com");
        // It is not in quarantine any more, and is again once it is given up again.
        give_up(&store, one, "shop-production.example.com").await;
        assert_eq!(take(&store, other, "shop", "production").await, "shop-production-3.example.com");

        super::prune(&store).await.expect("pruned");
        assert_eq!(take(&store, other, "shop", "production").await, "shop-production-3.example.com", "30 days are not over");
        let tx = store.begin().await.expect("begins");
        tx.run(unscoped!("test", "UPDATE host_quarantine SET free_at = 1")).await.expect("set");
        tx.commit().await.expect("committed");
        assert_eq!(take(&store, other, "shop", "production").await, "shop-production.example.com");
        super::prune(&store).await.expect("pruned");
        let left = store.read().value::<i64>(unscoped!("test", "SELECT COUNT(*) FROM host_quarantine")).await;
        assert_eq!(left.expect("answers"), Some(0));
    }

    #[tokio::test]
    async fn nobody_gets_a_reserved_label() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(folder.path()).await;
        assert_eq!(take(&store, Uuid::from_u128(1), "mta", "sts").await, "mta-sts-2.example.com");
        assert_eq!(take(&store, Uuid::from_u128(1), "capsule", "api").await, "capsule-api-2.example.com");
    }
}
