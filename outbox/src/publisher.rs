use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, UNIX_EPOCH},
};

use opentelemetry::{
    KeyValue,
    global::BoxedTracer,
    trace::{Span, SpanKind, Tracer},
};
use rdkafka::{
    ClientConfig, ClientContext, Message,
    error::{KafkaError, RDKafkaErrorCode},
    message::{DeliveryResult, Header, OwnedHeaders},
    producer::{BaseRecord, Producer, ProducerContext, PurgeConfig, ThreadedProducer},
};
use shared_events::headers::EventHeaders;
use sqlx::types::Uuid;
use tokio::{sync::Notify, time::Instant};

use crate::ended::without_answer;
use crate::first_batch::FirstBatches;
use crate::watermark::{Acknowledged, InFlight, TransactionEnd, Watermark};

/// Longest wait for the broker to describe the topic.
const METADATA_TIMEOUT: Duration = Duration::from_secs(5);

/// Most events remembered as refused; a batch has fewer.
const MAX_SUSPECTS: usize = 10_000;

/// What bounds the events on their way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) events: usize,
    pub(crate) bytes: usize,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum PublishError {
    #[error("the Kafka producer cannot be made")]
    Client(#[source] KafkaError),
    #[error("the broker does not describe topic {topic}")]
    Metadata {
        topic: String,
        #[source]
        error: KafkaError,
    },
    #[error("topic {0} does not exist; create it first, topics are never created by themselves")]
    TopicMissing(String),
    /// The client itself refuses the event, now and whenever it is tried again.
    #[error("the producer refuses an event")]
    Refused(#[source] KafkaError),
    /// The broker gave an event up for good. Nothing after it may be acknowledged, so the session starts again from
    /// the last acknowledged position (HAZARDS H28, H31).
    #[error("event {id} was not delivered")]
    Undelivered {
        id: Uuid,
        #[source]
        error: KafkaError,
    },
}

/// Whether the broker or the client refuses the record for what it is: too large, invalid. Waiting will not help, and other
/// records are not concerned.
pub(crate) fn is_refusal(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::{
        InvalidMessage, InvalidMessageSize, InvalidRecord, InvalidTimestamp, MessageSizeTooLarge, PolicyViolation,
    };
    matches!(
        error.rdkafka_error_code(),
        Some(
            InvalidMessage
                | InvalidMessageSize
                | InvalidRecord
                | InvalidTimestamp
                | MessageSizeTooLarge
                | PolicyViolation
        )
    )
}

/// One event as the relay sends it, whatever source it was read from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outgoing<'a> {
    pub(crate) id: Uuid,
    pub(crate) key: &'a str,
    pub(crate) event_type: &'a str,
    pub(crate) version: i32,
    pub(crate) payload: &'a [u8],
    pub(crate) time: &'a str,
    pub(crate) traceparent: Option<&'a str>,
    pub(crate) committed_micros: i64,
}

/// Sends events and keeps what is unacknowledged. Lives as long as one session: a new session has a new producer, so
/// no half-sent request of the old one is left in a client buffer.
pub(crate) struct Publisher {
    producer: ThreadedProducer<Reports>,
    window: Arc<Window>,
    topic: String,
    source: String,
    bounds: Bounds,
    tracer: BoxedTracer,
}

/// Shared with the producer's thread, which hands in the delivery reports.
#[derive(Default)]
struct Window {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    watermark: Watermark,
    first_batches: FirstBatches,
    failure: Option<(Uuid, KafkaError)>,
    /// Events in batches that were refused: at least one event of a batch is at fault, nobody says which.
    refused: Vec<Uuid>,
}

impl Window {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change under the lock is complete when it panics: the state stays usable.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Reports(Arc<Window>);

impl ClientContext for Reports {
    fn error(&self, error: KafkaError, reason: &str) {
        // Brokers come and go; what matters is whether events are acknowledged, and that is watched elsewhere.
        tracing::debug!(%error, reason, "producer");
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = usize;

    fn delivery(&self, report: &DeliveryResult<'_>, index: usize) {
        let mut state = self.0.lock();
        match report {
            Ok(message) => {
                state.watermark.acknowledged(index as u64);
                state
                    .first_batches
                    .acknowledged(message.key().unwrap_or_default(), message.partition());
            }
            Err((error, message)) => {
                let id = message
                    .headers()
                    .and_then(|headers| rdkafka::message::Headers::try_get(headers, 0))
                    .and_then(|header| header.value)
                    .and_then(|value| Uuid::try_parse_ascii(value).ok())
                    .unwrap_or_default();
                if is_refusal(error) && state.refused.len() < MAX_SUSPECTS {
                    state.refused.push(id);
                }
                // The first failure is the cause; what follows is its consequence.
                state.failure.get_or_insert_with(|| (id, error.clone()));
            }
        }
        drop(state);
        self.0.changed.notify_one();
    }
}

impl Publisher {
    /// Makes the producer and checks that the topic is there.
    pub(crate) async fn connect(
        mut config: ClientConfig,
        topic: &str,
        source: &str,
        bounds: Bounds,
        linger: Duration,
    ) -> Result<Self, PublishError> {
        config
            .set("enable.idempotence", "true")
            // A batch that is refused ends this producer: without it, the library renumbers and sends what comes after, and
            // a key's later event passes the one that was refused.
            .set("enable.gapless.guarantee", "true")
            .set("acks", "all")
            .set("max.in.flight.requests.per.connection", "5")
            // Never give up by time: a timed-out message may have been written, and later ones would pass it.
            .set("message.timeout.ms", "0")
            // The library's default would let the check for the topic create it, on a broker that allows that.
            .set("allow.auto.create.topics", "false")
            // What Java clients, and so Debezium, use: every publisher agrees on a key's partition (HAZARDS H32).
            .set("partitioner", "murmur2_random")
            .set("linger.ms", linger.as_millis().to_string())
            .set("compression.type", "lz4")
            .set("message.max.bytes", "1048576")
            // The window bounds memory; these are above it, so that the client never refuses what the window allows.
            .set("queue.buffering.max.messages", (bounds.events * 2).to_string())
            .set(
                "queue.buffering.max.kbytes",
                (bounds.bytes / 512).max(2_048).to_string(),
            );
        let window = Arc::<Window>::default();
        let reports = Reports(window.clone());
        let producer = config
            .create_with_context::<_, ThreadedProducer<Reports>>(reports)
            .map_err(PublishError::Client)?;
        let publisher = Self {
            producer,
            window,
            topic: topic.to_owned(),
            source: source.to_owned(),
            bounds,
            tracer: opentelemetry::global::tracer("outbox"),
        };
        publisher.check_topic().await
    }

    async fn check_topic(self) -> Result<Self, PublishError> {
        let checked = tokio::task::spawn_blocking(move || {
            let metadata = self
                .producer
                .client()
                .fetch_metadata(Some(&self.topic), METADATA_TIMEOUT);
            let partitions =
                metadata.map(|metadata| metadata.topics().iter().map(|topic| topic.partitions().len()).sum());
            (self, partitions)
        })
        .await;
        match checked {
            Ok((publisher, Ok(0))) => {
                let topic = publisher.topic.clone();
                publisher.close().await;
                Err(PublishError::TopicMissing(topic))
            }
            Ok((publisher, Ok(partitions))) => {
                publisher.window.lock().first_batches = FirstBatches::new(partitions);
                Ok(publisher)
            }
            Ok((publisher, Err(error))) => {
                let topic = publisher.topic.clone();
                publisher.close().await;
                Err(PublishError::Metadata { topic, error })
            }
            Err(error) => without_answer(error).await,
        }
    }

    /// Whether another event may be sent now.
    pub(crate) fn has_room(&self) -> bool {
        let state = self.window.lock();
        state.watermark.len() < self.bounds.events && state.watermark.bytes() < self.bounds.bytes
    }

    /// Whether an event of this key may be sent without passing an earlier one, see [`FirstBatches`].
    pub(crate) fn may_follow(&self, key: &str) -> bool {
        self.window.lock().first_batches.may_follow(key.as_bytes())
    }

    /// Hands the event to the producer. Does not wait for the broker; [`Self::may_follow`] is asked before.
    pub(crate) async fn publish(&self, event: Outgoing<'_>) -> Result<(), PublishError> {
        let index = {
            let mut state = self.window.lock();
            if let Some((id, error)) = &state.failure {
                return Err(PublishError::Undelivered {
                    id: *id,
                    error: error.clone(),
                });
            }
            state.first_batches.sent(event.key.as_bytes());
            state.watermark.sent(InFlight {
                id: event.id,
                bytes: event.payload.len() + event.key.len(),
                committed_micros: event.committed_micros,
                sent_at: Instant::now(),
            })
        };
        let mut id = Uuid::encode_buffer();
        let headers = EventHeaders {
            id: event.id.hyphenated().encode_lower(&mut id),
            event_type: event.event_type,
            version: event.version,
            source: &self.source,
            time: event.time,
            subject: event.key,
            traceparent: event.traceparent,
        };
        let mut list = Some(OwnedHeaders::new_with_capacity(8));
        headers.for_each(|key, value| {
            list = list.take().map(|list| {
                list.insert(Header {
                    key,
                    value: Some(value),
                })
            })
        });
        let mut record = BaseRecord::with_opaque_to(&self.topic, index as usize)
            .key(event.key)
            .payload(event.payload);
        record.headers = list;
        loop {
            match self.producer.send(record) {
                Ok(()) => {
                    self.trace(&event);
                    return Ok(());
                }
                // Back-pressure, not failure: the same record again, so that order is kept.
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), refused)) => {
                    record = refused;
                    self.changed().await;
                }
                Err((error, _)) => {
                    // It never left: no report will come.
                    self.window.lock().watermark.take_back();
                    return Err(PublishError::Refused(error));
                }
            }
        }
    }

    /// Sends the event with nothing else on its way, and waits for the broker's word: `Some` if this event is refused for
    /// itself. Then it is as if it had not been sent; if it was the broker who refused, this producer is at its end.
    pub(crate) async fn publish_alone(&self, event: Outgoing<'_>) -> Result<Option<KafkaError>, PublishError> {
        match self.publish(event).await {
            Ok(()) => {}
            Err(PublishError::Refused(error)) if is_refusal(&error) => return Ok(Some(error)),
            Err(error) => return Err(error),
        }
        loop {
            {
                let mut state = self.window.lock();
                if let Some((_, error)) = &state.failure
                    && is_refusal(error)
                {
                    let error = error.clone();
                    state.watermark.take_back();
                    state.refused.clear();
                    return Ok(Some(error));
                }
                if let Some((id, error)) = &state.failure {
                    return Err(PublishError::Undelivered {
                        id: *id,
                        error: error.clone(),
                    });
                }
                if state.watermark.is_settled() {
                    return Ok(None);
                }
            }
            self.changed().await;
        }
    }

    /// The producer span of the event's trace, from commit to here. Without an exporter this makes nothing.
    fn trace(&self, event: &Outgoing<'_>) {
        let Some(traceparent) = event.traceparent else { return };
        let carrier = HashMap::from([("traceparent".to_owned(), traceparent.to_owned())]);
        let parent = opentelemetry::global::get_text_map_propagator(|propagator| propagator.extract(&carrier));
        let committed = UNIX_EPOCH + Duration::from_micros(u64::try_from(event.committed_micros).unwrap_or_default());
        let mut span = self
            .tracer
            .span_builder(format!("send {}", self.topic))
            .with_kind(SpanKind::Producer)
            .with_start_time(committed)
            .with_attributes([
                KeyValue::new("messaging.system", "kafka"),
                KeyValue::new("messaging.operation.name", "send"),
                KeyValue::new("messaging.destination.name", self.topic.clone()),
                KeyValue::new("messaging.message.id", event.id.to_string()),
                KeyValue::new("messaging.kafka.message.key", event.key.to_owned()),
            ])
            .start_with_context(&self.tracer, &parent);
        span.end();
    }

    /// A transaction has ended; its end becomes a position once all before it is acknowledged.
    pub(crate) fn committed(&self, end: TransactionEnd) {
        self.window.lock().watermark.committed(end);
    }

    /// Takes out what the broker has acknowledged without a gap.
    pub(crate) fn take_acknowledged(&self) -> Result<Acknowledged, PublishError> {
        let mut state = self.window.lock();
        match &state.failure {
            Some((id, error)) => Err(PublishError::Undelivered {
                id: *id,
                error: error.clone(),
            }),
            None => Ok(state.watermark.take()),
        }
    }

    /// The same, also after a failure.
    pub(crate) fn take_settled(&self) -> Acknowledged {
        self.window.lock().watermark.take()
    }

    /// How long the oldest event has waited for the broker.
    pub(crate) fn waiting(&self) -> Duration {
        let oldest = self.window.lock().watermark.oldest();
        oldest.map_or(Duration::ZERO, |event| event.sent_at.elapsed())
    }

    /// Whether the broker has acknowledged everything sent.
    pub(crate) fn is_settled(&self) -> bool {
        self.window.lock().watermark.is_settled()
    }

    /// Whether nothing is on its way, and everything acknowledged was taken.
    pub(crate) fn is_idle(&self) -> bool {
        self.window.lock().watermark.is_empty()
    }

    /// Events of refused batches.
    pub(crate) fn take_refused(&self) -> Vec<Uuid> {
        std::mem::take(&mut self.window.lock().refused)
    }

    /// Waits for a delivery report. Reports that came since the last wait end it at once.
    pub(crate) async fn changed(&self) {
        self.window.changed.notified().await;
    }

    /// Throws away what is unsent and ends the client. What is unacknowledged comes again from its source.
    pub(crate) async fn close(self) {
        self.producer.purge(PurgeConfig::default().queue().inflight());
        // The client's own end blocks on its threads.
        if let Err(error) = tokio::task::spawn_blocking(move || drop(self)).await {
            tracing::error!(%error, "the producer did not end cleanly");
        }
    }
}
