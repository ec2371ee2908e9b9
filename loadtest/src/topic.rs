use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
    producer::{BaseProducer, BaseRecord, Producer},
    types::RDKafkaErrorCode,
};
use uuid::Uuid;

use crate::usage;

const DEADLINE: Duration = Duration::from_secs(30);
/// Longer than a Kafka client's session by default, 45 s.
const SESSION: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(100);
const WARM_UP_STEP: Duration = Duration::from_secs(5);
/// Share of a processor that a compiler takes that has little left to do.
const COMPILED: f64 = 0.05;

/// A topic whose records bear the broker's time.
#[derive(Debug, Clone)]
pub struct Topic {
    brokers: String,
    name: String,
    partitions: i32,
}

impl Topic {
    pub fn new(brokers: &str, name: &str, partitions: i32) -> Self {
        Self {
            brokers: brokers.to_owned(),
            name: name.to_owned(),
            partitions,
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn brokers(&self) -> &str {
        &self.brokers
    }

    pub fn partitions(&self) -> i32 {
        self.partitions
    }

    /// # Errors
    /// If the broker does not answer, or refuses.
    pub async fn create(&self) -> anyhow::Result<()> {
        let topic = NewTopic::new(&self.name, self.partitions, TopicReplication::Fixed(1))
            .set("message.timestamp.type", "LogAppendTime");
        let results = self.admin()?.create_topics(&[topic], &options()).await;
        for result in results.context("ask the broker to create the topic")? {
            if let Err((topic, code)) = result {
                bail!("create the topic {topic}: {code}");
            }
        }
        Ok(())
    }

    /// A topic that does not exist is no error.
    ///
    /// # Errors
    /// If the broker does not answer, or refuses.
    pub async fn delete(&self) -> anyhow::Result<()> {
        let results = self.admin()?.delete_topics(&[&self.name], &options()).await;
        for result in results.context("ask the broker to delete the topic")? {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::UnknownTopicOrPartition)) => {}
                Err((topic, code)) => bail!("delete the topic {topic}: {code}"),
            }
        }
        Ok(())
    }

    /// The group's offsets; it has no members any more. One that is not there is no error.
    ///
    /// # Errors
    /// If the broker does not answer, or refuses.
    pub async fn forget_group(&self, group: &str) -> anyhow::Result<()> {
        let end = Instant::now() + SESSION;
        loop {
            let results = self.admin()?.delete_groups(&[group], &options()).await;
            let result = results
                .context("ask the broker to delete the group")?
                .into_iter()
                .next();
            match result.context("the broker says nothing of the group")? {
                Ok(_) | Err((_, RDKafkaErrorCode::GroupIdNotFound)) => return Ok(()),
                // A member that went without a word is one until its session ends.
                Err((_, RDKafkaErrorCode::NonEmptyGroup)) if Instant::now() < end => tokio::time::sleep(POLL).await,
                Err((group, code)) => bail!("delete the group {group}: {code}"),
            }
        }
    }

    fn admin(&self) -> anyhow::Result<AdminClient<DefaultClientContext>> {
        let config = ClientConfig::new().set("bootstrap.servers", &self.brokers).create();
        config.context("create a Kafka admin client")
    }

    /// A reader of the whole topic, assigned nothing yet.
    ///
    /// # Errors
    /// If the client cannot be made.
    pub fn reader(&self) -> anyhow::Result<Reader> {
        let consumer = ClientConfig::new()
            .set("bootstrap.servers", &self.brokers)
            .set("group.id", "loadtest")
            .set("enable.auto.commit", "false")
            .set("allow.auto.create.topics", "false")
            .set("fetch.min.bytes", "1")
            // The default of 1 s holds back a reader whose queue was full for a moment.
            .set("fetch.queue.backoff.ms", "5")
            .set("queued.max.messages.kbytes", "65536")
            .create()
            .context("create a Kafka client")?;
        Ok(Reader {
            topic: self.clone(),
            consumer: Arc::new(consumer),
        })
    }
}

/// Publishes to a topic of its own, in bursts and one by one, and reads along: a Java broker compiles its hot paths while it works,
/// and the first contender should not pay for that. Ends when the compiler has little left to do, or with `false` when `most` has
/// passed before.
///
/// # Errors
/// If the broker does not answer, or refuses.
pub async fn warm_up(brokers: &str, partitions: i32, broker_pid: i32, most: Duration) -> anyhow::Result<bool> {
    let topic = Topic::new(
        brokers,
        &format!("loadtest.warm-up.{}", Uuid::now_v7().simple()),
        partitions,
    );
    topic.create().await?;
    let warmed = topic.clone();
    let warming = tokio::task::spawn_blocking(move || {
        std::thread::scope(|scope| {
            let publishing = scope.spawn(|| publish_until_compiled(&warmed, broker_pid, most));
            let read = warmed.reader()?.read_along(|| publishing.is_finished());
            let compiled = publishing
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            compiled.and_then(|compiled| read.map(|()| compiled))
        })
    });
    let warm = warming.await.context("warm up the broker")?;
    let deleted = topic.delete().await;
    warm.and_then(|compiled| deleted.map(|()| compiled))
}

