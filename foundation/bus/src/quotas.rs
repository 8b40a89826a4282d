//! A service's cache of organizations' quotas. [`QuotasChanged`] updates it; outdated entries are requested from the
//! organization service, which owns them. It works like the membership cache.

use std::sync::LazyLock;

use capsule_contracts::quotas::{ConfirmQuotas, ConfirmedQuotas, Quotas, QuotasChanged};
use capsule_contracts::{Problem, Timestamp, Uuid};
use capsule_store::{FromRow, Transaction, unscoped};

use crate::context::Context;
use crate::service::{Router, Service};

/// How long cached quotas are valid after the organization service confirmed them, in seconds.
const LEASE_SECONDS: i64 = 60;

/// Entries from before this process started are requested again: the installation's settings may have changed.
static STARTED: LazyLock<i64> = LazyLock::new(|| Timestamp::now().0);

#[derive(FromRow)]
struct CachedQuotas {
    quotas: String,
    confirmed_at: i64,
}

/// The quotas of an organization. Call it before the transaction that counts.
///
/// Quotas that were confirmed recently come from the cache; others are requested from the organization service. If
/// that is unavailable, outdated quotas from the cache are returned.
///
/// # Errors
/// [`Problem::unavailable`] if the quotas are not in the cache and the organization service is unavailable.
pub async fn quotas<S: Service>(service: &S, organization: Uuid) -> Result<Quotas, Problem> {
    let cached = unscoped!(
        "the limits of the organization that the caller was authorized for",
        "SELECT quotas, confirmed_at FROM known_quotas WHERE organization_id = :organization",
        organization
    );
    let cached = service.store().read().first::<CachedQuotas>(cached).await?;
    let valid_since = Timestamp::now().plus_seconds(-LEASE_SECONDS).0.max(*STARTED);
    if let Some(cached) = cached.as_ref().filter(|cached| cached.confirmed_at >= valid_since) {
        return parse(&cached.quotas);
    }
    let request = ConfirmQuotas { organization_id: organization };
    match (service.bus().request(&Context::background(service.store().name()), &request).await, cached) {
        (Ok(confirmed), _) => {
            let tx = service.store().begin().await?;
            cache_quotas(&tx, &confirmed).await?;
            tx.commit().await?;
            Ok(confirmed.quotas)
        }
        (Err(problem), Some(cached)) if problem.status >= 500 => {
            tracing::warn!(%organization, %problem, "quotas cannot be confirmed; using the cached ones");
            parse(&cached.quotas)
        }
        (Err(problem), None) if problem.status >= 500 => {
            tracing::warn!(%organization, %problem, "quotas are not in the cache and cannot be requested");
            Err(Problem::unavailable("The organization's quotas cannot be read: the organization service is unavailable."))
        }
        (Err(problem), _) => Err(problem),
    }
}

fn parse(text: &str) -> Result<Quotas, Problem> {
    serde_json::from_str(text).map_err(|_| Problem::internal())
}

/// Caches quotas, unless the cached ones are newer.
async fn cache_quotas(tx: &Transaction<'_>, confirmed: &ConfirmedQuotas) -> Result<(), Problem> {
    tx.run(unscoped!(
        "limits are not a tenant's data",
        "INSERT INTO known_quotas (organization_id, quotas, sequence, confirmed_at) \
         VALUES (:organization_id, :quotas, :sequence, :confirmed_at) \
         ON CONFLICT (organization_id) DO UPDATE \
         SET quotas = excluded.quotas, sequence = excluded.sequence, confirmed_at = excluded.confirmed_at \
         WHERE excluded.sequence >= known_quotas.sequence",
        organization_id = confirmed.organization_id,
        quotas = serde_json::to_string(&confirmed.quotas).map_err(|_| Problem::internal())?,
        sequence = confirmed.sequence,
        confirmed_at = Timestamp::now().0
    ))
    .await?;
    Ok(())
}

impl<S: Service> Router<S> {
    /// Updates the cache of [`quotas`] by events. For services that check quotas.
    #[must_use]
    pub fn keep_quotas(self) -> Self {
        LazyLock::force(&STARTED);
        self.consume::<QuotasChanged>(|_, tx, delivery| {
            Box::pin(async move { cache_quotas(tx, &delivery.event.confirmed).await })
        })
    }
}
