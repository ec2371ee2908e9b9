//! The relay: one loop, *next batch → publish → acknowledge*, over the source that its mode says.

/// Following the write-ahead log.
mod wal;

/// Publishing from the table.
mod poll;

/// The log while it can be had, the table meanwhile.
mod auto;

/// Why a session ended, and whether waiting helps.
mod error;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rdkafka::ClientConfig;
use sqlx::{PgPool, types::Uuid};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use self::error::SessionError;
use crate::{
    confirm,
    delivery::{Delivery, Records, Refused},
    limited_pool::LimitedPool,
    monitor::{Watched, monitor},
    publisher::{Bounds, PublishError, Publisher},
    retention::retain,
    status::{Metrics, RelayState, SlotHealth, Source, Status, StatusWriter, with_causes},
    table::Table,
    upkeep::{StuckAfter, Upkeep},
    wal::{Address, AddressError, Slot},
};

const FIRST_BACKOFF: Duration = Duration::from_millis(100);
/// Also the longest time between the return of a server and the first event after it.
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);
/// A session that lasted this long was healthy: the next failure starts from the first backoff again.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);

/// Where a relay finds the events to publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The write-ahead log, through a replication slot: in commit order, at once.
    Wal,
    /// The table: several instances share the keys.
    Poll,
    /// Whoever commits publishes at once; this relay sends from the table what was not.
    AfterCommit,
    /// Somebody else publishes from the same table, Debezium for instance; this relay sends from it what was not.
    External,
    /// The log while it is healthy, the table meanwhile.
    Auto,
}

/// Which marks a row gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifecycle {
    /// None beyond what the mode itself needs: the log's position says what is done. A relay that reads the table needs the
    /// mark of publication.
    Off,
    /// PUBLISHED, when the broker has acknowledged.
    Published,
    /// COMPLETED too, when the product's own group has read the record back.
    Full,
}

/// What a slot may cost before mode `auto` does without it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalBudget {
    /// Most bytes of log that the server keeps because of the slot.
    pub bytes: u64,
    /// Longest time that the slot's position stands still with log behind it.
    pub age: Duration,
}

impl WalBudget {
    /// Why the slot costs too much, if it does.
    pub(crate) fn breach(&self, slot: &SlotHealth) -> Option<String> {
        let retained = u64::try_from(slot.retained_bytes).unwrap_or_default();
        if retained > self.bytes {
            Some(format!(
                "{retained} bytes of log are kept for it, allowed are {}",
                self.bytes
            ))
        } else if slot.still_for > self.age {
            Some(format!(
                "it has not moved for {} s, allowed are {}",
                slot.still_for.as_secs(),
                self.age.as_secs()
            ))
        } else {
            None
        }
    }
}

/// What a relay needs to know. Not `Debug`: the URL holds a password.
#[derive(Clone)]
pub struct RelaySettings {
    pub mode: Mode,
    pub lifecycle: Lifecycle,
    /// `postgres://` URL of a login with REPLICATION, which only the modes that read the log need.
    pub database_url: String,
    /// Schema of the table `outbox`.
    pub schema: String,
    /// Replication slot, of `[a-z0-9_]`; one relay at a time works on it, others stand by.
    pub slot: String,
    /// Publication of the outbox table: insert only, via the partition root.
    pub publication: String,
    pub wal_budget: WalBudget,
    pub topic: String,
    /// Name of the service in CloudEvents headers.
    pub source: String,
    /// Most events sent and not yet acknowledged.
    pub max_in_flight: usize,
    /// Most bytes of them.
    pub max_in_flight_bytes: usize,
    /// How long the producer waits to fill a batch.
    pub linger: Duration,
    /// How long the oldest event may wait for the broker before a new producer is tried.
    pub silent_after: Duration,
    /// Longest pause of an idle poll.
    pub poll_interval: Duration,
    /// Rows unsent for longer, although their source should have brought them, are sent from the table.
    pub sweep_after: Duration,
    /// Consumer group that reads the topic back.
    pub confirm_group: String,
    /// Rows published and not read back for longer are sent again.
    pub confirm_within: Duration,
    /// Days past this age are dropped when all of their events are published.
    pub retention: Duration,
}

