use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use rdkafka::{Message, Timestamp};
use serde::Serialize;

use crate::{
    topic::Reader,
    workload::{Recognised, Workload},
};

const POLL: Duration = Duration::from_millis(200);

/// What stands in the topic against what was appended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Account {
    /// Events appended.
    pub rows: u64,
    /// Records of them in the topic.
    pub records: u64,
    /// Events that are in the topic.
    pub distinct: u64,
    /// Records beyond the first of their event.
    pub duplicates: u64,
    /// Events that are not in the topic.
    pub missing: u64,
    /// First records that came after a later sequence of their key.
    pub inversions: u64,
}

impl Account {
    /// Whether every event arrived, each key in its order. Duplicates are allowed: delivery is at least once.
    pub fn holds(&self) -> bool {
        self.missing == 0 && self.inversions == 0
    }
}

/// The account, and the broker's times of the first records.
#[derive(Debug)]
pub struct Verdict {
    pub account: Account,
    /// Of the first and of the last event to arrive, in milliseconds since 1970.
    pub first_ms: i64,
    pub last_ms: i64,
    /// Most events that arrived within one second of the clock.
    pub fastest_second: u64,
}

/// Reads the topic from its beginning to the end that it has now. Blocks.
///
/// # Errors
/// If the broker is silent for longer than `patience`, or a record is none of the workload's.
pub fn verify(reader: &Reader, workload: &Workload, patience: Duration) -> anyhow::Result<Verdict> {
    let ends = reader.ends()?;
    let consumer = reader.assign(ends.partitions.iter().map(|(low, _)| *low))?;
    let mut tally = Tally::new(workload);
    let mut heard = Instant::now();
    for read in 0..ends.records {
        let message = loop {
            if let Some(message) = consumer.poll(POLL) {
                break message.context("read the topic")?;
            }
            if heard.elapsed() > patience {
                bail!("{read} of {} records could be read", ends.records);
            }
        };
        heard = Instant::now();
        let value = message.payload().unwrap_or_default();
        tally.add(&Recognised::from_value(value)?, message.timestamp())?;
    }
    tally.verdict()
}

struct Tally<'a> {
    workload: &'a Workload,
    seen: Vec<bool>,
    /// By key, counted from 1.
    last_sequence: Vec<u64>,
    account: Account,
    first_ms: i64,
    last_ms: i64,
    seconds: BTreeMap<i64, u64>,
}

impl<'a> Tally<'a> {
    fn new(workload: &'a Workload) -> Self {
        Self {
            workload,
            seen: vec![false; workload.events() as usize],
            last_sequence: vec![0; workload.keys() as usize + 1],
            account: Account {
                rows: workload.events(),
                ..Account::default()
            },
            first_ms: i64::MAX,
            last_ms: i64::MIN,
            seconds: BTreeMap::new(),
        }
    }

    fn add(&mut self, record: &Recognised, timestamp: Timestamp) -> anyhow::Result<()> {
        let Some(index) = record.index else { return Ok(()) };
        let (key, sequence) = self.workload.position(index);
        let envelope = &record.envelope;
        let matches = envelope.aggregate_id == key.to_string() && envelope.sequence == sequence.cast_signed();
        let seen = self.seen.get_mut(index as usize).filter(|_| matches);
        let seen = seen.with_context(|| format!("event {} is none of this run's", envelope.id))?;
        self.account.records += 1;
        if std::mem::replace(seen, true) {
            self.account.duplicates += 1;
            return Ok(());
        }
        self.account.distinct += 1;
        let last = &mut self.last_sequence[key as usize];
        if sequence < *last {
            self.account.inversions += 1;
        }
        *last = sequence.max(*last);
        let ms = append_ms(timestamp)?;
        self.first_ms = self.first_ms.min(ms);
        self.last_ms = self.last_ms.max(ms);
        *self.seconds.entry(ms / 1_000).or_default() += 1;
        Ok(())
    }

    fn verdict(mut self) -> anyhow::Result<Verdict> {
        ensure!(self.account.distinct > 0, "no event arrived");
        self.account.missing = self.account.rows - self.account.distinct;
        Ok(Verdict {
            account: self.account,
            first_ms: self.first_ms,
            last_ms: self.last_ms,
            fastest_second: self.seconds.into_values().max().unwrap_or_default(),
        })
    }
}

/// When the broker appended the record, in milliseconds since 1970.
///
/// # Errors
/// If the topic has the producer's times.
pub fn append_ms(timestamp: Timestamp) -> anyhow::Result<i64> {
    match timestamp {
        Timestamp::LogAppendTime(ms) => Ok(ms),
        other => bail!("the topic does not have the broker's times: {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use time::OffsetDateTime;

    use super::*;

    #[test]
    fn losses_repetitions_and_inversions_are_counted() {
        let workload = Workload::new(8, 2, 400, 1);
        let mut tally = Tally::new(&workload);
        // Keys 1 to 4, sequences 1 and 2: event 4 is the second of key 1, event 5 that of key 2.
        for (index, ms) in [(0, 5_000), (4, 5_100), (4, 5_200), (5, 5_300), (1, 7_000)] {
            let value = workload
                .event(index, OffsetDateTime::now_utc())
                .unwrap()
                .encode()
                .unwrap();
            let record = Recognised::from_value(value.as_bytes()).unwrap();
            tally.add(&record, Timestamp::LogAppendTime(ms)).unwrap();
        }
        let verdict = tally.verdict().unwrap();
        assert_eq!(
            verdict.account,
            Account {
                rows: 8,
                records: 5,
                distinct: 4,
                duplicates: 1,
                missing: 4,
                inversions: 1
            }
        );
        assert!(!verdict.account.holds());
        assert_eq!(
            (verdict.first_ms, verdict.last_ms, verdict.fastest_second),
            (5_000, 7_000, 3)
        );
    }

    #[test]
    fn a_record_of_another_run_is_refused() {
        let (mine, other) = (Workload::new(8, 2, 400, 1), Workload::new(8, 4, 400, 1));
        let value = other.event(7, OffsetDateTime::now_utc()).unwrap().encode().unwrap();
        let record = Recognised::from_value(value.as_bytes()).unwrap();
        assert!(Tally::new(&mine).add(&record, Timestamp::LogAppendTime(1)).is_err());
    }
}
