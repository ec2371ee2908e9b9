use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::{sync::Notify, time::Instant};

use crate::record::Record;

/// A partition is paused when its queue holds this many records or bytes, and resumed at half of both. Records are
/// small (DESIGN §5), so bytes only matter when someone sends large ones; with 48 partitions this bounds all queues
/// together to 24 MiB.
const HIGH_RECORDS: usize = 1_000;
const HIGH_BYTES: usize = 512 * 1024;

/// When a record of a tier is due: its timestamp plus the delay, and not before the time in its header. The timestamp is
/// the broker's and the header a consumer's, so that one of them still holds the delay when a clock here is ahead. The
/// wait is on the monotonic clock and never longer than the delay itself, so that no clock and no forged header can
/// stretch it.
pub(crate) fn due(
    received: Instant,
    wall: SystemTime,
    timestamp_ms: Option<i64>,
    not_before_ms: Option<i64>,
    delay: Duration,
) -> Instant {
    let at = |millis: Option<i64>| {
        millis
            .and_then(|millis| u64::try_from(millis).ok())
            .and_then(|millis| UNIX_EPOCH.checked_add(Duration::from_millis(millis)))
    };
    let stamped = at(timestamp_ms);
    let waited = stamped.map_or(Duration::ZERO, |stamped| {
        wall.duration_since(stamped).unwrap_or_default()
    });
    let rest = delay.saturating_sub(waited);
    let ahead = at(not_before_ms).map_or(Duration::ZERO, |not_before| {
        not_before.duration_since(wall).unwrap_or_default()
    });
    received + rest.max(ahead).min(delay)
}

/// Bounded by the poll thread, which pauses the partition when [`Queue::push`] says so; filled by that thread only and
/// emptied by one worker only.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    state: Mutex<State>,
    filled: Notify,
}

#[derive(Debug, Default)]
struct State {
    records: VecDeque<Record>,
    bytes: usize,
}

impl Queue {
    /// Takes a record in; true if the queue is now full and the partition is to be paused.
    pub(crate) fn push(&self, record: Record) -> bool {
        let mut state = self.lock();
        state.bytes += record.size();
        state.records.push_back(record);
        let full = state.records.len() >= HIGH_RECORDS || state.bytes >= HIGH_BYTES;
        drop(state);
        self.filled.notify_one();
        full
    }

    /// Whether a paused partition may be resumed.
    pub(crate) fn has_room(&self) -> bool {
        let state = self.lock();
        state.records.len() <= HIGH_RECORDS / 2 && state.bytes <= HIGH_BYTES / 2
    }

    /// Waits until the head is due and returns how many records from there on are due, at least 1 and at most `most`.
    /// May be cancelled.
    pub(crate) async fn due(&self, most: usize) -> usize {
        loop {
            let head = {
                let state = self.lock();
                let now = Instant::now();
                match state.records.front() {
                    None => None,
                    Some(head) if head.due > now => Some(head.due),
                    Some(_) => {
                        return state
                            .records
                            .iter()
                            .take(most)
                            .take_while(|record| record.due <= now)
                            .count();
                    }
                }
            };
            match head {
                None => self.filled.notified().await,
                Some(due) => tokio::time::sleep_until(due).await,
            }
        }
    }

    /// Takes up to `most` records off the head.
    pub(crate) fn take(&self, most: usize) -> Vec<Record> {
        let mut state = self.lock();
        let count = most.min(state.records.len());
        let taken: Vec<Record> = state.records.drain(..count).collect();
        let bytes: usize = taken.iter().map(Record::size).sum();
        state.bytes = state.bytes.saturating_sub(bytes);
        taken
    }

    /// The timestamp of the oldest record that waits.
    pub(crate) fn oldest_ms(&self) -> Option<i64> {
        self.lock().records.front().and_then(|record| record.timestamp_ms)
    }

    /// Nothing that is done under this lock can leave the state half changed.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_full_by_count_or_bytes_and_has_room_at_half() {
        let queue = Queue::default();
        let record = |offset, value: &[u8]| Record::new(offset, Some(1), None, Some(value), []);
        let fill = (0..).find(|offset| queue.push(record(*offset, b"x")));
        assert_eq!(fill, Some(HIGH_RECORDS as i64 - 1));
        assert_eq!(queue.take(HIGH_RECORDS / 2 - 1).len(), HIGH_RECORDS / 2 - 1);
        assert!(!queue.has_room());
        queue.take(1);
        assert!(queue.has_room());

        let queue = Queue::default();
        let large = vec![0; HIGH_BYTES / 4];
        let fill = (0..).find(|offset| queue.push(record(*offset, &large)));
        assert_eq!(fill, Some(3));
        assert_eq!(queue.take(10).len(), 4);
        assert!(queue.has_room());
    }

    #[test]
    fn a_record_is_due_after_the_rest_of_its_delay_whatever_the_clocks_say() {
        let delay = Duration::from_secs(30);
        let now = Instant::now();
        let wall = UNIX_EPOCH + Duration::from_secs(1_000);
        let at = |seconds: i64| Some(seconds * 1_000);
        assert_eq!(due(now, wall, at(990), None, delay), now + Duration::from_secs(20));
        assert_eq!(due(now, wall, at(900), None, delay), now);
        // A clock here that is ahead makes every timestamp look old; the header was written by such a clock.
        assert_eq!(due(now, wall, at(900), at(1_025), delay), now + Duration::from_secs(25));
        assert_eq!(due(now, wall, at(990), at(1_001), delay), now + Duration::from_secs(20));
        assert_eq!(due(now, wall, at(900), at(1_000_000), delay), now + delay);
        assert_eq!(due(now, wall, at(900), at(999), delay), now);
        // Stamped in the future, not at all, or with nonsense: the whole delay, no more.
        for timestamp in [at(5_000), None, Some(-1), Some(i64::MAX)] {
            assert_eq!(due(now, wall, timestamp, None, delay), now + delay);
        }
    }
}
