//! What the command line does with wrong targets, misspelt names and hostile output.

use libtest_mimic::Trial;

pub fn trials() -> Vec<Trial> {
    Vec::new()
}
