//! Applications that attack the kernel, the network, the host, or the tenant before them.

use libtest_mimic::Trial;

pub fn trials() -> Vec<Trial> {
    Vec::new()
}
