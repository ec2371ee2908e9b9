use std::{
    collections::{HashMap, HashSet, VecDeque},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use opentelemetry::{KeyValue, metrics::Counter};
use rdkafka::ClientConfig;
use shared_events::{Envelope, envelope::format_timestamp};
use sqlx::PgPool;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::{
    append::NewEvent,
    delivery::{Delivery, DeliveryError, Handed, Records, Refused},
    limited_pool::LimitedPool,
    publisher::{Outgoing, PublishError},
    relay::RelaySettings,
    status::{Metrics, with_causes},
    table::{self, Table},
};

/// Commits that wait to be published, and the bytes of their events; more are left to the relay.
const QUEUE: usize = 10_000;
const QUEUE_BYTES: usize = 64 << 20;
/// What an event takes beside its texts.
const EVENT_OVERHEAD_BYTES: usize = 512;
/// How long a commit may keep those behind it waiting.
const COMMIT_PATIENCE: Duration = Duration::from_millis(250);
/// Keys whose last published sequence is remembered.
const REMEMBERED: usize = 100_000;
const BACKOFF: Duration = Duration::from_secs(1);
/// How long a stop waits for the broker; the relay sends the rest.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// What the side that commits tells the side that publishes. Only ever saves time: an event that nobody was told of is
/// found in the table (HAZARDS H27).
#[derive(Debug, Clone, Default)]
pub struct Hints {
    wake: Option<Arc<Notify>>,
    queue: Option<Queue>,
    left: Option<Counter<u64>>,
}

#[derive(Debug, Clone)]
struct Queue {
    tickets: mpsc::Sender<Ticket>,
    bytes: Arc<Semaphore>,
}

/// Events about to be committed.
#[derive(Debug)]
struct Ticket {
    events: Vec<NewEvent>,
    /// Dropped if they are not.
    committed: oneshot::Receiver<()>,
    _bytes: OwnedSemaphorePermit,
}

/// A place in the order of commits.
#[derive(Debug)]
#[must_use = "without `committed` the events are left to the relay"]
pub struct Place {
    committed: Option<oneshot::Sender<()>>,
    wake: Option<Arc<Notify>>,
}

impl Hints {
    /// Wakes a relay of this process that polls.
    pub fn to_relay(wake: Arc<Notify>) -> Self {
        Self {
            wake: Some(wake),
            ..Self::default()
        }
    }

    /// To be called with the events' aggregates still locked, so that each key's places have the order of its commits.
    /// Never waits.
    pub fn reserve(&self, events: &[NewEvent]) -> Place {
        let mut place = Place {
            committed: None,
            wake: self.wake.clone(),
        };
        if let (Some(queue), false) = (&self.queue, events.is_empty()) {
            place.committed = queue.take(events);
            if let (None, Some(left)) = (&place.committed, &self.left) {
                left.add(events.len() as u64, &[KeyValue::new("reason", "queue full")]);
            }
        }
        place
    }
}

impl Queue {
    fn new() -> (Self, mpsc::Receiver<Ticket>) {
        let (tickets, queue) = mpsc::channel(QUEUE);
        let bytes = Arc::new(Semaphore::new(QUEUE_BYTES));
        (Self { tickets, bytes }, queue)
    }

    /// `None` if it is full.
    fn take(&self, events: &[NewEvent]) -> Option<oneshot::Sender<()>> {
        let bytes = u32::try_from(events.iter().map(bytes).sum::<usize>()).ok()?;
        let bytes = self.bytes.clone().try_acquire_many_owned(bytes).ok()?;
        let (sender, committed) = oneshot::channel();
        let ticket = Ticket {
            events: events.to_vec(),
            committed,
            _bytes: bytes,
        };
        self.tickets.try_send(ticket).ok().map(|()| sender)
    }
}

/// What an event takes in memory, about.
fn bytes(event: &NewEvent) -> usize {
    let envelope = &event.envelope;
    EVENT_OVERHEAD_BYTES + envelope.aggregate_id.len() + envelope.event_type.len() + envelope.payload.get().len()
}

impl Place {
    /// The transaction is committed.
    pub fn committed(self) {
        if let Some(committed) = self.committed {
            // A publisher that has given this place up leaves the events to the relay.
            committed.send(()).ok();
        }
        if let Some(wake) = self.wake {
            wake.notify_one();
        }
    }
}

/// Publishes what this process commits, at once. A relay in mode `after-commit` sends what it could not.
///
/// A key's events leave in order: those of this process by their places. An event whose predecessor was not published here
/// leaves only if the table says that nothing of its key is unsent before it; else the relay sends both.
pub struct AfterCommit {
    settings: RelaySettings,
    table: Table,
    pool: LimitedPool,
    kafka: ClientConfig,
    metrics: Metrics,
    queue: mpsc::Receiver<Ticket>,
    left: Counter<u64>,
}

#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(transparent)]
    Publish(#[from] PublishError),
    #[error(transparent)]
    Delivery(#[from] DeliveryError),
    #[error("outbox table")]
    Table(#[from] sqlx::Error),
    #[error("an event cannot be written as JSON")]
    Encode(#[from] serde_json::Error),
    #[error("an event's time cannot be written")]
    Time(#[from] time::error::Format),
}

impl AfterCommit {
    pub fn new(settings: RelaySettings, pool: PgPool, kafka: ClientConfig) -> (Self, Hints) {
        let (sender, queue) = Queue::new();
        let left = opentelemetry::global::meter("outbox")
            .u64_counter("outbox.after_commit.left")
            .with_unit("{message}")
            .with_description("Events that were not published at once after their commit but left to the relay")
            .build();
        let hints = Hints {
            wake: None,
            queue: Some(sender),
            left: Some(left.clone()),
        };
        let publisher = Self {
            table: Table::new(&settings.schema),
            metrics: Metrics::counters(),
            settings,
            pool: pool.into(),
            kafka,
            queue,
            left,
        };
        (publisher, hints)
    }

    /// Publishes until told to stop. While the broker is away everything is left to the relay.
    pub async fn run(mut self, stop: CancellationToken) {
        while !stop.is_cancelled() {
            let ended = self.session(&stop).await;
            if let Err(error) = ended {
                tracing::warn!(
                    reason = with_causes(&error),
                    "events are not published at once; the relay sends them"
                );
            }
            if self.queue.is_closed() {
                return;
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.leave_during(tokio::time::sleep(BACKOFF)) => {}
            }
        }
    }

    /// What comes while nothing can be published must not wait: it is the relay's.
    async fn leave_during<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                Some(ticket) = self.queue.recv() => self.leave(ticket.events.len(), "broker"),
            }
        }
    }

    async fn session(&mut self, stop: &CancellationToken) -> Result<(), SessionError> {
        let records = Records {
            marks: true,
            slot: None,
            rereads: false,
            silent_after: self.settings.silent_after,
        };
        let (settings, kafka) = (self.settings.clone(), self.kafka.clone());
        let (table, pool, metrics) = (self.table.clone(), self.pool.clone(), self.metrics.clone());
        let begin = async move {
            let publisher = settings.publisher(&kafka).await?;
            let delivery = Delivery::new(publisher, table, pool, records, metrics, Refused::default()).await?;
            Ok::<_, SessionError>(delivery)
        };
        let mut delivery = self.leave_during(begin).await?;
        let ended = self.publish(&mut delivery, stop).await;
        if ended.is_ok() && tokio::time::timeout(DRAIN_LIMIT, delivery.finish()).await.is_err() {
            tracing::warn!("the broker did not acknowledge in time; the relay sends the rest");
        }
        delivery.close().await;
        ended
    }

    async fn publish(&mut self, delivery: &mut Delivery, stop: &CancellationToken) -> Result<(), SessionError> {
        let mut published = Published::default();
        loop {
            let ticket = tokio::select! {
                () = stop.cancelled() => return Ok(()),
                ticket = self.queue.recv() => ticket,
                progress = delivery.progress() => {
                    progress?;
                    continue;
                }
            };
            let Some(Ticket {
                events,
                committed,
                _bytes,
            }) = ticket
            else {
                return Ok(());
            };
            match tokio::time::timeout(COMMIT_PATIENCE, committed).await {
                Ok(Ok(())) => {}
                // Rolled back, or nobody knows.
                Ok(Err(_)) => continue,
                Err(_) => {
                    self.leave(events.len(), "slow commit");
                    continue;
                }
            }
            if !delivery.has_room() {
                // The broker is slow: waiting here would only fill the queue.
                self.leave(events.len(), "broker");
                continue;
            }
            let mut behind = self.keys_with_unsent_before(&events, &published).await?;
            for event in &events {
                let envelope = &event.envelope;
                let key = envelope.aggregate_id.as_str();
                if !delivery.has_room_for(key) {
                    behind.insert(key.to_owned());
                }
                if behind.contains(key) {
                    self.leave(1, "order");
                    continue;
                }
                let payload = envelope.encode()?;
                let time = format_timestamp(envelope.timestamp)?;
                let handed = delivery
                    .publish(Outgoing {
                        id: envelope.id,
                        key: &envelope.aggregate_id,
                        event_type: &envelope.event_type,
                        version: envelope.version,
                        payload: payload.as_bytes(),
                        time: &time,
                        traceparent: event.traceparent.as_deref(),
                        committed_micros: (envelope.timestamp.unix_timestamp_nanos() / 1_000) as i64,
                    })
                    .await?;
                match handed {
                    Handed::Over | Handed::Published => published.remember(envelope),
                    Handed::Withheld => self.leave(1, "order"),
                }
            }
        }
    }

    /// Keys among these whose earlier events may still be unsent.
    async fn keys_with_unsent_before(
        &self,
        events: &[NewEvent],
        published: &Published,
    ) -> Result<HashSet<String>, sqlx::Error> {
        let mut first: HashMap<&str, i64> = HashMap::new();
        for NewEvent { envelope, .. } in events {
            let sequence = first.entry(&envelope.aggregate_id).or_insert(envelope.sequence);
            *sequence = (*sequence).min(envelope.sequence);
        }
        let unknown: Vec<(String, i64)> = first
            .into_iter()
            .filter(|(key, sequence)| *sequence > 1 && published.last(key) != Some(sequence - 1))
            .map(|(key, sequence)| (key.to_owned(), sequence))
            .collect();
        if unknown.is_empty() {
            return Ok(HashSet::new());
        }
        table::keys_with_unsent_before(&self.table, &self.pool, &unknown).await
    }

    fn leave(&self, events: usize, reason: &'static str) {
        self.left.add(events as u64, &[KeyValue::new("reason", reason)]);
    }
}

/// The last sequence published of the keys seen lately.
#[derive(Default)]
struct Published {
    last: HashMap<String, i64>,
    order: VecDeque<String>,
}

impl Published {
    fn last(&self, key: &str) -> Option<i64> {
        self.last.get(key).copied()
    }

    fn remember(&mut self, envelope: &Envelope) {
        let key = &envelope.aggregate_id;
        if self.last.insert(key.clone(), envelope.sequence).is_none() {
            self.order.push_back(key.clone());
            if self.order.len() > REMEMBERED
                && let Some(oldest) = self.order.pop_front()
            {
                self.last.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use shared_events::{
        envelope::Fact,
        shipment::{AGGREGATE_TYPE, ShipmentCreated},
    };
    use sqlx::types::Uuid;
    use time::OffsetDateTime;

    use super::*;

    #[test]
    fn the_queue_is_full_by_the_bytes_of_its_events_too() {
        let now = OffsetDateTime::now_utc();
        let fact = Fact {
            aggregate_type: AGGREGATE_TYPE,
            aggregate_id: "k".to_owned(),
            sequence: 1,
            transaction_key: Uuid::now_v7(),
            timestamp: now,
        };
        let payload = ShipmentCreated {
            order_id: "1".to_owned(),
            warehouse: "x".repeat(1 << 20),
            carrier: "Speedy".to_owned(),
            lines: Vec::new(),
            created_at: now,
        };
        let event = NewEvent {
            envelope: Envelope::new(Uuid::now_v7(), fact, &payload).unwrap(),
            traceparent: None,
        };
        let (queue, mut tickets) = Queue::new();
        let taken = (0..100).map_while(|_| queue.take(std::slice::from_ref(&event))).count();
        assert_eq!(taken, 63, "64 MiB hold no more of a little over 1 MiB");
        drop(tickets.try_recv());
        assert!(queue.take(std::slice::from_ref(&event)).is_some());
    }
}