impl RelaySettings {
    /// A producer of these events, with its topic checked.
    pub(crate) async fn publisher(&self, kafka: &ClientConfig) -> Result<Publisher, PublishError> {
        let bounds = Bounds {
            events: self.max_in_flight,
            bytes: self.max_in_flight_bytes,
        };
        Publisher::connect(kafka.clone(), &self.topic, &self.source, bounds, self.linger).await
    }
}

/// Moves committed outbox rows to Kafka, each key's in its order.
pub struct Relay {
    settings: RelaySettings,
    address: Address,
    slot: Slot,
    table: Table,
    pool: LimitedPool,
    kafka: ClientConfig,
    status: StatusWriter,
    metrics: Metrics,
    wake: Arc<Notify>,
    /// This instance among those that share the keys of the table.
    member: Uuid,
    breach: watch::Sender<Option<String>>,
    /// Rows that were refused, from one session to the next.
    refused: Mutex<Refused>,
}

/// One life over one source.
#[derive(Clone, Copy)]
enum Session<'a> {
    Wal,
    /// `drained` hears when the backlog is published.
    Table {
        drained: &'a Notify,
    },
}

impl Relay {
    /// `pool` reads and marks the table; `kafka` carries address and security.
    ///
    /// # Errors
    /// If the database URL is not one, or the slot's name is not of `[a-z0-9_]`.
    pub fn new(settings: RelaySettings, pool: PgPool, kafka: ClientConfig) -> Result<Self, AddressError> {
        let plain = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_');
        if settings.slot.is_empty() || settings.slot.len() > 63 || !settings.slot.bytes().all(plain) {
            return Err(AddressError::SlotName(settings.slot));
        }
        let source = match settings.mode {
            Mode::Wal | Mode::Auto => Source::Wal,
            Mode::Poll | Mode::AfterCommit | Mode::External => Source::Poll,
        };
        let status = StatusWriter::new(source);
        Ok(Self {
            address: Address::parse(&settings.database_url)?,
            slot: Slot {
                name: settings.slot.clone(),
                publication: settings.publication.clone(),
            },
            table: Table::new(&settings.schema),
            metrics: Metrics::new(status.reader()),
            settings,
            pool: pool.into(),
            kafka,
            status,
            wake: Arc::default(),
            member: Uuid::now_v7(),
            breach: watch::Sender::new(None),
            refused: Mutex::default(),
        })
    }

    pub fn status(&self) -> Status {
        self.status.reader()
    }

    /// To be notified when events were committed in this process: an idle poll looks at once.
    pub fn wake(&self) -> Arc<Notify> {
        self.wake.clone()
    }

    /// Relays until told to stop. Whatever fails is tried again: events wait in the table, nothing is lost by waiting,
    /// and an API in the same process is not stopped by its relay.
    pub async fn run(self, stop: CancellationToken) {
        let mut beside = self.start_beside(&stop);
        let drained = Notify::new();
        let work = async {
            match self.settings.mode {
                Mode::Wal => self.repeat(Session::Wal, &stop).await,
                Mode::Poll | Mode::AfterCommit | Mode::External => {
                    self.repeat(Session::Table { drained: &drained }, &stop).await;
                }
                Mode::Auto => self.wal_or_table(&stop).await,
            }
        };
        tokio::select! {
            () = work => {}
            // They end with the stop only; a defect in one of them must not pass unseen.
            Some(Err(error)) = beside.join_next(), if !beside.is_empty() => {
                if error.is_panic() {
                    std::panic::resume_unwind(error.into_panic());
                }
            }
        }
        self.status.set(RelayState::Stopped);
        // They own nothing; a question put to a server that is gone must not hold up the stop.
        beside.abort_all();
    }

