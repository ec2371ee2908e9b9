use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use tokio::time::Instant;

use crate::{lane::Lane, metrics::now_ms, ordering::KeyState};

/// What the engine is doing; a handle that may be cloned and kept.
#[derive(Debug, Clone, Default)]
pub struct Status {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    lanes: Vec<Arc<Lane>>,
    joined: bool,
    broker_fault: Option<String>,
    /// Per partition, what its worker waits for. Together they are one fault, logged when the first one begins and
    /// when the last one ends.
    faults: BTreeMap<(Arc<str>, i32), String>,
    /// Why a parked event that failed cannot be sent on.
    unsent: Option<String>,
    paused_by_operator: Option<String>,
    /// Records of the main topic that were not finished, and when; the oldest first.
    backlog: VecDeque<(Instant, i64)>,
    held: Option<Vec<(KeyState, i64, i64)>>,
    lost: u64,
    rebalances: u64,
}

/// A moment's view of a [`Status`].
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// Whether the group has given this instance its place, be it without partitions.
    pub joined: bool,
    /// Why the brokers cannot be reached, if they cannot.
    pub broker_fault: Option<String>,
    /// Why work stands still, if it does: the platform is at fault, or a record that no topic takes. Nothing is lost or
    /// counted as an attempt.
    pub paused: Option<String>,
    /// Why an operator has paused the group, if one has.
    pub paused_by_operator: Option<String>,
    pub partitions: Vec<PartitionStatus>,
    /// Seconds until this instance's partitions of the main topic have nothing left, at the pace of the last half minute;
    /// `None` if that is not known, or never comes because no less is left than before.
    pub drain_seconds: Option<f64>,
    /// Keys held in each state, and the events parked behind them, over the whole group; `None` until the table has been
    /// asked for the first time.
    pub held: Option<Vec<(KeyState, i64, i64)>>,
    /// Records that were deleted from their topic before this instance had read them, since it started.
    pub lost: u64,
    /// Changes of the partitions owned, since it started.
    pub rebalances: u64,
}

#[derive(Debug, Clone, PartialEq)]
pub struct PartitionStatus {
    pub topic: String,
    pub partition: i32,
    /// Records not finished; `None` until the broker has been asked for the first time.
    pub lag: Option<i64>,
    /// Age of the oldest record that is not finished, in seconds; 0 without any.
    pub oldest_age_seconds: Option<f64>,
}

impl Status {
    pub fn snapshot(&self) -> Snapshot {
        let state = self.lock();
        let partitions = state
            .lanes
            .iter()
            .map(|lane| {
                let lag = lane.lag();
                let age = lane
                    .oldest_ms()
                    .map(|oldest| now_ms().saturating_sub(oldest).max(0) as f64 / 1e3);
                PartitionStatus {
                    topic: lane.topic.to_string(),
                    partition: lane.partition,
                    lag,
                    oldest_age_seconds: age.or(lag.filter(|lag| *lag == 0).map(|_| 0.0)),
                }
            })
            .collect();
        let paused = state
            .faults
            .iter()
            .next()
            .map(|((topic, partition), reason)| format!("{topic}[{partition}]: {reason}"))
            .or_else(|| state.unsent.clone());
        Snapshot {
            joined: state.joined,
            broker_fault: state.broker_fault.clone(),
            paused,
            paused_by_operator: state.paused_by_operator.clone(),
            partitions,
            drain_seconds: drain_seconds(&state.backlog),
            held: state.held.clone(),
            lost: state.lost,
            rebalances: state.rebalances,
        }
    }

    /// A parked event that failed is refused by every topic: only an operator can help. `None`: no longer.
    pub(crate) fn unsent(&self, reason: Option<String>) {
        let mut state = self.lock();
        if let Some(reason) = reason.as_ref().filter(|reason| state.unsent.as_ref() != Some(reason)) {
            tracing::error!(reason, "stuck: a parked event can neither take effect nor be sent on");
        }
        state.unsent = reason;
    }

    /// Replaces the assignment after a rebalance.
    pub(crate) fn owns(&self, lanes: Vec<Arc<Lane>>) {
        let mut state = self.lock();
        state.faults.retain(|(topic, partition), _| {
            lanes
                .iter()
                .any(|lane| lane.topic == *topic && lane.partition == *partition)
        });
        state.backlog.clear();
        state.lanes = lanes;
        state.joined = true;
        state.rebalances += 1;
    }

    /// A worker cannot go on because of database or broker.
    pub(crate) fn paused(&self, lane: &Lane, reason: String) {
        let mut state = self.lock();
        if state.faults.is_empty() {
            tracing::warn!(
                topic = &*lane.topic,
                partition = lane.partition,
                reason,
                "paused: the platform is away"
            );
        }
        state.faults.insert((Arc::clone(&lane.topic), lane.partition), reason);
    }

