use capsule_contracts::organization::OrganizationDeleted;
use capsule_contracts::{Event, EventEnvelope, Permission, Problem, Uuid};
use capsule_store::Keyring;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{IncomingRequest, VERSION, Wire};
use crate::context::{Command, Context, Principal};
use crate::transport::Rejection;

/// Messages as the first version of the format wrote them, without a version.
mod first_version {
    pub const REQUEST_OF_USER: &[u8] = include_bytes!("../../tests/wire/v1/request_of_user");
    pub const REQUEST_OF_ANONYMOUS: &[u8] = include_bytes!("../../tests/wire/v1/request_of_anonymous");
    pub const REQUEST_OF_SERVICE: &[u8] = include_bytes!("../../tests/wire/v1/request_of_service");
    pub const REPLY_OK: &[u8] = include_bytes!("../../tests/wire/v1/reply_ok");
    pub const REPLY_PROBLEM: &[u8] = include_bytes!("../../tests/wire/v1/reply_problem");
    pub const EVENT: &[u8] = include_bytes!("../../tests/wire/v1/event");
    pub const EVENT_SIGNATURE: &str = include_str!("../../tests/wire/v1/event_signature");
    pub const STREAM_ITEM: &[u8] = include_bytes!("../../tests/wire/v1/stream_item");
    pub const STREAM_TICKET: &[u8] = include_bytes!("../../tests/wire/v1/stream_ticket");
}

/// The installation of the recorded messages, or another one.
fn installation(key: u8) -> Wire {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("key");
    std::fs::write(&file, format!("{key:02x}").repeat(32)).expect("written");
    Wire::new(&Keyring::open(&file).expect("a key"))
}

fn wire() -> Wire {
    installation(7)
}

fn user() -> Principal {
    Principal::User { id: Uuid::from_u128(1), session: Uuid::from_u128(2), platform_admin: true }
}

fn open(sealed: &[u8]) -> IncomingRequest {
    wire().open_request(sealed).expect("of this installation").expect("readable")
}

fn refusal(sealed: &[u8]) -> (Uuid, Problem) {
    let refused = wire().open_request(sealed).expect("of this installation").expect_err("refused");
    (refused.id, refused.problem)
}

/// A request with this header, as another version writes it.
fn request(header: &Value) -> Vec<u8> {
    let header = serde_json::to_vec(header).expect("JSON");
    let length = u32::try_from(header.len()).expect("short").to_be_bytes();
    wire().key.seal("request", &[&length, header.as_slice(), b"{}"].concat()).expect("seals")
}

/// The header of a later minor version.
fn later_header() -> Value {
    json!({
        "version": [VERSION.0, VERSION.1 + 1],
        "id": Uuid::from_u128(9),
        "subject": "project.locate",
        "correlation_id": "c-9",
        "traceparent": null,
        "principal": {"user": {"id": Uuid::from_u128(1), "session": Uuid::from_u128(2), "platform_admin": true, "device": "phone"}},
        "deadline": u64::MAX / 2,
        "command": null,
        "priority": {"class": "interactive"},
    })
}

#[test]
fn a_request_is_readable_only_within_the_installation() {
    let context = Context::new("c-1".into(), user());
    let (id, sealed) = wire().seal_request(&context, "auth.get_profile", b"{\"secret\":1}").expect("seals");
    assert!(!sealed.windows(6).any(|window| window == b"secret"));
    let received = open(&sealed);
    assert_eq!((received.id, received.subject.as_str(), received.context.principal), (id, "auth.get_profile", user()));
    assert_eq!(received.payload, b"{\"secret\":1}");
    assert!(installation(8).open_request(&sealed).is_none(), "another installation");
}

#[test]
fn a_reply_opens_only_for_its_request() {
    let (wire, id) = (wire(), Uuid::from_u128(7));
    let sealed = wire.seal_reply(id, &Err(Problem::not_found("thing"))).expect("seals");
    assert_eq!(wire.open_reply(id, &sealed), Err(Problem::not_found("thing")));
    assert_eq!(wire.open_reply(Uuid::from_u128(8), &sealed).expect_err("another's").code, "unavailable");
    let sealed = wire.seal_reply(id, &Ok(b"yes".to_vec())).expect("seals");
    assert_eq!(wire.open_reply(id, &sealed), Ok(b"yes".to_vec()));
}

