//! What a repository says of itself, from the weakest word to the strongest: files made for other
//! platforms, `app.json`, `Procfile`, a compose file, a Dockerfile, and above all `capsule.toml`.

mod capsule_toml;
mod docker;
mod heroku;
mod platforms;

pub use capsule_toml::{Declared, capsule_toml};
pub use docker::{DOCKERFILES, compose, dockerfile};
pub use heroku::{app_json, aptfile, procfile};
pub use platforms::others;

use crate::plan::PlanError;

fn check_process_name(name: &str, file: &str, line: Option<usize>) -> Result<(), PlanError> {
    let fits = (1..=30).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_');
    if fits {
        return Ok(());
    }
    Err(PlanError { file: file.into(), line, message: format!("`{name}` is no process type: use a-z, 0-9, - and _, at most 30") })
}
