use std::{str::FromStr, time::Duration};

use devstack::{
    database::RELAY,
    testing::{TestDatabase, TestServers, TestTopics},
};
use outbox::{Lifecycle, Mode, NewEvent, Outbox, Relay, RelaySettings, RelayState, Status, WalBudget};
use rdkafka::{
    ClientConfig, Message,
    consumer::{BaseConsumer, Consumer},
    message::Headers,
};
use service_runtime::settings::Secret;
use shared_events::{
    Envelope,
    envelope::Fact,
    shipment::{AGGREGATE_TYPE, Line, ShipmentCreated},
};
use sqlx::{PgPool, PgTransaction, postgres::PgPoolOptions, types::Uuid};
use time::OffsetDateTime;
use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

/// Everything a test waits for comes within this time on a slow machine; it only ends a test that has failed.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
const PARTITIONS: i32 = 4;

/// A database and a topic of one test, and what writes to the one and reads from the other.
pub(crate) struct Stage {
    // Dropped first: nobody may be connected when the database goes.
    pub(crate) pool: PgPool,
    pub(crate) outbox: Outbox,
    pub(crate) slot: String,
    pub(crate) topics: TestTopics,
    pub(crate) database: TestDatabase,
    pub(crate) servers: TestServers,
    brokers: String,
}

pub(crate) struct RunningRelay {
    pub(crate) status: Status,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// A record as the topic has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Published {
    pub(crate) key: String,
    pub(crate) value: String,
    pub(crate) partition: i32,
    pub(crate) headers: Vec<(String, String)>,
}

impl Stage {
    pub(crate) async fn new() -> anyhow::Result<Self> {
        Self::with_connections(4).await
    }

    /// With room for as many writers at once.
    pub(crate) async fn with_connections(connections: u32) -> anyhow::Result<Self> {
        let servers = TestServers::from_env()?;
        let brokers = servers.brokers().to_owned();
        Self::build(servers, brokers, connections).await
    }

    /// With a broker of the test's own.
    pub(crate) async fn on(servers: TestServers, brokers: String) -> anyhow::Result<Self> {
        Self::build(servers, brokers, 4).await
    }

