//! Runs workloads as processes, each in a sandbox and owned by a shim of its own.
//!
//! Three roles of the one binary take part:
//!
//! - the *runtime* ([`ProcessRuntime`]) starts shims, finds them again after a restart, queries and stops them;
//! - a *shim* ([`shim::run`]) owns one workload for its whole life: it starts it, restarts it when it crashes, writes
//!   its output to files, and serves requests on a Unix socket. It outlives the control plane;
//! - the *sandbox* ([`sandbox::run`]) is the first process of the workload's PID namespace: it builds the file system
//!   that the workload sees, drops every privilege, and starts the workload.
//!
//! The control plane may crash at any time: output does not go through it, and it finds a shim again by its socket, whose
//! name is that of the instance.

mod cgroup;
mod confine;
pub mod descriptors;
mod disk;
mod firewall;
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
mod unlinked;
pub mod uplink;

pub use cgroup::{Watch, unenforced_limits};
pub use disk::{Disk, Enforcement};
pub use mask::Mask;
pub use network::{prepare_host, restore_host};
pub use process::{ProcessRuntime, RunHandle, RunOutcome, RuntimeError};
pub use protocol::{ShimState, ShimStatus, connect, listen, send_connection};
pub use quota::is_available as has_project_quotas;
pub use seccomp::Relaxation;
pub use spec::{Limits, Mount, Network, Spec, Writes};
