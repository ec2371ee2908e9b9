//! The topics of a consumer group, created explicitly with the settings that the flow relies on.

use std::time::Duration;

use anyhow::{Context, bail};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::types::RDKafkaErrorCode;
use shared_events::topics::GroupTopics;

/// Retry tiers by default: 5 s, 30 s, 5 min.
pub const DEFAULT_TIERS: usize = 3;

/// Kafka's own default for the largest record batch, in bytes.
const MAIN_MAX_BYTES: &str = "1048588";
/// A redirected record carries its history in headers; 64 KiB more than the main topic always hold them.
const REDIRECT_MAX_BYTES: &str = "1114124";

const HEARTBEAT_RETENTION_MS: &str = "3600000";

const DEADLINE: Duration = Duration::from_secs(30);

/// Creates the main topic, `tiers` retry topics and the dead-letter topic. Topics that exist are left as they are.
pub async fn create(brokers: &str, topics: &GroupTopics, tiers: usize, partitions: i32) -> anyhow::Result<()> {
    let retries: Vec<String> = (1..=tiers).map(|tier| topics.retry(tier)).collect();
    let dead_letter = topics.dead_letter();
    let new = |name| NewTopic::new(name, partitions, TopicReplication::Fixed(1));

    let mut wanted = vec![new(topics.main()).set("max.message.bytes", MAIN_MAX_BYTES)];
    wanted.extend(retries.iter().map(|retry| {
        new(retry)
            .set("max.message.bytes", REDIRECT_MAX_BYTES)
            // A tier's delay counts from the broker's clock, not from the clock of whoever redirected the record.
            .set("message.timestamp.type", "LogAppendTime")
    }));
    wanted.push(
        new(&dead_letter)
            .set("max.message.bytes", REDIRECT_MAX_BYTES)
            // A dead letter stays until a person has dealt with it.
            .set("retention.ms", "-1"),
    );

    create_missing(brokers, &wanted).await
}

/// Creates the topic of Debezium's heartbeats, which nobody reads. It stays when it exists.
pub async fn create_heartbeat(brokers: &str, name: &str) -> anyhow::Result<()> {
    let topic = NewTopic::new(name, 1, TopicReplication::Fixed(1)).set("retention.ms", HEARTBEAT_RETENTION_MS);
    create_missing(brokers, &[topic]).await
}

async fn create_missing(brokers: &str, wanted: &[NewTopic<'_>]) -> anyhow::Result<()> {
    let results = admin(brokers)?
        .create_topics(wanted, &options())
        .await
        .context("ask the broker to create topics")?;
    for result in results {
        match result {
            Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((topic, code)) => bail!("create the topic {topic}: {code}"),
        }
    }
    Ok(())
}

/// Deletes the same topics. Topics that do not exist are no error.
pub async fn delete(brokers: &str, topics: &GroupTopics, tiers: usize) -> anyhow::Result<()> {
    let names = topics.all(tiers);
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let results = admin(brokers)?
        .delete_topics(&names, &options())
        .await
        .context("ask the broker to delete topics")?;
    for result in results {
        match result {
            Ok(_) | Err((_, RDKafkaErrorCode::UnknownTopicOrPartition)) => {}
            Err((topic, code)) => bail!("delete the topic {topic}: {code}"),
        }
    }
    Ok(())
}

fn admin(brokers: &str) -> anyhow::Result<AdminClient<DefaultClientContext>> {
    ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .create()
        .context("create a Kafka admin client")
}

fn options() -> AdminOptions {
    AdminOptions::new()
        .request_timeout(Some(DEADLINE))
        .operation_timeout(Some(DEADLINE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_containers_topics_have_the_same_settings() {
        let script = include_str!("../../compose/kafka/topics.sh");
        for line in [
            format!("create \"$TOPIC\" \"$PARTITIONS\" max.message.bytes={MAIN_MAX_BYTES}\n"),
            format!(
                "retry.$tier\" \"$PARTITIONS\" max.message.bytes={REDIRECT_MAX_BYTES} message.timestamp.type=LogAppendTime\n"
            ),
            format!("dlt\" \"$PARTITIONS\" max.message.bytes={REDIRECT_MAX_BYTES} retention.ms=-1\n"),
            format!("create __debezium-heartbeat.logistics 1 retention.ms={HEARTBEAT_RETENTION_MS}\n"),
        ] {
            assert!(script.contains(&line), "{line} is not in\n{script}");
        }
    }
}
