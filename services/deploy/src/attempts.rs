//! Attempts at the phases of a deployment. The transaction that begins an attempt counts it, and the one that ends it
//! subtracts it, so that attempts during which the server crashed stay counted.

use capsule_contracts::deploy::Phase;
use capsule_contracts::{Problem, Timestamp};
use capsule_store::{FromRow, Scope, Transaction, scoped};

use crate::deployments::Row;

/// The maximum number of attempts during which the server crashed.
const MAX_UNFINISHED: i32 = 10;
/// The maximum number of attempts that failed because a part of the platform was not available. With the delays
/// between them, they take about an hour.
const MAX_HINDERED: i32 = 20;
/// The maximum delay between two attempts.
const MAX_DELAY_SECONDS: i64 = 300;

#[derive(Default, FromRow)]
struct Counts {
    unfinished: i32,
    hindered: i32,
}

async fn counts(tx: &Transaction<'_>, scope: &impl Scope, row: &Row, phase: Phase) -> Result<Counts, Problem> {
    let counts = scoped!(
        scope,
        "SELECT unfinished, hindered FROM deployment_attempts WHERE organization_id = :tenant \
         AND deployment_id = :deployment_id AND phase = :phase",
        deployment_id = row.id,
        phase = phase.name()
    );
    Ok(tx.read().first(counts).await?.unwrap_or_default())
}

async fn store(
    tx: &Transaction<'_>,
    scope: &impl Scope,
    row: &Row,
    phase: Phase,
    counts: &Counts,
    delay: i64,
) -> Result<(), Problem> {
    tx.run(scoped!(
        scope,
        "INSERT INTO deployment_attempts (deployment_id, organization_id, phase, unfinished, hindered) \
         VALUES (:deployment_id, :tenant, :phase, :unfinished, :hindered) ON CONFLICT (deployment_id, phase) \
         DO UPDATE SET unfinished = excluded.unfinished, hindered = excluded.hindered",
        deployment_id = row.id,
        phase = phase.name(),
        unfinished = counts.unfinished,
        hindered = counts.hindered
    ))
    .await?;
    tx.run(scoped!(
        scope,
        "UPDATE deployments SET next_attempt_at = :next_attempt_at WHERE organization_id = :tenant AND id = :id",
        next_attempt_at = Timestamp::now().plus_seconds(delay).0,
        id = row.id
    ))
    .await?;
    Ok(())
}

/// Counts an attempt that begins. If the server crashes during it, the next attempt is delayed: not after the first
/// crash, then by a growing back-off. `Some` is the reason why there is no further attempt.
pub async fn begin(tx: &Transaction<'_>, scope: &impl Scope, row: &Row, phase: Phase) -> Result<Option<String>, Problem> {
    let Counts { unfinished, hindered } = counts(tx, scope, row, phase).await?;
    if unfinished >= MAX_UNFINISHED {
        return Ok(Some(format!(
            "The server ended {unfinished} times in the phase `{}` of this deployment, so it is not tried again. \
             If other deployments succeed, this one causes the crash: change it, deploy again, and report the problem.",
            phase.name()
        )));
    }
    let counts = Counts { unfinished: unfinished + 1, hindered };
    store(tx, scope, row, phase, &counts, delay(unfinished)).await?;
    Ok(None)
}

/// Subtracts an attempt that ended without a crash.
pub async fn complete(tx: &Transaction<'_>, scope: &impl Scope, row: &Row, phase: Phase) -> Result<(), Problem> {
    tx.run(scoped!(
        scope,
        "UPDATE deployment_attempts SET unfinished = unfinished - 1 \
         WHERE organization_id = :tenant AND deployment_id = :deployment_id AND phase = :phase AND unfinished > 0",
        deployment_id = row.id,
        phase = phase.name()
    ))
    .await?;
    Ok(())
}

/// Counts an attempt that failed because a part of the platform was not available, and sets the time of the next.
/// `Some` is the reason why there is no further attempt.
pub async fn record_hindered(
    tx: &Transaction<'_>,
    scope: &impl Scope,
    row: &Row,
    phase: Phase,
    problem: &Problem,
) -> Result<Option<String>, Problem> {
    complete(tx, scope, row, phase).await?;
    let Counts { unfinished, hindered } = counts(tx, scope, row, phase).await?;
    let counts = Counts { unfinished, hindered: hindered + 1 };
    store(tx, scope, row, phase, &counts, delay(counts.hindered)).await?;
    Ok((counts.hindered >= MAX_HINDERED).then(|| {
        format!("The phase `{}` failed {} times: {} Deploy again later.", phase.name(), counts.hindered, problem.detail)
    }))
}

/// The delay before the next attempt, in seconds.
fn delay(attempts: i32) -> i64 {
    match attempts {
        ..=0 => 0,
        attempts => (1_i64 << (attempts - 1).min(20)).min(MAX_DELAY_SECONDS),
    }
}

#[cfg(test)]
mod tests {
    use super::delay;

    #[test]
    fn delays_grow_and_are_bounded() {
        assert_eq!((0..12).map(delay).collect::<Vec<_>>(), [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        assert_eq!(delay(i32::MAX), 300);
    }
}
