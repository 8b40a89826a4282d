//! What a sandbox gives up at last, just before it starts the user's command: descriptors that were left open, the
//! session keyring of whoever started the server, and system calls that an application has no need of.

use keyutils::Keyring;

use crate::descriptors;
use crate::seccomp::{self, Relaxation};

/// Confines the calling process and all that it starts. Called while it has one thread, and after `no_new_privs`.
///
/// # Errors
/// When the kernel does not filter system calls, or a keyring that the application may use cannot be its own.
pub fn confine(relaxations: &[Relaxation]) -> Result<(), String> {
    descriptors::close_on_exec();
    // Without keyrings in the kernel, or none left to this user, there is nothing to use either: the filter refuses it.
    if let Err(error) = Keyring::join_anonymous_session()
        && (relaxations.contains(&Relaxation::Keyrings) || relaxations.contains(&Relaxation::Unconfined))
    {
        return Err(format!("a session keyring: {error}"));
    }
    seccomp::install(relaxations)
}
