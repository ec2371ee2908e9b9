use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use rdkafka::{
    ClientConfig, Message,
    consumer::{CommitMode, Consumer, StreamConsumer},
    error::KafkaError,
    message::{BorrowedMessage, Headers},
};
use shared_events::headers::CE_ID;
use sqlx::types::Uuid;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    limited_pool::LimitedPool,
    status::{Metrics, with_causes},
    table::{self, Table},
};

/// Records confirmed at once.
const BATCH: usize = 2_000;
/// How long a batch is gathered.
const GATHER: Duration = Duration::from_millis(200);
const BACKOFF: Duration = Duration::from_secs(1);
const LONGEST_BACKOFF: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
enum ConfirmError {
    #[error("the topic could not be read back")]
    Kafka(#[from] KafkaError),
    #[error("rows could not be confirmed")]
    Table(#[from] sqlx::Error),
}

/// Reads the topic back and marks each event's row COMPLETED, until told to stop. Instances share the partitions.
///
/// An offset is committed after its rows are marked: a crash in between confirms them twice, which changes nothing.
pub(crate) async fn read_back(
    table: Table,
    pool: LimitedPool,
    kafka: ClientConfig,
    topic: String,
    group: String,
    metrics: Metrics,
    stop: CancellationToken,
) {
    let mut backoff = BACKOFF;
    while !stop.is_cancelled() {
        let started = Instant::now();
        let session = session(&table, &pool, &kafka, &topic, &group, &metrics);
        tokio::select! {
            () = stop.cancelled() => return,
            Err(error) = session => {
                tracing::warn!(group, reason = with_causes(&error), ?backoff, "events are not confirmed for now");
            }
        }
        if started.elapsed() > LONGEST_BACKOFF {
            backoff = BACKOFF;
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(backoff) => {}
        }
        backoff = (backoff * 2).min(LONGEST_BACKOFF);
    }
}

async fn session(
    table: &Table,
    pool: &LimitedPool,
    kafka: &ClientConfig,
    topic: &str,
    group: &str,
    metrics: &Metrics,
) -> Result<std::convert::Infallible, ConfirmError> {
    let mut config = kafka.clone();
    config
        .set("group.id", group)
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "earliest")
        .set("isolation.level", "read_committed")
        .set("allow.auto.create.topics", "false")
        .set("session.timeout.ms", "10000")
        .set("heartbeat.interval.ms", "2000")
        // Of each partition: every record waiting here costs the library far more than its bytes.
        .set("queued.min.messages", "100")
        .set("queued.max.messages.kbytes", "1024")
        .set("fetch.max.bytes", "1200000")
        // Compressed: in memory it is many times as much.
        .set("max.partition.fetch.bytes", "32768")
        .set("message.max.bytes", "1100000")
        .set("fetch.queue.backoff.ms", "5");
    let consumer: StreamConsumer = config.create()?;
    consumer.subscribe(&[topic])?;
    loop {
        let mut ids = Vec::new();
        let mut last = Some(consumer.recv().await?);
        let until = Instant::now() + GATHER;
        let mut read = 0;
        while let Some(message) = last.take() {
            read += 1;
            // A record without our header is somebody else's.
            ids.extend(event_id(&message));
            consumer.store_offset_from_message(&message)?;
            if read < BATCH {
                last = match tokio::time::timeout_at(until, consumer.recv()).await {
                    Ok(next) => Some(next?),
                    Err(_) => None,
                };
            }
        }
        let confirmed = table::confirm(table, pool, &ids).await?;
        metrics.confirmed(confirmed);
        consumer.commit_consumer_state(CommitMode::Async)?;
    }
}

fn event_id(message: &BorrowedMessage<'_>) -> Option<Uuid> {
    let headers = message.headers()?;
    // rdkafka panics on a header name that is not UTF-8, which anyone may send.
    let id = catch_unwind(AssertUnwindSafe(|| {
        let header = headers.iter().find(|header| header.key == CE_ID)?;
        Uuid::try_parse_ascii(header.value?).ok()
    }));
    id.ok().flatten()
}
