//! Tests of invitations and of leaving, with a real database.

use std::sync::Arc;

use capsule_bus::{Bus, Context, Principal};
use capsule_contracts::identity::User;
use capsule_contracts::organization::{
    AcceptInvitation, ChangeRole, CountMemberships, CreateOrganization, LeaveOrganizations, Organization, RemoveMember,
};
use capsule_contracts::{Message, Problem, Role, Timestamp, Uuid, new_id};
use capsule_store::{Databases, Keyring, Scope, unscoped};

use crate::{Limits, OrganizationService, members, personal};

/// Access to an organization in tests.
pub struct TestScope(pub Uuid);

impl Scope for TestScope {
    fn organization(&self) -> Uuid {
        self.0
    }
}

/// The service on its own bus, and an organization with two owners.
struct World {
    _folder: tempfile::TempDir,
    bus: Bus,
    service: Arc<OrganizationService>,
    owner: Uuid,
    other: Uuid,
    organization: Uuid,
}

impl World {
    async fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let databases = Databases::Embedded(folder.path().into());
        let keyring = Keyring::open(&folder.path().join("key")).expect("a key");
        let bus = Bus::new();
        let service = crate::start(&databases, &bus, keyring, Limits::default()).await.expect("starts");
        let (owner, other, organization) = (new_id(), new_id(), Uuid::nil());
        let mut world = Self { _folder: folder, bus, service, owner, other, organization };
        let made = world.ask(owner, &CreateOrganization { name: "Team".into(), slug: None }).await.expect("made");
        world.organization = made.id;
        let tx = world.service.store.begin().await.expect("begins");
        members::set(&tx, &Context::background("test"), made.id, other, Some(Role::Owner)).await.expect("a member");
        tx.commit().await.expect("committed");
        world
    }

    async fn ask<M: Message>(&self, id: Uuid, message: &M) -> Result<M::Reply, Problem> {
        let principal = Principal::User { id, session: id, platform_admin: false };
        self.bus.request(&Context::new("test".into(), principal), message).await
    }

    /// Invites a user and returns the id of the invitation.
    async fn invite(&self, by: Uuid, whom: Uuid, role: Role) -> Uuid {
        let (id, now) = (new_id(), Timestamp::now());
        let tx = self.service.store.begin().await.expect("begins");
        tx.run(unscoped!(
            "a test",
            "INSERT INTO invitations (id, organization_id, user_id, role, invited_by, created_at, expires_at) \
             VALUES (:id, :organization_id, :whom, :role, :by, :created_at, :expires_at)",
            id,
            organization_id = self.organization,
            whom,
            role = role.name(),
            by,
            created_at = now.0,
            expires_at = now.plus_seconds(60).0
        ))
        .await
        .expect("invited");
        tx.commit().await.expect("committed");
        id
    }

    async fn accept(&self, whom: Uuid, id: Uuid) -> Result<Organization, Problem> {
        self.ask(whom, &AcceptInvitation { id }).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_member_cannot_return_by_their_own_invitation() {
    let world = World::new().await;
    let alt = new_id();
    let before = world.invite(world.other, alt, Role::Owner).await;
    world.ask(world.owner, &RemoveMember { id: world.organization, user_id: world.other }).await.expect("removed");
    assert_eq!(world.accept(alt, before).await.expect_err("void").code, "not_found");
    // An invitation that was inserted after the removal.
    let late = world.invite(world.other, alt, Role::Owner).await;
    let void = world.accept(alt, late).await.expect_err("void");
    assert!(void.code == "conflict" && void.detail.contains("void"), "{void}");
    let bob = new_id();
    let sound = world.invite(world.owner, bob, Role::Owner).await;
    assert_eq!(world.accept(bob, sound).await.expect("a member").role, Role::Owner);
}

#[tokio::test(flavor = "multi_thread")]
async fn invitations_of_owners_are_revoked_when_the_inviter_loses_the_owner_role() {
    let world = World::new().await;
    let (carl, dora) = (new_id(), new_id());
    let as_owner = world.invite(world.other, carl, Role::Owner).await;
    let as_viewer = world.invite(world.other, dora, Role::Viewer).await;
    let change = ChangeRole { id: world.organization, user_id: world.other, role: Role::Admin };
    world.ask(world.owner, &change).await.expect("changed");
    assert_eq!(world.accept(carl, as_owner).await.expect_err("void").code, "not_found");
    world.accept(dora, as_viewer).await.expect("an admin invites viewers");
    // Changing the role of a pending member makes the caller the inviter.
    let erin = new_id();
    let raised = world.invite(world.other, erin, Role::Viewer).await;
    let change = ChangeRole { id: world.organization, user_id: erin, role: Role::Owner };
    world.ask(world.owner, &change).await.expect("changed");
    assert_eq!(world.accept(erin, raised).await.expect("a member").role, Role::Owner);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_created_for_an_erased_user() {
    let world = World::new().await;
    let service = Context::background("identity");
    let user = User {
        id: new_id(),
        email: "ada@example.com".into(),
        name: "Ada".into(),
        platform_admin: false,
        created_at: Timestamp::now(),
    };
    world.bus.request(&service, &LeaveOrganizations { user_id: user.id }).await.expect("left");
    let tx = world.service.store.begin().await.expect("begins");
    personal::create_if_missing(&tx, &user).await.expect("nothing to do");
    tx.commit().await.expect("committed");
    let made = world.ask(user.id, &CreateOrganization { name: "Mine".into(), slug: None }).await;
    assert_eq!(made.expect_err("refused").code, "conflict");
    let invitation = world.invite(world.owner, user.id, Role::Viewer).await;
    assert_eq!(world.accept(user.id, invitation).await.expect_err("refused").code, "conflict");
    let left = world.bus.request(&service, &CountMemberships { user_id: user.id }).await.expect("counted");
    assert_eq!(left.count, 0);
}
