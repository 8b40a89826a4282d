//! Tests of invitations and of concurrent actions, with a real database.

use std::path::Path;
use std::sync::Arc;

use capsule_bus::{Bus, Context, Principal};
use capsule_cache::Cache;
use capsule_contracts::identity::{
    ChangePassword, INVITATION_SECONDS, InviteUser, InvitedUser, Login, Register, Registration, Session,
};
use capsule_contracts::{Problem, Timestamp, Uuid, new_id};
use capsule_store::{Databases, Keyring, Store, unscoped};

use crate::{IdentityService, MIGRATIONS, NAME, invitations, sessions};

const PASSWORD: &str = "a long enough one 1";

/// The service on its own bus, with one account.
struct World {
    identity: Arc<IdentityService>,
    bus: Bus,
}

impl World {
    async fn new(folder: &Path) -> Self {
        let databases = Databases::Embedded(folder.into());
        let keyring = Keyring::open(&folder.join("key")).expect("a key");
        let bus = Bus::new();
        let started = crate::start(&databases, &bus, Cache::none(), keyring, "set-up".into(), Registration::Invited).await;
        let world = Self { identity: started.expect("starts"), bus };
        world.register("ada@example.com", Some("set-up".into()), None).await.expect("the first account");
        world
    }

    async fn register(&self, email: &str, setup: Option<String>, registration: Option<String>) -> Result<Session, Problem> {
        let register = Register {
            email: email.into(),
            password: PASSWORD.into(),
            name: None,
            setup_token: setup,
            registration_token: registration,
        };
        self.bus.request(&Context::new("test".into(), Principal::Anonymous), &register).await
    }

    async fn invite(&self, email: &str, organization_id: Uuid) -> InvitedUser {
        let invite = InviteUser { email: email.into(), organization_id };
        self.bus.request(&Context::background("organization"), &invite).await.expect("invited")
    }

    /// Signs the first account in.
    async fn sign_in(&self) -> Context {
        let login = Login { email: "ada@example.com".into(), password: PASSWORD.into() };
        let anonymous = Context::new("test".into(), Principal::Anonymous);
        let session = self.bus.request(&anonymous, &login).await.expect("signed in");
        let id = sessions::id_of(&self.identity, &session).expect("a session");
        Context::new("test".into(), Principal::User { id: session.user.id, session: id, platform_admin: true })
    }

    async fn change_password(&self, by: &Context, new: &str) -> Result<(), Problem> {
        let change = ChangePassword { password: Some(PASSWORD.into()), new_password: new.into() };
        self.bus.request(by, &change).await.map(|_| ())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_token_is_valid_only_for_the_invitation_of_its_organization() {
    let folder = tempfile::tempdir().expect("a folder");
    let world = World::new(folder.path()).await;
    let (corp, mallory) = (new_id(), new_id());
    let wanted = world.invite("director@example.com", corp).await;
    let other = world.invite("director@example.com", mallory).await;
    assert_ne!(wanted.user_id, other.user_id);
    assert_eq!(world.invite("Director@example.com", corp).await.user_id, wanted.user_id, "the same organization, once more");
    let session = world.register("director@example.com", None, other.registration_token).await.expect("registered");
    assert_eq!(session.user.id, other.user_id);
    // Invited again, they have an account; the other id is not used.
    let again = world.invite("director@example.com", corp).await;
    assert_eq!((again.user_id, again.registration_token), (other.user_id, None));
    assert!(invitations::find(&world.identity, wanted.user_id).await.expect("read").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn expired_invitations_are_deleted() {
    let folder = tempfile::tempdir().expect("a folder");
    let world = World::new(folder.path()).await;
    let invited = world.invite("bob@example.com", new_id()).await.user_id;
    let now = Timestamp::now();
    invitations::purge(&world.identity, now).await.expect("purged");
    assert!(invitations::find(&world.identity, invited).await.expect("read").is_some());
    invitations::purge(&world.identity, now.plus_seconds(INVITATION_SECONDS + 60)).await.expect("purged");
    assert!(invitations::find(&world.identity, invited).await.expect("read").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_two_concurrent_password_changes_succeeds() {
    let folder = tempfile::tempdir().expect("a folder");
    let world = World::new(folder.path()).await;
    let (one, other) = (world.sign_in().await, world.sign_in().await);
    let (first, second) =
        tokio::join!(world.change_password(&one, "the first new one 1"), world.change_password(&other, "the second new one 2"));
    assert!(first.is_ok() != second.is_ok(), "{first:?} {second:?}");
}

#[tokio::test]
async fn the_migration_drops_ids_reserved_by_several_organizations() {
    let folder = tempfile::tempdir().expect("a folder");
    let databases = Databases::Embedded(folder.path().into());
    let keyring = Keyring::open(&folder.path().join("key")).expect("a key");
    let before = [MIGRATIONS[0], (NAME, &MIGRATIONS[1].1[..3])];
    let store = Store::open(&databases, NAME, keyring.clone(), &before).await.expect("opens");
    let (own, shared) = (new_id(), new_id());
    let tx = store.begin().await.expect("begins");
    for (id, email) in [(own, "ada@example.com"), (shared, "bob@example.com")] {
        let row =
            unscoped!("a test", "INSERT INTO invited_users (user_id, email, created_at) VALUES (:id, :email, 0)", id, email);
        tx.run(row).await.expect("inserted");
    }
    for (digest, id) in [("a", own), ("b", shared), ("c", shared)] {
        let row = unscoped!(
            "a test",
            "INSERT INTO registration_tokens (digest, user_id, organization_id, expires_at) \
             VALUES (:digest, :id, :organization_id, 0)",
            digest,
            id,
            organization_id = new_id()
        );
        tx.run(row).await.expect("inserted");
    }
    tx.commit().await.expect("committed");
    drop(store);
    let store = Store::open(&databases, NAME, keyring, MIGRATIONS).await.expect("opens");
    let kept = unscoped!(
        "a test",
        "SELECT i.user_id FROM invited_users i JOIN registration_tokens t \
         ON t.user_id = i.user_id AND t.organization_id = i.organization_id"
    );
    assert_eq!(store.read().value::<Uuid>(kept).await.expect("read"), Some(own));
    let tx = store.begin().await.expect("begins");
    assert_eq!(tx.run(unscoped!("a test", "DELETE FROM invited_users")).await.expect("deleted"), 1);
    assert!(!tx.read().exists(unscoped!("a test", "SELECT 1 FROM registration_tokens")).await.expect("read"));
}
