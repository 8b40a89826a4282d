//! Host names of applications. They are unique in the installation; some are reserved for the platform. After a removal,
//! a host is quarantined for its organization: another organization that took a host to which links still point would
//! receive its visitors, with their cookies and credentials.

use capsule_contracts::message::to_label;
use capsule_contracts::project::Configuration;
use capsule_contracts::{Problem, Timestamp, Uuid};
use capsule_store::{Scope, Store, Transaction, scoped, unscoped};

use crate::reconcile;

/// First labels with a meaning to other programs (mail, validation of domains), or that users take for the platform.
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

/// Whether a first label is reserved.
pub fn is_reserved(label: &str) -> bool {
    RESERVED.binary_search(&label).is_ok() || label.starts_with('_')
}

/// Returns a free host, `<service>-<environment>.<base domain>`. A number follows the label if the host is taken, reserved,
/// or quarantined for another organization. A DNS label has at most 63 bytes (RFC 1035).
///
/// # Errors
/// If too many services have the same name.
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
            // Ends the quarantine, which can only be that of this organization.
            tx.run(scoped!(
                scope,
                "DELETE FROM host_quarantine WHERE organization_id = :tenant AND host = :host",
                host = host.as_str()
            ))
            .await?;
            return Ok(host);
        }
    }
    Err(Problem::conflict("Too many services have this name; choose another."))
}

async fn is_free(tx: &Transaction<'_>, scope: &impl Scope, host: &str) -> Result<bool, Problem> {
    let taken = unscoped!("hosts are unique over all tenants", "SELECT 1 FROM placements WHERE host = :host", host);
    let quarantined = unscoped!(
        "hosts are unique over all tenants",
        "SELECT 1 FROM host_quarantine WHERE host = :host AND organization_id <> :organization_id AND free_at > :now",
        host,
        organization_id = scope.organization(),
        now = Timestamp::now().0
    );
    Ok(!tx.read().exists(taken).await? && !tx.read().exists(quarantined).await?)
}

/// Quarantines a host for its organization, in the transaction that releases it.
///
/// # Errors
/// If the row cannot be written.
pub async fn quarantine(tx: &Transaction<'_>, scope: &impl Scope, host: &str, days: u32) -> Result<(), Problem> {
    let free_at = Timestamp::now().plus_seconds(i64::from(days) * 24 * 3600).0;
    tx.run(scoped!(
        scope,
        "INSERT INTO host_quarantine (host, organization_id, free_at) VALUES (:host, :tenant, :free_at) \
         ON CONFLICT (host) DO UPDATE SET organization_id = excluded.organization_id, free_at = excluded.free_at",
        host,
        free_at
    ))
    .await?;
    Ok(())
}

/// The unique value that replaces the host of a removed service, so that its organization can take the host again.
pub fn placeholder(service_id: Uuid, environment_id: Uuid) -> String {
    format!("removed/{service_id}/{environment_id}")
}

/// Deletes the hosts whose quarantine is over.
///
/// # Errors
/// If the database does not answer.
pub async fn prune(store: &Store) -> Result<(), Problem> {
    let now = Timestamp::now().0;
    let exists = unscoped!("the platform's own work", "SELECT 1 FROM host_quarantine WHERE free_at <= :now LIMIT 1", now);
    let delete = unscoped!("the platform's own work", "DELETE FROM host_quarantine WHERE free_at <= :now", now);
    reconcile::delete_if_any(store, exists, delete).await
}

#[cfg(test)]
mod tests {
    use capsule_contracts::access::EnvironmentKind;
    use capsule_contracts::project::Configuration;
    use capsule_contracts::{Uuid, new_id};
    use capsule_store::{Databases, Keyring, Store, unscoped};

    use super::{RESERVED, is_reserved};
    use crate::tests::TestScope;

    const DAYS: u32 = 30;

    #[test]
    fn labels_of_the_platform_are_reserved() {
        assert!(RESERVED.is_sorted(), "binary search");
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
        let grant = TestScope(organization);
        let configuration = configuration(organization, service, environment);
        let host = super::take(&tx, &grant, "example.com", &configuration).await.expect("a host");
        tx.commit().await.expect("committed");
        host
    }

    async fn release(store: &Store, organization: Uuid, host: &str) {
        let tx = store.begin().await.expect("begins");
        super::quarantine(&tx, &TestScope(organization), host, DAYS).await.expect("kept");
        tx.commit().await.expect("committed");
    }

    #[tokio::test]
    async fn a_quarantined_host_is_available_only_to_its_organization() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(folder.path()).await;
        let (one, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        for host in ["shop-production.example.com", "shop-production-2.example.com"] {
            release(&store, one, host).await;
        }
        // Different names can lead to the same host.
        for (service, environment) in [("shop", "production"), ("shop-production", "2")] {
            let host = take(&store, other, service, environment).await;
            assert!(!["shop-production.example.com", "shop-production-2.example.com"].contains(&host.as_str()), "{host}");
        }
        assert_eq!(take(&store, one, "shop", "production").await, "shop-production.example.com");
        // The quarantine has ended, and begins again with the next release.
        release(&store, one, "shop-production.example.com").await;
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
    async fn reserved_labels_are_not_given_out() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(folder.path()).await;
        assert_eq!(take(&store, Uuid::from_u128(1), "mta", "sts").await, "mta-sts-2.example.com");
        assert_eq!(take(&store, Uuid::from_u128(1), "capsule", "api").await, "capsule-api-2.example.com");
    }
}
