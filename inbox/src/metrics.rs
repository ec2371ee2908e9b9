use std::time::Duration;

use opentelemetry::{
    KeyValue, global,
    metrics::{Counter, Histogram},
};
use time::OffsetDateTime;

use crate::{
    handler::Reason,
    ordering::KeyState,
    rate_limit::{Budget, RateLimits},
    retry::Step,
    status::Status,
};

const SECONDS: [f64; 15] = [
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 600.0,
];

/// The engine's instruments. Labels are topics, tiers and fixed names; ids never.
pub(crate) struct Metrics {
    applied: Counter<u64>,
    duplicates: Counter<u64>,
    skipped: Counter<u64>,
    parked: Counter<u64>,
    scheduled: Counter<u64>,
    dead_letters: Counter<u64>,
    faults: Counter<u64>,
    rebalances: Counter<u64>,
    lost: Counter<u64>,
    limiter_wait: Histogram<f64>,
    stage: Histogram<f64>,
    consume: [KeyValue; 1],
    apply: [KeyValue; 1],
    end_to_end: [KeyValue; 1],
}

impl Metrics {
    pub(crate) fn new(status: &Status, limits: &RateLimits) -> Self {
        let meter = global::meter("inbox");
        let counter = |name: &'static str, description: &'static str| {
            meter
                .u64_counter(name)
                .with_unit("{message}")
                .with_description(description)
                .build()
        };
        let histogram = |name: &'static str, description: &'static str| {
            meter
                .f64_histogram(name)
                .with_unit("s")
                .with_description(description)
                .with_boundaries(SECONDS.to_vec())
                .build()
        };
        let stage = |name: &'static str| [KeyValue::new("stage", name)];
        observe(status, limits);
        let metrics = Self {
            applied: counter("inbox.applied", "events that took effect"),
            duplicates: counter("inbox.duplicates", "events that had taken effect before"),
            skipped: counter("inbox.skipped", "events of a type that is not for this service"),
            parked: counter("inbox.parked", "events that were parked behind their key"),
            scheduled: counter("retry.scheduled", "events put into a retry tier"),
            dead_letters: counter("dead_letter.messages", "events put into the dead-letter topic"),
            faults: counter(
                "inbox.platform.faults",
                "tries that failed because database or broker were away",
            ),
            lost: counter("inbox.lost", "records deleted from their topic before they were read"),
            rebalances: counter("inbox.rebalances", "changes of the partitions owned"),
            limiter_wait: histogram("limiter.wait.duration", "time a batch waited for the rate limit"),
            stage: histogram("flow.stage.duration", "Time of one stage of the flow"),
            consume: stage("consume"),
            apply: stage("apply"),
            end_to_end: stage("end_to_end"),
        };
        // A counter that appears with its first event has not risen, for whoever watches the rise.
        for counter in [
            &metrics.applied,
            &metrics.duplicates,
            &metrics.skipped,
            &metrics.parked,
            &metrics.faults,
        ] {
            counter.add(0, &[]);
        }
        metrics
    }

    pub(crate) fn waited(&self, budget: Budget, wait: Duration) {
        self.limiter_wait
            .record(wait.as_secs_f64(), &[KeyValue::new("budget", budget.as_str())]);
    }

    /// From the record's timestamp to its batch.
    pub(crate) fn consumed(&self, timestamp_ms: Option<i64>) {
        if let Some(timestamp_ms) = timestamp_ms {
            let age_ms = now_ms().saturating_sub(timestamp_ms);
            // Clocks of two machines may disagree; a negative age counts as none.
            self.stage.record(age_ms.max(0) as f64 / 1e3, &self.consume);
        }
    }

    /// One transaction, from begin to commit.
    pub(crate) fn transaction(&self, took: Duration) {
        self.stage.record(took.as_secs_f64(), &self.apply);
    }

    /// `decided` is when the change was decided at the other service.
    pub(crate) fn applied(&self, decided: OffsetDateTime) {
        self.applied.add(1, &[]);
        let age = (OffsetDateTime::now_utc() - decided).as_seconds_f64();
        self.stage.record(age.max(0.0), &self.end_to_end);
    }

    pub(crate) fn duplicate(&self) {
        self.duplicates.add(1, &[]);
    }

    pub(crate) fn parked(&self) {
        self.parked.add(1, &[]);
    }

    pub(crate) fn skipped(&self) {
        self.skipped.add(1, &[]);
    }

