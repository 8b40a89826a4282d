//! Calls every endpoint with every role, as a non-member, and without a token. The endpoints come from the gateway's table,
//! so a new endpoint is tested automatically, and fails until `request` has a value for each of its required members.

use std::sync::{Arc, OnceLock};

use capsule_contracts::Access;
use capsule_gateway::rows::{self, Row, RowKind};
use capsule_tests::{Reply, Server, eventually, text};
use libtest_mimic::Trial;
use serde_json::{Map, Value, json};
use utoipa::openapi::{RefOr, Schema};

use crate::{archive_of_page, test};

/// The roles from least to most, each with its permissions beyond the previous role.
const ROLES: [(&str, &[&str]); 4] = [
    ("viewer", &["org:view", "project:view", "service:view", "logs:view", "metrics:view"]),
    ("developer", &["project:create", "deploy:dev", "deploy:staging", "service:manage", "service:scale"]),
    ("admin", &["org:manage", "project:delete", "deploy:production", "alerts:manage"]),
    ("owner", &["org:billing"]),
];

/// Messages that require the role owner in addition to the permission.
const OWNER_ONLY: [&str; 1] = ["organization.delete_organization"];

pub fn trials() -> Vec<Trial> {
    let world = Arc::new(OnceLock::new());
    let mut trials = Vec::new();
    for row in rows::all() {
        let world = world.clone();
        trials.push(test(&format!("access to {} {}", row.method, row.path), move || {
            let world: &World = world.get_or_init(World::new);
            world.check_precondition(row);
            world.check(row.method.as_str(), row.subject, row.access, |fixture| request(row, fixture));
        }));
    }
    trials
}

/// Checks all endpoints in one test.
pub fn all() {
    let world = World::new();
    for row in rows::all() {
        world.check(row.method.as_str(), row.subject, row.access, |fixture| request(row, fixture));
    }
}

enum Body {
    None,
    Json(Value),
    Archive(Vec<u8>),
}

/// A server with users.
struct World {
    server: Server,
    /// Token and id of one user per role.
    members: Vec<(String, String)>,
    /// A user who is not a member of the test organizations.
    outsider: String,
}

/// One resource of each kind, in its own organization.
struct Fixture {
    organization: String,
    project: String,
    environment: String,
    service: String,
    upload: String,
    deployment: String,
    viewer: String,
    session: String,
    invitation: String,
}

impl World {
    fn new() -> Self {
        // One user creates an organization for every row, and all users are registered from one address.
        let server = Server::with(&["limits.organizations_per_user=1000", "limits.sign_ins_per_minute=0"]);
        let members = ROLES
            .iter()
            .map(|(role, _)| {
                let token = server.register(&format!("{role}@example.com"));
                let id = text(&server.api("GET", "/auth/me", Some(&token), None).ok(), "id");
                (token, id)
            })
            .collect();
        let outsider = server.register("outsider@example.com");
        Self { server, members, outsider }
    }

    fn owner(&self) -> &str {
        &self.members[3].0
    }

    fn fixture(&self) -> Fixture {
        let post = |path: &str, body: Value| self.server.api("POST", path, Some(self.owner()), Some(&body)).ok();
        let organization = text(&post("/organizations", json!({"name": "Fixture"})), "id");
        for ((role, _), (token, _)) in ROLES.iter().zip(&self.members).take(3) {
            self.server.add_member(self.owner(), &organization, &format!("{role}@example.com"), role, token);
        }
        let project = text(&post("/projects", json!({"organization_id": organization, "name": "Fixture"})), "id");
        let environments = self.server.api("GET", &format!("/projects/{project}/environments"), Some(self.owner()), None).ok();
        let environment = text(&environments["items"][0], "id");
        let put = format!("/environments/{environment}/secrets/TOKEN");
        self.server.api("PUT", &put, Some(self.owner()), Some(&json!({"value": "1"}))).ok();
        let service = text(&post("/services", json!({"project_id": project, "name": "site"})), "id");
        let path = format!("/uploads?service_id={service}");
        let upload = text(
            &self.server.api_raw("POST", &path, Some(self.owner()), "application/gzip", Some(archive_of_page("hi"))).ok(),
            "id",
        );
        let deployment = text(&post(&format!("/services/{service}/deploy"), json!({"upload_id": upload})), "id");
        // A second deployment, so that a rollback has a target.
        for id in [deployment.clone(), text(&post(&format!("/deployments/{deployment}/redeploy"), json!({})), "id")] {
            eventually("the fixture is deployed", || {
                let now = self.server.api("GET", &format!("/deployments/{id}"), Some(self.owner()), None).ok();
                (now["finished_at"].is_i64() || now["finished_at"].is_string()).then_some(())
            });
        }
        let sessions = self.server.api("GET", "/auth/sessions", Some(self.owner()), None).ok();
        let session = text(&sessions["items"][0], "id");
        Fixture {
            organization,
            project,
            environment,
            service,
            upload,
            deployment,
            viewer: self.members[0].1.clone(),
            session,
            invitation: Fixture::nothing().invitation,
        }
    }

