//! The last restrictions of a sandbox before it starts the user's command: it closes inherited descriptors, leaves the
//! session keyring of the server, and filters system calls.

use keyutils::Keyring;

use crate::descriptors;
use crate::seccomp::{self, Relaxation};

/// Confines the calling process and its children. The process must have one thread and `no_new_privs`.
///
/// # Errors
/// When system calls cannot be filtered, or the application may use keyrings and cannot have its own.
pub fn confine(relaxations: &[Relaxation]) -> Result<(), String> {
    descriptors::close_on_exec();
    // Without permission to use keyrings, this may fail: the filter rejects their system calls.
    if let Err(error) = Keyring::join_anonymous_session()
        && (relaxations.contains(&Relaxation::Keyrings) || relaxations.contains(&Relaxation::Unconfined))
    {
        return Err(format!("cannot create a session keyring: {error}"));
    }
    seccomp::install(relaxations)
}
