use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use rdkafka::Message;
use serde::Serialize;
use shared_events::Envelope;

use crate::{
    latency::{Quantiles, micros},
    load::histogram,
    place::Place,
    topic::Reader,
};

const POLL: Duration = Duration::from_millis(200);
/// The broker's time is a whole millisecond, rounded down: its middle is right to half of one.
const HALF_A_MILLISECOND: i64 = 500;

/// What stands in the topic after a load.
#[derive(Debug, Serialize)]
pub struct Broker {
    pub records: u64,
    /// Distinct ones among them.
    pub events: u64,
    pub duplicates: u64,
    pub bytes: u64,
    /// From the event's own time, taken inside its transaction, to the broker's time of its first record.
    pub append_to_broker: Quantiles,
}

/// Reads the whole topic.
///
/// # Errors
/// If the broker is silent for longer than `patience`, or a record is no event.
pub async fn read_back(place: &Place, patience: Duration) -> anyhow::Result<Broker> {
    let reader = place.topic.reader()?;
    let read = tokio::task::spawn_blocking(move || read(&reader, patience)).await;
    read.context("read the topic")?
}

fn read(reader: &Reader, patience: Duration) -> anyhow::Result<Broker> {
    let ends = reader.ends()?;
    let consumer = reader.assign(ends.partitions.iter().map(|(low, _)| *low))?;
    let mut seen = HashSet::new();
    let (mut bytes, mut times) = (0, histogram()?);
    let mut heard = Instant::now();
    for number in 0..ends.records {
        let message = loop {
            if let Some(message) = consumer.poll(POLL) {
                break message.context("read the topic")?;
            }
            if heard.elapsed() > patience {
                bail!("{number} of {} records could be read", ends.records);
            }
        };
        heard = Instant::now();
        let value = message.payload().unwrap_or_default();
        bytes += value.len() as u64;
        let envelope = Envelope::decode(value).context("a record is no event")?;
        if seen.insert(envelope.id)
            && let Some(broker) = message.timestamp().to_millis()
        {
            let took = broker * 1_000 + HALF_A_MILLISECOND - micros(envelope.timestamp);
            times.saturating_record(took.max(0).cast_unsigned());
        }
    }
    let events = seen.len() as u64;
    Ok(Broker {
        records: ends.records,
        events,
        duplicates: ends.records - events,
        bytes,
        append_to_broker: Quantiles::of(&times),
    })
}
