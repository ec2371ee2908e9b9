use std::sync::Arc;

use rdkafka::{
    ClientConfig, ClientContext,
    config::RDKafkaLogLevel,
    error::{KafkaError, KafkaResult, RDKafkaErrorCode},
    message::{Header as KafkaHeader, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use shared_events::{
    headers::{Origin, Redirect},
    topics::GroupTopics,
};
use time::OffsetDateTime;

use crate::{
    crash_point,
    decode::History,
    failure::Class,
    handler::{IncomingEvent, Reason},
    metrics::Metrics,
    record::Record,
    retry::Step,
};

/// Publishes what cannot be applied now to a retry or dead-letter topic.
pub(crate) struct Redirector {
    producer: FutureProducer<Quiet>,
    topics: GroupTopics,
    consumer_version: &'static str,
    metrics: Arc<Metrics>,
}

/// The waits and faults of this client are reported by the worker that meets them.
#[derive(Clone)]
struct Quiet;

impl ClientContext for Quiet {
    fn log(&self, _level: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(facility, message, "librdkafka");
    }
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "librdkafka");
    }
}

/// A record on its way to another topic: same key, same partition number, the same bytes, new headers.
pub(crate) struct Letter<'a> {
    topic: String,
    from: Outgoing<'a>,
    step: Step,
    reason: &'a Reason,
    redirect: Redirect,
}

/// What is sent on.
#[derive(Clone, Copy)]
pub(crate) struct Outgoing<'a> {
    pub(crate) record: &'a Record,
    /// Where it stood until now; its partition number is kept.
    pub(crate) topic: &'a str,
    pub(crate) partition: i32,
    pub(crate) event: Option<&'a IncomingEvent>,
    pub(crate) history: &'a History,
}

/// Why letters are left to be sent again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Undelivered {
    #[error("{left} records could not be redirected: {error}")]
    Away { left: usize, error: KafkaError },
    /// The one kind of failure that a record brings about by itself. It can neither go nor be cut nor be dropped.
    #[error(
        "the record of {}[{}] at offset {} is refused by {topic} for its size ({error}); raise that topic's \
         max.message.bytes",
        .origin.topic, .origin.partition, .origin.offset
    )]
    TooLarge {
        origin: Origin,
        topic: String,
        error: KafkaError,
    },
}

impl Redirector {
    pub(crate) fn new(
        client_config: &ClientConfig,
        topics: GroupTopics,
        consumer_version: &'static str,
        metrics: Arc<Metrics>,
    ) -> KafkaResult<Self> {
        let mut config = client_config.clone();
        config
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("partitioner", "murmur2_random")
            // Bounded, because the worker repeats what was not acknowledged; the inbox makes a second copy harmless.
            .set("message.timeout.ms", "30000")
            .set("linger.ms", "1")
            // What came compressed may be far larger in memory than a topic takes. It has to fit again, so only the
            // brokers judge sizes, after compression; the client's own limits count before it and stand at their most.
            .set("compression.type", "zstd")
            .set("message.max.bytes", "1000000000")
            .set("batch.size", "1000000")
            // Never reached: a worker hands in what its queue held, and waits for it.
            .set("queue.buffering.max.messages", "100000")
            .set("queue.buffering.max.kbytes", "1048576")
            .set("allow.auto.create.topics", "false");
        Ok(Self {
            producer: config.create_with_context(Quiet)?,
            topics,
            consumer_version,
            metrics,
        })
    }

    /// Addresses a record by what was decided about it.
    pub(crate) fn letter<'a>(&self, from: Outgoing<'a>, step: Step, class: Class, reason: &'a Reason) -> Letter<'a> {
        let (topic, not_before) = match step {
            Step::Retry { tier, delay } => (self.topics.retry(tier), Some(OffsetDateTime::now_utc() + delay)),
            Step::DeadLetter => (self.topics.dead_letter(), None),
        };
        Letter {
            topic,
            from,
            step,
            reason,
            redirect: Redirect {
                origin: from.history.origin.clone(),
                attempt: from.history.attempts.saturating_add(1),
                not_before,
                error_class: class.as_str().to_owned(),
                error_type: reason.error_type.clone().into_owned(),
                error_message: reason.message.clone(),
                consumer_version: self.consumer_version.to_owned(),
            },
        }
    }

