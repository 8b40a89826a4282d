//! Errors of commands: printed as text, or with `--json` as one JSON object on the last line of standard error.

use serde::Serialize;

use crate::client::Refused;

/// An error with a stable code for programs.
#[derive(Debug)]
pub struct Failure {
    /// Stable, such as `no_such_environment`.
    pub code: &'static str,
    /// What happened, and why.
    pub message: String,
    /// What to do next.
    pub hint: Option<String>,
    /// The exit status of the process.
    pub exit_status: u8,
}

impl Failure {
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None, exit_status: 1 }
    }

    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)?;
        self.hint.as_ref().map_or(Ok(()), |hint| write!(f, "\n{hint}"))
    }
}

impl std::error::Error for Failure {}

/// An error as `--json` prints it.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    pub code: String,
    pub message: String,
    pub hint: Option<String>,
    pub exit_status: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
}

impl From<&Failure> for Report {
    fn from(failure: &Failure) -> Self {
        Self {
            code: failure.code.into(),
            message: failure.message.clone(),
            hint: failure.hint.clone(),
            exit_status: failure.exit_status,
            correlation_id: None,
        }
    }
}

impl From<&anyhow::Error> for Report {
    fn from(error: &anyhow::Error) -> Self {
        let mut report = Self { code: "failed".into(), message: String::new(), hint: None, exit_status: 1, correlation_id: None };
        for cause in error.chain() {
            let text = if let Some(Refused(problem)) = cause.downcast_ref::<Refused>() {
                report.code.clone_from(&problem.code);
                report.hint.clone_from(&problem.hint);
                report.correlation_id.clone_from(&problem.correlation_id);
                if problem.errors.is_empty() {
                    problem.detail.clone()
                } else {
                    let errors = problem.errors.iter().map(|error| format!("{}: {}", error.field, error.message));
                    errors.collect::<Vec<_>>().join("\n")
                }
            } else if let Some(failure) = cause.downcast_ref::<Failure>() {
                report.code = failure.code.into();
                report.hint.clone_from(&failure.hint);
                report.exit_status = failure.exit_status;
                failure.message.clone()
            } else {
                cause.to_string()
            };
            if !report.message.contains(&text) {
                report.message.push_str(if report.message.is_empty() { "" } else { ": " });
                report.message.push_str(&text);
            }
        }
        report
    }
}

impl Report {
    /// The error as text.
    pub fn text(&self) -> String {
        let mut text = self.message.clone();
        if let Some(hint) = &self.hint {
            text.push('\n');
            text.push_str(hint);
        }
        // The server's log has more only about internal errors.
        if let (Some(id), "internal" | "unavailable" | "deadline_exceeded") = (&self.correlation_id, self.code.as_str()) {
            text.push_str(&format!("\n(correlation id {id})"));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::{Failure, Report};
    use crate::client::Refused;
    use anyhow::Context;
    use capsule_contracts::Problem;

    #[test]
    fn an_error_keeps_its_code_and_hint_when_context_is_added() {
        let refused = Refused(Problem::not_found("service").hint("Look again."));
        let error = Err::<(), _>(refused).context("the service cannot be shown").expect_err("an error");
        let report = Report::from(&error);
        assert_eq!((report.code.as_str(), report.hint.as_deref(), report.exit_status), ("not_found", Some("Look again."), 1));
        assert!(report.message.starts_with("the service cannot be shown: "), "{report:?}");
        assert!(!report.message.contains("Look again."), "{report:?}");
        assert!(report.text().ends_with("\nLook again."), "{report:?}");
        let plain = Report::from(&anyhow::anyhow!("broken"));
        assert_eq!((plain.code.as_str(), plain.message.as_str()), ("failed", "broken"));
        let failure = Failure { exit_status: 130, ..Failure::new("interrupted", "Still building.") };
        assert_eq!(Report::from(&anyhow::Error::from(failure)).exit_status, 130);
    }
}
