use std::collections::{HashMap, HashSet};

/// Keeps a key's second event back until the key's partition is known to hold a batch of this producer.
///
/// A broker checks that the batches of a producer follow each other only on partitions where it already has one of them;
/// before that it takes any sequence number (KAFKA-15591, KAFKA-19880). So if a partition's first batch is refused, or has to
/// be tried again, a batch behind it that is already on its way is written, and a key's later event stands before its
/// earlier one (HAZARDS H31). Once each partition has an acknowledged event, nothing is kept back any more. Not covered is a
/// partition that has been idle for longer than the broker remembers a producer (`producer.id.expiration.ms`, a day).
#[derive(Debug, Default)]
pub(crate) struct FirstBatches {
    /// Partitions of the topic.
    partitions: usize,
    /// Those with an acknowledged event of this producer.
    begun: HashSet<i32>,
    /// Keys sent while some partition had none.
    keys: HashMap<Box<[u8]>, Key>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    /// Its first event is on its way.
    First,
    /// Its partition has begun.
    Begun,
}

impl FirstBatches {
    pub(crate) fn new(partitions: usize) -> Self {
        Self {
            partitions,
            ..Self::default()
        }
    }

    /// Whether the next event of the key may leave now.
    pub(crate) fn may_follow(&self, key: &[u8]) -> bool {
        self.keys.get(key) != Some(&Key::First)
    }

    pub(crate) fn sent(&mut self, key: &[u8]) {
        if !self.all_begun() && !self.keys.contains_key(key) {
            self.keys.insert(key.into(), Key::First);
        }
    }

    pub(crate) fn acknowledged(&mut self, key: &[u8], partition: i32) {
        if self.keys.is_empty() {
            return;
        }
        self.begun.insert(partition);
        if let Some(state) = self.keys.get_mut(key) {
            *state = Key::Begun;
        }
        if self.all_begun() {
            // What is still on its way may be in the batch that fails, whatever came through behind it.
            self.keys.retain(|_, state| *state == Key::First);
        }
    }

    fn all_begun(&self) -> bool {
        self.begun.len() >= self.partitions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_waits_for_its_first_event_only() {
        let mut first = FirstBatches::new(2);
        first.sent(b"a");
        assert!(!first.may_follow(b"a"));
        assert!(first.may_follow(b"b"));
        first.acknowledged(b"a", 0);
        assert!(first.may_follow(b"a"));
        first.sent(b"a");
        assert!(first.may_follow(b"a"), "its partition has begun");
    }

    #[test]
    fn once_every_partition_has_begun_only_what_was_on_its_way_waits() {
        let mut first = FirstBatches::new(2);
        for key in [b"a", b"b", b"c"] {
            first.sent(key);
        }
        first.acknowledged(b"b", 0);
        first.acknowledged(b"c", 1);
        assert!(!first.may_follow(b"a"), "its batch may have failed");
        first.sent(b"d");
        assert!(first.may_follow(b"d"));
        first.acknowledged(b"a", 0);
        assert!(first.may_follow(b"a"));
        assert!(first.keys.is_empty());
    }
}
