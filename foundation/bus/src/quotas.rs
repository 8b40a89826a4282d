//! The quotas of organizations, as a service that counts was told them: by [`QuotasChanged`], and by asking
//! their owner where that was too long ago. Like the cache of memberships, but for numbers.

use std::sync::LazyLock;

use capsule_contracts::quotas::{ConfirmQuotas, ConfirmedQuotas, Quotas, QuotasChanged};
use capsule_contracts::{Problem, Timestamp, Uuid};
use capsule_store::{Transaction, unscoped};
use sea_orm::FromQueryResult;

use crate::context::Context;
use crate::service::{Router, Service};

/// Quotas are taken for true so long, in seconds, after their owner last confirmed them.
const LEASE: i64 = 60;

/// What an earlier process was told may have been changed by a setting since: it is confirmed anew.
static STARTED: LazyLock<i64> = LazyLock::new(|| Timestamp::now().0);

#[derive(FromQueryResult)]
struct Known {
    quotas: String,
    confirmed_at: i64,
}

/// The quotas of an organization. Call it before the transaction that counts.
///
/// What was confirmed lately is taken as it is; otherwise the organization service is asked. Where that does not
/// answer, the quotas known last hold on; where none were ever known, nothing new may be used.
///
/// # Errors
/// [`Problem::unavailable`] where the quotas are not known and their owner does not answer.
pub async fn quotas<S: Service>(service: &S, organization: Uuid) -> Result<Quotas, Problem> {
    let known = unscoped!(
        "the limits of the organization that the caller was authorized for",
        "SELECT quotas, confirmed_at FROM known_quotas WHERE organization_id = $1",
        organization
    );
    let known = service.store().read().first::<Known>(known).await?;
    let fresh = Timestamp::now().plus_seconds(-LEASE).0.max(*STARTED);
    if let Some(known) = known.as_ref().filter(|known| known.confirmed_at >= fresh) {
        return read(&known.quotas);
    }
    let ask = ConfirmQuotas { organization_id: organization };
    match (service.bus().request(&Context::background(service.store().name()), &ask).await, known) {
        (Ok(confirmed), _) => {
            let tx = service.store().begin().await?;
            remember(&tx, &confirmed).await?;
            tx.commit().await?;
            Ok(confirmed.quotas)
        }
        (Err(problem), Some(known)) if problem.status >= 500 => {
            tracing::warn!(%organization, %problem, "quotas cannot be confirmed; those known last hold on");
            read(&known.quotas)
        }
        (Err(problem), None) if problem.status >= 500 => {
            tracing::warn!(%organization, %problem, "quotas are not known");
            Err(Problem::unavailable("The quotas of the organization cannot be read at the moment."))
        }
        (Err(problem), _) => Err(problem),
    }
}

fn read(text: &str) -> Result<Quotas, Problem> {
    serde_json::from_str(text).map_err(|_| Problem::internal())
}

/// Takes over what an event or answer says, unless something newer is known.
async fn remember(tx: &Transaction<'_>, confirmed: &ConfirmedQuotas) -> Result<(), Problem> {
    tx.run(unscoped!(
        "limits are not a tenant's data",
        "INSERT INTO known_quotas (organization_id, quotas, sequence, confirmed_at) VALUES ($1, $2, $3, $4) \
         ON CONFLICT (organization_id) DO UPDATE \
         SET quotas = excluded.quotas, sequence = excluded.sequence, confirmed_at = excluded.confirmed_at \
         WHERE excluded.sequence >= known_quotas.sequence",
        confirmed.organization_id,
        serde_json::to_string(&confirmed.quotas).map_err(|_| Problem::internal())?,
        confirmed.sequence,
        Timestamp::now().0
    ))
    .await?;
    Ok(())
}

impl<S: Service> Router<S> {
    /// Keeps what [`quotas`] answers up to date: for services that count.
    #[must_use]
    pub fn keep_quotas(self) -> Self {
        LazyLock::force(&STARTED);
        self.consume::<QuotasChanged>(|_, tx, event| Box::pin(async move { remember(tx, &event.confirmed).await }))
    }
}
