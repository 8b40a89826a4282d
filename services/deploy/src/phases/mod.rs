//! The phases of a deployment, one file each with one function, which may be run twice without harm.

pub mod active;
pub mod building;
pub mod copying_files;
pub mod creating_symlinks;
pub mod health_check;
pub mod pulling_source;
pub mod updating_routes;

use std::path::Path;

use capsule_contracts::Problem;

/// Why a phase did not succeed.
pub enum Failure {
    /// The deployment has failed; the text is for its user.
    Failed(String),
    /// The deployment was cancelled, or settled, in the meantime.
    Cancelled,
    /// Something of the platform is in the way; the phase is tried again.
    Retry(Problem),
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        match problem.code.as_str() {
            // To try again would be to wait until somebody makes room.
            "quota_exceeded" => Self::Failed(problem.to_string()),
            _ => Self::Retry(problem),
        }
    }
}

/// Runs file work off the async threads.
async fn files<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| Err(Failure::Failed("the platform failed in this step".into())))
}

/// What the host said when it could not do its part.
#[expect(clippy::needless_pass_by_value, reason = "used as an error mapper")]
fn host(error: std::io::Error) -> Failure {
    Failure::Failed(format!("the server could not do this step: {error}"))
}

/// Points `next` in an application's folder at a release.
fn point_next(folder: &Path, release: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let next = folder.join("next");
    match std::fs::remove_file(&next) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::os::unix::fs::symlink(release, next)
}
