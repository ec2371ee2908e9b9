use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use opentelemetry::{
    KeyValue,
    metrics::{Counter, Histogram, Meter},
};
use time::OffsetDateTime;
use tokio::{sync::watch, time::Instant};

use crate::watermark::InFlight;

/// Seconds, from below a millisecond to the length of an outage.
const LATENCY_BUCKETS: [f64; 14] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0,
];

/// What the relay is doing. Set by the relay alone; health, metrics and people read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RelayState {
    /// Connecting to the database and the broker.
    Starting,
    /// Another instance relays; this one takes over when it is gone.
    Standby,
    /// A slot had to be made: rows that it will not stream are published from the table.
    Sweeping,
    /// Following the write-ahead log.
    Streaming,
    /// Publishing from the table.
    Polling,
    /// Still reading its source, but the broker has acknowledged nothing for a while: events gather.
    Stalled,
    /// Waiting to try again; events gather in the table meanwhile.
    Failing {
        reason: String,
    },
    Stopped,
}

impl RelayState {
    /// Stable short name, for labels and JSON.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Standby => "standby",
            Self::Sweeping => "sweeping",
            Self::Streaming => "streaming",
            Self::Polling => "polling",
            Self::Stalled => "stalled",
            Self::Failing { .. } => "failing",
            Self::Stopped => "stopped",
        }
    }
}

impl fmt::Display for RelayState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failing { reason } => write!(formatter, "failing: {reason}"),
            state => formatter.write_str(state.name()),
        }
    }
}

/// Where a relay reads events from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    Wal,
    Poll,
}

impl Source {
    pub fn name(self) -> &'static str {
        match self {
            Self::Wal => "wal",
            Self::Poll => "poll",
        }
    }
}

/// The last change of source by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Switch {
    pub at: OffsetDateTime,
    pub from: Source,
    pub to: Source,
    pub reason: String,
}

/// A moment's view of a relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    pub state: RelayState,
    /// When the state began.
    pub since: Instant,
    pub source: Source,
    pub last_switch: Option<Switch>,
}

/// A handle to read the relay's state; cheap to clone.
#[derive(Debug, Clone)]
pub struct Status {
    view: watch::Receiver<View>,
    seen: Arc<Mutex<Seen>>,
}