fn publish_until_compiled(topic: &Topic, broker_pid: i32, most: Duration) -> anyhow::Result<bool> {
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", &topic.brokers)
        .set("enable.idempotence", "true")
        .set("allow.auto.create.topics", "false")
        .set("linger.ms", "0")
        .set("compression.type", "lz4")
        .create()
        .context("create a Kafka client")?;
    let end = Instant::now() + most;
    let mut compiled = usage::compiler_seconds(broker_pid);
    while Instant::now() < end {
        let start = Instant::now();
        publish(&producer, &topic.name, WARM_UP_STEP)?;
        let before = std::mem::replace(&mut compiled, usage::compiler_seconds(broker_pid));
        // Where the system does not tell, one step has to be enough.
        let Some((after, before)) = compiled.zip(before) else {
            return Ok(true);
        };
        // Less than none: a thread of the compiler has ended, with its time.
        if (0.0..start.elapsed().as_secs_f64() * COMPILED).contains(&(after - before)) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn publish(producer: &BaseProducer, topic: &str, time: Duration) -> anyhow::Result<()> {
    let end = Instant::now() + time;
    let value = "x".repeat(400);
    for round in 0_u32.. {
        if Instant::now() >= end {
            break;
        }
        // One burst in a hundred: what is measured is mostly single records, and each way has its paths.
        let burst = if round.is_multiple_of(100) { 2_000 } else { 1 };
        for number in 0..burst {
            let key = (round.wrapping_add(number)).to_string();
            let record = BaseRecord::to(topic).key(&key).payload(&value);
            if let Err((error, _)) = producer.send(record) {
                return Err(error).context("warm up the broker");
            }
        }
        producer.flush(DEADLINE).context("warm up the broker")?;
    }
    Ok(())
}

/// Reads a topic, and asks for its ends. The calls block.
#[derive(Clone)]
pub struct Reader {
    topic: Topic,
    consumer: Arc<BaseConsumer>,
}

impl Reader {
    /// The first and the next offset of every partition, and how many records lie between.
    ///
    /// # Errors
    /// If the broker does not answer in time.
    pub fn ends(&self) -> anyhow::Result<Ends> {
        let mut ends = Ends::default();
        for partition in 0..self.topic.partitions {
            let (low, high) = self
                .ends_of(partition)
                .with_context(|| format!("ask for the ends of partition {partition}"))?;
            ends.records += (high - low).cast_unsigned();
            ends.partitions.push((low, high));
        }
        Ok(ends)
    }

    /// A broker that has just made a topic may say for a moment that it does not lead it.
    fn ends_of(&self, partition: i32) -> Result<(i64, i64), KafkaError> {
        let end = Instant::now() + DEADLINE;
        loop {
            let ends = self.consumer.fetch_watermarks(&self.topic.name, partition, DEADLINE);
            let code = ends.as_ref().err().and_then(KafkaError::rdkafka_error_code);
            match code {
                Some(RDKafkaErrorCode::NotLeaderForPartition | RDKafkaErrorCode::LeaderNotAvailable)
                    if Instant::now() < end =>
                {
                    std::thread::sleep(POLL);
                }
                _ => return ends,
            }
        }
    }

    /// The same from asynchronous code.
    ///
    /// # Errors
    /// If the broker does not answer in time.
    pub async fn count(&self) -> anyhow::Result<u64> {
        let reader = self.clone();
        let ends = tokio::task::spawn_blocking(move || reader.ends()).await;
        Ok(ends.context("ask for the ends of the topic")??.records)
    }

    /// Everything from the topic's begin, as it comes, to the end that it has once everything is published.
    fn read_along(&self, is_published: impl Fn() -> bool) -> anyhow::Result<()> {
        let ends = self.ends()?;
        let consumer = self.assign(ends.partitions.iter().map(|(low, _)| *low))?;
        let mut read = 0;
        while !is_published() {
            if let Some(record) = consumer.poll(POLL) {
                record.context("read from the broker")?;
                read += 1;
            }
        }
        for _ in read..self.ends()?.records {
            let record = consumer.poll(DEADLINE).context("nothing came from the broker")?;
            record.context("read from the broker")?;
        }
        Ok(())
    }

    /// Reads from these offsets on.
    ///
    /// # Errors
    /// If the client refuses.
    pub fn assign(&self, offsets: impl Iterator<Item = i64>) -> anyhow::Result<&BaseConsumer> {
        let mut assignment = TopicPartitionList::new();
        for (partition, offset) in (0..).zip(offsets) {
            assignment.add_partition_offset(&self.topic.name, partition, Offset::Offset(offset))?;
        }
        ensure!(assignment.count() > 0, "the topic {} has no partition", self.topic.name);
        self.consumer.assign(&assignment).context("assign the partitions")?;
        Ok(&self.consumer)
    }
}

/// Where a topic begins and ends.
#[derive(Debug, Default)]
pub struct Ends {
    pub partitions: Vec<(i64, i64)>,
    pub records: u64,
}

fn options() -> AdminOptions {
    AdminOptions::new()
        .request_timeout(Some(DEADLINE))
        .operation_timeout(Some(DEADLINE))
}
