//! Hostile applications behind the ingress, ambiguous requests, forged headers, and files that no site publishes.

use libtest_mimic::Trial;

pub fn trials() -> Vec<Trial> {
    Vec::new()
}