impl Status {
    /// The state and how long it has lasted.
    pub fn get(&self) -> (RelayState, Duration) {
        let current = self.view.borrow();
        (current.state.clone(), current.since.elapsed())
    }

    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// What was seen last of backlog and slot, a few seconds ago at most while the database answers.
    pub fn seen(&self) -> Seen {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The relay's side of [`Status`].
#[derive(Debug)]
pub(crate) struct StatusWriter {
    view: watch::Sender<View>,
    seen: Arc<Mutex<Seen>>,
    switches: Counter<u64>,
}

impl StatusWriter {
    pub(crate) fn new(source: Source) -> Self {
        let view = View {
            state: RelayState::Starting,
            since: Instant::now(),
            source,
            last_switch: None,
        };
        let switches = opentelemetry::global::meter("outbox")
            .u64_counter("relay.switches")
            .with_unit("{switch}")
            .with_description("Changes of source that the relay made by itself")
            .build();
        for (from, to) in [(Source::Wal, Source::Poll), (Source::Poll, Source::Wal)] {
            switches.add(0, &switch_labels(from, to));
        }
        Self {
            view: watch::Sender::new(view),
            seen: Arc::default(),
            switches,
        }
    }

    pub(crate) fn reader(&self) -> Status {
        Status {
            view: self.view.subscribe(),
            seen: self.seen.clone(),
        }
    }

    /// Between the two states of a session that goes on.
    pub(crate) fn streaming(&self, stalled: bool) {
        self.set(if stalled {
            RelayState::Stalled
        } else {
            RelayState::Streaming
        });
    }

    pub(crate) fn polling(&self, stalled: bool) {
        self.set(if stalled {
            RelayState::Stalled
        } else {
            RelayState::Polling
        });
    }

    /// No key is leased: others have them all, or nobody could be asked.
    pub(crate) fn without_keys(&self, asked: bool) {
        // Read out first: setting the state waits for whoever still reads it.
        let state = self.view.borrow().state.clone();
        match (asked, state) {
            (true, _) => self.set(RelayState::Standby),
            (false, RelayState::Starting) => {}
            (false, _) => self.set(RelayState::Failing {
                reason: "the leases could not be renewed".to_owned(),
            }),
        }
    }

    /// The relay reads from elsewhere from now on.
    pub(crate) fn switch(&self, to: Source, reason: &str) {
        let mut from = None;
        self.view.send_if_modified(|view| {
            if view.source == to {
                return false;
            }
            from = Some(view.source);
            view.last_switch = Some(Switch {
                at: OffsetDateTime::now_utc(),
                from: view.source,
                to,
                reason: reason.to_owned(),
            });
            view.source = to;
            true
        });
        if let Some(from) = from {
            self.switches.add(1, &switch_labels(from, to));
            tracing::warn!(
                from = from.name(),
                to = to.name(),
                reason,
                "the relay changes its source"
            );
        }
    }

    /// Logs a change once, where it happens.
    pub(crate) fn set(&self, state: RelayState) {
        let changed = self.view.send_if_modified(|view| {
            let changed = view.state != state;
            if changed {
                view.state = state.clone();
                view.since = Instant::now();
            }
            changed
        });
        match state {
            _ if !changed => {}
            // Logged with its cause where it happened.
            RelayState::Failing { .. } => {}
            RelayState::Stalled => tracing::warn!("the broker acknowledges nothing; events wait in the outbox"),
            state => tracing::info!(state = state.name(), "relay"),
        }
    }
}

/// What the monitor saw last. A source that could not be asked is `None`, and its gauges are absent.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Events not yet published, at most 1,000,000 are counted, and when the oldest was created.
    pub backlog: Option<(i64, Option<OffsetDateTime>)>,
    pub slot: Option<SlotHealth>,
}

/// What the slot costs the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotHealth {
    /// Bytes of log behind its confirmed position.
    pub lag_bytes: i64,
    /// Bytes of log that the server keeps because of it.
    pub retained_bytes: i64,
    /// How long its position has not moved although there is log behind it.
    pub still_for: Duration,
}

#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    published: Counter<u64>,
    stage: Histogram<f64>,
    failures: Counter<u64>,
    set_aside: Counter<u64>,
    swept: Counter<u64>,
    resent: Counter<u64>,
    confirmed: Counter<u64>,
    seen: Arc<Mutex<Seen>>,
}

impl Metrics {
    pub(crate) fn new(status: Status) -> Self {
        let counters = Self::counters();
        let seen = status.seen.clone();
        observe_gauges(&opentelemetry::global::meter("outbox"), status);
        Self { seen, ..counters }
    }

    /// Without the gauges of a relay.
    pub(crate) fn counters() -> Self {
        let meter = opentelemetry::global::meter("outbox");
        let metrics = Self {
            published: meter
                .u64_counter("outbox.published")
                .with_unit("{message}")
                .with_description("Events that the broker has acknowledged")
                .build(),
            stage: meter
                .f64_histogram("flow.stage.duration")
                .with_unit("s")
                .with_description("Time of one stage of the flow")
                .with_boundaries(LATENCY_BUCKETS.to_vec())
                .build(),
            failures: meter
                .u64_counter("relay.failures")
                .with_unit("{failure}")
                .with_description("Sessions of the relay that ended in an error")
                .build(),
            set_aside: meter
                .u64_counter("outbox.set_aside")
                .with_unit("{message}")
                .with_description("Events that the broker refuses for themselves; each holds up its key until repaired")
                .build(),
            swept: meter
                .u64_counter("outbox.swept")
                .with_unit("{message}")
                .with_description("Events that were stuck in a state and were sent again; alert on any")
                .build(),
            resent: meter
                .u64_counter("outbox.resent")
                .with_unit("{message}")
                .with_description("Events sent again because they were asked for")
                .build(),
            confirmed: meter
                .u64_counter("outbox.confirmed")
                .with_unit("{message}")
                .with_description("Events that the confirmation group has read back")
                .build(),
            seen: Arc::default(),
        };
        metrics.begin_at_zero();
        metrics
    }

