//! From a repository's files to a plan: what it is, how it is built, what is run.
//!
//! Nothing is executed and nothing is guessed silently: each conclusion carries the file and line
//! it came from, and where there is doubt, the plan asks, and says what would settle it.
//!
//! Precedence, highest first: `capsule.toml`, `Procfile`, the framework, the language.

mod declared;
mod languages;
mod plan;
mod tree;

pub use declared::Declared;
pub use plan::{
    Build, Detection, Draft, Evidence, Kind, Member, Networking, Plan, PlanError, Question, Range, Resources, Scaling,
};
pub use tree::{Folder, Memory, Tree};

/// Makes the plan of a tree.
///
/// # Errors
/// When a file that decides is malformed: which file, which line, and what is wrong.
pub fn plan(tree: &dyn Tree) -> Result<Plan, PlanError> {
    let mut draft = Draft::default();
    languages::detect(tree, &mut draft)?;
    declared::procfile(tree, &mut draft)?;
    declared::capsule_toml(tree, &mut draft)?;
    Ok(draft.finish())
}

#[cfg(test)]
mod tests;
