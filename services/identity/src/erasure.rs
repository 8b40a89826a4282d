//! The erasure of a user (GDPR, article 17). The account is closed at once, and opened again if its user
//! must stay for an organization's sake; then there is no return: they leave every organization, those
//! that were theirs alone are deleted, and nothing that tells who they were is left.

use std::sync::Arc;
use std::time::Duration;

use capsule_bus::saga::{self, Run, Saga, Step};
use capsule_bus::{Call, Caller, Context, emit};
use capsule_contracts::identity::{DeleteProfile, UserErased};
use capsule_contracts::organization::{CheckLeaving, CountMemberships, LeaveOrganizations};
use capsule_contracts::{Empty, Problem, Timestamp, Uuid};
use capsule_store::{Transaction, unscoped};
use serde::{Deserialize, Serialize};

use crate::reauthentication::{self, Confirmed};
use crate::{Identity, administration, profile, sessions};

#[derive(Serialize, Deserialize)]
struct Input {
    user_id: Uuid,
}

pub static ERASURE: Saga<Identity> = Saga {
    name: "user_erasure",
    patience: Duration::from_secs(600),
    steps: &[
        Step {
            name: "close",
            act: |identity, run| Box::pin(set_closed(identity, run, true)),
            undo: Some(|identity, run| Box::pin(set_closed(identity, run, false))),
        },
        Step {
            name: "check_organizations",
            act: |identity, run| Box::pin(check(identity, run)),
            undo: Some(|_, _| Box::pin(async { Ok(()) })),
        },
        Step { name: "leave_organizations", act: |identity, run| Box::pin(leave(identity, run)), undo: None },
        Step { name: "wait_until_left", act: |identity, run| Box::pin(wait(identity, run)), undo: None },
        Step { name: "erase", act: |identity, run| Box::pin(erase(identity, run)), undo: None },
    ],
};

pub async fn delete_profile(identity: Arc<Identity>, call: Call<DeleteProfile>) -> Result<Empty, Problem> {
    let user = call.proof.user();
    let confirmed = reauthentication::confirm(&identity, user, call.message.password.as_deref()).await?;
    begin(&identity, &call.context, (&call.proof, &confirmed), user).await?;
    Ok(Empty {})
}

/// Begins the erasure of a user, for themself or an administrator, who has confirmed it.
pub async fn begin(
    identity: &Identity,
    context: &Context,
    (caller, confirmed): (&Caller, &Confirmed),
    user_id: Uuid,
) -> Result<(), Problem> {
    // Told at once, where it can be; it is checked again once the account is closed.
    identity.bus.request(&context.on_behalf("identity"), &CheckLeaving { user_id }).await?;
    let tx = identity.store.begin().await?;
    confirmed.still(&tx, caller).await?;
    if caller.user() != user_id {
        administration::still_admin(&tx, caller.user()).await?;
    }
    let user = profile::by_id(&tx, user_id).await?.ok_or_else(|| Problem::not_found("user"))?;
    let closed = unscoped!(
        "users belong to no tenant",
        "UPDATE users SET closed_at = $1 WHERE id = $2 AND closed_at IS NULL AND (NOT platform_admin OR EXISTS \
         (SELECT 1 FROM users u WHERE u.platform_admin AND u.closed_at IS NULL AND u.id <> $3))",
        Timestamp::now().0,
        user_id,
        user_id
    );
    if tx.run(closed).await? == 0 {
        return Err(Problem::conflict(format!("{} is the only administrator of this installation.", user.email))
            .hint("Make somebody else one first: capsule admin users grant EMAIL"));
    }
    sessions::end_all(&tx, context, user_id).await?;
    saga::begin(&tx, context, &ERASURE, &Input { user_id }).await?;
    tx.commit().await
}

async fn close(tx: &Transaction<'_>, user: Uuid, at: Option<i64>) -> Result<(), Problem> {
    tx.run(unscoped!("users belong to no tenant", "UPDATE users SET closed_at = $1 WHERE id = $2", at, user)).await?;
    Ok(())
}

async fn set_closed(identity: &Identity, run: &Run, closed: bool) -> Result<(), Problem> {
    let Input { user_id } = run.input()?;
    let tx = identity.store.begin().await?;
    close(&tx, user_id, closed.then(|| Timestamp::now().0)).await?;
    tx.commit().await
}

async fn check(identity: &Identity, run: &Run) -> Result<(), Problem> {
    let Input { user_id } = run.input()?;
    identity.bus.request(&run.context(), &CheckLeaving { user_id }).await.map(|_| ())
}

async fn leave(identity: &Identity, run: &Run) -> Result<(), Problem> {
    let Input { user_id } = run.input()?;
    identity.bus.request(&run.command(), &LeaveOrganizations { user_id }).await.map(|_| ())
}

async fn wait(identity: &Identity, run: &Run) -> Result<(), Problem> {
    let Input { user_id } = run.input()?;
    match identity.bus.request(&run.context(), &CountMemberships { user_id }).await?.count {
        0 => Ok(()),
        left => {
            // An organization that was to be deleted may be back. No command that is known by its id: it is a new one
            // each time.
            identity.bus.request(&run.context(), &LeaveOrganizations { user_id }).await?;
            Err(Problem::unavailable(format!("The user is still in {left} organizations.")))
        }
    }
}

async fn erase(identity: &Identity, run: &Run) -> Result<(), Problem> {
    let Input { user_id } = run.input()?;
    let tx = identity.store.begin().await?;
    sessions::forget_all(&tx, user_id).await?;
    tx.run(unscoped!("credentials belong to a user", "DELETE FROM credentials WHERE user_id = $1", user_id)).await?;
    tx.run(unscoped!(
        "users belong to no tenant",
        "UPDATE users SET email = $1, name = 'erased', platform_admin = FALSE WHERE id = $2",
        format!("erased-{user_id}"),
        user_id
    ))
    .await?;
    // Every service, this one among them, drops what else it has of them when it hears of it.
    emit(&tx, &run.context(), &UserErased { user_id }).await?;
    tx.commit().await
}
