//! Personal organizations. Every user has one. It is created when the user's registration event arrives, or when the
//! user lists organizations, whichever is first.

use capsule_bus::Context;
use capsule_contracts::identity::User;
use capsule_contracts::message::to_label;
use capsule_contracts::{Problem, Uuid};
use capsule_store::{Transaction, unscoped};

use crate::leaving;
use crate::organizations::{self, NewOrganization};

/// Creates the personal organization of `user` unless it exists or the user's account was erased.
pub async fn create_if_missing(tx: &Transaction<'_>, user: &User) -> Result<(), Problem> {
    let known = unscoped!("one per user", "SELECT 1 FROM organizations WHERE personal_of = :personal_of", personal_of = user.id);
    if tx.read().exists(known).await? || leaving::has_left(tx, user.id).await? {
        return Ok(());
    }
    let wanted = to_label(user.email.split('@').next().unwrap_or_default(), "personal");
    let slug = organizations::free_slug(tx, &wanted).await?;
    let new = NewOrganization { name: user.name.clone(), slug, owner: user.id, personal: true };
    organizations::insert(tx, &Context::background("organization"), new).await?;
    Ok(())
}

/// Turns the personal organization of an erased user into an ordinary one, as it may have other members. Replaces its
/// name and slug, which contain the user's name.
pub async fn detach(tx: &Transaction<'_>, user: Uuid) -> Result<(), Problem> {
    let own = unscoped!("one per user", "SELECT id FROM organizations WHERE personal_of = :user", user);
    if let Some(id) = tx.read().value::<Uuid>(own).await? {
        tx.run(unscoped!(
            "one per user",
            "UPDATE organizations SET name = 'Former personal organization', slug = :slug, personal_of = NULL WHERE id = :id",
            slug = format!("former-{}", id.simple()),
            id
        ))
        .await?;
    }
    Ok(())
}