    /// Sends all letters together, then waits for every report. Only the broker's acknowledgement takes a letter off
    /// the list.
    ///
    /// # Errors
    /// [`Undelivered`]; what it and other failures concern is left on the list, to be sent again.
    pub(crate) async fn deliver(&self, letters: &mut Vec<Letter<'_>>) -> Result<(), Undelivered> {
        let Err(error) = self.send(letters).await else {
            return Ok(());
        };
        if !is_too_large(&error) {
            let left = letters.len();
            return Err(Undelivered::Away { left, error });
        }
        // The client puts several letters into one batch, which may be too large where each of them is not.
        let mut first_failure = None;
        let together = std::mem::take(letters);
        for letter in together {
            let mut alone = vec![letter];
            if let Err(error) = self.send(&mut alone).await
                && let [letter] = alone.as_slice()
            {
                first_failure.get_or_insert_with(|| letter.undelivered(error));
            }
            letters.append(&mut alone);
        }
        first_failure.map_or(Ok(()), Err)
    }

    async fn send(&self, letters: &mut Vec<Letter<'_>>) -> Result<(), KafkaError> {
        let mut first_failure = None;
        let mut reports = Vec::with_capacity(letters.len());
        for letter in letters.iter() {
            let mut record = FutureRecord::<[u8], [u8]>::to(&letter.topic)
                .partition(letter.from.partition)
                .headers(headers(letter));
            if let Some(key) = letter.from.record.key() {
                record = record.key(key);
            }
            if let Some(value) = letter.from.record.value() {
                record = record.payload(value);
            }
            reports.push(self.producer.send_result(record).map_err(|(error, _)| error));
        }
        crash_point::REDIRECT_SENT.reached();
        let mut acknowledged = Vec::with_capacity(reports.len());
        for report in reports {
            let result = match report {
                Ok(delivery) => match delivery.await {
                    Ok(Ok(_)) => Ok(()),
                    Ok(Err((error, _))) => Err(error),
                    // The producer was dropped; it lives as long as this.
                    Err(_) => Err(KafkaError::Canceled),
                },
                Err(error) => Err(error),
            };
            acknowledged.push(result.is_ok());
            if let Err(error) = result {
                first_failure.get_or_insert(error);
            }
        }
        let mut acknowledged = acknowledged.into_iter();
        letters.retain(|letter| {
            let arrived = acknowledged.next().unwrap_or(false);
            if arrived {
                letter.report(&self.metrics);
            }
            !arrived
        });
        first_failure.map_or(Ok(()), Err)
    }
}

impl Letter<'_> {
    /// Logs and counts it, once the broker has it.
    fn report(&self, metrics: &Metrics) {
        metrics.redirected(self.step, self.reason);
        let Outgoing {
            record,
            topic,
            partition,
            event,
            ..
        } = self.from;
        let event_id = event.map(|event| tracing::field::display(event.envelope.id));
        let aggregate_id = event.map(|event| event.envelope.aggregate_id.as_str());
        let offset = record.offset;
        let Redirect { origin, attempt, .. } = &self.redirect;
        let (error_type, reason) = (&*self.reason.error_type, &self.reason.message);
        match self.step {
            Step::Retry { tier, delay } => tracing::info!(
                event_id,
                aggregate_id,
                topic,
                partition,
                offset,
                attempt,
                tier,
                ?delay,
                error.r#type = error_type,
                reason,
                "retry later"
            ),
            Step::DeadLetter => tracing::warn!(
                event_id, aggregate_id, topic, partition, offset, attempt,
                origin = ?(&origin.topic, origin.partition, origin.offset), error.r#type = error_type, reason,
                "dead letter"
            ),
        }
    }

    fn undelivered(&self, error: KafkaError) -> Undelivered {
        if !is_too_large(&error) {
            return Undelivered::Away { left: 1, error };
        }
        Undelivered::TooLarge {
            origin: self.redirect.origin.clone(),
            topic: self.topic.clone(),
            error,
        }
    }
}

fn is_too_large(error: &KafkaError) -> bool {
    matches!(
        error.rdkafka_error_code(),
        Some(RDKafkaErrorCode::MessageSizeTooLarge | RDKafkaErrorCode::MessageBatchTooLarge)
    )
}

fn headers(letter: &Letter<'_>) -> OwnedHeaders {
    let encoded = letter.redirect.encode(&letter.from.record.header_list());
    // Headers that cannot be read are passed on as they are; of two with one name the later counts.
    let original = letter.from.record.unreadable_headers.clone();
    encoded.iter().fold(
        original.unwrap_or_else(|| OwnedHeaders::new_with_capacity(encoded.len())),
        |headers, (key, value)| {
            headers.insert(KafkaHeader {
                key,
                value: Some(value),
            })
        },
    )
}
