use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::Context;
use hdrhistogram::Histogram;
use rdkafka::{Message, message::BorrowedMessage};
use time::OffsetDateTime;

use crate::{
    append::Schedule,
    latency::{micros, new_histogram},
    topic::Reader,
    verify,
    workload::Recognised,
};

/// Also how long a stop may take.
const POLL: Duration = Duration::from_millis(100);
/// The broker's time is a whole millisecond, rounded down; its middle is right to half of one.
const MIDDLE_OF_A_MILLISECOND_MICROS: i64 = 500;

/// A thread that reads the topic while events are appended.
pub struct Receiver {
    distinct: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Received>>,
}

/// Times in microseconds, of the first record of each event that counts. All clocks are this machine's real-time clock.
pub struct Received {
    /// From the event's time to the broker's.
    pub append_to_broker: Histogram<u64>,
    /// From the event's time to its receipt here.
    pub append_to_receiver: Histogram<u64>,
    /// From the time at which the event was due to the broker's.
    pub due_to_broker: Histogram<u64>,
    pub records: u64,
    pub duplicates: u64,
    /// Records whose broker time lies before the event's; they count as 0.
    pub negative: u64,
}

impl Receiver {
    /// Begins at the ends that the topic has now. Events before `counted_from` are received and not measured.
    ///
    /// # Errors
    /// If the broker does not answer.
    pub fn start(reader: Reader, schedule: Schedule, events: u64, counted_from: u64) -> anyhow::Result<Self> {
        let (distinct, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let ends = reader.ends()?;
        let mut receipt = Receipt {
            received: Received::none()?,
            seen: vec![false; events as usize],
            schedule,
            counted_from,
        };
        let (shared_distinct, shared_stop) = (distinct.clone(), stop.clone());
        let receive = move || {
            let consumer = reader.assign(ends.partitions.iter().map(|(_, high)| *high))?;
            while !shared_stop.load(Ordering::Acquire) {
                let Some(message) = consumer.poll(POLL) else { continue };
                let now = micros(OffsetDateTime::now_utc());
                if receipt.add(&message.context("read the topic")?, now)? {
                    shared_distinct.fetch_add(1, Ordering::Release);
                }
            }
            Ok(receipt.received)
        };
        let thread = std::thread::Builder::new().name("receiver".to_owned()).spawn(receive);
        Ok(Self {
            distinct,
            stop,
            thread: thread.context("start the receiving thread")?,
        })
    }

    /// How many events have arrived.
    pub fn distinct(&self) -> u64 {
        self.distinct.load(Ordering::Acquire)
    }

    /// Whether it ended by itself, which it only does on an error.
    pub fn has_failed(&self) -> bool {
        self.thread.is_finished()
    }

    /// # Errors
    /// What ended it before.
    pub fn finish(self) -> anyhow::Result<Received> {
        self.stop.store(true, Ordering::Release);
        match self.thread.join() {
            Ok(received) => received,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

struct Receipt {
    received: Received,
    seen: Vec<bool>,
    schedule: Schedule,
    counted_from: u64,
}

impl Receipt {
    /// Whether it was the first record of an event.
    fn add(&mut self, message: &BorrowedMessage<'_>, now: i64) -> anyhow::Result<bool> {
        let record = Recognised::from_value(message.payload().unwrap_or_default())?;
        let Some(index) = record.index else { return Ok(false) };
        let seen = self.seen.get_mut(index as usize);
        let seen = seen.with_context(|| format!("event {} is none of this run's", record.envelope.id))?;
        self.received.records += 1;
        if std::mem::replace(seen, true) {
            self.received.duplicates += 1;
            return Ok(false);
        }
        if index >= self.counted_from {
            let broker = verify::append_ms(message.timestamp())? * 1_000 + MIDDLE_OF_A_MILLISECOND_MICROS;
            let appended = micros(record.envelope.timestamp);
            let due = self.schedule.due_micros(index);
            self.received.record(appended, due, broker, now);
        }
        Ok(true)
    }
}

impl Received {
    fn none() -> anyhow::Result<Self> {
        Ok(Self {
            append_to_broker: new_histogram()?,
            append_to_receiver: new_histogram()?,
            due_to_broker: new_histogram()?,
            records: 0,
            duplicates: 0,
            negative: 0,
        })
    }

    fn record(&mut self, appended: i64, due: i64, broker: i64, received: i64) {
        if broker < appended {
            self.negative += 1;
        }
        let spent = |from: i64, to: i64| u64::try_from(to - from).unwrap_or_default();
        self.append_to_broker.saturating_record(spent(appended, broker));
        self.append_to_receiver.saturating_record(spent(appended, received));
        self.due_to_broker.saturating_record(spent(due, broker));
    }
}