#[test]
fn a_service_is_known_by_its_name_in_another_process() {
    let context = Context::background("deploy");
    let (_, sealed) = wire().seal_request(&context, "project.locate", b"{}").expect("seals");
    assert_eq!(open(&sealed).context.principal, Principal::Service("deploy"));
    let mut header = later_header();
    for name in ["", "Deploy", "a b", &"a".repeat(41)] {
        header["principal"] = json!({"service": name});
        assert_eq!(refusal(&request(&header)).1.code, "unavailable", "{name}");
    }
}

#[test]
fn an_api_key_keeps_its_scopes_in_another_process() {
    let scopes = [Permission::DeployStaging, Permission::LogsView].into_iter().collect();
    let [id, owner, organization] = [1, 2, 3].map(Uuid::from_u128);
    let key = Principal::ApiKey { id, owner, organization, scopes };
    let (_, sealed) = wire().seal_request(&Context::new("c-1".into(), key), "deploy.deploy", b"{}").expect("seals");
    assert_eq!(open(&sealed).context.principal, key);
    // A scope that only a later version knows gives nothing here.
    let mut header = later_header();
    let scopes = ["deploy:staging", "deploy:moon", "logs:view"];
    header["principal"] = json!({"api_key": {"id": id, "owner": owner, "organization": organization, "scopes": scopes}});
    assert_eq!(open(&request(&header)).context.principal, key);
}