    async fn build(servers: TestServers, brokers: String, connections: u32) -> anyhow::Result<Self> {
        // What the relay logs is shown with a failing test. The first test of the process has installed it for all.
        tracing_subscriber::fmt()
            .with_test_writer()
            .with_ansi(false)
            .try_init()
            .ok();
        let migrator = sqlx::migrate!("../migrations/logistics");
        let fingerprint = migrator.iter().fold(0_u64, |hash, migration| {
            migration
                .checksum
                .iter()
                .fold(hash, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(*byte)))
        });
        let database = TestDatabase::create(&servers, "logistics", &format!("{fingerprint:x}"), async |owner_url| {
            let url = Secret::from_str(owner_url)?;
            Ok(service_runtime::schema::migrate(&url, "logistics", &migrator).await?)
        })
        .await?;
        let topics = TestTopics::create_on(&brokers, 0, PARTITIONS).await?;
        let pool = PgPoolOptions::new()
            .max_connections(connections)
            .connect(&database.superuser_url())
            .await?;
        Ok(Self {
            pool,
            outbox: Outbox::new("logistics", "logistics", 1_000_000),
            slot: format!("slot_{}", Uuid::now_v7().simple()),
            topics,
            database,
            servers,
            brokers,
        })
    }

    /// Over the write-ahead log.
    pub(crate) async fn start_relay(&self) -> anyhow::Result<RunningRelay> {
        self.start_relay_with(|settings| settings.mode = Mode::Wal).await
    }

    /// With what a test wants otherwise.
    pub(crate) async fn start_relay_with(
        &self,
        change: impl FnOnce(&mut RelaySettings),
    ) -> anyhow::Result<RunningRelay> {
        let (settings, pool, kafka) = self.relay_parts(change)?;
        let relay = Relay::new(settings, pool, kafka)?;
        let (status, stop) = (relay.status(), CancellationToken::new());
        let task = tokio::spawn(relay.run(stop.clone()));
        Ok(RunningRelay { status, stop, task })
    }

    /// What a relay of this stage is made of.
    pub(crate) fn relay_parts(
        &self,
        change: impl FnOnce(&mut RelaySettings),
    ) -> anyhow::Result<(RelaySettings, PgPool, ClientConfig)> {
        let mut settings = RelaySettings {
            mode: Mode::Auto,
            lifecycle: Lifecycle::Published,
            wal_budget: WalBudget {
                bytes: 1 << 30,
                age: Duration::from_secs(900),
            },
            poll_interval: Duration::from_millis(50),
            sweep_after: Duration::from_secs(60),
            confirm_group: format!("confirm-{}", self.slot),
            confirm_within: Duration::from_secs(300),
            retention: Duration::from_secs(7 * 24 * 3600),
            database_url: self.database.url_for(RELAY)?,
            schema: "logistics".to_owned(),
            slot: self.slot.clone(),
            publication: "logistics_outbox".to_owned(),
            topic: self.topics.main().to_owned(),
            source: "logistics".to_owned(),
            max_in_flight: 1_000,
            max_in_flight_bytes: 8 << 20,
            linger: Duration::ZERO,
            silent_after: Duration::from_secs(30),
        };
        change(&mut settings);
        let pool = PgPoolOptions::new()
            .max_connections(4)
            .connect_lazy(&settings.database_url)?;
        let mut kafka = ClientConfig::new();
        kafka
            .set("bootstrap.servers", &self.brokers)
            .set("reconnect.backoff.max.ms", "500");
        Ok((settings, pool, kafka))
    }

    /// An event that is not yet committed.
    pub(crate) fn event(key: &str, sequence: i64) -> NewEvent {
        let now = OffsetDateTime::now_utc();
        let payload = ShipmentCreated {
            order_id: "10248".to_owned(),
            warehouse: "main".to_owned(),
            carrier: "Speedy".to_owned(),
            lines: vec![Line {
                sku: "11".to_owned(),
                quantity: 12,
            }],
            created_at: now,
        };
        let fact = Fact {
            aggregate_type: AGGREGATE_TYPE,
            aggregate_id: key.to_owned(),
            sequence,
            transaction_key: Uuid::now_v7(),
            timestamp: now,
        };
        let envelope = Envelope::new(Uuid::now_v7(), fact, &payload).unwrap();
        NewEvent {
            envelope,
            traceparent: None,
        }
    }

    /// The same with a text of `bytes` in it.
    pub(crate) fn large_event(key: &str, sequence: i64, bytes: usize) -> NewEvent {
        let mut event = Self::event(key, sequence);
        // Hardly compressible: the broker's limit is on what is sent.
        let mut text = String::with_capacity(bytes + 36);
        while text.len() < bytes {
            text.push_str(&Uuid::new_v4().simple().to_string());
        }
        event.envelope.payload = serde_json::value::to_raw_value(&serde_json::json!({ "text": text })).unwrap();
        event
    }

    /// Lowers or raises `max.message.bytes` of the topic.
    pub(crate) async fn limit_records(&self, bytes: u32) -> anyhow::Result<()> {
        use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier};
        let admin: AdminClient<_> = ClientConfig::new().set("bootstrap.servers", &self.brokers).create()?;
        let bytes = bytes.to_string();
        let config = AlterConfig::new(ResourceSpecifier::Topic(self.topics.main())).set("max.message.bytes", &bytes);
        for altered in admin.alter_configs([&config], &AdminOptions::new()).await? {
            altered.map_err(|(_, code)| anyhow::anyhow!("{code}"))?;
        }
        Ok(())
    }

    pub(crate) async fn append(&self, tx: &mut PgTransaction<'_>, events: &[NewEvent]) -> anyhow::Result<()> {
        Ok(self.outbox.append(tx, events).await?)
    }

    /// One transaction with these events.
    pub(crate) async fn commit(&self, events: &[NewEvent]) -> anyhow::Result<()> {
        let mut tx = self.pool.begin().await?;
        self.append(&mut tx, events).await?;
        Ok(tx.commit().await?)
    }

    /// Reads the topic from its beginning until `enough`.
    pub(crate) async fn read_until(&self, enough: impl Fn(&[Published]) -> bool) -> anyhow::Result<Vec<Published>> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &self.brokers)
            .set("group.id", "reader")
            .set("enable.auto.commit", "false")
            .set("auto.offset.reset", "earliest")
            .create()?;
        let mut assignment = rdkafka::TopicPartitionList::new();
        for partition in 0..PARTITIONS {
            assignment.add_partition_offset(self.topics.main(), partition, rdkafka::Offset::Beginning)?;
        }
        consumer.assign(&assignment)?;
        let deadline = Instant::now() + DEADLINE;
        let mut read = Vec::new();
        loop {
            match consumer.poll(Duration::ZERO) {
                Some(Ok(message)) => read.push(published(&message)),
                Some(Err(error)) => tracing::debug!(%error, "reader"),
                // Asked only when nothing more is at hand: the answer may be dear.
                None if enough(&read) => return Ok(read),
                None => tokio::time::sleep(Duration::from_millis(5)).await,
            }
            let keys = || {
                read.iter()
                    .map(|record| (record.key.as_str(), sequences(&read, &record.key)))
                    .collect::<std::collections::BTreeMap<_, _>>()
            };
            anyhow::ensure!(
                Instant::now() < deadline,
                "only {} records came: {:?}",
                read.len(),
                keys()
            );
        }
    }

    /// How many records the topic holds.
    pub(crate) fn records(&self) -> anyhow::Result<i64> {
        let consumer: BaseConsumer = ClientConfig::new().set("bootstrap.servers", &self.brokers).create()?;
        let mut records = 0;
        for partition in 0..PARTITIONS {
            let (low, high) = consumer.fetch_watermarks(self.topics.main(), partition, DEADLINE)?;
            records += high - low;
        }
        Ok(records)
    }

    pub(crate) async fn unpublished(&self) -> anyhow::Result<i64> {
        let count = sqlx::query_scalar("SELECT count(*) FROM logistics.outbox WHERE published_at IS NULL");
        Ok(count.fetch_one(&self.pool).await?)
    }

    /// Up to where the slot is confirmed, in bytes of log.
    pub(crate) async fn slot_position(&self) -> anyhow::Result<i64> {
        let position = sqlx::query_scalar(
            "SELECT (confirmed_flush_lsn - '0/0')::bigint FROM pg_replication_slots WHERE slot_name = $1",
        );
        Ok(position.bind(&self.slot).fetch_one(&self.pool).await?)
    }

    /// Bytes of log that the slot has not confirmed.
    pub(crate) async fn slot_lag(&self) -> anyhow::Result<i64> {
        let lag = sqlx::query_scalar(
            "SELECT (pg_current_wal_lsn() - confirmed_flush_lsn)::bigint FROM pg_replication_slots WHERE slot_name = $1",
        );
        Ok(lag.bind(&self.slot).fetch_one(&self.pool).await?)
    }

    pub(crate) async fn all_marked(&self) -> anyhow::Result<()> {
        match wait_for("every row to be marked", async || Ok(self.unpublished().await? == 0)).await {
            Ok(()) => Ok(()),
            Err(error) => Err(error.context(format!("{} rows are unsent", self.unpublished().await?))),
        }
    }
}

