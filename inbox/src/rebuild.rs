use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    consumer::{Consumer, StreamConsumer},
    error::{KafkaError, KafkaResult, RDKafkaErrorCode},
};
use shared_events::{
    headers::{self, Redirect},
    topics::GroupTopics,
};
use sqlx::PgPool;
use tokio::time::timeout;
use uuid::Uuid;

use crate::{
    consumer::to_record,
    decode::{self, History},
    ordering::Ordering,
    record::Record,
    table::{FromTopic, Table},
};

/// Most records in one statement.
const BATCH: usize = 500;
/// Most bytes of them in memory, about.
const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// Longest wait for a broker's answer, and for the next record.
const ANSWER: Duration = Duration::from_secs(30);

/// Fills the table of dead letters again from their topic. The consumer may run meanwhile, and it may be repeated: it only adds
/// what the table lacks.
#[derive(Debug, Clone)]
pub struct Rebuild {
    pub table: Table,
    pub pool: PgPool,
    /// Brokers' addresses and security.
    pub client_config: ClientConfig,
    pub topics: GroupTopics,
    /// As the consumer has it: which letters hold their keys.
    pub ordering: Ordering,
}

/// How far a rebuild is, and at its end its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Records of the topic that have been read.
    pub read: u64,
    /// Offsets that the topic had when the rebuild began; some of them may be no records.
    pub of: u64,
    /// Letters that the table lacked.
    pub added: u64,
}

