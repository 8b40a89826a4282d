//! The phases of a deployment: a file each, with one idempotent function `run`.

pub mod active;
pub mod building;
pub mod copying_files;
pub mod creating_symlinks;
pub mod health_check;
pub mod pulling_source;
pub mod updating_routes;

use std::path::Path;

use capsule_contracts::Problem;

/// The reason why a phase failed.
pub enum Failure {
    /// The deployment has failed; the text is for users.
    Failed(String),
    /// The deployment was cancelled, or settled, in the meantime.
    Cancelled,
    /// A part of the platform is not available; the phase is tried again.
    Retry(Problem),
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        match problem.code.as_str() {
            // Trying again would wait for the user to free the quota.
            "quota_exceeded" => Self::Failed(problem.to_string()),
            _ => Self::Retry(problem),
        }
    }
}

/// Runs file operations on a blocking thread.
async fn run_blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| {
        Err(Failure::Failed("this step failed because of a bug in Capsule: report it, with the log of the server".into()))
    })
}

/// The failure of a file operation on the server.
#[expect(clippy::needless_pass_by_value, reason = "used as an error mapper")]
fn io_failure(error: std::io::Error) -> Failure {
    Failure::Failed(format!("a file operation on the server failed: {error}"))
}

/// Points the link `next` in the directory of an application at a release.
fn update_next_link(directory: &Path, release: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(directory)?;
    let next = directory.join("next");
    match std::fs::remove_file(&next) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::os::unix::fs::symlink(release, next)
}