    /// A pending invitation of the user with this token.
    fn invitation(&self, token: &str) -> String {
        let email = text(&self.server.api("GET", "/auth/me", Some(token), None).ok(), "email");
        let body = json!({"name": "Inviting"});
        let organization = text(&self.server.api("POST", "/organizations", Some(self.owner()), Some(&body)).ok(), "id");
        let body = json!({"email": email, "role": "viewer"});
        self.server.api("POST", &format!("/organizations/{organization}/members"), Some(self.owner()), Some(&body)).ok();
        text(&self.server.api("GET", "/invitations", Some(token), None).ok()["items"][0], "id")
    }

    fn send(&self, method: &str, token: Option<&str>, (path, body): (String, Body)) -> Reply {
        match body {
            Body::None => self.server.api(method, &path, token, None),
            Body::Json(body) => self.server.api(method, &path, token, Some(&body)),
            Body::Archive(bytes) => self.server.api_raw(method, &path, token, "application/gzip", Some(bytes)),
        }
    }

    /// Checks that an update with an outdated entity tag is refused with the current representation.
    fn check_precondition(&self, row: &Row) {
        if !row.is_update() || !row.has_entity_tag() || matches!(row.access, Access::SignedIn | Access::PlatformAdmin) {
            return;
        }
        let (path, Body::Json(body)) = request(row, &self.fixture()) else { panic!("an update has a body") };
        let header = ("if-match", "\"outdated\"");
        let reply = self.server.api_with_header(row.method.as_str(), &path, self.owner(), header, Some(&body));
        assert_eq!(reply.status, 412, "{reply:?}");
        assert!(reply.json()["current"].is_object() && reply.json()["etag"].is_string(), "{reply:?}");
    }

    /// Checks that the endpoint refuses unauthenticated requests, non-members, and each role without the permission, and
    /// then accepts the least role with the permission.
    fn check(&self, method: &str, subject: &str, access: Access, request: impl Fn(&Fixture) -> (String, Body)) {
        let taken = match access {
            Access::Public => return,
            Access::SignedIn | Access::Invited => {
                // A new user for each endpoint, because the request may end the user's sessions.
                let token = self.server.register(&format!("{}@example.com", unique()));
                let session = text(&self.server.api("GET", "/auth/sessions", Some(&token), None).ok()["items"][0], "id");
                let invitation = self.invitation(&token);
                let fixture = Fixture { session, invitation, ..Fixture::nothing() };
                assert_eq!(self.send(method, None, request(&fixture)).status, 401);
                let answer = self.send(method, Some(&token), request(&fixture));
                assert!((200..300).contains(&answer.status), "a signed-in user: {answer:?}");
                return;
            }
            Access::PlatformAdmin => {
                let fixture = Fixture::nothing();
                assert_eq!(self.send(method, None, request(&fixture)).status, 401);
                assert_eq!(self.send(method, Some(self.owner()), request(&fixture)).status, 403);
                return;
            }
            Access::Granted(permission) => vec![permission.name()],
            // The fixture's environment is a production environment.
            Access::GrantedDeploy => vec!["deploy:production"],
            Access::GrantedAndDeploy(permission) => vec![permission.name(), "deploy:production"],
            Access::Internal => panic!("an endpoint exposes an internal message"),
        };
        let fixture = self.fixture();
        assert_eq!(self.send(method, None, request(&fixture)).status, 401, "no token");
        assert_eq!(self.send(method, Some("not.a.token"), request(&fixture)).status, 401, "an invalid token");

        // Replies for resources of others and for missing resources are identical.
        let foreign = self.send(method, Some(&self.outsider), request(&fixture));
        let missing = self.send(method, Some(&self.outsider), request(&Fixture::nothing()));
        assert_eq!(foreign.status, 404, "a non-member: {foreign:?}");
        assert_eq!(without_id(&foreign), without_id(&missing));

        let mut permitted = Vec::new();
        for ((role, more), (token, _)) in ROLES.iter().zip(&self.members) {
            permitted.extend(*more);
            let answer = self.send(method, Some(token), request(&fixture));
            if taken.iter().all(|permission| permitted.contains(permission))
                && (*role == "owner" || !OWNER_ONLY.contains(&subject))
            {
                // A conflict with the current state means that access was granted.
                assert!(matches!(answer.status, 200..=299 | 409), "{role} has {taken:?}: {answer:?}");
                return;
            }
            assert_eq!(answer.status, 403, "{role} lacks some of {taken:?}: {answer:?}");
        }
        panic!("no role has {taken:?}");
    }
}

