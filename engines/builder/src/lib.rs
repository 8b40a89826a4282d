//! From an archive and a plan to a release: unpack, build in a sandbox with the host's toolchains,
//! and set aside what is run or served; or to an image, built by Docker Engine.

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
pub use steps::{BuildError, Builder, Job, evict, remove_cache, say};
pub use toolchains::{Settings, Toolchains};
pub use versions::{Versions, local_mismatches};

/// The uid and gid of `nobody`, which own no file.
const NOBODY_UID: u32 = 65534;
