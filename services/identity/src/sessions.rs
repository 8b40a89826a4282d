//! Sessions. A session is a chain of refresh tokens, each valid for one use, and the access tokens issued with them.

use std::sync::Arc;

use capsule_bus::{Call, Context, emit};
use capsule_contracts::identity::{
    CheckSessions, ListSessions, LiveSessions, Logout, RefreshToken, RevokeSession, RevokeSessions, Session, SessionInfo,
    SessionRevoked, TokenStatus, User, ValidateToken,
};
use capsule_contracts::list::PageQuery;
use capsule_contracts::{Empty, Page, Problem, Timestamp, Uuid, new_id};
use capsule_store::{FromRow, Transaction, UserScope, page, unscoped, user_scoped};

use crate::authenticated::Authenticated;
use crate::{IdentityService, profile, tokens};

/// How long a refresh token is valid.
const REFRESH_TOKEN_SECONDS: i64 = 7 * 24 * 3600;
/// How long ended sessions are kept.
const ENDED_SESSION_RETENTION_SECONDS: i64 = 30 * 24 * 3600;

/// Begins a session and issues its first tokens.
pub async fn open(
    identity: &IdentityService,
    tx: &Transaction<'_>,
    context: &Context,
    scope: &impl UserScope,
    user: User,
) -> Result<Session, Problem> {
    let (id, now) = (new_id(), Timestamp::now());
    tx.run(user_scoped!(
        scope,
        "INSERT INTO sessions (id, user_id, created_at, last_used_at, expires_at) \
         VALUES (:id, :user, :now, :now, :expires_at)",
        id,
        now = now.0,
        expires_at = now.plus_seconds(REFRESH_TOKEN_SECONDS).0
    ))
    .await?;
    tracing::info!(user = %user.id, correlation_id = context.correlation_id, "session opened");
    issue_tokens(identity, tx, id, user).await
}

/// Issues the next pair of tokens of a session.
async fn issue_tokens(identity: &IdentityService, tx: &Transaction<'_>, session: Uuid, user: User) -> Result<Session, Problem> {
    let refresh_token = tokens::secret()?;
    tx.run(unscoped!(
        "tokens belong to a session",
        "INSERT INTO refresh_tokens (digest, session_id, expires_at) VALUES (:digest, :session, :expires_at)",
        digest = tokens::digest(&refresh_token),
        session,
        expires_at = Timestamp::now().plus_seconds(REFRESH_TOKEN_SECONDS).0
    ))
    .await?;
    let access_token = identity.signer.sign(user.id, session, user.platform_admin)?;
    Ok(Session { user, access_token, expires_in: tokens::ACCESS_SECONDS, refresh_token })
}

/// The id of a session, from its access token.
pub fn id_of(identity: &IdentityService, session: &Session) -> Result<Uuid, Problem> {
    identity.signer.verify(&session.access_token).map(|claims| claims.sid).ok_or_else(Problem::internal)
}

pub async fn refresh_token(identity: Arc<IdentityService>, call: Call<RefreshToken>) -> Result<Session, Problem> {
    let refused = || Problem::unauthenticated("The refresh token is not valid.").hint("Sign in again with `capsule login`.");
    let digest = tokens::digest(&call.message.refresh_token);
    let now = Timestamp::now();
    let tx = identity.store.begin().await?;
    let (grant, row) = Authenticated::by_refresh_token(&tx, &digest).await?.ok_or_else(refused)?;
    if row.used_at.is_some() {
        tracing::warn!(user = %grant.user(), session = %row.session_id, "a refresh token was used twice; ending the session");
        end(&tx, &call.context, &grant, row.session_id).await?;
        tx.commit().await?;
        return Err(refused());
    }
    if row.revoked_at.is_some() || row.expires_at <= now.0 {
        return Err(refused());
    }
    tx.run(unscoped!(
        "tokens belong to a session",
        "UPDATE refresh_tokens SET used_at = :used_at WHERE digest = :digest",
        used_at = now.0,
        digest
    ))
    .await?;
    tx.run(user_scoped!(
        &grant,
        "UPDATE sessions SET last_used_at = :last_used_at, expires_at = :expires_at WHERE id = :id AND user_id = :user",
        last_used_at = now.0,
        expires_at = now.plus_seconds(REFRESH_TOKEN_SECONDS).0,
        id = row.session_id
    ))
    .await?;
    let user = profile::by_id(&tx, &grant).await?.ok_or_else(refused)?;
    let session = issue_tokens(&identity, &tx, row.session_id, user).await?;
    tx.commit().await?;
    Ok(session)
}

