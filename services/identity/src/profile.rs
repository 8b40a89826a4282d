//! User profiles.

use std::sync::Arc;

use capsule_bus::Call;
use capsule_contracts::identity::{GetProfile, GetUsers, UpdateProfile, User};
use capsule_contracts::{Page, Problem, Timestamp, Uuid};
use capsule_store::{FromRow, Statement, Transaction, UserScope, unscoped, user_scoped};

use crate::{IdentityService, invitations};

#[derive(FromRow)]
pub struct UserRow {
    id: Uuid,
    email: String,
    name: String,
    platform_admin: bool,
    created_at: i64,
}

impl From<UserRow> for User {
    fn from(row: UserRow) -> Self {
        Self {
            id: row.id,
            email: row.email,
            name: row.name,
            platform_admin: row.platform_admin,
            created_at: Timestamp(row.created_at),
        }
    }
}

/// The user with this address, unless the account is closed. Used to find out who signs in.
pub async fn by_email(identity: &IdentityService, email: &str) -> Result<Option<User>, Problem> {
    let row = unscoped!(
        "users belong to no tenant",
        "SELECT id, email, name, platform_admin, created_at FROM users WHERE email = :email AND closed_at IS NULL",
        email
    );
    Ok(identity.store.read().first::<UserRow>(row).await?.map(User::from))
}

/// The user of a grant, unless the account is closed.
pub async fn by_id(tx: &Transaction<'_>, scope: &impl UserScope) -> Result<Option<User>, Problem> {
    Ok(tx.read().first::<UserRow>(row(scope)).await?.map(User::from))
}

fn row(scope: &impl UserScope) -> Statement {
    user_scoped!(scope, "SELECT id, email, name, platform_admin, created_at FROM users WHERE id = :user AND closed_at IS NULL")
}

pub async fn get_profile(identity: Arc<IdentityService>, call: Call<GetProfile>) -> Result<User, Problem> {
    get(&identity, &call.grant).await
}

/// Reads a user whose account is not closed.
async fn get(identity: &IdentityService, scope: &impl UserScope) -> Result<User, Problem> {
    identity.store.read().first::<UserRow>(row(scope)).await?.map(User::from).ok_or_else(|| Problem::not_found("user"))
}

pub async fn update_profile(identity: Arc<IdentityService>, call: Call<UpdateProfile>) -> Result<User, Problem> {
    let tx = identity.store.begin().await?;
    let mut user = by_id(&tx, &call.grant).await?.ok_or_else(|| Problem::not_found("user"))?;
    call.context.check_if_match(&user)?;
    if let Some(name) = &call.message.name {
        name.trim().clone_into(&mut user.name);
        tx.run(user_scoped!(
            &call.grant,
            "UPDATE users SET name = :name WHERE id = :user AND closed_at IS NULL",
            name = user.name.as_str()
        ))
        .await?;
        tx.commit().await?;
    }
    Ok(user)
}

pub async fn get_users(identity: Arc<IdentityService>, call: Call<GetUsers>) -> Result<Page<User>, Problem> {
    let mut users = Vec::with_capacity(call.message.ids.len());
    for id in call.message.ids {
        match get(&identity, &call.grant.user(id, "users are listed")).await {
            Ok(user) => users.push(user),
            Err(problem) if problem.code == "not_found" => {
                let invited = invitations::find(&identity, id).await?;
                users.extend(invited.map(|invited| User {
                    id,
                    email: invited.email,
                    name: String::new(),
                    platform_admin: false,
                    created_at: Timestamp::default(),
                }));
            }
            Err(problem) => return Err(problem),
        }
    }
    Ok(Page::whole(users))
}
