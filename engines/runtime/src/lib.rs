//! Runs processes: each in a sandbox, owned by a shim of its own.
//!
//! Three roles of the one binary take part:
//!
//! - the *runtime* ([`ProcessRuntime`]) starts shims, finds them again, asks and stops them;
//! - a *shim* ([`shim::run`]) owns one workload for its whole life: it starts it, starts it again
//!   when it crashes, keeps its output in files and answers over a Unix socket. It outlives the
//!   control plane;
//! - the *sandbox* ([`sandbox::run`]) is the first process of the workload's own PID namespace: it
//!   builds the file system the workload sees, gives up every privilege, and starts it.
//!
//! The control plane may die at any instant. Nothing a workload prints goes through it, and a shim
//! is found again by its socket: who answers under an instance's name is that instance.

mod cgroup;
mod confine;
pub mod descriptors;
mod disk;
mod firewall;
mod held;
mod layers;
pub mod logs;
mod mask;
mod network;
mod process;
mod protocol;
mod quota;
pub mod sandbox;
mod seccomp;
pub mod shim;
mod spec;
mod throttle;
pub mod trees;
pub mod uplink;

pub use cgroup::{Watch, unenforced};
pub use disk::{Disk, Enforcement};
pub use mask::Mask;
pub use network::{keep_host_prepared, prepare_host};
pub use process::{Ended, Once, ProcessRuntime, RuntimeError};
pub use protocol::{ShimState, ShimStatus, connect, hand_over, listen};
pub use quota::is_available as has_project_quotas;
pub use seccomp::Relaxation;
pub use spec::{Limits, Mount, Network, Spec, Writes};
