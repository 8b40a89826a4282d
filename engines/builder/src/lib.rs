//! From an archive and a plan to a release: unpack, build in a sandbox with the host's toolchains,
//! and set aside what is run or served.

pub mod archive;
mod release;
mod steps;
mod toolchains;

pub use release::{SiteError, collect_site};
pub use steps::{BuildError, Builder, Job, say};
pub use toolchains::{Settings, Toolchains};