impl RunningRelay {
    pub(crate) async fn reaches(&self, wanted: RelayState) -> anyhow::Result<()> {
        wait_for(&format!("the relay to be {wanted}"), async || {
            Ok(self.status.get().0 == wanted)
        })
        .await
    }

    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        self.stop.cancel();
        Ok(tokio::time::timeout(DEADLINE, self.task).await??)
    }

    /// As a crash would end it: nothing is drained, nothing confirmed.
    pub(crate) async fn abort(self) {
        self.task.abort();
        assert!(self.task.await.is_err_and(|error| error.is_cancelled()));
    }
}

pub(crate) async fn wait_for(what: &str, holds: impl AsyncFn() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let deadline = Instant::now() + DEADLINE;
    while !holds().await? {
        anyhow::ensure!(Instant::now() < deadline, "waited {DEADLINE:?} for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

fn published(message: &rdkafka::message::BorrowedMessage<'_>) -> Published {
    let text = |bytes: Option<&[u8]>| String::from_utf8(bytes.unwrap_or_default().to_vec()).unwrap();
    Published {
        key: text(message.key()),
        value: text(message.payload()),
        partition: message.partition(),
        headers: message
            .headers()
            .map(|headers| {
                headers
                    .iter()
                    .map(|header| (header.key.to_owned(), text(header.value)))
                    .collect()
            })
            .unwrap_or_default(),
    }
}

/// The sequence of each record of a key, in the order of the topic.
pub(crate) fn sequences(records: &[Published], key: &str) -> Vec<i64> {
    records
        .iter()
        .filter(|record| record.key == key)
        .map(|record| Envelope::decode(record.value.as_bytes()).unwrap().sequence)
        .collect()
}

/// Takes repetitions out: an event counts where it stood first. What remains is what an inbox would apply.
pub(crate) fn first_seen(sequences: &[i64]) -> Vec<i64> {
    let mut seen = std::collections::HashSet::new();
    sequences
        .iter()
        .copied()
        .filter(|sequence| seen.insert(*sequence))
        .collect()
}
