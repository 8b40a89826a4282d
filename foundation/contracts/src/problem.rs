//! The one error type that crosses the bus; RFC 9457 at the edge.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::text::shortened;

/// One field of a request that was wrong, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FieldError {
    /// The member's path in the request, such as `services[0].name`.
    pub field: String,
    /// What is wrong with it and what would be right.
    pub message: String,
}

/// What went wrong, where, and what to do about it (RFC 9457 problem details).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// A stable, machine-readable code such as `not_found`.
    pub code: String,
    /// The HTTP status that fits.
    pub status: u16,
    /// A short summary of the kind of problem.
    pub title: String,
    /// What happened this time.
    pub detail: String,
    /// What the caller can do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The fields at fault, when it was the input.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
    /// The request's correlation id, to quote when asking for help.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
}

impl Problem {
    fn new(code: &str, status: u16, title: &str, detail: impl Into<String>) -> Self {
        Self {
            code: code.into(),
            status,
            title: title.into(),
            detail: shortened(detail.into()),
            hint: None,
            errors: Vec::new(),
            correlation_id: None,
        }
    }

    /// Adds what the caller can do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(shortened(hint.into()));
        self
    }

    /// The request could not be understood (400).
    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::new("bad_request", 400, "The request could not be understood", detail)
    }

    /// One or more fields are wrong (422).
    #[must_use]
    pub fn invalid(errors: Vec<FieldError>) -> Self {
        let cut = |error: FieldError| FieldError { field: shortened(error.field), message: shortened(error.message) };
        let errors: Vec<FieldError> = errors.into_iter().map(cut).collect();
        let detail = errors.iter().map(|e| format!("{}: {}", e.field, e.message)).collect::<Vec<_>>().join("; ");
        Self { errors, ..Self::new("invalid", 422, "The request has invalid fields", detail) }
    }

    /// One field is wrong (422).
    pub fn invalid_field(field: &str, message: impl Into<String>) -> Self {
        Self::invalid(vec![FieldError { field: field.into(), message: message.into() }])
    }

    /// The caller is not signed in, or its credentials do not hold (401).
    pub fn unauthenticated(detail: impl Into<String>) -> Self {
        Self::new("unauthenticated", 401, "Sign in first", detail)
            .hint("Run `capsule login`, or send `Authorization: Bearer <access token>`.")
    }

    /// The caller must confirm with a password that the act is theirs (403).
    pub fn reauthentication_required(detail: impl Into<String>) -> Self {
        Self::new("reauthentication_required", 403, "Confirm with your password", detail)
            .hint("Send your password as `password`; the local administrator sends the local token of the server.")
    }

    /// The caller may see the thing, but not do this to it (403).
    pub fn forbidden(detail: impl Into<String>) -> Self {
        Self::new("forbidden", 403, "Not allowed", detail)
    }

    /// There is no such thing, or the caller may not know of it (404).
    #[must_use]
    pub fn not_found(what: &str) -> Self {
        Self::new("not_found", 404, "Not found", format!("There is no such {what}, or it is not yours to see."))
    }

    /// A quota of the organization is used up (403, as Kubernetes answers); [`crate::quotas::Quotas::check`] makes it.
    pub fn quota_exceeded(detail: impl Into<String>) -> Self {
        Self::new("quota_exceeded", 403, "A quota is used up", detail)
    }

    /// The state of the thing does not allow this now (409).
    pub fn conflict(detail: impl Into<String>) -> Self {
        Self::new("conflict", 409, "In conflict with the present state", detail)
    }

    /// The request arrives too slowly (408).
    pub fn too_slow(detail: impl Into<String>) -> Self {
        Self::new("too_slow", 408, "The request arrives too slowly", detail).hint("Send it again over a faster connection.")
    }

    /// The request is larger than allowed (413).
    pub fn too_large(detail: impl Into<String>) -> Self {
        Self::new("too_large", 413, "Too large", detail)
    }

    /// Too many attempts (429).
    pub fn too_many(detail: impl Into<String>) -> Self {
        Self::new("too_many_requests", 429, "Too many requests", detail)
    }

    /// A part of the platform is not reachable now (503).
    pub fn unavailable(detail: impl Into<String>) -> Self {
        Self::new("unavailable", 503, "Not available at the moment", detail).hint("Try again in a few seconds.")
    }

    /// The server's disk is too full for this (507).
    pub fn insufficient_storage(detail: impl Into<String>) -> Self {
        Self::new("insufficient_storage", 507, "Not enough disk space", detail)
            .hint("Try again later. An administrator can free space, or lower disk.reserve_mib.")
    }

    /// No answer came before the deadline (504).
    pub fn deadline(subject: &str) -> Self {
        Self::new("deadline_exceeded", 504, "No answer in time", format!("{subject} was not answered before its deadline."))
    }

    /// Something broke inside. The cause is logged under the correlation id, never shown.
    #[must_use]
    pub fn internal() -> Self {
        Self::new("internal", 500, "Something broke on our side", "The request could not be completed.")
            .hint("The server's log has the cause under this correlation id.")
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
