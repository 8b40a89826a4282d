//! The table of endpoints: method, path, message. The access rule is part of the message type, so every row has one.

use axum::http::{Method, StatusCode};
use capsule_contracts::deploy::{
    BeginUpload, CancelDeployment, Deploy, GetDeployment, GetServiceState, ListDeploymentEvents, ListDeployments, Plan, Redeploy,
    RemoveFromEnvironment, Restart, Rollback, Start, Stop, StreamDeploymentLog, StreamServiceLog, Upload,
};
use capsule_contracts::identity::{
    ChangePassword, DeleteProfile, DeleteUser, GetKeys, GetProfile, ListSessions, ListUsers, LocalLogin, Login, Logout,
    RefreshToken, Register, RevokeSession, RevokeSessions, UpdateProfile, UpdateUser, ValidateToken,
};
use capsule_contracts::operations::{DiscardDeadLetter, GetDeadLetter, GetSaga, ListDeadLetters, ListSagas, ReplayDeadLetter};
use capsule_contracts::organization::{
    AcceptInvitation, AddMember, ChangeRole, CreateOrganization, DeleteOrganization, GetOrganization, LeaveOrganization,
    ListInvitations, ListMembers, ListOrganizations, ListPermissions, RejectInvitation, RemoveMember, UpdateOrganization,
};
use capsule_contracts::project::{
    ArchiveProject, ChangeVariables, CreateEnvironment, CreateProject, CreateService, DeleteEnvironment, DeleteProject,
    DeleteSecret, DeleteService, GetEnvironment, GetProject, GetService, GetVariables, ListEnvironments, ListProjects,
    ListServices, PutSecret, ReplaceVariables, RestoreProject, UpdateEnvironment, UpdateProject, UpdateService,
};
use capsule_contracts::quotas::{GetQuotas, InspectOrganizations, InspectQuotas, SetQuotas};
use capsule_contracts::{Access, Download, DuplexMessage, Message, Problem, Redirect, StreamMessage};
use serde_json::{Map, Value};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use crate::uploads::{self, RawHandler};

/// An endpoint.
pub struct Row {
    pub method: Method,
    /// Below `/api/v1`.
    pub path: &'static str,
    /// The status of a successful response.
    pub success: StatusCode,
    /// The subject of its message, and its name in the documentation.
    pub subject: &'static str,
    pub access: Access,
    /// Name and schema of the message and of its reply.
    pub message: TypeSchema,
    pub reply: TypeSchema,
    /// Checks that an object is a valid message and encodes it. The error contains the invalid field.
    pub check: fn(Map<String, Value>) -> Result<Vec<u8>, Problem>,
    pub kind: RowKind,
    /// Whether it updates a resource that no endpoint returns.
    write_only: bool,
}

/// How the request becomes a message, and the reply a response.
pub enum RowKind {
    /// Body, query and path are the message; the reply is JSON.
    Json {
        /// Whether the request is sent to every service and the replies are merged.
        fan_out: bool,
    },
    /// The handler takes the headers and the body as bytes. Query and path are the message; the reply is JSON.
    Raw { handler: RawHandler, summary: &'static str, media_type: &'static str },
    /// As `Json`, and the reply is a file.
    Download,
    /// As `Json`, and the reply is a redirect.
    Redirect,
    /// The reply is a sequence of JSON objects: one per line, or server-sent events.
    Stream,
    /// A WebSocket. `input` is the type of the text frames that the client sends.
    Duplex { input: Box<TypeSchema> },
}

/// Name and schema of a contract type, for the documentation.
pub struct TypeSchema {
    pub name: String,
    pub schema: RefOr<Schema>,
    pub others: Vec<(String, RefOr<Schema>)>,
}

impl TypeSchema {
    fn of<T: ToSchema + PartialSchema>() -> Self {
        let mut others = Vec::new();
        T::schemas(&mut others);
        Self { name: T::name().into_owned(), schema: T::schema(), others }
    }
}

fn row<M: Message>(method: Method, path: &'static str, kind: RowKind) -> Row {
    Row {
        kind,
        write_only: false,
        success: StatusCode::OK,
        method,
        path,
        subject: M::SUBJECT,
        access: M::ACCESS,
        message: TypeSchema::of::<M>(),
        reply: TypeSchema::of::<M::Reply>(),
        check: |object| {
            let message: M = serde_path_to_error::deserialize(Value::Object(object)).map_err(|error| {
                let field = error.path().to_string();
                let text = error.inner().to_string();
                // serde reports a missing member at its parent; the member's name is only in the message.
                let field = match text.strip_prefix("missing field `").and_then(|rest| rest.split('`').next()) {
                    Some(missing) => missing.to_owned(),
                    None => field,
                };
                Problem::invalid_field(&field, text)
            })?;
            serde_json::to_vec(&message).map_err(|_| Problem::internal())
        },
    }
}

