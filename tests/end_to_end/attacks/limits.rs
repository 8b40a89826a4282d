//! Disk and inode limits of applications and builds, and file systems that are read-only.

use libtest_mimic::Trial;

pub fn trials() -> Vec<Trial> {
    Vec::new()
}
