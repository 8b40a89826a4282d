//! Makes the plan of a repository from its files: what the application is, how to build it, and what to run.
//!
//! Nothing is executed. Each value of a plan has evidence: the file and line it comes from. An ambiguous value becomes a
//! question with the lines of `capsule.toml` that answer it.
//!
//! Precedence, highest first: `capsule.toml`, a Dockerfile, a compose file, `Procfile`, `app.json`, files
//! made for other platforms, the framework, the language.

mod bounds;
mod budget;
mod declared;
mod dependencies;
mod dockerfile;
mod folder;
mod frameworks;
mod languages;
mod plan;
mod ports;
mod published;
mod tree;
mod versions;
mod workspace;

pub use bounds::{check, truncate_to};
pub use declared::Declared;
pub use dockerfile::{IMAGES, Image, ImageOptions, dockerfile};
pub use folder::Folder;
pub use frameworks::build_cache_folders;
pub use frameworks::{Framework, TABLE, Type};
pub use plan::{
    Build, Detection, Disk, Evidence, Kind, Member, Networking, Plan, PlanError, Question, Range, Resources, Scaling,
};
pub use published::{is_published, is_published_folder};
pub use tree::{Listing, MAX_FILE_BYTES, Memory, Tree};
pub use versions::{VersionMismatch, is_satisfied, mismatches};
pub use workspace::affected;

use plan::Draft;
use tree::Repo;

/// Files whose settings are final: a value from them removes the question about it.
const DECISIVE_FILES: [&str; 10] = [
    "capsule.toml",
    "Procfile",
    "app.json",
    "Dockerfile",
    "nixpacks.toml",
    "railpack.json",
    "railway.json",
    "railway.toml",
    "render.yaml",
    "heroku.yml",
];

/// How the plan will be used.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Whether images are built and run. Otherwise Dockerfiles and compose files are ignored.
    pub containers: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { containers: true }
    }
}

/// Makes the plan of a tree.
///
/// # Errors
/// When a file that a value depends on is malformed (with file and line), or when the repository exceeds a limit.
pub fn plan(tree: &dyn Tree) -> Result<Plan, PlanError> {
    plan_with(tree, Options::default())
}

/// As [`plan`], with options.
///
/// # Errors
/// As [`plan`].
pub fn plan_with(tree: &dyn Tree, options: Options) -> Result<Plan, PlanError> {
    let repo = Repo::new(tree);
    let planned = make(&repo, options);
    // Without budget left, the plan may lack files: its error has precedence.
    let planned = repo.check().and(planned).and_then(|plan| check(&plan).map(|()| plan));
    planned.map_err(PlanError::truncated)
}

fn make(repo: &Repo<'_>, options: Options) -> Result<Plan, PlanError> {
    let declared = Declared::of(repo)?;
    let build = declared.as_ref().map(|(declared, _)| declared.build.clone()).unwrap_or_default();
    let mut draft = Draft::default();
    languages::detect(repo, &mut draft)?;
    declared::others(repo, &mut draft);
    declared::app_json(repo, &mut draft)?;
    declared::procfile(repo, &mut draft)?;
    declared::aptfile(repo, &mut draft);
    match &build.root {
        Some(root) => {
            let text = repo.text(Declared::FILE);
            workspace::enter(repo, &mut draft, root, plan::Source::line(Declared::FILE, &text, "root"), "set in capsule.toml")?;
        }
        None => workspace::detect(repo, &mut draft)?,
    }
    declared::compose(repo, options.containers, &mut draft)?;
    let own_steps = build.dockerfile.is_none() && (build.install.is_some() || build.build.is_some());
    if options.containers && !own_steps {
        declared::dockerfile(repo, build.dockerfile.as_deref(), &mut draft)?;
    }
    if !options.containers
        && build.dockerfile.is_none()
        && let Some(file) = repo.first(&declared::DOCKERFILES)
    {
        let text = format!("{file} is not used: applications run as processes of the server");
        draft.add_question("build.dockerfile", &text, "[build]\ndockerfile = \"none\"");
    }
    if let Some((declared, text)) = declared {
        declared::capsule_toml(declared, &text, &mut draft);
    }
    Ok(draft.finish())
}

#[cfg(test)]
mod tests;
