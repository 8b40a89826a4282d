//! Tests of quotas with the organization and project services in this process, on SQLite and PostgreSQL.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use capsule_bus::{Bus, Context, Principal};
use capsule_cache::Cache;
use capsule_contracts::access::EnvironmentKind;
use capsule_contracts::identity::{Register, Registration};
use capsule_contracts::organization::{CreateOrganization, DeleteOrganization, Organization};
use capsule_contracts::project::{
    ChangeVariables, CreateEnvironment, CreateProject, CreateService, DeleteProject, ListEnvironments, ListProjects,
    ListServices, Project, PutSecret, ReplaceVariables,
};
use capsule_contracts::quotas::{GetQuotas, InspectOrganizations, InspectQuotas, Quotas, SetQuotas};
use capsule_contracts::{Message, Problem, Uuid};
use capsule_organization::Limits;
use capsule_store::{Databases, Keyring};
use capsule_tests::Postgres;

/// Two services on a bus, a user with an organization, and an administrator of the installation.
struct World {
    bus: Bus,
    user: Context,
    administrator: Context,
    organization: Organization,
}

fn signed_in(platform_admin: bool) -> Context {
    let id = capsule_contracts::new_id();
    Context::new("test".into(), Principal::User { id, session: id, platform_admin })
}

impl World {
    async fn new(folder: &Path, databases: &Databases, quotas: &[(&str, u32)]) -> Self {
        let keyring = Keyring::open(&folder.join("key")).expect("a key");
        let bus = Bus::new();
        let own = Quotas(quotas.iter().map(|(name, limit)| ((*name).to_owned(), *limit)).collect());
        let limits = Limits { quotas: Quotas::defaults().overridden_by(&own), organizations_per_user: 3 };
        capsule_organization::start(databases, &bus, keyring.clone(), limits).await.expect("starts");
        capsule_project::start(databases, &bus, keyring).await.expect("starts");
        bus.start_event_delivery();
        let user = signed_in(false);
        let make = CreateOrganization { name: "Acme".into(), slug: None };
        let organization = bus.request(&user, &make).await.expect("an organization");
        Self { bus, user, administrator: signed_in(true), organization }
    }

    async fn request<M: Message>(&self, message: &M) -> Result<M::Reply, Problem> {
        // A new deadline for each request.
        self.bus.request(&Context::new("test".into(), self.user.principal), message).await
    }

    async fn project(&self, name: &str) -> Result<Project, Problem> {
        self.request(&CreateProject { organization_id: self.organization.id, name: name.into(), slug: None }).await
    }

    /// Sends messages in parallel and returns how many succeeded. The others must have exceeded a quota.
    async fn race<M: Message>(self: &Arc<Self>, messages: impl IntoIterator<Item = M>) -> usize {
        let sent = messages.into_iter().map(|message| {
            let world = self.clone();
            tokio::spawn(async move { world.request(&message).await.map(|_| ()) })
        });
        let mut succeeded = 0;
        for outcome in sent.collect::<Vec<_>>() {
            match outcome.await.expect("no panic") {
                Ok(()) => succeeded += 1,
                Err(problem) => assert_eq!((problem.code.as_str(), problem.status), ("quota_exceeded", 403), "{problem}"),
            }
        }
        succeeded
    }

    async fn set_quotas(&self, quotas: &[(&str, u32)]) {
        let quotas = quotas.iter().map(|(name, limit)| ((*name).to_owned(), *limit)).collect();
        self.bus.request(&self.administrator, &SetQuotas { id: self.organization.id, quotas }).await.expect("set");
    }
}

async fn embedded(quotas: &[(&str, u32)]) -> (tempfile::TempDir, Arc<World>) {
    let folder = tempfile::tempdir().expect("a folder");
    let world = World::new(folder.path(), &Databases::Embedded(folder.path().into()), quotas).await;
    (folder, Arc::new(world))
}

