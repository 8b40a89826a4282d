//! From a repository's files to a plan: what it is, how it is built, what is run.
//!
//! Nothing is executed and nothing is guessed silently: each conclusion carries the file and line
//! it came from, and where there is doubt, the plan asks, and says what would settle it.
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
pub use frameworks::kept;
pub use frameworks::{Framework, TABLE, Type};
pub use plan::{
    Build, Detection, Disk, Evidence, Kind, Member, Networking, Plan, PlanError, Question, Range, Resources, Scaling,
};
pub use published::{is_published, is_published_folder};
pub use tree::{Listing, MOST_BYTES, Memory, Tree};
pub use versions::{VersionMismatch, is_satisfied, mismatches};
pub use workspace::affected;

use plan::Draft;
use tree::Repo;

/// Files whose word is final: what they settle is not asked any more.
const DECIDE: [&str; 10] = [
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

/// How a plan will be carried out.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Whether images are built and run: a Dockerfile and a compose file are of use then.
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
/// When a file that decides is malformed: which file, which line, and what is wrong; or when the repository
/// costs more than a plan may.
pub fn plan(tree: &dyn Tree) -> Result<Plan, PlanError> {
    plan_with(tree, Options::default())
}

/// As [`plan`], for a particular way to carry it out.
///
/// # Errors
/// As [`plan`].
pub fn plan_with(tree: &dyn Tree, options: Options) -> Result<Plan, PlanError> {
    let repo = Repo::new(tree);
    let planned = make(&repo, options);
    // What ran out of its budget did not see everything, whatever it made of the rest.
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
            workspace::enter(repo, &mut draft, root, plan::Source::line(Declared::FILE, &text, "root"), "capsule.toml says so")?;
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
        let text = format!("{file} is here, but applications run as processes of the server; it was not used");
        draft.ask("build.dockerfile", &text, "[build]\ndockerfile = \"none\"");
    }
    if let Some((declared, text)) = declared {
        declared::capsule_toml(declared, &text, &mut draft);
    }
    Ok(draft.finish())
}

#[cfg(test)]
mod tests;
