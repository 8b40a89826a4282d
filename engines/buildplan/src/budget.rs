//! The budget of one plan: limits that all its detectors share.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use crate::plan::PlanError;

/// Files and folders that are opened.
const MAX_OPENED: u32 = 20_000;
/// Bytes that are read.
const MAX_BYTES: u64 = 64 << 20;
/// Entries of folders that are listed.
const MAX_ENTRIES: u64 = 1_000_000;
/// Folders that are planned like a repository: members, modules.
const MAX_MEMBERS: u32 = 2_000;
/// Parts of a path.
pub const MAX_PARTS: usize = 64;
/// Wall time.
const MAX_TIME: Duration = Duration::from_secs(30);
/// Bytes of text that are searched for line numbers. After that, lines are unknown.
const MAX_SEARCHED_BYTES: usize = 512 << 20;

thread_local! {
    /// The rest of [`MAX_SEARCHED_BYTES`] for the plan that this thread makes. It is not in [`Budget`], because searches
    /// have a text only, no repository.
    static SEARCHABLE: Cell<usize> = const { Cell::new(MAX_SEARCHED_BYTES) };
}

/// Spends bytes to be searched. Returns whether the budget allows them.
pub fn may_search(bytes: usize) -> bool {
    SEARCHABLE.with(|left| {
        let enough = left.get().checked_sub(bytes.max(1));
        left.set(enough.unwrap_or_default());
        enough.is_some()
    })
}

/// The remaining budget of one plan. Once a limit is exceeded, nothing more is read or listed.
#[derive(Debug)]
pub struct Budget {
    opened: Cell<u32>,
    bytes: Cell<u64>,
    entries: Cell<u64>,
    members: Cell<u32>,
    until: Instant,
    exceeded: RefCell<Option<PlanError>>,
}

impl Default for Budget {
    fn default() -> Self {
        SEARCHABLE.set(MAX_SEARCHED_BYTES);
        Self {
            opened: Cell::new(MAX_OPENED),
            bytes: Cell::new(MAX_BYTES),
            entries: Cell::new(MAX_ENTRIES),
            members: Cell::new(MAX_MEMBERS),
            until: Instant::now() + MAX_TIME,
            exceeded: RefCell::default(),
        }
    }
}

impl Budget {
    /// Spends one file or folder to be opened.
    pub fn open(&self, path: &str) -> bool {
        if Instant::now() > self.until {
            return self.refuse(path, &format!("making the plan takes longer than {} s", MAX_TIME.as_secs()));
        }
        self.spend(&self.opened, 1, path, || format!("more than {MAX_OPENED} files and folders would be opened"))
    }

    /// Spends bytes that were read.
    pub fn read(&self, bytes: usize, path: &str) -> bool {
        self.spend(&self.bytes, bytes as u64, path, || format!("more than {} MiB would be read", MAX_BYTES >> 20))
    }

    /// Spends entries of a folder.
    pub fn list(&self, entries: usize, path: &str) -> bool {
        self.spend(&self.entries, entries as u64, path, || format!("its folders hold more than {MAX_ENTRIES} entries"))
    }

    /// Spends a folder that is planned by itself.
    pub fn enter(&self, path: &str) -> bool {
        self.spend(&self.members, 1, path, || format!("more than {MAX_MEMBERS} members and modules would be looked into"))
    }

    /// Fails if a limit was exceeded.
    pub fn check(&self) -> Result<(), PlanError> {
        self.exceeded.borrow().clone().map_or(Ok(()), Err)
    }

    fn spend<T>(&self, left: &Cell<T>, amount: T, path: &str, why: impl FnOnce() -> String) -> bool
    where
        T: Copy + Default + PartialOrd + std::ops::Sub<Output = T>,
    {
        if self.exceeded.borrow().is_some() {
            return false;
        }
        if left.get() < amount {
            left.set(T::default());
            return self.refuse(path, &why());
        }
        left.set(left.get() - amount);
        true
    }

    fn refuse(&self, path: &str, why: &str) -> bool {
        self.exceeded.borrow_mut().get_or_insert_with(|| PlanError {
            file: if path.is_empty() { ".".into() } else { path.into() },
            line: None,
            message: format!(
                "the repository is too large to plan: {why}. Name the folder that is deployed in capsule.toml ([build] root = \"…\"), or leave out what is built or downloaded (.capsuleignore)"
            ),
        });
        false
    }
}