    /// A counter that appears with its first event has not risen, for whoever watches the rise.
    fn begin_at_zero(&self) {
        for counter in [
            &self.published,
            &self.failures,
            &self.set_aside,
            &self.resent,
            &self.confirmed,
        ] {
            counter.add(0, &[]);
        }
        for state in ["init", "published"] {
            self.swept(state, 0);
        }
    }

    pub(crate) fn set_aside(&self) {
        self.set_aside.add(1, &[]);
    }

    /// `state` is the one they were stuck in.
    pub(crate) fn swept(&self, state: &'static str, rows: usize) {
        self.swept.add(rows as u64, &[KeyValue::new("state", state)]);
    }

    pub(crate) fn resent(&self, rows: usize) {
        self.resent.add(rows as u64, &[]);
    }

    pub(crate) fn confirmed(&self, rows: u64) {
        self.confirmed.add(rows, &[]);
    }

    pub(crate) fn published(&self, events: &[InFlight]) {
        if events.is_empty() {
            return;
        }
        self.published.add(events.len() as u64, &[]);
        let now = (OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000) as i64;
        let stage = [KeyValue::new("stage", "publish")];
        for event in events {
            // Two clocks: the database's and ours. A negative difference is skew and counts as zero.
            let micros = (now - event.committed_micros).max(0);
            self.stage.record(micros as f64 / 1e6, &stage);
        }
    }

    pub(crate) fn failed(&self) {
        self.failures.add(1, &[]);
    }

    pub(crate) fn seen(&self, seen: Seen) {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = seen;
    }
}

/// Name, unit, meaning, and what was seen of it; absent while nobody knows.
type SeenGauge = (&'static str, &'static str, &'static str, fn(&Seen) -> Option<f64>);

const SEEN_GAUGES: [SeenGauge; 5] = [
    (
        "outbox.backlog",
        "{message}",
        "Committed events not yet published; counted up to 1,000,000",
        |seen| seen.backlog.map(|(events, _)| events as f64),
    ),
    (
        "outbox.oldest.age",
        "s",
        "Age of the oldest event that is not published; 0 if there is none",
        |seen| {
            let age = |time: OffsetDateTime| (OffsetDateTime::now_utc() - time).as_seconds_f64().max(0.0);
            seen.backlog.map(|(_, oldest)| oldest.map_or(0.0, age))
        },
    ),
    (
        "relay.slot.lag",
        "By",
        "Write-ahead log between the slot's confirmed position and the server's",
        |seen| seen.slot.map(|slot| slot.lag_bytes as f64),
    ),
    (
        "relay.slot.retained",
        "By",
        "Write-ahead log that the server keeps because of the slot",
        |seen| seen.slot.map(|slot| slot.retained_bytes as f64),
    ),
    (
        "relay.slot.lag.time",
        "s",
        "How long the slot's position has not moved although there is log behind it",
        |seen| seen.slot.map(|slot| slot.still_for.as_secs_f64()),
    ),
];

fn observe_gauges(meter: &Meter, status: Status) {
    for (name, unit, description, value) in SEEN_GAUGES {
        let status = status.clone();
        meter
            .f64_observable_gauge(name)
            .with_unit(unit)
            .with_description(description)
            .with_callback(move |gauge| {
                if let Some(value) = value(&status.seen()) {
                    gauge.observe(value, &[]);
                }
            })
            .build();
    }
    meter
        .u64_observable_gauge("relay.state")
        .with_unit("1")
        .with_description("1 for the state the relay is in")
        .with_callback(move |gauge| {
            let view = status.view();
            let labels = [
                KeyValue::new("kind", view.source.name()),
                KeyValue::new("state", view.state.name()),
            ];
            gauge.observe(1, &labels);
        })
        .build();
}

fn switch_labels(from: Source, to: Source) -> [KeyValue; 2] {
    [KeyValue::new("from", from.name()), KeyValue::new("to", to.name())]
}

/// An error with its causes on one line.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