#[test]
fn messages_of_the_first_version_are_read() {
    let first = open(first_version::REQUEST_OF_USER);
    assert_eq!((first.subject.as_str(), first.payload.as_slice()), ("project.create_project", b"{\"name\":\"site\"}".as_slice()));
    assert_eq!((first.context.principal, first.context.correlation_id.as_str()), (user(), "c-1"));
    assert_eq!(first.context.traceparent.as_deref(), Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"));
    assert_eq!(first.context.command, Some(Command { id: Uuid::from_u128(3), digest: "digest".into() }));
    assert_eq!(open(first_version::REQUEST_OF_ANONYMOUS).context.principal, Principal::Anonymous);
    assert_eq!(open(first_version::REQUEST_OF_SERVICE).context.principal, Principal::Service("deploy"));

    assert_eq!(wire().open_reply(first.id, first_version::REPLY_OK), Ok(b"{\"id\":1}".to_vec()));
    let problem = Problem::invalid_field("name", "must be short");
    assert_eq!(wire().open_reply(first.id, first_version::REPLY_PROBLEM), Err(problem));

    let envelope = wire().open_event(first_version::EVENT, first_version::EVENT_SIGNATURE).expect("readable");
    assert_eq!((envelope.kind.as_str(), envelope.correlationid.as_str()), (OrganizationDeleted::TYPE, "c-4"));
    let event: OrganizationDeleted = serde_json::from_value(envelope.data).expect("readable");
    assert_eq!(event.organization_id, Uuid::from_u128(5));

    assert_eq!(wire().open_item("ab", 7, first_version::STREAM_ITEM).as_deref(), Some(b"{\"line\":1}".as_slice()));
    serde_json::from_slice::<crate::streams::Ticket>(first_version::STREAM_TICKET).expect("readable");
}

/// The first version's reader of requests.
#[derive(Debug, PartialEq, Deserialize)]
struct FirstHeader {
    id: Uuid,
    subject: String,
    correlation_id: String,
    traceparent: Option<String>,
    principal: FirstPrincipal,
    deadline: u64,
    command: Option<FirstCommand>,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum FirstPrincipal {
    Anonymous,
    User { id: Uuid, session: Uuid, platform_admin: bool },
    Service(String),
}

#[derive(Debug, PartialEq, Deserialize)]
struct FirstCommand {
    id: Uuid,
    digest: String,
}

#[test]
fn requests_are_readable_by_the_first_version() {
    let (id, session) = (Uuid::from_u128(1), Uuid::from_u128(2));
    let principals = [
        (Principal::Anonymous, FirstPrincipal::Anonymous),
        (user(), FirstPrincipal::User { id, session, platform_admin: true }),
        (Principal::Service("deploy"), FirstPrincipal::Service("deploy".into())),
    ];
    for (principal, expected) in principals {
        let context = Context::new("c-1".into(), principal).with_command_id(Uuid::from_u128(3), "digest".into());
        let (id, sealed) = wire().seal_request(&context, "auth.login", b"{}").expect("seals");
        let opened = wire().key.open("request", &sealed).expect("opens");
        let (length, rest) = opened.split_first_chunk::<4>().expect("a length");
        let (header, payload) = rest.split_at(u32::from_be_bytes(*length) as usize);
        let header: FirstHeader = serde_json::from_slice(header).expect("readable");
        assert_eq!((header.id, header.subject.as_str(), header.principal), (id, "auth.login", expected));
        let command = FirstCommand { id: Uuid::from_u128(3), digest: "digest".into() };
        assert_eq!((header.command, payload), (Some(command), b"{}".as_slice()));
    }
}

#[test]
fn messages_of_a_later_minor_version_are_read() {
    let request = open(&request(&later_header()));
    assert_eq!((request.subject.as_str(), request.context.principal), ("project.locate", user()));

    let mut problem = serde_json::to_value(Problem::conflict("Busy.")).expect("JSON");
    problem["retry_after"] = json!(3);
    let body = [b"-".as_slice(), &serde_json::to_vec(&problem).expect("JSON")].concat();
    let sealed = wire().key.seal(&format!("reply/{}", request.id), &body).expect("seals");
    assert_eq!(wire().open_reply(request.id, &sealed), Err(Problem::conflict("Busy.")));

    let mut event: Value = serde_json::from_slice(first_version::EVENT).expect("JSON");
    event["specversion"] = json!("1.1");
    event["severity"] = json!("low");
    event["data"]["reason"] = json!("unused");
    let envelope = open_event(&event).expect("readable");
    serde_json::from_value::<OrganizationDeleted>(envelope.data).expect("readable");
}

#[test]
fn requests_of_a_later_major_version_are_refused_with_its_number() {
    let mut header = later_header();
    header["version"] = json!([VERSION.0 + 1, 3]);
    let (id, problem) = refusal(&request(&header));
    assert_eq!((id, problem.code.as_str()), (Uuid::from_u128(9), "unavailable"));
    assert!(problem.detail.contains(&format!("version {}.3", VERSION.0 + 1)), "{problem}");
    assert!(problem.to_string().contains("same version"), "{problem}");
    // Only the version and the id stay.
    let (id, problem) = refusal(&request(&json!({"version": [VERSION.0 + 1, 0], "id": Uuid::from_u128(9), "to": 1})));
    assert!(id == Uuid::from_u128(9) && problem.detail.contains(&format!("version {}.0", VERSION.0 + 1)), "{problem}");
}

#[test]
fn a_request_with_an_unknown_kind_of_sender_is_refused() {
    let mut header = later_header();
    header["principal"] = json!({"robot": {"id": 1}});
    let (id, problem) = refusal(&request(&header));
    assert_eq!((id, problem.code.as_str()), (Uuid::from_u128(9), "unavailable"));
    assert!(problem.detail.contains("robot"), "{problem}");
}

#[test]
fn events_and_replies_of_a_later_major_version_are_refused() {
    let mut event: Value = serde_json::from_slice(first_version::EVENT).expect("JSON");
    event["specversion"] = json!("2.0");
    let Err(Rejection::Permanent(problem)) = open_event(&event) else { panic!("it is read") };
    assert!(problem.detail.contains("version 2.0"), "{problem}");

    let id = Uuid::from_u128(7);
    let sealed = wire().key.seal(&format!("reply/{id}"), b"*{}").expect("seals");
    let problem = wire().open_reply(id, &sealed).expect_err("refused");
    assert!(problem.to_string().contains("same version"), "{problem}");
}

fn open_event(event: &Value) -> Result<EventEnvelope, Rejection> {
    let body = serde_json::to_vec(event).expect("JSON");
    wire().open_event(&body, &wire().key.sign(&body))
}
