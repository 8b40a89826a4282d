//! The error type of all messages. The gateway sends it as RFC 9457 problem details.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::access::{Permission, Role};
use crate::text::truncated;

/// An invalid field of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FieldError {
    /// The path of the field in the request, such as `services[0].name`.
    pub field: String,
    /// What is wrong with the value, and what is valid.
    pub message: String,
}

/// An error: what happened, where, and what to do (RFC 9457 problem details).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// A stable, machine-readable code such as `not_found`.
    pub code: String,
    /// The HTTP status code.
    pub status: u16,
    /// A short description of the kind of error.
    pub title: String,
    /// What happened in this case.
    pub detail: String,
    /// What the caller can do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The invalid fields of the request.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
    /// The request's correlation id. The server's log has the cause under it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
    /// For a failed precondition: the current representation of the resource.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub current: Option<Box<serde_json::Value>>,
    /// For a failed precondition: the entity tag of the current representation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
}

impl Problem {
    fn new(code: &str, status: u16, title: &str, detail: impl Into<String>) -> Self {
        Self {
            code: code.into(),
            status,
            title: title.into(),
            detail: truncated(detail.into()),
            hint: None,
            errors: Vec::new(),
            correlation_id: None,
            current: None,
            etag: None,
        }
    }

    /// Adds a hint: what the caller can do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(truncated(hint.into()));
        self
    }

    /// The request is malformed (400).
    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::new("bad_request", 400, "The request is malformed", detail)
    }

    /// One or more fields are invalid (422).
    #[must_use]
    pub fn invalid(errors: Vec<FieldError>) -> Self {
        let cut = |error: FieldError| FieldError { field: truncated(error.field), message: truncated(error.message) };
        let errors: Vec<FieldError> = errors.into_iter().map(cut).collect();
        let detail = errors.iter().map(|e| format!("{}: {}", e.field, e.message)).collect::<Vec<_>>().join("; ");
        Self { errors, ..Self::new("invalid", 422, "The request has invalid fields", detail) }
    }

    /// One field is invalid (422).
    pub fn invalid_field(field: &str, message: impl Into<String>) -> Self {
        Self::invalid(vec![FieldError { field: field.into(), message: message.into() }])
    }

    /// The caller is not signed in, or its credentials are invalid (401).
    pub fn unauthenticated(detail: impl Into<String>) -> Self {
        Self::new("unauthenticated", 401, "Sign in first", detail)
            .hint("Run `capsule login`, or send `Authorization: Bearer <access token>`.")
    }

    /// The caller must confirm the request with a password (403).
    pub fn reauthentication_required(detail: impl Into<String>) -> Self {
        Self::new("reauthentication_required", 403, "Confirm with your password", detail)
            .hint("Enter your password (API: the member `password`). The local administrator enters the server's local token.")
    }

    /// The caller may not do this (403). For a target that the caller may not see, use [`Problem::not_found`].
    pub fn forbidden(detail: impl Into<String>) -> Self {
        Self::new("forbidden", 403, "Not allowed", detail)
    }

    /// The caller's role does not have a required permission (403).
    #[must_use]
    pub fn missing_permission(permission: Permission, role: Role) -> Self {
        let (permission, role) = (permission.name(), role.name());
        Self::forbidden(format!("You need the {permission} permission. Your role in this organization is {role}."))
            .hint("Ask an owner or admin of the organization for a role that has it.")
    }

    /// The API key does not have a required permission among its scopes (403).
    #[must_use]
    pub fn missing_scope(permission: Permission) -> Self {
        Self::forbidden(format!("You need the {} permission. It is not among the scopes of this API key.", permission.name()))
            .hint("Use a key that has it.")
    }

    /// The thing does not exist, or the caller may not see it (404). `what` is a noun, such as `service`.
    #[must_use]
    pub fn not_found(what: &str) -> Self {
        let (first, rest) = what.split_at(what.ceil_char_boundary(1));
        let detail = format!("{}{rest} not found, or you have no access to it.", first.to_uppercase());
        Self::new("not_found", 404, "Not found", detail)
    }

    /// A quota of the organization is exceeded (403, as in Kubernetes). Returned by [`crate::quotas::Quotas::check`].
    pub fn quota_exceeded(detail: impl Into<String>) -> Self {
        Self::new("quota_exceeded", 403, "A quota is exceeded", detail)
    }

    /// The request is not possible in the target's current state (409).
    pub fn conflict(detail: impl Into<String>) -> Self {
        Self::new("conflict", 409, "Not possible in the current state", detail)
    }

    /// The client has not seen the current representation of the resource (412).
    #[must_use]
    pub fn precondition_failed(current: serde_json::Value, etag: String) -> Self {
        let detail = "The resource was changed after you read it. Your change was not made.";
        let problem = Self::new("precondition_failed", 412, "The resource has changed", detail)
            .hint("Apply your change to the member `current`, and send it with its entity tag in If-Match.");
        Self { current: Some(Box::new(current)), etag: Some(etag), ..problem }
    }

    /// The request's body arrives too slowly (408).
    pub fn too_slow(detail: impl Into<String>) -> Self {
        Self::new("too_slow", 408, "The request arrives too slowly", detail).hint("Send it again over a faster connection.")
    }

    /// The request is larger than permitted (413).
    pub fn too_large(detail: impl Into<String>) -> Self {
        Self::new("too_large", 413, "Too large", detail)
    }

    /// Too many requests (429).
    pub fn too_many(detail: impl Into<String>) -> Self {
        Self::new("too_many_requests", 429, "Too many requests", detail)
    }

    /// A part of the platform is unavailable (503).
    pub fn unavailable(detail: impl Into<String>) -> Self {
        Self::new("unavailable", 503, "Temporarily unavailable", detail).hint("Try again in a few seconds.")
    }

    /// The server does not have enough free disk space (507).
    pub fn insufficient_storage(detail: impl Into<String>) -> Self {
        Self::new("insufficient_storage", 507, "Not enough disk space", detail)
            .hint("Try again later. An administrator can free disk space or lower the setting disk.reserve_mib.")
    }

    /// There was no reply before the deadline (504).
    pub fn deadline(subject: &str) -> Self {
        Self::new("deadline_exceeded", 504, "No reply in time", format!("There was no reply to {subject} before the deadline."))
    }

    /// An internal error (500). The cause is logged with the correlation id and not shown.
    #[must_use]
    pub fn internal() -> Self {
        Self::new("internal", 500, "Internal error", "The request failed because of an internal error.")
            .hint("The server's log has the cause under the correlation id.")
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.detail)?;
        if let Some(hint) = &self.hint {
            write!(f, " {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problem {}
