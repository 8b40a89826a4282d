//! Lists in pages, and updates with preconditions, with the organization and project services in this process, on
//! SQLite and PostgreSQL.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use capsule_bus::{Bus, Context, Principal, entity_tag};
use capsule_contracts::access::EnvironmentKind;
use capsule_contracts::organization::{CreateOrganization, ListOrganizations, UpdateOrganization};
use capsule_contracts::project::{
    ChangeVariables, CreateEnvironment, CreateProject, CreateService, DeleteProject, GetProject, GetVariables, ListEnvironments,
    ListProjects, ListServices, Project, ReplaceVariables, UpdateEnvironment, UpdateProject, UpdateService,
};
use capsule_contracts::quotas::Quotas;
use capsule_contracts::{Message, Page, Problem, Uuid};
use capsule_organization::Limits;
use capsule_store::{Databases, Keyring};
use capsule_tests::Postgres;
use serde::Serialize;

/// Two services on a bus, and a user with an organization.
struct World {
    bus: Bus,
    user: Principal,
    organization: Uuid,
}

impl World {
    async fn new(folder: &Path, databases: &Databases) -> Arc<Self> {
        let keyring = Keyring::open(&folder.join("key")).expect("a key");
        let bus = Bus::new();
        let limits = Limits { quotas: Quotas::defaults(), organizations_per_user: 9 };
        capsule_organization::start(databases, &bus, keyring.clone(), limits).await.expect("starts");
        capsule_project::start(databases, &bus, keyring).await.expect("starts");
        bus.start_event_delivery();
        let id = capsule_contracts::new_id();
        let user = Principal::User { id, session: id, platform_admin: false };
        let create = CreateOrganization { name: "Acme".into(), slug: None };
        let organization = bus.request(&Context::new("test".into(), user), &create).await.expect("an organization").id;
        Arc::new(Self { bus, user, organization })
    }

    async fn request<M: Message>(&self, message: &M) -> Result<M::Reply, Problem> {
        self.bus.request(&Context::new("test".into(), self.user), message).await
    }

    /// Sends a message with `If-Match`.
    async fn request_if_match<M: Message>(&self, tag: &str, message: &M) -> Result<M::Reply, Problem> {
        let context = Context { if_match: Some(tag.to_owned()), ..Context::new("test".into(), self.user) };
        self.bus.request(&context, message).await
    }

    async fn project(&self, name: &str) -> Project {
        let create = CreateProject { organization_id: self.organization, name: name.into(), slug: None };
        self.request(&create).await.expect("a project")
    }

    async fn projects(&self, query: ListProjects) -> Page<Project> {
        self.request(&ListProjects { organization_id: self.organization, ..query }).await.expect("listed")
    }

    /// The names of all projects, from pages of two.
    async fn names(&self, query: ListProjects) -> Vec<String> {
        let (mut names, mut cursor) = (Vec::new(), None);
        loop {
            let page = self.projects(ListProjects { limit: Some(2), cursor, ..query.clone() }).await;
            assert!(page.items.len() <= 2);
            names.extend(page.items.into_iter().map(|project| project.name));
            match page.next_cursor {
                Some(next) => cursor = Some(next),
                None => return names,
            }
        }
    }
}

fn tag(representation: &impl Serialize) -> String {
    entity_tag(&serde_json::to_vec(representation).expect("JSON"))
}

