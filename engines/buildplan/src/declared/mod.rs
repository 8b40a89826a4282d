//! Declared settings, in ascending precedence: files of other platforms, `app.json`, `Procfile`, a compose file, a
//! Dockerfile, `capsule.toml`.

mod capsule_toml;
mod docker;
mod heroku;
mod platforms;

pub use capsule_toml::{Declared, capsule_toml};
pub use docker::{DOCKERFILES, compose, dockerfile};
pub use heroku::{app_json, aptfile, procfile};
pub use platforms::others;

use crate::bounds::{MAX_PROCESSES, is_process_name, truncate_to};
use crate::plan::PlanError;

/// The error of a file that declares more process types than an application may have.
fn too_many_processes(file: &str, line: Option<usize>) -> PlanError {
    let message = format!("more than {MAX_PROCESSES} process types are declared");
    PlanError { file: file.into(), line, message }
}

fn check_process_name(name: &str, file: &str, line: Option<usize>) -> Result<(), PlanError> {
    if is_process_name(name) {
        return Ok(());
    }
    Err(PlanError {
        file: file.into(),
        line,
        message: format!(
            "`{}` is not a valid process type: use a-z, 0-9, - and _, at most 30 characters",
            truncate_to(name, 200)
        ),
    })
}
