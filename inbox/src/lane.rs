use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};

use tokio_util::sync::CancellationToken;

use crate::{queue::Queue, rate_limit::Budget};

const UNKNOWN: i64 = -1;

/// A partition while it is assigned: what the poll thread and the worker share.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) topic: Arc<str>,
    pub(crate) partition: i32,
    /// The retry tier whose topic this is; `None` for the main topic.
    pub(crate) tier: Option<usize>,
    pub(crate) queue: Queue,
    /// Cancelled when the partition is revoked or the engine stops: the batch in flight is the last.
    pub(crate) cancel: CancellationToken,
    finished: AtomicI64,
    lag: AtomicI64,
    in_hand_ms: AtomicI64,
}

impl Lane {
    pub(crate) fn new(topic: Arc<str>, partition: i32, tier: Option<usize>) -> Self {
        Self {
            topic,
            partition,
            tier,
            queue: Queue::default(),
            cancel: CancellationToken::new(),
            finished: AtomicI64::new(UNKNOWN),
            lag: AtomicI64::new(UNKNOWN),
            in_hand_ms: AtomicI64::new(UNKNOWN),
        }
    }

    pub(crate) fn budget(&self) -> Budget {
        if self.tier.is_some() {
            Budget::Retry
        } else {
            Budget::Live
        }
    }

    /// The offset up to which (exclusive) everything is committed or redirected; `None` until the first batch is.
    pub(crate) fn finished(&self) -> Option<i64> {
        known(&self.finished)
    }

    /// Everything before `offset` is done.
    pub(crate) fn finish_to(&self, offset: i64) {
        self.finished.store(offset, Ordering::Release);
    }

    pub(crate) fn lag(&self) -> Option<i64> {
        known(&self.lag)
    }

    pub(crate) fn set_lag(&self, lag: i64) {
        self.lag.store(lag, Ordering::Relaxed);
    }

    /// The timestamp of the oldest record in the worker's hands; `None` when they are empty.
    pub(crate) fn take_in_hand(&self, oldest_ms: Option<i64>) {
        self.in_hand_ms.store(oldest_ms.unwrap_or(UNKNOWN), Ordering::Relaxed);
    }

    /// The timestamp of the oldest record that is not finished.
    pub(crate) fn oldest_ms(&self) -> Option<i64> {
        known(&self.in_hand_ms).or_else(|| self.queue.oldest_ms())
    }
}

fn known(value: &AtomicI64) -> Option<i64> {
    Some(value.load(Ordering::Acquire)).filter(|value| *value != UNKNOWN)
}