async fn on_both(work: impl AsyncFn(Arc<World>)) {
    let folder = tempfile::tempdir().expect("a folder");
    work(World::new(folder.path(), &Databases::Embedded(folder.path().into())).await).await;
    if Postgres::programs().is_some() {
        let server = Postgres::start();
        let folder = tempfile::tempdir().expect("a folder");
        let databases = Databases::Postgres { url: server.url(), connections: 8 };
        work(World::new(folder.path(), &databases).await).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_is_sorted_filtered_and_complete_while_items_come_and_go() {
    on_both(async |world| {
        for name in ["delta", "alpha", "echo", "bravo", "charlie"] {
            world.project(name).await;
        }
        let sorted = |sort: &str| ListProjects { sort: Some(sort.into()), ..ListProjects::default() };
        assert_eq!(world.names(ListProjects::default()).await, ["delta", "alpha", "echo", "bravo", "charlie"]);
        assert_eq!(world.names(sorted("-created_at")).await, ["charlie", "bravo", "echo", "alpha", "delta"]);
        assert_eq!(world.names(sorted("name")).await, ["alpha", "bravo", "charlie", "delta", "echo"]);
        assert_eq!(world.names(sorted("-name")).await, ["echo", "delta", "charlie", "bravo", "alpha"]);

        // The last item of the first page is deleted, and others are created on both sides of it.
        let first = world.projects(ListProjects { limit: Some(2), ..sorted("name") }).await;
        world.request(&DeleteProject { id: first.items[1].id }).await.expect("deleted");
        for name in ["aardvark", "dingo"] {
            world.project(name).await;
        }
        let rest = ListProjects { limit: Some(9), cursor: first.next_cursor.clone(), ..sorted("name") };
        let rest: Vec<_> = world.projects(rest).await.items.into_iter().map(|project| project.name).collect();
        assert_eq!(rest, ["charlie", "delta", "dingo", "echo"]);

        let prefix = ListProjects { name_prefix: Some("d".into()), ..sorted("name") };
        assert_eq!(world.names(prefix).await, ["delta", "dingo"]);
        let wildcard = ListProjects { name_prefix: Some("%".into()), ..ListProjects::default() };
        assert!(world.names(wildcard).await.is_empty());
        let archived = ListProjects { archived: Some(true), ..ListProjects::default() };
        assert!(world.names(archived).await.is_empty());

        for (query, field) in [
            (sorted("organization_id"), "sort"),
            (ListProjects { limit: Some(201), ..sorted("name") }, "limit"),
            (ListProjects { cursor: first.next_cursor, ..sorted("-name") }, "cursor"),
        ] {
            let query = ListProjects { organization_id: world.organization, ..query };
            assert_eq!(world.request(&query).await.expect_err("invalid").errors[0].field, field);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn items_with_equal_sort_values_are_not_lost_between_pages() {
    on_both(async |world| {
        for _ in 0..5 {
            let slug = Some(format!("s{}", Uuid::now_v7().as_u128() % 1_000_000_000));
            let create = CreateProject { organization_id: world.organization, name: "same".into(), slug };
            world.request(&create).await.expect("created");
        }
        let (mut ids, mut cursor) = (BTreeSet::new(), None);
        loop {
            let query = ListProjects { limit: Some(1), sort: Some("-name".into()), cursor, ..ListProjects::default() };
            let page = world.projects(query).await;
            ids.extend(page.items.iter().map(|project| project.id));
            cursor = page.next_cursor;
            if cursor.is_none() {
                break;
            }
        }
        assert_eq!(ids.len(), 5);
        let organizations = world.request(&ListOrganizations { sort: Some("slug".into()), ..ListOrganizations::default() }).await;
        assert_eq!(organizations.expect("listed").items.len(), 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_concurrent_updates_with_one_entity_tag_one_succeeds() {
    on_both(async |world| {
        let project = world.project("one").await;
        let seen = tag(&world.request(&GetProject { id: project.id }).await.expect("read"));
        let updates = (0..8).map(|n| {
            let (world, seen) = (world.clone(), seen.clone());
            let update = UpdateProject { id: project.id, name: Some(format!("name {n}")) };
            tokio::spawn(async move { world.request_if_match(&seen, &update).await })
        });
        let (mut winner, mut lost) = (None, Vec::new());
        for update in updates.collect::<Vec<_>>() {
            match update.await.expect("no panic") {
                Ok(project) => assert!(winner.replace(project).is_none(), "two updates succeeded"),
                Err(problem) => lost.push(problem),
            }
        }
        let winner = winner.expect("one succeeded");
        assert_eq!(world.request(&GetProject { id: project.id }).await.expect("read"), winner);
        for problem in lost {
            assert_eq!((problem.status, problem.code.as_str()), (412, "precondition_failed"));
            assert_eq!(problem.etag, Some(tag(&winner)));
            assert_eq!(problem.current.as_deref(), Some(&serde_json::to_value(&winner).expect("JSON")));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_update_honours_the_precondition() {
    on_both(async |world| {
        let project = world.project("one").await;
        let list = ListEnvironments { id: project.id, ..ListEnvironments::default() };
        let environment = world.request(&list).await.expect("listed").items.remove(0);
        let create = CreateService { project_id: project.id, name: "web".into() };
        let service = world.request(&create).await.expect("created");
        let variables = tag(&world.request(&GetVariables { id: environment.id }).await.expect("read"));

        let stale = "\"stale\"";
        let rename = UpdateOrganization { id: world.organization, name: Some("New".into()) };
        assert_eq!(world.request_if_match(stale, &rename).await.expect_err("refused").status, 412);
        let replace = ReplaceVariables { id: environment.id, variables: [("A".to_owned(), "1".to_owned())].into() };
        assert_eq!(world.request_if_match(stale, &replace).await.expect_err("refused").status, 412);
        let changed = tag(&world.request_if_match(&variables, &replace).await.expect("replaced"));
        let change = ChangeVariables { id: environment.id, variables: [("B".to_owned(), Some("2".to_owned()))].into() };
        assert_eq!(world.request_if_match(&variables, &change).await.expect_err("refused").etag, Some(changed.clone()));
        world.request_if_match(&changed, &change).await.expect("changed");

        let rename = UpdateService { id: service.id, name: "api".into() };
        assert_eq!(world.request_if_match(stale, &rename).await.expect_err("refused").status, 412);
        assert_eq!(world.request_if_match(&tag(&service), &rename).await.expect("renamed").name, "api");
        let services = ListServices { project_id: project.id, name_prefix: Some("ap".into()), ..ListServices::default() };
        assert_eq!(world.request(&services).await.expect("listed").items.len(), 1);

        let update = UpdateEnvironment { id: environment.id, name: "production".into(), kind: EnvironmentKind::Custom };
        assert_eq!(world.request_if_match(stale, &update).await.expect_err("refused").status, 412);
        let updated = world.request_if_match(&tag(&environment), &update).await.expect("changed");
        assert_eq!(updated.kind, EnvironmentKind::Custom);
        let rename = UpdateEnvironment { name: "other".into(), ..update };
        assert_eq!(world.request(&rename).await.expect_err("refused").status, 409);
        let create = CreateEnvironment { id: project.id, name: "staging".into(), kind: EnvironmentKind::Staging };
        world.request(&create).await.expect("created");
        let custom = ListEnvironments { kind: Some(EnvironmentKind::Custom), ..list };
        assert_eq!(world.request(&custom).await.expect("listed").items, [updated]);
    })
    .await;
}
