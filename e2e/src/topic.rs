use std::time::Duration;

use anyhow::Context;
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    message::Headers,
};
use shared_events::headers::Header;

const TIMEOUT: Duration = Duration::from_secs(10);

/// A record as it lies in a topic.
#[derive(Debug, Clone)]
pub struct Record {
    pub partition: i32,
    pub offset: i64,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub headers: Vec<Header>,
    /// Milliseconds since 1970, as its producer or its broker has set it.
    pub time: Option<i64>,
}

/// Everything the topic holds now, each partition in its order.
///
/// # Errors
/// If the broker does not answer in time.
pub async fn read(brokers: &str, topic: &str) -> anyhow::Result<Vec<Record>> {
    let (brokers, topic) = (brokers.to_owned(), topic.to_owned());
    tokio::task::spawn_blocking(move || read_blocking(&brokers, &topic)).await?
}

fn read_blocking(brokers: &str, topic: &str) -> anyhow::Result<Vec<Record>> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "ledger")
        .set("enable.auto.commit", "false")
        .set("fetch.wait.max.ms", "10")
        .create()?;
    let metadata = consumer.fetch_metadata(Some(topic), TIMEOUT)?;
    let partitions = metadata
        .topics()
        .first()
        .with_context(|| format!("{topic} is not there"))?
        .partitions();
    let mut assignment = TopicPartitionList::new();
    let mut missing = 0;
    for partition in partitions {
        let (low, high) = consumer.fetch_watermarks(topic, partition.id(), TIMEOUT)?;
        if high > low {
            missing += high - low;
            assignment.add_partition_offset(topic, partition.id(), Offset::Offset(low))?;
        }
    }
    consumer.assign(&assignment)?;
    let mut records = Vec::new();
    while (records.len() as i64) < missing {
        let message = consumer
            .poll(TIMEOUT)
            .with_context(|| format!("{topic}: {} of {missing} records came", records.len()))??;
        records.push(Record {
            partition: message.partition(),
            offset: message.offset(),
            key: message.key().map(<[u8]>::to_vec),
            value: message.payload().map(<[u8]>::to_vec),
            time: message.timestamp().to_millis(),
            headers: message
                .headers()
                .map(|headers| {
                    let own = |header: rdkafka::message::Header<'_, &[u8]>| {
                        (header.key.to_owned(), header.value.unwrap_or_default().to_vec())
                    };
                    headers.iter().map(own).collect()
                })
                .unwrap_or_default(),
        });
    }
    Ok(records)
}

/// The times of all records, in their order.
///
/// # Errors
/// If the broker does not answer in time.
pub async fn times(brokers: &str, topic: &str) -> anyhow::Result<Vec<i64>> {
    let records = read(brokers, topic).await?;
    let mut times: Vec<i64> = records.iter().filter_map(|record| record.time).collect();
    times.sort_unstable();
    Ok(times)
}

/// How many records the topic holds.
///
/// # Errors
/// If the broker does not answer in time.
pub async fn count(brokers: &str, topic: &str) -> anyhow::Result<usize> {
    Ok(read(brokers, topic).await?.len())
}
