//! Everybody has an organization of their own from the start. It is made when the registration is
//! heard of, or when its owner asks before that: whichever comes first.

use capsule_bus::Context;
use capsule_contracts::identity::User;
use capsule_contracts::message::to_label;
use capsule_contracts::{Problem, Uuid};
use capsule_store::{Transaction, unscoped};

use crate::leaving;
use crate::organizations::{self, New};

/// Makes the personal organization of `user` unless there is one, or they have left for good.
pub async fn ensure(tx: &Transaction<'_>, user: &User) -> Result<(), Problem> {
    let known = unscoped!("one per user", "SELECT 1 FROM organizations WHERE personal_of = $1", user.id);
    if tx.read().exists(known).await? || leaving::has_left(tx, user.id).await? {
        return Ok(());
    }
    let wanted = to_label(user.email.split('@').next().unwrap_or_default(), "personal");
    let slug = organizations::free_slug(tx, &wanted).await?;
    let new = New { name: user.name.clone(), slug, owner: user.id, personal: true };
    organizations::insert(tx, &Context::background("organization"), new).await?;
    Ok(())
}

/// Makes a personal organization one like any other, without the name and the slug that were made from its person's:
/// their account is erased, and others may be members of it.
pub async fn detach(tx: &Transaction<'_>, user: Uuid) -> Result<(), Problem> {
    let own = unscoped!("one per user", "SELECT id FROM organizations WHERE personal_of = $1", user);
    if let Some(id) = tx.read().value::<Uuid>(own).await? {
        tx.run(unscoped!(
            "one per user",
            "UPDATE organizations SET name = 'Former personal organization', slug = $1, personal_of = NULL WHERE id = $2",
            format!("former-{}", id.simple()),
            id
        ))
        .await?;
    }
    Ok(())
}
