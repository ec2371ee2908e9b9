use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use rdkafka::{
    ClientConfig,
    producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer},
};
use shared_events::{
    Envelope, Payload,
    envelope::Fact,
    shipment::{AGGREGATE_TYPE, Line, ShipmentCompleted, ShipmentCreated},
};
use sqlx::PgPool;
use time::OffsetDateTime;
use tokio::{task::JoinHandle, time::Instant};
use uuid::Uuid;

use crate::{place::Place, workload::line_of};

const TICK: Duration = Duration::from_millis(20);
const FLUSH: Duration = Duration::from_secs(120);
/// Keys of a [`Feed`].
const KEY: &str = "live-";

/// Each query counts rows of a feed that must not be there; `$1` is the number of its shipments.
const CHECKS: [(&str, &str); 5] = [
    (
        "events applied less or more than once",
        "SELECT abs(2 * $1 - (SELECT count(*) FROM commerce.inbox WHERE aggregate_id LIKE 'live-%'))",
    ),
    (
        "shipments that are not completed",
        "SELECT abs($1 - (SELECT count(*) FROM commerce.shipments
                           WHERE id LIKE 'live-%' AND status = 'completed' AND sequence = 2))",
    ),
    (
        "lines shipped less or more than once",
        "SELECT count(*) FROM commerce.order_lines
          WHERE shipped_quantity <> CASE WHEN order_id !~ '^[0-9]+$' THEN shipped_quantity
                                         WHEN order_id::bigint <= $1 THEN quantity ELSE 0 END",
    ),
    (
        "entries in timelines that are missing or too many",
        "SELECT abs($1 - (SELECT count(*) FROM commerce.order_timeline WHERE order_id ~ '^[0-9]+$'))",
    ),
    (
        "events applied out of order",
        "SELECT count(*) FROM (SELECT applied_at < lag(applied_at) OVER (PARTITION BY aggregate_id ORDER BY sequence)
                                  AS earlier FROM commerce.inbox WHERE aggregate_id LIKE 'live-%') AS step
          WHERE earlier AND $1 > 0",
    ),
];

pub type EventProducer = ThreadedProducer<DefaultProducerContext>;

/// A producer with a key's order and partition as the relay has them. What it is given while the broker is away it keeps.
///
/// # Errors
/// If the client cannot be made.
pub fn producer(place: &Place) -> anyhow::Result<EventProducer> {
    Ok(ClientConfig::new()
        .set("bootstrap.servers", &place.brokers)
        .set("partitioner", "murmur2_random")
        .set("enable.idempotence", "true")
        .set("queue.buffering.max.messages", "1000000")
        .set("reconnect.backoff.max.ms", "1000")
        .create()?)
}

/// An event of a shipment, as it stands in the topic.
///
/// # Errors
/// A payload that is not valid.
pub fn envelope<P: Payload>(key: &str, sequence: i64, payload: &P) -> anyhow::Result<String> {
    let fact = Fact {
        aggregate_type: AGGREGATE_TYPE,
        aggregate_id: key.to_owned(),
        sequence,
        transaction_key: Uuid::now_v7(),
        timestamp: OffsetDateTime::now_utc(),
    };
    Ok(Envelope::new(Uuid::now_v7(), fact, payload)?.encode()?)
}

pub fn created(order: &str, lines: &[Line]) -> ShipmentCreated {
    ShipmentCreated {
        order_id: order.to_owned(),
        warehouse: "main".to_owned(),
        carrier: "Speedy".to_owned(),
        lines: lines.to_vec(),
        created_at: OffsetDateTime::now_utc(),
    }
}

pub fn completed(order: &str, lines: &[Line]) -> ShipmentCompleted {
    ShipmentCompleted {
        order_id: order.to_owned(),
        warehouse: "main".to_owned(),
        carrier: "Speedy".to_owned(),
        tracking_number: "t".to_owned(),
        lines: lines.to_vec(),
        completed_at: OffsetDateTime::now_utc(),
    }
}

/// Sends both events of a shipment.
///
/// # Errors
/// If the producer's queue is full.
pub fn ship(producer: &EventProducer, topic: &str, key: &str, order: &str, lines: &[Line]) -> anyhow::Result<()> {
    let first = envelope(key, 1, &created(order, lines))?;
    let second = envelope(key, 2, &completed(order, lines))?;
    for value in [first, second] {
        let record = BaseRecord::to(topic).key(key).payload(&value);
        producer.send(record).map_err(|(error, _)| error)?;
    }
    Ok(())
}

/// Ships the prepared orders, one after another and whole, at a steady rate whatever becomes of the events.
pub struct Feed {
    sent: Arc<AtomicI64>,
    stop: Arc<AtomicBool>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Feed {
    /// `rate` is events per second, two for each order.
    ///
    /// # Errors
    /// If the client cannot be made.
    pub fn start(place: &Place, rate: i64, orders: i64) -> anyhow::Result<Self> {
        let producer = producer(place)?;
        let topic = place.topics.main().to_owned();
        let (sent, stop) = (Arc::new(AtomicI64::new(0)), Arc::new(AtomicBool::new(false)));
        let task = tokio::spawn({
            let (sent, stop) = (sent.clone(), stop.clone());
            async move {
                let start = Instant::now();
                let mut shipped = 0;
                let mut tick = tokio::time::interval(TICK);
                while !stop.load(Ordering::Acquire) {
                    tick.tick().await;
                    let due = (start.elapsed().as_secs_f64() * rate as f64 / 2.0) as i64;
                    while shipped < due {
                        shipped += 1;
                        anyhow::ensure!(shipped <= orders, "more than {orders} orders would be shipped");
                        let lines = [0, 1].map(|line| line_of(shipped, line));
                        ship(
                            &producer,
                            &topic,
                            &format!("{KEY}{shipped}"),
                            &shipped.to_string(),
                            &lines,
                        )?;
                    }
                    sent.store(2 * shipped, Ordering::Release);
                }
                tokio::task::spawn_blocking(move || producer.flush(FLUSH)).await??;
                anyhow::Ok(())
            }
        });
        Ok(Self { sent, stop, task })
    }

    /// Events so far.
    pub fn sent(&self) -> i64 {
        self.sent.load(Ordering::Acquire)
    }

    /// The events sent in all; the broker has them.
    ///
    /// # Errors
    /// If it could not send, or the broker does not take them.
    pub async fn stop(self) -> anyhow::Result<i64> {
        self.stop.store(true, Ordering::Release);
        self.task.await??;
        Ok(self.sent.load(Ordering::Acquire))
    }
}

/// Events of a feed that took effect.
///
/// # Errors
/// Any database error.
pub async fn applied(owner: &PgPool) -> anyhow::Result<i64> {
    let query = "SELECT count(*) FROM commerce.inbox WHERE aggregate_id LIKE 'live-%'";
    Ok(sqlx::query_scalar(query).fetch_one(owner).await?)
}

/// What commerce holds of a feed that sent so many events against what it should: each check with how many rows it found,
/// all must be 0.
///
/// # Errors
/// Any database error.
pub async fn check(owner: &PgPool, sent: i64) -> anyhow::Result<Vec<(&'static str, i64)>> {
    let mut found = Vec::new();
    for (check, query) in CHECKS {
        let rows = sqlx::query_scalar(query).bind(sent / 2);
        found.push((check, rows.fetch_one(owner).await?));
    }
    Ok(found)
}
