//! The erasure of a user (GDPR, article 17).
//!
//! The account is closed at once. It is reopened if the user is the only owner of an organization with other members.
//! After that check, the erasure is final: the user leaves every organization, organizations without other members
//! are deleted, and all personal data is removed.

use std::sync::Arc;
use std::time::Duration;

use capsule_bus::saga::{self, Run, Saga, Step};
use capsule_bus::{Call, Caller, Context, UserGrant, emit};
use capsule_contracts::identity::{DeleteProfile, UserErased};
use capsule_contracts::organization::{CheckLeaving, CountMemberships, LeaveOrganizations};
use capsule_contracts::{Empty, Problem, Timestamp, Uuid};
use capsule_store::{UserScope, user_scoped};
use serde::{Deserialize, Serialize};

use crate::reauthentication::{self, Confirmation};
use crate::{IdentityService, administration, profile, sessions};

#[derive(Serialize, Deserialize)]
struct Input {
    user_id: Uuid,
}

pub static ERASURE: Saga<IdentityService> = Saga {
    name: "user_erasure",
    timeout: Duration::from_secs(600),
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

pub async fn delete_profile(identity: Arc<IdentityService>, call: Call<DeleteProfile>) -> Result<Empty, Problem> {
    let user = call.grant.user();
    let confirmation = reauthentication::confirm(&identity, &call.grant, call.message.password.as_deref()).await?;
    begin(&identity, &call.context, (&call.grant, &confirmation), user).await?;
    Ok(Empty {})
}

/// Begins the erasure of a user, confirmed by that user or an administrator.
pub async fn begin(
    identity: &IdentityService,
    context: &Context,
    (caller, confirmation): (&Caller, &Confirmation),
    user_id: Uuid,
) -> Result<(), Problem> {
    // Checked first for an immediate error, and again by the saga once the account is closed.
    identity.bus.request(&context.as_service("identity"), &CheckLeaving { user_id }).await?;
    let tx = identity.store.begin().await?;
    confirmation.check_still_valid(&tx, caller).await?;
    if caller.user() != user_id {
        administration::check_admin(&tx, caller).await?;
    }
    let grant = caller.access_to(user_id)?;
    let user = profile::by_id(&tx, &grant).await?.ok_or_else(|| Problem::not_found("user"))?;
    let closed = user_scoped!(
        &grant,
        "UPDATE users SET closed_at = :now WHERE id = :user AND closed_at IS NULL AND (NOT platform_admin OR EXISTS \
         (SELECT 1 FROM users u WHERE u.platform_admin AND u.closed_at IS NULL AND u.id <> :user))",
        now = Timestamp::now().0
    );
    if tx.run(closed).await? == 0 {
        return Err(Problem::conflict(format!("{} is the only administrator of this installation.", user.email))
            .hint("Make another user an administrator first: capsule admin users grant EMAIL"));
    }
    sessions::end_all(&tx, context, &grant).await?;
    saga::begin(&tx, context, &ERASURE, &Input { user_id }).await?;
    tx.commit().await
}

/// The grant for the user that a saga erases.
fn grant(run: &Run) -> Result<UserGrant, Problem> {
    let Input { user_id } = run.input()?;
    Ok(run.system().user(user_id, "the account is erased"))
}

async fn set_closed(identity: &IdentityService, run: &Run, closed: bool) -> Result<(), Problem> {
    let grant = grant(run)?;
    let at = closed.then(|| Timestamp::now().0);
    let tx = identity.store.begin().await?;
    tx.run(user_scoped!(&grant, "UPDATE users SET closed_at = :at WHERE id = :user", at)).await?;
    tx.commit().await
}

async fn check(identity: &IdentityService, run: &Run) -> Result<(), Problem> {
    let Input { user_id } = run.input()?;
    identity.bus.request(&run.context(), &CheckLeaving { user_id }).await.map(|_| ())
}

async fn leave(identity: &IdentityService, run: &Run) -> Result<(), Problem> {
    let Input { user_id } = run.input()?;
    identity.bus.request(&run.command(), &LeaveOrganizations { user_id }).await.map(|_| ())
}

async fn wait(identity: &IdentityService, run: &Run) -> Result<(), Problem> {
    let Input { user_id } = run.input()?;
    match identity.bus.request(&run.context(), &CountMemberships { user_id }).await?.count {
        0 => Ok(()),
        left => {
            // The deletion of an organization may have been undone. Sent without an idempotency id, so that it runs
            // again each time.
            identity.bus.request(&run.context(), &LeaveOrganizations { user_id }).await?;
            Err(Problem::unavailable(format!("The user is still in {left} organizations.")))
        }
    }
}

async fn erase(identity: &IdentityService, run: &Run) -> Result<(), Problem> {
    let grant = grant(run)?;
    let user_id = grant.user();
    let tx = identity.store.begin().await?;
    sessions::delete_all(&tx, &grant).await?;
    tx.run(user_scoped!(&grant, "DELETE FROM credentials WHERE user_id = :user")).await?;
    tx.run(user_scoped!(
        &grant,
        "UPDATE users SET email = :email, name = 'erased', platform_admin = FALSE WHERE id = :user",
        email = format!("erased-{user_id}")
    ))
    .await?;
    // Every service, including this one, deletes its other data of the user when it receives the event.
    emit(&tx, &run.context(), &UserErased { user_id }).await?;
    tx.commit().await
}