    /// A worker cannot go on with one record although the platform is there: only an operator can help.
    pub(crate) fn stuck(&self, lane: &Lane, reason: String) {
        let mut state = self.lock();
        let place = (Arc::clone(&lane.topic), lane.partition);
        if state.faults.get(&place) != Some(&reason) {
            tracing::error!(
                topic = &*lane.topic,
                partition = lane.partition,
                reason,
                "stuck: a record that cannot be applied cannot be put aside either"
            );
        }
        state.faults.insert(place, reason);
    }

    /// A worker that had been paused or stuck goes on.
    pub(crate) fn resumed(&self, lane: &Lane) {
        let mut state = self.lock();
        let was_paused = state
            .faults
            .remove(&(Arc::clone(&lane.topic), lane.partition))
            .is_some();
        if was_paused && state.faults.is_empty() {
            tracing::info!("resumed: nothing stands still any more");
        }
    }

    /// Notes what is left, for the drain estimate.
    pub(crate) fn sample(&self) {
        let mut state = self.lock();
        let live: Vec<_> = state.lanes.iter().filter(|lane| lane.tier.is_none()).collect();
        let known: Vec<i64> = live.iter().filter_map(|lane| lane.lag()).collect();
        if live.is_empty() || known.len() < live.len() {
            state.backlog.clear();
            return;
        }
        let now = Instant::now();
        let lag = known.iter().sum();
        state.backlog.push_back((now, lag));
        while state
            .backlog
            .front()
            .is_some_and(|(then, _)| now - *then > DRAIN_WINDOW)
        {
            state.backlog.pop_front();
        }
    }

    pub(crate) fn paused_by_operator(&self, reason: Option<String>) {
        let mut state = self.lock();
        match (&state.paused_by_operator, &reason) {
            (None, Some(reason)) => tracing::warn!(reason, "paused by an operator"),
            (Some(_), None) => tracing::info!("an operator lets it go on"),
            _ => {}
        }
        state.paused_by_operator = reason;
    }

    /// Records of a partition are gone unread.
    pub(crate) fn lost(&self, records: u64) {
        self.lock().lost += records;
    }

    pub(crate) fn holds(&self, held: Vec<(KeyState, i64, i64)>) {
        self.lock().held = Some(held);
    }

    pub(crate) fn broker_fault(&self, reason: String) {
        let mut state = self.lock();
        if state.broker_fault.is_none() {
            tracing::warn!(reason, "the brokers cannot be reached");
        }
        state.broker_fault = Some(reason);
    }

    pub(crate) fn broker_reached(&self) {
        if self.lock().broker_fault.take().is_some() {
            tracing::info!("the brokers can be reached again");
        }
    }

    pub(crate) fn downgrade(&self) -> WeakStatus {
        WeakStatus(Arc::downgrade(&self.state))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the drain is estimated from.
const DRAIN_WINDOW: Duration = Duration::from_secs(30);
/// The lag is asked from the broker every five seconds: less says nothing.
const DRAIN_LEAST: Duration = Duration::from_secs(10);

fn drain_seconds(backlog: &VecDeque<(Instant, i64)>) -> Option<f64> {
    let ((then, before), (now, left)) = (backlog.front()?, backlog.back()?);
    if *left == 0 {
        return Some(0.0);
    }
    let window = *now - *then;
    let per_second = (before - left) as f64 / window.as_secs_f64();
    (window >= DRAIN_LEAST && per_second > 0.0).then(|| *left as f64 / per_second)
}

/// For those who outlive the engine: metric callbacks are never unregistered.
#[derive(Debug, Clone)]
pub(crate) struct WeakStatus(Weak<Mutex<State>>);

impl WeakStatus {
    pub(crate) fn upgrade(&self) -> Option<Status> {
        self.0.upgrade().map(|state| Status { state })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drain_is_known_only_while_less_and_less_is_left() {
        let start = Instant::now();
        let at = |seconds, left| (start + Duration::from_secs(seconds), left);
        let estimate = |samples: &[(Instant, i64)]| drain_seconds(&samples.iter().copied().collect());
        assert_eq!(estimate(&[]), None);
        assert_eq!(estimate(&[at(0, 0)]), Some(0.0));
        assert_eq!(estimate(&[at(0, 1_000), at(5, 500)]), None, "too short to say");
        assert_eq!(estimate(&[at(0, 1_000), at(10, 500)]), Some(10.0));
        assert_eq!(estimate(&[at(0, 1_000), at(10, 1_000)]), None);
        assert_eq!(estimate(&[at(0, 1_000), at(10, 2_000)]), None);
    }
}
