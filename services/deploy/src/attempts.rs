//! How often the phases of a deployment are tried. An attempt is counted in the transaction that begins it and
//! discounted in the one that ends it, so attempts that the server did not survive stay counted.

use capsule_contracts::deploy::Phase;
use capsule_contracts::{Problem, Timestamp};
use capsule_store::{Transaction, scoped};
use sea_orm::FromQueryResult;

use crate::deployments::Row;

/// A phase is not begun again after the server ended in it so often.
const MOST_UNFINISHED: i32 = 10;
/// A phase is not begun again after so many attempts that the platform hindered; with the delays between
/// them, that takes about an hour.
const MOST_HINDERED: i32 = 20;
/// The longest delay between two attempts, in seconds.
const LONGEST_DELAY: i64 = 300;

#[derive(Default, FromQueryResult)]
struct Counts {
    unfinished: i32,
    hindered: i32,
}

async fn counts(tx: &Transaction<'_>, row: &Row, phase: Phase) -> Result<Counts, Problem> {
    let counts = scoped!(
        &row.grant(),
        "SELECT unfinished, hindered FROM deployment_attempts WHERE organization_id = :tenant AND deployment_id = $1 AND phase = $2",
        row.id,
        phase.name()
    );
    Ok(tx.read().first(counts).await?.unwrap_or_default())
}

async fn keep(tx: &Transaction<'_>, row: &Row, phase: Phase, counts: &Counts, delay: i64) -> Result<(), Problem> {
    tx.run(scoped!(
        &row.grant(),
        "INSERT INTO deployment_attempts (deployment_id, organization_id, phase, unfinished, hindered) \
         VALUES ($1, :tenant, $2, $3, $4) ON CONFLICT (deployment_id, phase) \
         DO UPDATE SET unfinished = excluded.unfinished, hindered = excluded.hindered",
        row.id,
        phase.name(),
        counts.unfinished,
        counts.hindered
    ))
    .await?;
    tx.run(scoped!(
        &row.grant(),
        "UPDATE deployments SET next_attempt_at = $1 WHERE organization_id = :tenant AND id = $2",
        Timestamp::now().plus_seconds(delay).0,
        row.id
    ))
    .await?;
    Ok(())
}

/// Counts an attempt that begins. Should the server end in it, the next one waits: not after the first time,
/// then longer each time. `Some` says why there is none any more.
pub async fn begin(tx: &Transaction<'_>, row: &Row, phase: Phase) -> Result<Option<String>, Problem> {
    let Counts { unfinished, hindered } = counts(tx, row, phase).await?;
    if unfinished >= MOST_UNFINISHED {
        return Ok(Some(format!(
            "The server ended {unfinished} times in the phase `{}` of this deployment, so it is not tried again. \
             If other deployments succeed, something in this one ends the server: change it and deploy again, and report it.",
            phase.name()
        )));
    }
    let counts = Counts { unfinished: unfinished + 1, hindered };
    keep(tx, row, phase, &counts, delay(unfinished)).await?;
    Ok(None)
}

/// Discounts an attempt that the server survived.
pub async fn complete(tx: &Transaction<'_>, row: &Row, phase: Phase) -> Result<(), Problem> {
    tx.run(scoped!(
        &row.grant(),
        "UPDATE deployment_attempts SET unfinished = unfinished - 1 \
         WHERE organization_id = :tenant AND deployment_id = $1 AND phase = $2 AND unfinished > 0",
        row.id,
        phase.name()
    ))
    .await?;
    Ok(())
}

/// Counts an attempt that the platform hindered, and sets the time of the next. `Some` says why there is none
/// any more.
pub async fn hinder(tx: &Transaction<'_>, row: &Row, phase: Phase, problem: &Problem) -> Result<Option<String>, Problem> {
    complete(tx, row, phase).await?;
    let Counts { unfinished, hindered } = counts(tx, row, phase).await?;
    let counts = Counts { unfinished, hindered: hindered + 1 };
    keep(tx, row, phase, &counts, delay(counts.hindered)).await?;
    Ok((counts.hindered >= MOST_HINDERED).then(|| {
        format!(
            "The phase `{}` was tried {} times without success: {} Deploy again later.",
            phase.name(),
            counts.hindered,
            problem.detail
        )
    }))
}

/// Seconds until the next attempt, after so many.
fn delay(attempts: i32) -> i64 {
    match attempts {
        ..=0 => 0,
        attempts => (1_i64 << (attempts - 1).min(20)).min(LONGEST_DELAY),
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