/// Repeats `attempt` until it is refused: a lowered quota applies as soon as its event has arrived.
async fn refused_soon(mut attempt: impl AsyncFnMut() -> Result<(), Problem>) -> Problem {
    for _ in 0..500 {
        if let Err(problem) = attempt().await {
            return problem;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("it is still allowed");
}

/// Creates projects, services, environments and organizations in parallel.
async fn races(folder: &Path, databases: &Databases) {
    let quotas = [("projects", 3), ("services", 4), ("environments_per_project", 2)];
    let world = Arc::new(World::new(folder, databases, &quotas).await);
    let organization_id = world.organization.id;
    let project = |n: usize| CreateProject { organization_id, name: format!("P{n}"), slug: None };
    assert_eq!(world.race((0..12).map(project)).await, 3);
    let page = world.request(&ListProjects { organization_id, ..ListProjects::default() }).await.expect("listed");
    let (one, two) = (page.items[0].id, page.items[1].id);
    // In two projects: services count across the organization.
    let service = |n: usize| CreateService { project_id: if n.is_multiple_of(2) { one } else { two }, name: format!("s{n}") };
    assert_eq!(world.race((0..12).map(service)).await, 4);
    // A project has one environment from the start.
    let environment = |n: usize| CreateEnvironment { id: one, name: format!("e{n}"), kind: EnvironmentKind::Staging };
    assert_eq!(world.race((0..8).map(environment)).await, 1);
    assert_eq!(world.request(&ListEnvironments { id: one, ..ListEnvironments::default() }).await.expect("listed").items.len(), 2);
    // The test user already has one.
    assert_eq!(world.race((0..8).map(|n| CreateOrganization { name: format!("O{n}"), slug: None })).await, 2);

    // Administrators find organizations, set quotas and see usage.
    let ask = InspectOrganizations { slug: Some(world.organization.slug.clone()), ..InspectOrganizations::default() };
    assert_eq!(world.bus.request(&world.administrator, &ask).await.expect("found").items.len(), 1);
    world.set_quotas(&[("projects", 3), ("services", 4), ("members", 5)]).await;
    let shown = world.bus.request(&world.administrator, &InspectQuotas { id: organization_id }).await.expect("shown");
    let shown = |name: &str| shown.items.iter().find(|quota| quota.name == name).map(|quota| (quota.used, quota.limit));
    assert_eq!(shown("environments_per_project"), Some((Some(2), 2)));
    assert_eq!((shown("services"), shown("members")), (Some((Some(4), 4)), Some((Some(1), 5))));
    let environments = world.request(&ListEnvironments { id: one, ..ListEnvironments::default() }).await.expect("listed");
    let secret = PutSecret { id: environments.items[0].id, name: "S".into(), value: "x".into() };
    world.request(&secret).await.expect("kept");

    // Deleted projects no longer count.
    world.request(&DeleteProject { id: two }).await.expect("deleted");
    assert_eq!(world.race((20..24).map(project)).await, 1);
    let left = world.request(&ListServices { project_id: one, ..ListServices::default() }).await.expect("listed").items.len();
    assert_eq!(world.race((20..28).map(|n| CreateService { project_id: one, name: format!("s{n}") })).await, 4 - left);
}

#[tokio::test(flavor = "multi_thread")]
async fn parallel_creations_never_exceed_a_quota() {
    let folder = tempfile::tempdir().expect("a folder");
    races(folder.path(), &Databases::Embedded(folder.path().into())).await;
}

#[test]
fn parallel_creations_never_exceed_a_quota_on_postgresql() {
    // PostgreSQL runs as another user, which needs root.
    if Postgres::programs().is_none() || !rustix::process::geteuid().is_root() {
        eprintln!("skipped: this test needs PostgreSQL and root");
        return;
    }
    let postgres = Postgres::start();
    let folder = tempfile::tempdir().expect("a folder");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let databases = Databases::Postgres { url: postgres.url(), connections: 8 };
    runtime.block_on(races(folder.path(), &databases));
    runtime.shutdown_timeout(Duration::from_secs(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lowered_quota_refuses_new_use_and_keeps_existing_use() {
    let (_folder, world) = embedded(&[]).await;
    for name in ["One", "Two", "Three"] {
        world.project(name).await.expect("made");
    }
    world.set_quotas(&[("projects", 2)]).await;
    // The quota arrives as an event.
    let refused = refused_soon(async || {
        let id = world.project("Another").await?.id;
        world.request(&DeleteProject { id }).await.map(|_| ())
    })
    .await;
    assert_eq!(refused.code, "quota_exceeded");
    assert!(refused.detail.contains("3 of 2 projects") && refused.hint.as_ref().is_some_and(|hint| hint.contains("raise")));
    let shown = world.request(&GetQuotas { id: world.organization.id }).await.expect("shown");
    let projects = shown.items.iter().find(|quota| quota.name == "projects").expect("there");
    assert_eq!((projects.used, projects.limit, projects.own), (Some(3), 2, true));
    let members = shown.items.iter().find(|quota| quota.name == "members").expect("there");
    assert_eq!((members.used, members.limit, members.own), (Some(1), 200, false));
    // No service that counts instances runs in this test.
    assert!(shown.items.iter().any(|quota| quota.name == "instances" && quota.used.is_none()));

    // A quota that is not set has the installation's default again.
    world.set_quotas(&[("services", 1)]).await;
    let mut attempts = 0;
    while let Err(problem) = world.project("Fourth").await {
        attempts += 1;
        assert!(attempts < 500, "{problem}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_administrators_of_the_installation_can_set_quotas_and_find_organizations() {
    let (_folder, world) = embedded(&[]).await;
    let id = world.organization.id;
    let raise = SetQuotas { id, quotas: [("projects".to_owned(), 1_000_000)].into() };
    assert_eq!(world.request(&raise).await.expect_err("refused").code, "forbidden");
    assert_eq!(world.request(&InspectQuotas { id }).await.expect_err("refused").code, "forbidden");
    let all = InspectOrganizations::default();
    assert_eq!(world.request(&all).await.expect_err("refused").code, "forbidden");
    let foreigner = world.bus.request(&signed_in(false), &GetQuotas { id }).await.expect_err("refused");
    assert_eq!(foreigner.code, "not_found");

    let ask = |slug: &str| InspectOrganizations { slug: Some(slug.into()), ..InspectOrganizations::default() };
    let found = world.bus.request(&world.administrator, &ask(&world.organization.slug)).await.expect("found");
    assert_eq!((found.items.len(), found.items[0].id, found.items[0].members), (1, id, 1));
    assert!(world.bus.request(&world.administrator, &ask("nobody")).await.expect("asked").items.is_empty());
    for (name, limit) in [("nonsense", 1), ("concurrent_builds", 0)] {
        let wrong = SetQuotas { id, quotas: [(name.to_owned(), limit)].into() };
        let refused = world.bus.request(&world.administrator, &wrong).await.expect_err("refused");
        assert_eq!((refused.code.as_str(), refused.errors[0].field.as_str()), ("invalid", &*format!("quotas.{name}")));
    }
    let missing = SetQuotas { id: Uuid::from_u128(7), quotas: Default::default() };
    assert_eq!(world.bus.request(&world.administrator, &missing).await.expect_err("refused").code, "not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn variables_and_secrets_share_a_quota_and_can_shrink_above_it() {
    let (_folder, world) = embedded(&[("variables_per_environment", 3), ("variable_kib_per_environment", 2)]).await;
    let project = world.project("One").await.expect("made");
    let environments = world.request(&ListEnvironments { id: project.id, ..ListEnvironments::default() }).await.expect("listed");
    let id = environments.items[0].id;
    let change = |pairs: &[(&str, Option<&str>)]| ChangeVariables {
        id,
        variables: pairs.iter().map(|(name, value)| ((*name).to_owned(), value.map(str::to_owned))).collect(),
    };
    let secret = |name: &str, value: &str| PutSecret { id, name: name.into(), value: value.into() };
    // In parallel.
    let secrets = world.race((0..6).map(|n| secret(&format!("S{n}"), "x"))).await;
    assert_eq!(secrets, 3);
    assert_eq!(world.request(&change(&[("A", Some("1"))])).await.expect_err("refused").code, "quota_exceeded");
    let all = ReplaceVariables { id, variables: [("A".to_owned(), String::new())].into() };
    assert_eq!(world.request(&all).await.expect_err("refused").code, "quota_exceeded");

    // A new value for an existing secret is not another secret, but its bytes count.
    let held = (0..6).map(|n| format!("S{n}"));
    let name = {
        let mut found = None;
        for name in held {
            if found.is_none() && world.request(&secret(&name, "again")).await.is_ok() {
                found = Some(name);
            }
        }
        found.expect("one of them is there")
    };
    world.request(&secret(&name, &"x".repeat(1000))).await.expect("fits");
    let refused = world.request(&secret(&name, &"ä".repeat(1000))).await.expect_err("2000 bytes, and the others");
    assert!(refused.code == "quota_exceeded" && refused.detail.contains("KiB"), "{refused}");
    world.request(&secret(&name, &"x".repeat(1500))).await.expect("fits");
    world.set_quotas(&[("variable_kib_per_environment", 1)]).await;
    // One byte more each time: the same size is always allowed.
    let mut bytes = 1500;
    refused_soon(async || {
        bytes += 1;
        world.request(&secret(&name, &"x".repeat(bytes))).await.map(|_| ())
    })
    .await;
    world.request(&secret(&name, &"x".repeat(1400))).await.expect("less than before, though above the limit");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_organization_counts_until_its_deletion_is_complete() {
    let (folder, mut world) = embedded(&[]).await;
    // Deleting an organization requires the password of an account.
    let keyring = Keyring::open(&folder.path().join("key")).expect("a key");
    let databases = Databases::Embedded(folder.path().into());
    let (cache, registration) = (Cache::none(), Registration::Open);
    capsule_identity::start(&databases, &world.bus, cache, keyring, "set-up".into(), registration).await.expect("starts");
    let register = Register {
        email: "ada@example.com".into(),
        password: "a long enough one 1".into(),
        name: None,
        setup_token: Some("set-up".into()),
        registration_token: None,
    };
    let session = world.bus.request(&Context::new("test".into(), Principal::Anonymous), &register).await.expect("registered");
    let principal = Principal::User { id: session.user.id, session: session.user.id, platform_admin: false };
    let own = Arc::get_mut(&mut world).expect("nobody else has it");
    own.user = Context::new("test".into(), principal);
    own.organization = own.request(&CreateOrganization { name: "One".into(), slug: None }).await.expect("made");
    let make = |name: &str| CreateOrganization { name: name.into(), slug: None };
    let mut last = world.organization.id;
    for name in ["Two", "Three"] {
        last = world.request(&make(name)).await.expect("made").id;
    }
    let refused = world.request(&make("Four")).await.expect_err("refused");
    assert!(refused.code == "quota_exceeded" && refused.detail.contains("the limit is 3 per user"), "{refused}");
    // The deletion waits for the deploy service, which does not run here.
    world.request(&DeleteOrganization { id: last, password: Some("a long enough one 1".into()) }).await.expect("begun");
    assert_eq!(world.request(&make("Four")).await.expect_err("refused").code, "quota_exceeded");
}
