//! Which records are done with, where many are worked on at a time and end in any order.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};

/// The records of each partition that were begun, and whether they are done with.
#[derive(Debug, Default)]
pub struct Offsets {
    partitions: Mutex<HashMap<(String, i32), BTreeMap<i64, bool>>>,
}

impl Offsets {
    pub fn begin(&self, topic: &str, partition: i32, offset: i64) {
        let mut partitions = self.partitions.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = partitions.entry((topic.to_owned(), partition)).or_default();
        // It was given away and came back: what is known of it is of its earlier time here.
        if begun.last_key_value().is_some_and(|(last, _)| *last >= offset) {
            begun.clear();
        }
        begun.insert(offset, false);
    }

    /// Marks a record as done with. The last offset before which all are, if this moved it.
    pub fn done(&self, topic: &str, partition: i32, offset: i64) -> Option<i64> {
        let mut partitions = self.partitions.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = partitions.get_mut(&(topic.to_owned(), partition))?;
        *begun.get_mut(&offset)? = true;
        let mut last = None;
        while let Some(entry) = begun.first_entry().filter(|entry| *entry.get()) {
            last = Some(entry.remove_entry().0);
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use super::Offsets;

    #[test]
    fn an_offset_is_committed_once_all_before_it_are_done_with() {
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
    fn a_partition_that_comes_back_begins_anew() {
        let offsets = Offsets::default();
        offsets.begin("t", 0, 5);
        offsets.begin("t", 0, 6);
        offsets.begin("t", 0, 5);
        assert_eq!(offsets.done("t", 0, 6), None, "of its earlier time here");
        assert_eq!(offsets.done("t", 0, 5), Some(5));
    }
}