impl Fixture {
    /// Ids that do not exist.
    fn nothing() -> Self {
        let id = || "0190a000-0000-7000-8000-000000000000".to_owned();
        Self {
            organization: id(),
            project: id(),
            environment: id(),
            service: id(),
            upload: id(),
            deployment: id(),
            viewer: id(),
            session: id(),
            invitation: id(),
        }
    }
}

fn without_id(reply: &Reply) -> Value {
    let mut problem = reply.json();
    problem["correlation_id"] = Value::Null;
    problem
}

/// The row's path and body, filled from a fixture.
fn request(row: &Row, fixture: &Fixture) -> (String, Body) {
    let own_id = match row.path.split('/').nth(1) {
        Some("organizations") => &fixture.organization,
        Some("projects") => &fixture.project,
        Some("environments") => &fixture.environment,
        Some("services") => &fixture.service,
        Some("deployments") => &fixture.deployment,
        Some("auth") => &fixture.session,
        Some("invitations") => &fixture.invitation,
        _ => &fixture.viewer,
    };
    let mut path = row
        .path
        .replace("{id}", own_id)
        .replace("{user_id}", &fixture.viewer)
        .replace("{name}", "TOKEN")
        .replace("{environment}", "production");
    let inside: Vec<&str> = row.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}')).collect();
    let RefOr::T(Schema::Object(schema)) = &row.message.schema else { panic!("the schema of {} is not an object", row.subject) };
    let mut members = Map::new();
    for name in schema.required.iter().filter(|name| !inside.contains(&name.as_str())) {
        let value = match name.as_str() {
            "organization_id" => json!(fixture.organization),
            "project_id" => json!(fixture.project),
            "service_id" => json!(fixture.service),
            "upload_id" => json!(fixture.upload),
            "name" => json!("another"),
            "kind" => json!("staging"),
            "role" => json!("viewer"),
            "value" => json!("1"),
            "variables" => json!({"A": "1"}),
            "quotas" => json!({"projects": 7}),
            "email" => json!("outsider@example.com"),
            "platform_admin" => json!(true),
            "new_password" => json!("another long one 2"),
            other => panic!("{} requires the member {other}: add a value for it in tests/end_to_end/access.rs", row.subject),
        };
        members.insert(name.clone(), value);
    }
    // Not in the list of required members: without it, the reply asks for the password.
    if schema.properties.contains_key("password") {
        members.insert("password".into(), json!("a long enough one 1"));
    }
    if !row.takes_json() {
        let query: Vec<String> =
            members.iter().map(|(name, value)| format!("{name}={}", value.as_str().unwrap_or_default())).collect();
        if !query.is_empty() {
            path = format!("{path}?{}", query.join("&"));
        }
        let archive = matches!(row.kind, RowKind::Raw { .. });
        return (path, if archive { Body::Archive(archive_of_page("hi")) } else { Body::None });
    }
    (path, Body::Json(Value::Object(members)))
}

fn unique() -> String {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    format!("somebody-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}