/// Ends a session. Its access tokens are no longer accepted.
async fn end(tx: &Transaction<'_>, context: &Context, scope: &impl UserScope, session: Uuid) -> Result<(), Problem> {
    let now = Timestamp::now();
    let ended = tx
        .run(user_scoped!(
            scope,
            "UPDATE sessions SET revoked_at = :revoked_at WHERE id = :id AND user_id = :user AND revoked_at IS NULL",
            revoked_at = now.0,
            id = session
        ))
        .await?;
    if ended > 0 {
        let until = now.plus_seconds(tokens::ACCESS_SECONDS);
        emit(tx, context, &SessionRevoked { user_id: scope.user(), session_id: session, until }).await?;
    }
    Ok(())
}

/// Ends every session of a user.
pub async fn end_all(tx: &Transaction<'_>, context: &Context, scope: &impl UserScope) -> Result<(), Problem> {
    end_others(tx, context, scope, Uuid::nil()).await
}

/// Ends every session of a user except one.
pub async fn end_others(tx: &Transaction<'_>, context: &Context, scope: &impl UserScope, except: Uuid) -> Result<(), Problem> {
    let live =
        user_scoped!(scope, "SELECT id, created_at, last_used_at FROM sessions WHERE user_id = :user AND revoked_at IS NULL");
    for session in tx.read().all::<SessionRow>(live).await?.into_iter().filter(|session| session.id != except) {
        end(tx, context, scope, session.id).await?;
    }
    Ok(())
}

/// Deletes sessions that ended long before `now`, with their tokens.
pub async fn purge(identity: &IdentityService, now: Timestamp) -> Result<(), Problem> {
    let old = now.plus_seconds(-ENDED_SESSION_RETENTION_SECONDS).0;
    let tx = identity.store.begin().await?;
    tx.run(unscoped!(
        "tokens belong to a session",
        "DELETE FROM refresh_tokens WHERE session_id IN (SELECT id FROM sessions WHERE expires_at < :old OR revoked_at < :old)",
        old
    ))
    .await?;
    // Used tokens are kept while they would have been valid, to detect reuse.
    tx.run(unscoped!("tokens belong to a session", "DELETE FROM refresh_tokens WHERE expires_at < :old", old)).await?;
    tx.run(unscoped!("sessions belong to a user", "DELETE FROM sessions WHERE expires_at < :old OR revoked_at < :old", old))
        .await?;
    tx.commit().await
}

/// Deletes all sessions of a user, with their tokens.
pub async fn delete_all(tx: &Transaction<'_>, scope: &impl UserScope) -> Result<(), Problem> {
    tx.run(user_scoped!(scope, "DELETE FROM refresh_tokens WHERE session_id IN (SELECT id FROM sessions WHERE user_id = :user)"))
        .await?;
    tx.run(user_scoped!(scope, "DELETE FROM sessions WHERE user_id = :user")).await?;
    Ok(())
}

pub async fn logout(identity: Arc<IdentityService>, call: Call<Logout>) -> Result<Empty, Problem> {
    let tx = identity.store.begin().await?;
    end(&tx, &call.context, &call.grant, call.grant.session()).await?;
    tx.commit().await?;
    Ok(Empty {})
}

pub async fn revoke_session(identity: Arc<IdentityService>, call: Call<RevokeSession>) -> Result<Empty, Problem> {
    let own = live(&identity, &call.grant).await?;
    if own.iter().all(|session| session.id != call.message.id) {
        return Err(Problem::not_found("session"));
    }
    let tx = identity.store.begin().await?;
    end(&tx, &call.context, &call.grant, call.message.id).await?;
    tx.commit().await?;
    Ok(Empty {})
}

