//! The dispatcher's decision for every access rule and every kind of sender.

use std::sync::Arc;

use capsule_bus::{Bus, Context, Principal, Router, Service};
use capsule_contracts::access::EnvironmentKind;
use capsule_contracts::project::Location;
use capsule_contracts::{Empty, Message, Permission, Permissions, Problem, Role, Target, Uuid, message};
use capsule_store::{Databases, Keyring, Store};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

macro_rules! messages {
    ($($name:ident),+) => {$(
        #[derive(Debug, Serialize, Deserialize, ToSchema)]
        struct $name {
            id: Uuid,
        }
    )+};
}

messages!(Open, Signed, Administer, Join, Inside, View, Manage, Deploy, ManageAndDeploy);
message!(Open, query "test.open", Public => Empty);
message!(Signed, query "test.signed", SignedIn => Empty);
message!(Administer, query "test.administer", PlatformAdmin => Empty);
message!(Join, query "test.join", Invited at Invitation(id) => Empty);
message!(Inside, query "test.inside", Internal => Empty);
message!(View, query "test.view", Granted(OrgView) at Organization(id) => Empty);
message!(Manage, query "test.manage", Granted(OrgManage) at Organization(id) => Empty);
message!(Deploy, query "test.deploy", GrantedDeploy at Environment(id) => Empty);
message!(ManageAndDeploy, query "test.manage_and_deploy", GrantedAndDeploy(ServiceManage) at Environment(id) => Empty);

const ORGANIZATION: Uuid = Uuid::from_u128(1);
const OTHER_ORGANIZATION: Uuid = Uuid::from_u128(2);
const STRANGER: Uuid = Uuid::from_u128(99);
const INVITATION: Uuid = Uuid::from_u128(50);

const KINDS: [EnvironmentKind; 5] = [
    EnvironmentKind::Development,
    EnvironmentKind::Staging,
    EnvironmentKind::Production,
    EnvironmentKind::Preview,
    EnvironmentKind::Custom,
];

fn member(role: Role) -> Uuid {
    Uuid::from_u128(10 + role as u128)
}

fn environment(kind: EnvironmentKind) -> Uuid {
    Uuid::from_u128(20 + kind as u128)
}

/// A service that owns an organization with a member of each role and an environment of each kind.
struct Owner {
    store: Arc<Store>,
    bus: Bus,
}

impl Service for Owner {
    fn store(&self) -> &Arc<Store> {
        &self.store
    }

    fn bus(&self) -> &Bus {
        &self.bus
    }

    async fn locate(&self, target: &Target) -> Result<Option<Location>, Problem> {
        let own = Location::in_organization(ORGANIZATION);
        Ok(match target {
            Target::Organization(id) => Some(Location::in_organization(*id)),
            Target::Environment(id) => {
                let kind = KINDS.into_iter().find(|kind| environment(*kind) == *id);
                kind.map(|kind| Location { environment: Some(kind), ..own })
            }
            _ => None,
        })
    }

    async fn invited_to(&self, invitation: Uuid, user: Uuid) -> Result<Option<Uuid>, Problem> {
        Ok((invitation == INVITATION && user == STRANGER).then_some(ORGANIZATION))
    }

    /// The owner is a member of both organizations.
    async fn cached_role(&self, organization: Uuid, user: Uuid) -> Result<Option<Role>, Problem> {
        let role = Role::ALL.into_iter().find(|role| member(*role) == user);
        Ok(role.filter(|role| organization == ORGANIZATION || *role == Role::Owner))
    }

    async fn fetch_role(&self, organization: Uuid, user: Uuid) -> Result<Option<Role>, Problem> {
        self.cached_role(organization, user).await
    }
}

async fn start(directory: &std::path::Path) -> Bus {
    let keyring = Keyring::open(&directory.join("key")).expect("a key");
    let databases = Databases::Embedded(directory.into());
    let store = Store::open(&databases, "test", keyring, &[("bus", capsule_bus::MIGRATIONS)]).await.expect("opens");
    let bus = Bus::new();
    let _ = Router::new(Arc::new(Owner { store: Arc::new(store), bus: bus.clone() }))
        .handle::<Open, _, _>(|_, _| async { Ok(Empty {}) })
        .handle::<Signed, _, _>(|_, _| async { Ok(Empty {}) })
        .handle::<Administer, _, _>(|_, _| async { Ok(Empty {}) })
        .handle::<Join, _, _>(|_, _| async { Ok(Empty {}) })
        .handle::<Inside, _, _>(|_, _| async { Ok(Empty {}) })
        .handle::<View, _, _>(|_, _| async { Ok(Empty {}) })
        .handle::<Manage, _, _>(|_, _| async { Ok(Empty {}) })
        .handle::<Deploy, _, _>(|_, _| async { Ok(Empty {}) })
        .handle::<ManageAndDeploy, _, _>(|_, _| async { Ok(Empty {}) });
    bus
}

