//! What the making of one plan may cost. All detectors spend from the same budget, whatever a repository
//! makes them do.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use crate::plan::PlanError;

/// Files and folders that are opened.
const MOST_OPENED: u32 = 20_000;
/// Bytes that are read.
const MOST_BYTES: u64 = 64 << 20;
/// Entries of folders that are listed.
const MOST_ENTRIES: u64 = 1_000_000;
/// Folders that are planned as if each were a repository: members, modules.
const MOST_MEMBERS: u32 = 2_000;
/// Parts of a path.
pub const MOST_PARTS: usize = 64;
/// Wall time.
const MOST_TIME: Duration = Duration::from_secs(30);
/// Bytes of text that are searched for the lines where things stand. Behind them, lines are unknown.
const MOST_SEARCHED: usize = 512 << 20;

thread_local! {
    /// What is left of [`MOST_SEARCHED`] for the plan that this thread makes. Of the thread and not of the
    /// budget: a line is looked for in a text, which knows no repository.
    static SEARCHABLE: Cell<usize> = const { Cell::new(MOST_SEARCHED) };
}

/// Whether so many bytes may still be searched by the plan that this thread makes.
pub fn may_search(bytes: usize) -> bool {
    SEARCHABLE.with(|left| {
        let enough = left.get().checked_sub(bytes.max(1));
        left.set(enough.unwrap_or_default());
        enough.is_some()
    })
}

/// What is left for one plan. Once something is used up, nothing more is read or listed.
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
        SEARCHABLE.set(MOST_SEARCHED);
        Self {
            opened: Cell::new(MOST_OPENED),
            bytes: Cell::new(MOST_BYTES),
            entries: Cell::new(MOST_ENTRIES),
            members: Cell::new(MOST_MEMBERS),
            until: Instant::now() + MOST_TIME,
            exceeded: RefCell::default(),
        }
    }
}

impl Budget {
    /// Spends one file or folder that is opened.
    pub fn open(&self, path: &str) -> bool {
        if Instant::now() > self.until {
            return self.refuse(path, &format!("it takes longer than {} s", MOST_TIME.as_secs()));
        }
        self.spend(&self.opened, 1, path, || format!("more than {MOST_OPENED} files and folders would be opened"))
    }

    /// Spends bytes that were read.
    pub fn read(&self, bytes: usize, path: &str) -> bool {
        self.spend(&self.bytes, bytes as u64, path, || format!("more than {} MiB would be read", MOST_BYTES >> 20))
    }

    /// Spends entries of a folder.
    pub fn list(&self, entries: usize, path: &str) -> bool {
        self.spend(&self.entries, entries as u64, path, || format!("its folders hold more than {MOST_ENTRIES} entries"))
    }

    /// Spends a folder that is planned by itself.
    pub fn enter(&self, path: &str) -> bool {
        self.spend(&self.members, 1, path, || format!("more than {MOST_MEMBERS} members and modules would be looked into"))
    }

    /// Fails if anything was used up.
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
                "the repository costs more than a plan may: {why}. Name the folder that is deployed in capsule.toml ([build] root = \"…\"), or leave out what is built or downloaded (.capsuleignore)"
            ),
        });
        false
    }
}