pub async fn revoke_sessions(identity: Arc<IdentityService>, call: Call<RevokeSessions>) -> Result<Empty, Problem> {
    let own = live(&identity, &call.grant).await?;
    let tx = identity.store.begin().await?;
    for session in own {
        end(&tx, &call.context, &call.grant, session.id).await?;
    }
    tx.commit().await?;
    Ok(Empty {})
}

#[derive(FromRow)]
struct SessionRow {
    id: Uuid,
    created_at: i64,
    last_used_at: i64,
}

async fn live(identity: &IdentityService, scope: &impl UserScope) -> Result<Vec<SessionRow>, Problem> {
    let rows = user_scoped!(
        scope,
        "SELECT id, created_at, last_used_at FROM sessions \
         WHERE user_id = :user AND revoked_at IS NULL AND expires_at > :now ORDER BY last_used_at DESC",
        now = Timestamp::now().0
    );
    identity.store.read().all(rows).await
}

pub async fn list_sessions(identity: Arc<IdentityService>, call: Call<ListSessions>) -> Result<Page<SessionInfo>, Problem> {
    let query = PageQuery::of(&call.message)?;
    let rows = page!(
        query,
        unscoped "sessions belong to a user",
        "SELECT id, created_at, last_used_at FROM sessions WHERE user_id = :user AND revoked_at IS NULL AND expires_at > :now",
        "id" uuid,
        ["last_used_at" => "last_used_at" integer, "created_at" => "created_at" integer],
        user = call.grant.user(),
        now = Timestamp::now().0
    );
    let rows = identity.store.read().all::<SessionRow>(rows?).await?;
    let key = |row: &SessionRow| if query.sort() == "created_at" { row.created_at } else { row.last_used_at };
    Ok(query.page(rows, |row| (key(row).into(), row.id)).map(|row| SessionInfo {
        id: row.id,
        created_at: Timestamp(row.created_at),
        last_used_at: Timestamp(row.last_used_at),
        current: row.id == call.grant.session(),
    }))
}

pub async fn validate_token(identity: Arc<IdentityService>, call: Call<ValidateToken>) -> Result<TokenStatus, Problem> {
    let inactive = TokenStatus { active: false, user_id: None, session_id: None, platform_admin: false, expires_at: None };
    let Some(claims) = identity.signer.verify(&call.message.token) else {
        return Ok(inactive);
    };
    // Read from the database, as the claims may be outdated.
    let admin = unscoped!(
        "sessions belong to a user",
        "SELECT u.platform_admin FROM sessions s JOIN users u ON u.id = s.user_id \
         WHERE s.id = :id AND s.user_id = :user_id AND s.revoked_at IS NULL AND u.closed_at IS NULL",
        id = claims.sid,
        user_id = claims.sub
    );
    let Some(platform_admin) = identity.store.read().value::<bool>(admin).await? else {
        return Ok(inactive);
    };
    Ok(TokenStatus {
        active: true,
        user_id: Some(claims.sub),
        session_id: Some(claims.sid),
        platform_admin,
        expires_at: Some(Timestamp(claims.exp * 1_000_000)),
    })
}

#[derive(FromRow)]
struct LiveRow {
    platform_admin: bool,
}

pub async fn check_sessions(identity: Arc<IdentityService>, call: Call<CheckSessions>) -> Result<LiveSessions, Problem> {
    let (mut live, now) = (LiveSessions::default(), Timestamp::now().0);
    for id in call.message.ids {
        let row = unscoped!(
            "sessions belong to a user",
            "SELECT u.platform_admin FROM sessions s JOIN users u ON u.id = s.user_id \
             WHERE s.id = :id AND s.revoked_at IS NULL AND s.expires_at > :now AND u.closed_at IS NULL",
            id,
            now
        );
        if let Some(row) = identity.store.read().first::<LiveRow>(row).await? {
            live.ids.push(id);
            live.platform_admins.extend(row.platform_admin.then_some(id));
        }
    }
    Ok(live)
}
