//! How the limits follow the database's health, between a floor and the limit itself: additive increase, multiplicative
//! decrease, as TCP does it (RFC 5681, section 3.1).

use std::{
    num::NonZeroU32,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Of the limit, per second.
const INCREASE: f64 = 0.05;
const DECREASE: f64 = 0.7;
/// Seconds after a decrease before the next change: its effect must be seen first.
const SETTLE: u32 = 2;

/// When the database counts as strained, and how far the limits then fall.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Events per second of the whole group from the main topic, below which the pace does not fall. The other budgets fall
    /// by the same share.
    pub floor: NonZeroU32,
    /// A commit that takes longer than this, in the mean of a second, is slow.
    pub commit_within: Duration,
    /// More sessions than this that wait for a lock in this database are too many, whoever they are.
    pub lock_waits: u32,
}

/// What this instance has seen of its own commits since it was asked last.
#[derive(Debug, Default)]
pub(crate) struct Commits {
    count: AtomicU64,
    micros: AtomicU64,
}

impl Commits {
    pub(crate) fn took(&self, time: Duration) {
        self.count.fetch_add(1, Ordering::Relaxed);
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.micros.fetch_add(micros, Ordering::Relaxed);
    }

    /// The mean of those since the last call; `None` without any.
    pub(crate) fn take_mean(&self) -> Option<Duration> {
        let count = self.count.swap(0, Ordering::Relaxed);
        let micros = self.micros.swap(0, Ordering::Relaxed);
        micros.checked_div(count).map(Duration::from_micros)
    }
}

/// The share of the limits that is in force; pure.
#[derive(Debug)]
pub(crate) struct Regulator {
    pace: Pace,
    share: f64,
    settling: u32,
}

impl Regulator {
    pub(crate) fn new(pace: Pace) -> Self {
        Self {
            pace,
            share: 1.0,
            settling: 0,
        }
    }

    /// The share for the next second. `limit` is what the group may take from the main topic; without one there is nothing
    /// to take a share of.
    pub(crate) fn next(&mut self, commit: Option<Duration>, lock_waits: u32, limit: Option<NonZeroU32>) -> f64 {
        let Some(limit) = limit else { return 1.0 };
        let floor = (f64::from(self.pace.floor.get()) / f64::from(limit.get())).min(1.0);
        let strained =
            lock_waits > self.pace.lock_waits || commit.is_some_and(|commit| commit > self.pace.commit_within);
        if self.settling > 0 {
            self.settling -= 1;
        } else if strained {
            self.share *= DECREASE;
            self.settling = SETTLE;
        } else {
            self.share += INCREASE;
        }
        self.share = self.share.clamp(floor, 1.0);
        self.share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAST: Option<Duration> = Some(Duration::from_millis(5));
    const SLOW: Option<Duration> = Some(Duration::from_millis(80));
    const LIMIT: Option<NonZeroU32> = NonZeroU32::new(1_000);

    fn regulator() -> Regulator {
        Regulator::new(Pace {
            floor: NonZeroU32::new(100).expect("not zero"),
            commit_within: Duration::from_millis(50),
            lock_waits: 10,
        })
    }

    #[test]
    fn it_falls_by_a_factor_to_the_floor_and_rises_by_steps_to_the_limit() {
        let mut regulator = regulator();
        assert_eq!(regulator.next(FAST, 0, LIMIT), 1.0);
        assert_eq!(regulator.next(SLOW, 0, LIMIT), 0.7);
        assert_eq!(
            regulator.next(SLOW, 0, LIMIT),
            0.7,
            "the first change has to show first"
        );
        assert_eq!(regulator.next(SLOW, 0, LIMIT), 0.7);
        assert!((regulator.next(SLOW, 0, LIMIT) - 0.49).abs() < 1e-9);
        for _ in 0..60 {
            regulator.next(SLOW, 0, LIMIT);
        }
        assert_eq!(regulator.next(SLOW, 0, LIMIT), 0.1);
        let mut shares = Vec::new();
        for _ in 0..30 {
            shares.push(regulator.next(FAST, 0, LIMIT));
        }
        assert!(shares.is_sorted());
        assert_eq!(shares.last(), Some(&1.0));
    }

    #[test]
    fn lock_waits_are_strain_and_silence_is_none() {
        let mut regulator = regulator();
        assert!(regulator.next(FAST, 11, LIMIT) < 1.0);
        let mut last = 0.0;
        for _ in 0..20 {
            last = regulator.next(None, 10, LIMIT);
        }
        assert_eq!(last, 1.0);
    }

    #[test]
    fn without_a_limit_there_is_nothing_to_regulate() {
        assert_eq!(regulator().next(SLOW, 100, None), 1.0);
    }

    #[test]
    fn the_mean_is_of_the_commits_since_the_last_look() {
        let commits = Commits::default();
        assert_eq!(commits.take_mean(), None);
        commits.took(Duration::from_millis(10));
        commits.took(Duration::from_millis(30));
        assert_eq!(commits.take_mean(), Some(Duration::from_millis(20)));
        assert_eq!(commits.take_mean(), None);
    }
}
