//! Builds releases and images. A release: unpacks an archive, makes a plan, runs its build steps in a sandbox with the
//! host's toolchains, and copies the files of a site. An image: packs a folder for Docker Engine.

pub mod archive;
pub mod images;
pub mod planner;
mod release;
mod reserve;
mod steps;
mod toolchains;
mod versions;

pub use capsule_runtime::trees;
pub use release::{LeftOut, SiteError, collect_site};
pub use reserve::{DiskReserve, ReserveReached};
pub use steps::{BuildError, Builder, Job, evict, log_line, remove_cache};
pub use toolchains::{Settings, Toolchains};
pub use versions::{Versions, local_mismatches};

/// The uid and gid of `nobody`, which own no file.
const NOBODY_UID: u32 = 65534;
