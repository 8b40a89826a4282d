//! The offsets that can be committed while records are handled concurrently and finish in any order.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};

/// The records of each partition that were started, and whether they are done.
#[derive(Debug, Default)]
pub struct Offsets {
    partitions: Mutex<HashMap<(String, i32), BTreeMap<i64, bool>>>,
}

impl Offsets {
    /// Marks a record as started.
    pub fn begin(&self, topic: &str, partition: i32, offset: i64) {
        let mut partitions = self.partitions.lock().unwrap_or_else(PoisonError::into_inner);
        let started = partitions.entry((topic.to_owned(), partition)).or_default();
        // The partition was revoked and assigned again: the entries are from the earlier assignment.
        if started.last_key_value().is_some_and(|(last, _)| *last >= offset) {
            started.clear();
        }
        started.insert(offset, false);
    }

    /// Marks a record as done. Returns the last offset up to which all records are done, if it changed.
    pub fn done(&self, topic: &str, partition: i32, offset: i64) -> Option<i64> {
        let mut partitions = self.partitions.lock().unwrap_or_else(PoisonError::into_inner);
        let started = partitions.get_mut(&(topic.to_owned(), partition))?;
        *started.get_mut(&offset)? = true;
        let mut last = None;
        while let Some(entry) = started.first_entry().filter(|entry| *entry.get()) {
            last = Some(entry.remove_entry().0);
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use super::Offsets;

    #[test]
    fn an_offset_is_committed_once_all_before_it_are_done() {
        let offsets = Offsets::default();
        for offset in 5..9 {
            offsets.begin("t", 0, offset);
        }
        assert_eq!(offsets.done("t", 0, 6), None);
        assert_eq!(offsets.done("t", 0, 8), None);
        assert_eq!(offsets.done("t", 0, 5), Some(6));
        assert_eq!(offsets.done("t", 0, 7), Some(8));
        assert_eq!(offsets.done("t", 1, 7), None);
    }

    #[test]
    fn a_partition_that_is_assigned_again_starts_empty() {
        let offsets = Offsets::default();
        offsets.begin("t", 0, 5);
        offsets.begin("t", 0, 6);
        offsets.begin("t", 0, 5);
        assert_eq!(offsets.done("t", 0, 6), None, "from the earlier assignment");
        assert_eq!(offsets.done("t", 0, 5), Some(5));
    }
}