    fn start_beside(&self, stop: &CancellationToken) -> JoinSet<()> {
        let (table, pool, slot) = (self.table.clone(), self.pool.clone(), self.settings.slot.clone());
        let mut beside = JoinSet::new();
        beside.spawn(monitor(
            table.clone(),
            pool.clone(),
            Watched {
                slot: slot.clone(),
                marks: self.marks(),
                budget: self.settings.wal_budget,
            },
            self.metrics.clone(),
            self.breach.clone(),
            stop.clone(),
        ));
        beside.spawn(retain(
            table.clone(),
            pool.clone(),
            slot,
            self.settings.retention,
            stop.clone(),
        ));
        if self.reads_back() {
            beside.spawn(confirm::read_back(
                table,
                pool,
                self.kafka.clone(),
                self.settings.topic.clone(),
                self.settings.confirm_group.clone(),
                self.metrics.clone(),
                stop.clone(),
            ));
        }
        beside
    }

    /// Whoever reads the table cannot do without.
    fn marks(&self) -> bool {
        let follows_log = matches!(self.settings.mode, Mode::Wal | Mode::Auto);
        self.settings.lifecycle != Lifecycle::Off || !follows_log
    }

    /// Nobody else can say what was published from outside.
    fn reads_back(&self) -> bool {
        self.settings.lifecycle == Lifecycle::Full || self.settings.mode == Mode::External
    }

    /// Session after session, with a growing pause after failures.
    async fn repeat(&self, session: Session<'_>, stop: &CancellationToken) {
        let mut backoff = FIRST_BACKOFF;
        while !stop.is_cancelled() {
            let started = Instant::now();
            let ended = match session {
                Session::Wal => self.follow_wal(stop).await,
                Session::Table { drained } => self.poll_table(drained, stop).await,
            };
            match ended {
                Ok(()) => break,
                Err(error) if stop.is_cancelled() => {
                    tracing::info!(
                        reason = with_causes(&error),
                        "the session ended with the stop; unmarked events come again"
                    );
                    break;
                }
                Err(error) if error.is_renewal() => continue,
                Err(error) => {
                    if started.elapsed() >= HEALTHY_AFTER {
                        backoff = FIRST_BACKOFF;
                    }
                    self.failed(&error, backoff);
                    if error.leaves_gap() {
                        self.give_up_slot().await;
                    }
                }
            }
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(backoff) => {}
            }
            backoff = (backoff * 2).min(LONGEST_BACKOFF);
        }
    }

    async fn publisher(&self) -> Result<Publisher, PublishError> {
        self.settings.publisher(&self.kafka).await
    }

    async fn delivery(&self, publisher: Publisher, records: Records) -> Result<Delivery, sqlx::Error> {
        let refused = std::mem::take(&mut *self.refused.lock().unwrap_or_else(PoisonError::into_inner));
        let (table, pool, metrics) = (self.table.clone(), self.pool.clone(), self.metrics.clone());
        Delivery::new(publisher, table, pool, records, metrics, refused).await
    }

    async fn end(&self, delivery: Delivery) {
        let refused = delivery.close().await;
        self.refused
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(refused);
    }

    fn upkeep(&self, unsent: Option<Duration>) -> Upkeep {
        let stuck_after = StuckAfter {
            unsent,
            unconfirmed: self.reads_back().then_some(self.settings.confirm_within),
        };
        let (table, pool, metrics) = (self.table.clone(), self.pool.clone(), self.metrics.clone());
        Upkeep::new(table, pool, metrics, stuck_after, self.settings.confirm_group.clone())
    }

    fn failed(&self, error: &SessionError, backoff: Duration) {
        self.metrics.failed();
        let reason = with_causes(error);
        if error.needs_a_person() {
            tracing::error!(
                slot = self.slot.name,
                reason,
                ?backoff,
                "the relay cannot work until this is repaired"
            );
        } else {
            tracing::warn!(
                slot = self.slot.name,
                reason,
                ?backoff,
                "the relay lost its session and tries again"
            );
        }
        self.status.set(RelayState::Failing { reason });
    }
}