/// Why a rebuild has ended early. What it has added stays, and the next one goes on from there.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    #[error("the Kafka client failed")]
    Client(#[from] KafkaError),
    #[error("topic {0} does not exist")]
    TopicMissing(String),
    #[error("the brokers sent no record for {0:?}")]
    Silent(Duration),
    #[error("the database failed")]
    Database(#[from] sqlx::Error),
    #[error("the rebuild was ended by a defect")]
    Defect,
}

impl Rebuild {
    /// Reads the topic from its beginning to the end that it has now, and tells how far it is after each batch.
    ///
    /// # Errors
    /// [`RebuildError`].
    pub async fn run(&self, mut tell: impl FnMut(Progress)) -> Result<Progress, RebuildError> {
        let topic = self.topics.dead_letter();
        let (config, group) = (self.client_config.clone(), self.topics.group().to_owned());
        let begun = tokio::task::spawn_blocking(move || begin(config, &group, &topic));
        let (consumer, mut open) = begun.await.map_err(|_| RebuildError::Defect)??;
        let mut progress = Progress {
            of: open.values().map(|(low, end)| (end - low).unsigned_abs()).sum(),
            ..Progress::default()
        };
        let mut batch = Batch::default();
        while !open.is_empty() {
            let message = match timeout(ANSWER, consumer.recv()).await {
                Ok(Ok(message)) => message,
                // What was left were no records.
                Ok(Err(KafkaError::PartitionEOF(partition))) => {
                    open.remove(&partition);
                    continue;
                }
                Ok(Err(error @ KafkaError::MessageConsumptionFatal(_))) => return Err(error.into()),
                // The library repairs the rest by itself, as long as something comes.
                Ok(Err(error)) => {
                    tracing::debug!(%error, "the dead-letter topic cannot be read for now");
                    continue;
                }
                Err(_) => return Err(RebuildError::Silent(ANSWER)),
            };
            let record = to_record(&message, None);
            let partition = message.partition();
            let Some((_, end)) = open.get(&partition).copied() else {
                continue;
            };
            if record.offset + 1 >= end {
                open.remove(&partition);
            }
            // It came after we began: whoever sent it has written its row.
            if record.offset >= end {
                continue;
            }
            let letter = self.letter(record, partition);
            if batch.is_full() || batch.has(&letter) {
                progress.added += self.table.rebuild(&self.pool, &batch.letters).await?;
                batch = Batch::default();
                tell(progress);
            }
            batch.push(letter);
            progress.read += 1;
        }
        if !batch.letters.is_empty() {
            progress.added += self.table.rebuild(&self.pool, &batch.letters).await?;
        }
        tell(progress);
        Ok(progress)
    }

    fn letter(&self, record: Record, partition: i32) -> FromTopic {
        let topic = self.topics.dead_letter().into();
        let headers = record.header_list();
        let redirect = Redirect::decode(&headers).unwrap_or_else(|| Redirect {
            // Without our headers, it is known by where it stands.
            origin: decode::history(&record, &topic, partition, None).origin,
            attempt: 1,
            not_before: None,
            error_class: UNKNOWN.to_owned(),
            error_type: UNKNOWN.to_owned(),
            error_message: "the record has no headers that tell".to_owned(),
            consumer_version: UNKNOWN.to_owned(),
        });
        let envelope = decode::decode(record.value()).ok();
        let record = record.with_headers(&headers::without_redirect(&headers));
        FromTopic {
            holds: envelope
                .as_ref()
                .is_some_and(|envelope| self.ordering.holds(&envelope.event_type)),
            envelope,
            record,
            history: History {
                attempts: redirect.attempt,
                origin: redirect.origin.clone(),
            },
            partition,
            redirect,
        }
    }
}

const UNKNOWN: &str = "unknown";

/// Records for one statement, no event twice.
#[derive(Default)]
struct Batch {
    letters: Vec<FromTopic>,
    events: HashSet<Uuid>,
    bytes: usize,
}

impl Batch {
    fn is_full(&self) -> bool {
        self.letters.len() >= BATCH || self.bytes >= BATCH_BYTES
    }

    fn has(&self, letter: &FromTopic) -> bool {
        let same_place = |other: &FromTopic| other.history.origin == letter.history.origin;
        match &letter.envelope {
            Some(envelope) => self.events.contains(&envelope.id),
            None => self
                .letters
                .iter()
                .any(|other| other.envelope.is_none() && same_place(other)),
        }
    }

    fn push(&mut self, letter: FromTopic) {
        self.bytes += letter.record.value().map_or(0, <[u8]>::len);
        self.events.extend(letter.envelope.as_ref().map(|envelope| envelope.id));
        self.letters.push(letter);
    }
}

/// The partitions that are not read to their end, each with its first offset and its end.
type Open = HashMap<i32, (i64, i64)>;

/// A consumer at the topic's beginning.
fn begin(mut config: ClientConfig, group: &str, topic: &str) -> Result<(StreamConsumer, Open), RebuildError> {
    // Partitions are assigned by hand and nothing is committed: the group does not notice.
    let consumer: StreamConsumer = config
        .set("group.id", group)
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "earliest")
        .set("isolation.level", "read_committed")
        .set("check.crcs", "true")
        .set("allow.auto.create.topics", "false")
        .set("enable.partition.eof", "true")
        .set("queued.min.messages", "1000")
        .set("queued.max.messages.kbytes", "4096")
        .create()?;
    let metadata = consumer.fetch_metadata(Some(topic), ANSWER)?;
    let missing = || RebuildError::TopicMissing(topic.to_owned());
    let found = metadata.topics().iter().find(|found| found.name() == topic);
    let found = found.ok_or_else(missing)?;
    match found.error().map(RDKafkaErrorCode::from) {
        None => {}
        Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => return Err(missing()),
        Some(code) => return Err(KafkaError::MetadataFetch(code).into()),
    }
    let mut open = HashMap::new();
    let mut assignment = TopicPartitionList::new();
    for partition in found.partitions() {
        let (low, end) = watermarks(&consumer, topic, partition.id())?;
        if low < end {
            open.insert(partition.id(), (low, end));
            assignment.add_partition_offset(topic, partition.id(), Offset::Offset(low))?;
        }
    }
    consumer.assign(&assignment)?;
    Ok((consumer, open))
}

/// A leader that has only just been named does not know it yet.
fn watermarks(consumer: &StreamConsumer, topic: &str, partition: i32) -> KafkaResult<(i64, i64)> {
    let end = Instant::now() + ANSWER;
    loop {
        let answer = consumer.fetch_watermarks(topic, partition, ANSWER);
        let elects = matches!(
            answer,
            Err(KafkaError::MetadataFetch(
                RDKafkaErrorCode::NotLeaderForPartition | RDKafkaErrorCode::LeaderNotAvailable
            ))
        );
        if !elects || Instant::now() >= end {
            return answer;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
