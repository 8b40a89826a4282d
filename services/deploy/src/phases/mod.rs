//! The phases of a deployment, one file each with one function, which may be run twice without harm.

pub mod active;
pub mod building;
pub mod copying_files;
pub mod creating_symlinks;
pub mod health_check;
pub mod pulling_source;
pub mod updating_routes;

use capsule_contracts::Problem;

/// Why a phase did not succeed.
pub enum Failure {
    /// The deployment has failed; the text is for its user.
    Failed(String),
    /// Something of the platform is in the way; the phase is tried again.
    Retry(Problem),
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self::Retry(problem)
    }
}

/// Runs file work off the async threads. An error of the host is tried again.
async fn files<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| Err(Failure::Failed("the platform failed in this step".into())))
}

/// What the host said when it could not do its part.
#[expect(clippy::needless_pass_by_value, reason = "used as an error mapper")]
fn host(error: std::io::Error) -> Failure {
    Failure::Failed(format!("the server could not do this step: {error}"))
}