impl Row {
    /// An endpoint with a reply in JSON.
    #[must_use]
    pub fn json<M: Message>(method: Method, path: &'static str) -> Self {
        row::<M>(method, path, RowKind::Json { fan_out: false })
    }

    /// An endpoint with a file as reply.
    #[must_use]
    pub fn download<M: Message<Reply = Download>>(path: &'static str) -> Self {
        row::<M>(Method::GET, path, RowKind::Download)
    }

    /// An endpoint with a redirect as reply.
    #[must_use]
    pub fn redirect<M: Message<Reply = Redirect>>(path: &'static str) -> Self {
        row::<M>(Method::GET, path, RowKind::Redirect).with_status(StatusCode::SEE_OTHER)
    }

    /// An endpoint with a stream of replies.
    #[must_use]
    pub fn stream<M: StreamMessage>(path: &'static str) -> Self {
        row::<M>(Method::GET, path, RowKind::Stream)
    }

    /// An endpoint that is a WebSocket.
    #[must_use]
    pub fn duplex<M: DuplexMessage>(path: &'static str) -> Self {
        row::<M>(Method::GET, path, RowKind::Duplex { input: Box::new(TypeSchema::of::<M::Input>()) })
            .with_status(StatusCode::SWITCHING_PROTOCOLS)
    }

    /// An endpoint whose body is an archive of source code, with the access rule of `M` and a reply of type `R`.
    fn archive<M: Message, R: ToSchema>(
        path: &'static str,
        subject: &'static str,
        summary: &'static str,
        handler: RawHandler,
    ) -> Self {
        let kind = RowKind::Raw { handler, summary, media_type: "application/octet-stream" };
        Self { subject, reply: TypeSchema::of::<R>(), ..row::<M>(Method::POST, path, kind) }
    }

    /// Whether the request is sent to every service.
    #[must_use]
    pub fn is_fan_out(&self) -> bool {
        matches!(self.kind, RowKind::Json { fan_out: true })
    }

    /// Whether the body of a request is a JSON object.
    #[must_use]
    pub fn takes_json(&self) -> bool {
        !matches!(self.kind, RowKind::Raw { .. }) && self.method != Method::GET
    }

    /// Whether it updates a resource as a whole or in parts.
    #[must_use]
    pub fn is_update(&self) -> bool {
        self.method == Method::PUT || self.method == Method::PATCH
    }

    /// Whether the reply is the representation of the resource and has an entity tag. Updates of such a resource honour
    /// `If-Match`.
    #[must_use]
    pub fn has_entity_tag(&self) -> bool {
        matches!(self.kind, RowKind::Json { .. }) && (self.method == Method::GET || (self.is_update() && !self.write_only))
    }

    /// An update of a resource that cannot be read.
    fn write_only(self) -> Self {
        Self { write_only: true, ..self }
    }

    fn fan_out(self) -> Self {
        Self { kind: RowKind::Json { fan_out: true }, ..self }
    }

    fn with_status(self, success: StatusCode) -> Self {
        Self { success, ..self }
    }
}

fn get<M: Message>(path: &'static str) -> Row {
    Row::json::<M>(Method::GET, path)
}

fn post<M: Message>(path: &'static str) -> Row {
    Row::json::<M>(Method::POST, path)
}

fn create<M: Message>(path: &'static str) -> Row {
    post::<M>(path).with_status(StatusCode::CREATED)
}

fn begin<M: Message>(path: &'static str) -> Row {
    post::<M>(path).with_status(StatusCode::ACCEPTED)
}

fn put<M: Message>(path: &'static str) -> Row {
    Row::json::<M>(Method::PUT, path)
}

fn patch<M: Message>(path: &'static str) -> Row {
    Row::json::<M>(Method::PATCH, path)
}

fn delete<M: Message>(path: &'static str) -> Row {
    Row::json::<M>(Method::DELETE, path)
}