/// The status of the reply.
async fn send<M: Message>(bus: &Bus, principal: Principal, message: M) -> u16 {
    match bus.request(&Context::new("test".into(), principal), &message).await {
        Ok(_) => 200,
        Err(problem) => problem.status,
    }
}

fn user(id: Uuid) -> Principal {
    Principal::User { id, session: Uuid::nil(), platform_admin: false }
}

fn key(owner: Uuid, scopes: Permissions) -> Principal {
    Principal::ApiKey { id: Uuid::from_u128(7), owner, organization: ORGANIZATION, scopes }
}

fn all() -> Permissions {
    Permission::ALL.into_iter().collect()
}

#[tokio::test]
async fn rules_without_an_organization_admit_the_kinds_of_sender_that_they_name() {
    let directory = tempfile::tempdir().expect("a folder");
    let bus = start(directory.path()).await;
    let administrator = Principal::User { id: STRANGER, session: Uuid::nil(), platform_admin: true };
    let id = INVITATION;
    for (principal, open, signed, administer, join, inside) in [
        (Principal::Anonymous, 200, 401, 401, 401, 404),
        (user(member(Role::Owner)), 200, 200, 403, 404, 404),
        (user(STRANGER), 200, 200, 403, 200, 404),
        (administrator, 200, 200, 200, 200, 404),
        (key(member(Role::Owner), all()), 200, 403, 403, 403, 404),
        (key(STRANGER, all()), 200, 403, 403, 403, 404),
        (Principal::Service("deploy"), 200, 401, 401, 401, 200),
    ] {
        assert_eq!(send(&bus, principal, Open { id }).await, open, "public, {principal:?}");
        assert_eq!(send(&bus, principal, Signed { id }).await, signed, "signed in, {principal:?}");
        assert_eq!(send(&bus, principal, Administer { id }).await, administer, "administrator, {principal:?}");
        assert_eq!(send(&bus, principal, Join { id }).await, join, "invited, {principal:?}");
        assert_eq!(send(&bus, principal, Inside { id }).await, inside, "internal, {principal:?}");
    }
    assert_eq!(send(&bus, user(STRANGER), Join { id: Uuid::nil() }).await, 404, "no such invitation");
}

#[tokio::test]
async fn a_member_needs_the_permission_and_a_key_needs_it_in_its_scopes_too() {
    let directory = tempfile::tempdir().expect("a folder");
    let bus = start(directory.path()).await;
    let id = ORGANIZATION;
    for role in Role::ALL {
        for (scopes, view, manage) in [
            (all(), true, true),
            ([Permission::OrgView].into_iter().collect(), true, false),
            (Permissions::default(), false, false),
        ] {
            let status = |permission, in_scope: bool| if role.allows(permission) && in_scope { 200 } else { 403 };
            let own = member(role);
            assert_eq!(send(&bus, user(own), Manage { id }).await, status(Permission::OrgManage, true), "{role:?}");
            assert_eq!(send(&bus, key(own, scopes), View { id }).await, status(Permission::OrgView, view), "{role:?} {scopes:?}");
            assert_eq!(send(&bus, key(own, scopes), Manage { id }).await, status(Permission::OrgManage, manage), "{role:?}");
        }
    }
    for principal in [user(STRANGER), key(STRANGER, all())] {
        assert_eq!(send(&bus, principal, View { id }).await, 404, "not a member: {principal:?}");
    }
    for principal in [Principal::Anonymous, Principal::Service("deploy")] {
        assert_eq!(send(&bus, principal, View { id }).await, 401, "{principal:?}");
    }
    let owner = member(Role::Owner);
    assert_eq!(send(&bus, user(owner), View { id: OTHER_ORGANIZATION }).await, 200, "the owner is a member there");
    assert_eq!(send(&bus, key(owner, all()), View { id: OTHER_ORGANIZATION }).await, 404, "the key is of another organization");
}

#[tokio::test]
async fn deployments_need_the_permission_of_the_kind_of_environment() {
    let directory = tempfile::tempdir().expect("a folder");
    let bus = start(directory.path()).await;
    for kind in KINDS {
        let (id, required) = (environment(kind), kind.deploy_permission());
        let only: Permissions = [required].into_iter().collect();
        let both: Permissions = [required, Permission::ServiceManage].into_iter().collect();
        for role in Role::ALL {
            let own = member(role);
            let deploys = if role.allows(required) { 200 } else { 403 };
            let manages = if role.allows(required) && role.allows(Permission::ServiceManage) { 200 } else { 403 };
            for (sender, deploy, manage) in
                [(user(own), deploys, manages), (key(own, only), deploys, 403), (key(own, both), deploys, manages)]
            {
                assert_eq!(send(&bus, sender, Deploy { id }).await, deploy, "{kind:?} {sender:?}");
                assert_eq!(send(&bus, sender, ManageAndDeploy { id }).await, manage, "{kind:?} {sender:?}");
            }
            assert_eq!(send(&bus, key(own, Permissions::default()), Deploy { id }).await, 403, "{kind:?} {role:?}");
        }
    }
}