    pub(crate) fn redirected(&self, step: Step, reason: &Reason) {
        let error_type = KeyValue::new("error.type", reason.error_type.to_string());
        match step {
            Step::Retry { tier, .. } => {
                let tier = KeyValue::new("tier", i64::try_from(tier).unwrap_or(i64::MAX));
                self.scheduled.add(1, &[error_type, tier]);
            }
            Step::DeadLetter => self.dead_letters.add(1, &[error_type]),
        }
    }

    pub(crate) fn fault(&self) {
        self.faults.add(1, &[]);
    }

    pub(crate) fn lost(&self, topic: &str, partition: i32, records: u64) {
        self.lost.add(records, &labels(topic, partition));
    }

    pub(crate) fn rebalance(&self, kind: &'static str) {
        self.rebalances.add(1, &[KeyValue::new("kind", kind)]);
    }
}

pub(crate) fn now_ms() -> i64 {
    i64::try_from(OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000).unwrap_or(i64::MAX)
}

type HeldCount = (KeyState, i64, i64);
/// Name, unit, description, and which number of a count.
type HeldGauge = (&'static str, &'static str, &'static str, fn(&HeldCount) -> i64);

/// Of the whole group, as this instance last saw them.
const HELD_GAUGES: [HeldGauge; 2] = [
    (
        "inbox.held.keys",
        "{key}",
        "keys whose events wait for one of them",
        |(_, keys, _)| *keys,
    ),
    (
        "inbox.parked.events",
        "{message}",
        "events that wait behind their key",
        |(_, _, parked)| *parked,
    ),
];

/// Gauges are read at each scrape. What is not known is absent, never 0.
fn observe(status: &Status, limits: &RateLimits) {
    let meter = global::meter("inbox");
    let seen = status.downgrade();
    meter
        .i64_observable_gauge("inbox.lag")
        .with_unit("{message}")
        .with_description("records on the topic that are not finished")
        .with_callback(move |observer| {
            for partition in seen.upgrade().iter().flat_map(|status| status.snapshot().partitions) {
                if let Some(lag) = partition.lag {
                    observer.observe(lag, &labels(&partition.topic, partition.partition));
                }
            }
        })
        .build();
    let seen = status.downgrade();
    meter
        .f64_observable_gauge("inbox.lag.time")
        .with_unit("s")
        .with_description("age of the oldest record that is not finished")
        .with_callback(move |observer| {
            for partition in seen.upgrade().iter().flat_map(|status| status.snapshot().partitions) {
                if let Some(age) = partition.oldest_age_seconds {
                    observer.observe(age, &labels(&partition.topic, partition.partition));
                }
            }
        })
        .build();
    let seen = status.downgrade();
    meter
        .f64_observable_gauge("inbox.drain.time")
        .with_unit("s")
        .with_description(
            "time until the main topic's partitions of this instance have nothing left; absent while not known",
        )
        .with_callback(move |observer| {
            if let Some(seconds) = seen.upgrade().and_then(|status| status.snapshot().drain_seconds) {
                observer.observe(seconds, &[]);
            }
        })
        .build();
    for (name, unit, description, of) in HELD_GAUGES {
        let seen = status.downgrade();
        meter
            .i64_observable_gauge(name)
            .with_unit(unit)
            .with_description(description)
            .with_callback(move |observer| {
                let held = seen.upgrade().and_then(|status| status.snapshot().held);
                // A state that is not in the table has no keys, once the table has been asked.
                for state in KeyState::ALL.iter().filter(|_| held.is_some()) {
                    let counted = held.iter().flatten().find(|(counted, _, _)| counted == state);
                    observer.observe(counted.map_or(0, of), &[KeyValue::new("state", state.as_str())]);
                }
            })
            .build();
    }
    let limits = limits.clone();
    meter
        .f64_observable_gauge("limiter.rate")
        .with_unit("{message}/s")
        .with_description("this instance's share of the limit; absent while unlimited")
        .with_callback(move |observer| {
            for budget in Budget::ALL {
                if let Some(share) = limits.share(budget) {
                    observer.observe(share, &[KeyValue::new("budget", budget.as_str())]);
                }
            }
        })
        .build();
}

fn labels(topic: &str, partition: i32) -> [KeyValue; 2] {
    [
        KeyValue::new("topic", topic.to_owned()),
        KeyValue::new("partition", i64::from(partition)),
    ]
}
