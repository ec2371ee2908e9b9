//! The least service that can be built on `inbox`: one update of an order for each event, beside the engine's own inbox rows.
//! `loadtest consumer` measures it beside Spring Kafka, which does the same work (`spring/src/main/java/ShipOrders.java`). Says
//! `done` once so many events are through, and goes on until it is ended.

use std::{
    collections::HashSet,
    env,
    io::Write,
    sync::{
        Arc,
        atomic::{self, AtomicU64},
    },
    time::Duration,
};

use anyhow::Context;
use inbox::{
    Engine, FloodLimit, Handler, HandlerError, IncomingEvent, Membership, Ordering, Outcome, Parking, Rate, Reason,
    Schedule, Settings, Table, UnknownTypes,
};
use rdkafka::ClientConfig;
use shared_events::{Envelope, topics::GroupTopics};
use sqlx::{PgTransaction, postgres::PgPoolOptions};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

const BATCH: usize = 500;

/// As in the services.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let transactions: u32 = setting("THREADS")?.parse().context("THREADS")?;
    let pool = PgPoolOptions::new()
        .max_connections(transactions + 4)
        .connect(&setting("DATABASE_URL")?)
        .await
        .context("connect to PostgreSQL")?;
    let ordering = match setting("ORDERING")?.as_str() {
        "per-key" => Ordering::PerKey(Parking {
            most_per_key: 1_000,
            most_in_all: 100_000,
            released_by: HashSet::new(),
        }),
        _ => Ordering::None,
    };
    let (topic, group) = (setting("TOPIC")?, setting("GROUP")?);
    let settings = Settings {
        topics: GroupTopics::new(topic, &group),
        schedule: Schedule::new([5, 30, 300].map(Duration::from_secs).to_vec()),
        batch_limit: BATCH,
        transaction_limit: Duration::from_secs(60),
        max_transactions: transactions as usize,
        rate_limit: Rate::Unlimited,
        retry_rate_limit: Rate::Unlimited,
        redrive_rate_limit: Rate::Unlimited,
        pace: None,
        membership: Membership::default(),
        unknown_types: UnknownTypes::Skip,
        ordering,
        flood_limit: FloodLimit {
            run: 100,
            ratio: 0.2,
            window: 1_000,
            resume_after: None,
        },
        letters_retention: Duration::from_secs(90 * 24 * 3600),
        join_trace: |_, _| {},
        consumer_version: env!("CARGO_PKG_VERSION"),
    };
    let mut kafka = ClientConfig::new();
    kafka.set("bootstrap.servers", setting("KAFKA_BROKERS")?);
    let orders = Orders {
        events: setting("EVENTS")?.parse().context("EVENTS")?,
        through: Arc::default(),
    };
    let table = Table::new("commerce", &group).context("the schema of the inbox")?;
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let stopped = stop.clone();
    tokio::spawn(async move {
        terminate.recv().await;
        stopped.cancel();
    });
    Engine::new(settings, pool, table, kafka, orders)
        .run(stop)
        .await
        .context("the engine ended")
}

/// `same_work.orders`, whose numbers are those of the shipments.
struct Orders {
    events: u64,
    through: Arc<AtomicU64>,
}

impl Handler for Orders {
    fn takes(&self, _: &Envelope) -> bool {
        true
    }

    async fn apply(
        &self,
        transaction: &mut PgTransaction<'_>,
        events: &[IncomingEvent],
    ) -> Result<Vec<Outcome>, HandlerError> {
        let orders: Vec<Option<i64>> = events
            .iter()
            .map(|event| event.envelope.aggregate_id.parse().ok())
            .collect();
        sqlx::query(
            "UPDATE same_work.orders SET status = 'SHIPPED', shipped_at = now() FROM unnest($1::bigint[]) AS event(id)
              WHERE orders.id = event.id",
        )
        .bind(orders.iter().flatten().collect::<Vec<_>>())
        .execute(&mut **transaction)
        .await?;
        self.count(events.len() as u64);
        let outcome = |order: &Option<i64>| match order {
            Some(_) => Outcome::Applied,
            None => Outcome::DeadLetter(Reason::new("order-number", "the key is not an order's number")),
        };
        Ok(orders.iter().map(outcome).collect())
    }
}

impl Orders {
    /// Before the commit, so a little early: who waits for it also looks at the inbox.
    fn count(&self, more: u64) {
        let before = self.through.fetch_add(more, atomic::Ordering::Relaxed);
        if before < self.events && before + more >= self.events {
            let mut out = std::io::stdout();
            // Where nobody listens, nobody waits.
            out.write_all(b"done\n").and_then(|()| out.flush()).ok();
        }
    }
}

fn setting(name: &'static str) -> anyhow::Result<String> {
    env::var(name).with_context(|| format!("{name} is not set"))
}
