use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, ensure};
use hdrhistogram::Histogram;
use outbox::{NewEvent, Outbox};
use reqwest::StatusCode;
use serde_json::json;
use shared_events::Envelope;
use sqlx::PgPool;
use time::OffsetDateTime;
use tokio::{task::JoinSet, time::Instant};

use crate::{
    latency::{micros, new_histogram},
    workload::{self, PROOF, Workload},
};

/// The service's own limit; the events here are far below.
const MAX_EVENT_BYTES: usize = 1_000_000;
const REQUEST_DEADLINE: Duration = Duration::from_secs(30);

/// Appends one event in a transaction of its own.
#[derive(Clone)]
pub enum Appender {
    /// With the product's own append, as a business transaction that changes nothing else.
    Table {
        pool: PgPool,
        outbox: Outbox,
        workload: Workload,
    },
    /// Through the endpoint of load test 1, which appends the event of a creation and creates nothing.
    Api { client: reqwest::Client, url: String },
}

impl Appender {
    pub fn table(pool: PgPool, workload: Workload) -> Self {
        let outbox = Outbox::new("logistics", "loadtest", MAX_EVENT_BYTES);
        Self::Table { pool, outbox, workload }
    }

    /// # Errors
    /// If the HTTP client cannot be made.
    pub fn api(base: &str) -> anyhow::Result<Self> {
        let client = reqwest::Client::builder().timeout(REQUEST_DEADLINE).no_proxy().build();
        Ok(Self::Api {
            client: client.context("make the HTTP client")?,
            url: format!("{base}/load-test/outbox"),
        })
    }

    /// An event that shows, by its arrival, that the contender is connected.
    ///
    /// # Errors
    /// If it was not committed.
    pub async fn append_proof(&self) -> anyhow::Result<()> {
        match self {
            Self::Table { pool, outbox, .. } => append(pool, outbox, workload::proof).await,
            Self::Api { client, url } => post(client, url, PROOF).await,
        }
    }

    async fn append(&self, index: u64) -> anyhow::Result<()> {
        match self {
            Self::Table { pool, outbox, workload } => append(pool, outbox, |at| workload.event(index, at)).await,
            Self::Api { client, url } => post(client, url, &index.to_string()).await,
        }
    }
}

/// The product's own.
pub fn outbox() -> Outbox {
    Outbox::new("logistics", "logistics", MAX_EVENT_BYTES)
}

/// The event's time is taken where the product takes it: inside the transaction, before the insert.
async fn append(
    pool: &PgPool,
    outbox: &Outbox,
    event: impl FnOnce(OffsetDateTime) -> anyhow::Result<Envelope>,
) -> anyhow::Result<()> {
    let mut transaction = pool.begin().await.context("begin")?;
    let envelope = event(OffsetDateTime::now_utc())?;
    let event = NewEvent {
        envelope,
        traceparent: None,
    };
    outbox.append(&mut transaction, &[event]).await?;
    transaction.commit().await.context("commit")
}

async fn post(client: &reqwest::Client, url: &str, order_id: &str) -> anyhow::Result<()> {
    let shipment = json!({"order_id": order_id, "warehouse": "main", "carrier": "Speedy",
                          "lines": [{"sku": "A-1", "quantity": 2}]});
    let response = client.post(url).json(&shipment).send().await?;
    let status = response.status();
    let answer = response.text().await?;
    ensure!(status == StatusCode::CREATED, "{status} {answer}");
    Ok(())
}

/// When each event is due. The load is open: an event is due at its time whatever became of those before it.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    start: Instant,
    /// The same moment in microseconds since 1970.
    start_micros: i64,
    per_second: u64,
    events: u64,
}

impl Schedule {
    /// Begins after `lead`.
    pub fn new(per_second: u64, events: u64, lead: Duration) -> Self {
        let now = OffsetDateTime::now_utc();
        Self {
            start: Instant::now() + lead,
            start_micros: micros(now + lead),
            per_second,
            events,
        }
    }

    fn offset(&self, index: u64) -> Duration {
        Duration::from_micros(index * 1_000_000 / self.per_second)
    }

    /// In microseconds since 1970.
    pub fn due_micros(&self, index: u64) -> i64 {
        self.start_micros + self.offset(index).as_micros() as i64
    }
}

/// What became of the schedule.
pub struct Appended {
    pub committed: u64,
    pub failed: u64,
    pub first_failure: Option<String>,
    /// From the first event's due time to the last commit.
    pub seconds: f64,
    /// From due time to the begin of its append, in microseconds, of the events that count.
    pub late: Histogram<u64>,
    /// From the begin of an append to its commit, in microseconds, of the events that count.
    pub took: Histogram<u64>,
}

/// Appends every event at its time, or as soon afterwards as one of `connections` is free.
///
/// # Errors
/// Only if a task panics; an append that fails is counted.
pub async fn run(
    appender: &Appender,
    schedule: Schedule,
    counted_from: u64,
    connections: u32,
) -> anyhow::Result<Appended> {
    let next = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..connections {
        tasks.spawn(work(appender.clone(), schedule, counted_from, next.clone()));
    }
    let mut total = Appended::none()?;
    while let Some(ended) = tasks.join_next().await {
        total.add(ended.context("an appending task panicked")??)?;
    }
    total.seconds = schedule.start.elapsed().as_secs_f64();
    Ok(total)
}

async fn work(
    appender: Appender,
    schedule: Schedule,
    counted_from: u64,
    next: Arc<AtomicU64>,
) -> anyhow::Result<Appended> {
    let mut mine = Appended::none()?;
    loop {
        let index = next.fetch_add(1, Ordering::Relaxed);
        if index >= schedule.events {
            return Ok(mine);
        }
        let due = schedule.start + schedule.offset(index);
        tokio::time::sleep_until(due).await;
        let begin = Instant::now();
        match appender.append(index).await {
            Ok(()) => mine.committed += 1,
            Err(error) => {
                mine.failed += 1;
                mine.first_failure.get_or_insert_with(|| format!("{error:#}"));
            }
        }
        if index >= counted_from {
            mine.late.saturating_record((begin - due).as_micros() as u64);
            mine.took.saturating_record(begin.elapsed().as_micros() as u64);
        }
    }
}

impl Appended {
    fn none() -> anyhow::Result<Self> {
        Ok(Self {
            committed: 0,
            failed: 0,
            first_failure: None,
            seconds: 0.0,
            late: new_histogram()?,
            took: new_histogram()?,
        })
    }

    fn add(&mut self, other: Self) -> anyhow::Result<()> {
        self.committed += other.committed;
        self.failed += other.failed;
        self.first_failure = self.first_failure.take().or(other.first_failure);
        self.late.add(&other.late)?;
        self.took.add(&other.took)?;
        Ok(())
    }
}