/// All endpoints below `/api/v1`.
pub fn all() -> &'static [Row] {
    static ROWS: std::sync::LazyLock<Vec<Row>> = std::sync::LazyLock::new(|| {
        vec![
            create::<Register>("/auth/register"),
            post::<Login>("/auth/login"),
            post::<LocalLogin>("/auth/local"),
            post::<RefreshToken>("/auth/refresh"),
            post::<Logout>("/auth/logout"),
            post::<ValidateToken>("/auth/validate"),
            get::<GetProfile>("/auth/me"),
            patch::<UpdateProfile>("/auth/me"),
            delete::<DeleteProfile>("/auth/me").with_status(StatusCode::ACCEPTED),
            post::<ChangePassword>("/auth/password/change"),
            get::<ListSessions>("/auth/sessions"),
            delete::<RevokeSessions>("/auth/sessions"),
            delete::<RevokeSession>("/auth/sessions/{id}"),
            get::<ListOrganizations>("/organizations"),
            create::<CreateOrganization>("/organizations"),
            get::<GetOrganization>("/organizations/{id}"),
            put::<UpdateOrganization>("/organizations/{id}"),
            delete::<DeleteOrganization>("/organizations/{id}").with_status(StatusCode::ACCEPTED),
            get::<ListMembers>("/organizations/{id}/members"),
            create::<AddMember>("/organizations/{id}/members"),
            patch::<ChangeRole>("/organizations/{id}/members/{user_id}/role").write_only(),
            delete::<RemoveMember>("/organizations/{id}/members/{user_id}"),
            get::<GetQuotas>("/organizations/{id}/quotas"),
            post::<LeaveOrganization>("/organizations/{id}/leave"),
            get::<ListInvitations>("/invitations"),
            post::<AcceptInvitation>("/invitations/{id}/accept"),
            post::<RejectInvitation>("/invitations/{id}/reject"),
            get::<ListPermissions>("/permissions"),
            get::<ListProjects>("/projects"),
            create::<CreateProject>("/projects"),
            get::<GetProject>("/projects/{id}"),
            put::<UpdateProject>("/projects/{id}"),
            delete::<DeleteProject>("/projects/{id}"),
            post::<ArchiveProject>("/projects/{id}/archive"),
            post::<RestoreProject>("/projects/{id}/restore"),
            get::<ListEnvironments>("/projects/{id}/environments"),
            create::<CreateEnvironment>("/projects/{id}/environments"),
            get::<GetEnvironment>("/environments/{id}"),
            put::<UpdateEnvironment>("/environments/{id}"),
            delete::<DeleteEnvironment>("/environments/{id}"),
            get::<GetVariables>("/environments/{id}/variables"),
            put::<ReplaceVariables>("/environments/{id}/variables"),
            patch::<ChangeVariables>("/environments/{id}/variables"),
            put::<PutSecret>("/environments/{id}/secrets/{name}").write_only(),
            delete::<DeleteSecret>("/environments/{id}/secrets/{name}"),
            get::<ListServices>("/services"),
            create::<CreateService>("/services"),
            get::<GetService>("/services/{id}"),
            put::<UpdateService>("/services/{id}"),
            delete::<DeleteService>("/services/{id}"),
            begin::<Deploy>("/services/{id}/deploy"),
            begin::<Rollback>("/services/{id}/rollback"),
            begin::<Restart>("/services/{id}/restart"),
            begin::<Stop>("/services/{id}/stop"),
            begin::<Start>("/services/{id}/start"),
            get::<GetServiceState>("/services/{id}/state"),
            delete::<RemoveFromEnvironment>("/services/{id}/environments/{environment}"),
            get::<ListDeployments>("/deployments"),
            get::<GetDeployment>("/deployments/{id}"),
            begin::<Redeploy>("/deployments/{id}/redeploy"),
            post::<CancelDeployment>("/deployments/{id}/cancel"),
            get::<ListDeploymentEvents>("/deployments/{id}/events"),
            Row::stream::<StreamDeploymentLog>("/deployments/{id}/logs"),
            Row::stream::<StreamServiceLog>("/services/{id}/logs"),
            Row::archive::<BeginUpload, Upload>(
                "/uploads",
                "deploy.upload",
                "Uploads a source archive: tar, tar.gz or zip.",
                uploads::upload,
            )
            .with_status(StatusCode::CREATED),
            Row::archive::<BeginUpload, Plan>(
                "/plan",
                "deploy.plan",
                "Plans a source archive. Builds and keeps nothing.",
                uploads::plan,
            ),
            get::<InspectOrganizations>("/admin/organizations"),
            get::<InspectQuotas>("/admin/organizations/{id}/quotas"),
            put::<SetQuotas>("/admin/organizations/{id}/quotas"),
            get::<ListUsers>("/admin/users"),
            patch::<UpdateUser>("/admin/users/{id}"),
            delete::<DeleteUser>("/admin/users/{id}").with_status(StatusCode::ACCEPTED),
            get::<ListDeadLetters>("/admin/dead-letters").fan_out(),
            get::<GetDeadLetter>("/admin/dead-letters/{id}").fan_out(),
            post::<ReplayDeadLetter>("/admin/dead-letters/{id}/replay").fan_out(),
            delete::<DiscardDeadLetter>("/admin/dead-letters/{id}").fan_out(),
            get::<ListSagas>("/admin/sagas").fan_out(),
            get::<GetSaga>("/admin/sagas/{id}").fan_out(),
        ]
    });
    &ROWS
}

/// The endpoint of the public keys, at its well-known path.
pub fn keys() -> &'static Row {
    static ROW: std::sync::LazyLock<Row> = std::sync::LazyLock::new(|| get::<GetKeys>("/.well-known/jwks.json"));
    &ROW
}
