//! A stage per test: a database, topics, engines, and a handler whose scripts stand in the events' types.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{self, AtomicBool, AtomicUsize},
    },
    time::{Duration, Instant},
};

use devstack::testing::{TestDatabase, TestServers, TestTopics};
use futures_util::future::try_join_all;
use inbox::{
    Controls, Engine, EngineError, FloodLimit, Handler, HandlerError, IncomingEvent, Membership, Operator, Ordering,
    Outcome, Pace, Parking, Rate, RateLimits, Reason, Schedule, Settings, Status, Table, UnknownTypes, operator::Actor,
};
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier},
    client::DefaultClientContext,
    consumer::{BaseConsumer, CommitMode, Consumer},
    message::{BorrowedHeaders, Header, Headers, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use serde_json::{json, value::RawValue};
use shared_events::{Envelope, headers};
use sqlx::{AssertSqlSafe, PgPool, PgTransaction, postgres::PgPoolOptions};
use time::OffsetDateTime;
use tokio::{sync::RwLock, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub(crate) const PARTITIONS: i32 = 6;
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// No key guards this table: an effect that happens twice shows.
const SCHEMA: &str = "
    CREATE SCHEMA t;
    CREATE TABLE t.inbox (
        consumer text NOT NULL, event_id uuid NOT NULL, aggregate_type text NOT NULL, aggregate_id text NOT NULL,
        sequence bigint NOT NULL, topic text NOT NULL, partition integer NOT NULL, record_offset bigint NOT NULL,
        applied_at timestamptz NOT NULL DEFAULT statement_timestamp(), PRIMARY KEY (consumer, event_id));
    CREATE TABLE t.effects (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        event_id uuid NOT NULL, aggregate_id text NOT NULL, sequence bigint NOT NULL);
    CREATE TABLE t.passed_over (event_id uuid PRIMARY KEY);";

/// Event types, each a script for the handler.
pub(crate) const EFFECT: &str = "Effect";
/// Not yet: always a retry.
pub(crate) const NOT_YET: &str = "NotYet";
/// Not yet at the first attempt, fine at the second.
pub(crate) const SECOND_TIME: &str = "SecondTime";
pub(crate) const NEVER: &str = "Never";
/// Raises an SQL error, which fails the whole batch.
pub(crate) const SQL_ERROR: &str = "SqlError";
pub(crate) const PANIC: &str = "Panic";
/// Holds its batch's transaction open for a while.
pub(crate) const SLOW: &str = "Slow";
/// Holds it for seconds.
pub(crate) const CRAWLING: &str = "Crawling";
/// Stays in its batch's hands until the door opens.
pub(crate) const AT_DOOR: &str = "AtDoor";
/// Waits for a lock that nobody gives up: the platform's fault, for ever.
pub(crate) const LOCKED: &str = "Locked";
/// Not yet as often as the number behind it says, then fine: `Flaky:2`.
pub(crate) const FLAKY: &str = "Flaky:";
/// Not yet while the gate is closed.
pub(crate) const GATED: &str = "Gated";
/// Early until the event before it has taken effect.
pub(crate) const STRICT: &str = "Strict";
/// Never, and its key goes on.
pub(crate) const RELEASES: &str = "Releases";
/// Never, and it cannot be passed over either.
pub(crate) const STAYS: &str = "Stays";
/// Not taken by the handler.
pub(crate) const FOREIGN: &str = "Foreign";

/// Notes effects, and when it saw which event.
#[derive(Clone, Default)]
pub(crate) struct Notes {
    pub(crate) seen: Arc<Mutex<HashMap<Uuid, Vec<Instant>>>>,
    pub(crate) gate_closed: Arc<AtomicBool>,
    /// Closed while somebody holds it for writing.
    pub(crate) door: Arc<RwLock<()>>,
    /// While set, nothing works.
    pub(crate) broken: Arc<AtomicBool>,
    /// Calls of the handler.
    pub(crate) calls: Arc<AtomicUsize>,
    passed_over: Arc<Mutex<Vec<Uuid>>>,
    /// It takes every type.
    pub(crate) upgraded: Arc<AtomicBool>,
    /// Events in the largest of them.
    pub(crate) largest: Arc<AtomicUsize>,
}

impl Notes {
    pub(crate) fn attempts(&self, id: Uuid) -> Vec<Instant> {
        self.seen.lock().unwrap().get(&id).cloned().unwrap_or_default()
    }

    /// How often the handler was asked to pass over an event.
    pub(crate) fn passed_over(&self, id: Uuid) -> usize {
        let passed_over = self.passed_over.lock().unwrap();
        passed_over.iter().filter(|other| **other == id).count()
    }

    /// Whether the event before this one has taken effect.
    async fn follows(
        &self,
        transaction: &mut PgTransaction<'_>,
        effects: &[&Envelope],
        envelope: &Envelope,
    ) -> Result<bool, sqlx::Error> {
        let before = envelope.sequence - 1;
        let same_key = |effect: &&Envelope| effect.aggregate_id == envelope.aggregate_id;
        if before == 0
            || effects
                .iter()
                .any(|effect| same_key(effect) && effect.sequence == before)
        {
            return Ok(true);
        }
        sqlx::query_scalar("SELECT EXISTS (SELECT FROM t.effects WHERE aggregate_id = $1 AND sequence = $2)")
            .bind(&envelope.aggregate_id)
            .bind(before)
            .fetch_one(&mut **transaction)
            .await
    }
}

impl Handler for Notes {
    fn takes(&self, envelope: &Envelope) -> bool {
        envelope.event_type != FOREIGN || self.upgraded.load(atomic::Ordering::Relaxed)
    }

    async fn apply(
        &self,
        transaction: &mut PgTransaction<'_>,
        events: &[IncomingEvent],
    ) -> Result<Vec<Outcome>, HandlerError> {
        self.calls.fetch_add(1, atomic::Ordering::Relaxed);
        self.largest.fetch_max(events.len(), atomic::Ordering::Relaxed);
        let mut outcomes = Vec::new();
        let mut effects: Vec<&Envelope> = Vec::new();
        for IncomingEvent { envelope, .. } in events {
            let attempt = {
                let mut seen = self.seen.lock().unwrap();
                let times = seen.entry(envelope.id).or_default();
                times.push(Instant::now());
                times.len()
            };
            if self.broken.load(atomic::Ordering::Relaxed) {
                outcomes.push(Outcome::DeadLetter(Reason::new("broken", "nothing works")));
                continue;
            }
            // As one that counts sequences: its key has moved past it.
            if [RELEASES, NOT_YET].contains(&&*envelope.event_type) && is_passed_over(transaction, envelope.id).await? {
                outcomes.push(Outcome::Duplicate);
                continue;
            }
            outcomes.push(match envelope.event_type.as_str() {
                RELEASES => Outcome::DeadLetter(Reason::new("releases", "it contradicts the records")),
                flaky
                    if flaky
                        .strip_prefix(FLAKY)
                        .is_some_and(|times| attempt <= times.parse().unwrap()) =>
                {
                    Outcome::Retry(Reason::new("not_yet", "what it needs is not there"))
                }
                STRICT if !self.follows(transaction, &effects, envelope).await? => {
                    Outcome::Early(Reason::new("gap", "the one before it is missing"))
                }
                GATED if self.gate_closed.load(atomic::Ordering::Relaxed) => {
                    Outcome::Retry(Reason::new("not_yet", "the gate is closed"))
                }
                NOT_YET => Outcome::Retry(Reason::new("not_yet", "what it needs is not there")),
                SECOND_TIME if attempt == 1 => Outcome::Retry(Reason::new("not_yet", "what it needs is not there")),
                NEVER | STAYS => Outcome::DeadLetter(Reason::new("never", "it contradicts the records")),
                PANIC => panic!("a defect of the handler"),
                script => {
                    if script == SQL_ERROR {
                        sqlx::query("DO $$BEGIN RAISE 'refused'; END$$")
                            .execute(&mut **transaction)
                            .await?;
                    }
                    if script == AT_DOOR {
                        drop(self.door.read().await);
                    }
                    if script == LOCKED {
                        sqlx::query("DO $$BEGIN RAISE 'locked' USING ERRCODE = '55P03'; END$$")
                            .execute(&mut **transaction)
                            .await?;
                    }
                    if script == CRAWLING {
                        sqlx::query("SELECT pg_sleep(3)").execute(&mut **transaction).await?;
                    }
                    if script == SLOW && effects.is_empty() {
                        sqlx::query("SELECT pg_sleep(0.4)").execute(&mut **transaction).await?;
                    }
                    effects.push(envelope);
                    Outcome::Applied
                }
            });
        }
        sqlx::query(
            "INSERT INTO t.effects (event_id, aggregate_id, sequence)
             SELECT e, a, s FROM unnest($1::uuid[], $2::text[], $3::bigint[]) WITH ORDINALITY AS n (e, a, s, place)
             ORDER BY place",
        )
        .bind(effects.iter().map(|envelope| envelope.id).collect::<Vec<Uuid>>())
        .bind(
            effects
                .iter()
                .map(|envelope| envelope.aggregate_id.as_str())
                .collect::<Vec<&str>>(),
        )
        .bind(effects.iter().map(|envelope| envelope.sequence).collect::<Vec<i64>>())
        .execute(&mut **transaction)
        .await?;
        Ok(outcomes)
    }

    async fn pass_over(&self, transaction: &mut PgTransaction<'_>, event: &IncomingEvent) -> Result<(), HandlerError> {
        self.passed_over.lock().unwrap().push(event.envelope.id);
        if event.envelope.event_type == STAYS {
            return Err(HandlerError::Other("it stays".into()));
        }
        sqlx::query("INSERT INTO t.passed_over VALUES ($1) ON CONFLICT DO NOTHING")
            .bind(event.envelope.id)
            .execute(&mut **transaction)
            .await?;
        Ok(())
    }
}

async fn is_passed_over(transaction: &mut PgTransaction<'_>, id: Uuid) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("SELECT EXISTS (SELECT FROM t.passed_over WHERE event_id = $1)")
        .bind(id)
        .fetch_one(&mut **transaction)
        .await
}

pub(crate) struct Stage {
    pub(crate) pool: PgPool,
    /// Where engines connect to, if not at the database itself.
    pub(crate) database_url: Option<String>,
    pub(crate) notes: Notes,
    pub(crate) schedule: Schedule,
    pub(crate) rate: Rate,
    pub(crate) redrive_rate: Rate,
    pub(crate) pace: Option<Pace>,
    pub(crate) membership: Membership,
    pub(crate) transaction_limit: Duration,
    pub(crate) max_transactions: usize,
    pub(crate) unknown_types: UnknownTypes,
    pub(crate) ordering: Ordering,
    pub(crate) flood_limit: FloodLimit,
    pub(crate) letters_retention: Duration,
    pub(crate) database: TestDatabase,
    pub(crate) topics: TestTopics,
    producer: FutureProducer,
    brokers: String,
}

pub(crate) const ANN: Actor<'_> = Actor {
    name: "ann",
    role: "operator",
    reason: "the order is there now",
};

/// An engine that runs.
pub(crate) struct Running {
    pub(crate) status: Status,
    pub(crate) limits: RateLimits,
    pub(crate) controls: Controls,
    stop: CancellationToken,
    task: JoinHandle<Result<(), EngineError>>,
}

impl Running {
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(DEADLINE, self.task)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }

    pub(crate) async fn ended(self) -> EngineError {
        tokio::time::timeout(DEADLINE, self.task)
            .await
            .unwrap()
            .unwrap()
            .unwrap_err()
    }
}

/// A record as it stands in a topic.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) partition: i32,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) value: Option<Vec<u8>>,
    pub(crate) headers: HashMap<String, Vec<u8>>,
}

impl Found {
    pub(crate) fn header(&self, name: &str) -> &str {
        std::str::from_utf8(&self.headers[name]).unwrap()
    }
}

impl Stage {
    pub(crate) async fn new(delays: &[Duration]) -> Self {
        let servers = TestServers::from_env().unwrap();
        let database = TestDatabase::create(&servers, "inbox", "v9", async |url| {
            let pool = PgPool::connect(url).await?;
            sqlx::raw_sql(SCHEMA).execute(&pool).await?;
            // The service's own tables, in our schema and without its roles.
            let tables = [
                include_str!("../../../migrations/commerce/0006_held_keys.sql"),
                include_str!("../../../migrations/commerce/0007_dead_letters.sql"),
                include_str!("../../../migrations/commerce/0008_consumer_controls.sql"),
                include_str!("../../../migrations/commerce/0009_redrive_jobs.sql"),
                include_str!("../../../migrations/commerce/0010_edited_and_archived_letters.sql"),
            ]
            .join("\n")
            .lines()
            .filter(|line| !line.starts_with("GRANT"))
            .collect::<Vec<&str>>()
            .join("\n")
            .replace("commerce.", "t.");
            sqlx::raw_sql(AssertSqlSafe(tables)).execute(&pool).await?;
            pool.close().await;
            Ok(())
        });
        let database = database.await.unwrap();
        let topics = TestTopics::create(&servers, delays.len(), PARTITIONS).await.unwrap();
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", servers.brokers())
            .set("partitioner", "murmur2_random")
            .set("linger.ms", "1")
            .set("compression.type", "zstd")
            .set("message.max.bytes", "100000000");
        Self {
            pool: pool(&database.superuser_url()).await,
            database_url: None,
            notes: Notes::default(),
            schedule: Schedule::new(delays.to_vec()),
            rate: Rate::Unlimited,
            redrive_rate: Rate::Unlimited,
            pace: None,
            membership: Membership::default(),
            transaction_limit: DEADLINE,
            max_transactions: 6,
            unknown_types: UnknownTypes::Skip,
            ordering: Ordering::PerKey(Parking {
                most_per_key: 1_000,
                most_in_all: 100_000,
                released_by: [RELEASES.to_owned()].into(),
            }),
            flood_limit: FloodLimit {
                run: 1_000_000,
                ratio: 1.0,
                window: 1_000,
                resume_after: None,
            },
            letters_retention: Duration::from_secs(3600),
            producer: config.create().unwrap(),
            brokers: servers.brokers().to_owned(),
            database,
            topics,
        }
    }

    pub(crate) async fn engine(&self) -> Running {
        let table = Table::new("t", self.topics.group()).unwrap();
        let settings = Settings {
            topics: self.topics.group_topics().clone(),
            schedule: self.schedule.clone(),
            batch_limit: 500,
            transaction_limit: self.transaction_limit,
            max_transactions: self.max_transactions,
            rate_limit: self.rate,
            retry_rate_limit: Rate::Unlimited,
            redrive_rate_limit: self.redrive_rate,
            pace: self.pace,
            membership: self.membership.clone(),
            unknown_types: self.unknown_types,
            ordering: self.ordering.clone(),
            flood_limit: self.flood_limit,
            letters_retention: self.letters_retention,
            join_trace: |_, _| {},
            consumer_version: "test 0",
        };
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.brokers);
        let url = self
            .database_url
            .clone()
            .unwrap_or_else(|| self.database.superuser_url());
        let engine = Engine::new(settings, pool(&url).await, table, config, self.notes.clone());
        let stop = CancellationToken::new();
        Running {
            status: engine.status(),
            limits: engine.limits(),
            controls: engine.controls(),
            task: tokio::spawn(engine.run(stop.clone())),
            stop,
        }
    }

    pub(crate) fn operator(&self) -> Operator {
        Operator::new(Table::new("t", self.topics.group()).unwrap(), self.pool.clone())
    }

    pub(crate) async fn send(
        &self,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        partition: Option<i32>,
        headers: &[(&str, &[u8])],
    ) {
        let mut record = FutureRecord::<[u8], [u8]>::to(self.topics.main());
        record.key = key;
        record.payload = value;
        record.partition = partition;
        if !headers.is_empty() {
            let all = headers.iter().fold(OwnedHeaders::new(), |all, (key, value)| {
                all.insert(Header {
                    key,
                    value: Some(*value),
                })
            });
            record.headers = Some(all);
        }
        self.producer.send(record, DEADLINE).await.unwrap();
    }

    pub(crate) async fn send_event(&self, envelope: &Envelope) {
        let value = envelope.encode().unwrap();
        self.send(
            Some(envelope.aggregate_id.as_bytes()),
            Some(value.as_bytes()),
            None,
            &[],
        )
        .await;
    }

    /// All together, in order per key.
    pub(crate) async fn send_events(&self, envelopes: impl IntoIterator<Item = &Envelope>) {
        self.send_events_to(None, envelopes).await;
    }

    /// The same, and into this partition.
    pub(crate) async fn send_events_to(&self, partition: Option<i32>, envelopes: impl IntoIterator<Item = &Envelope>) {
        let values: Vec<(&Envelope, String)> = envelopes
            .into_iter()
            .map(|envelope| (envelope, envelope.encode().unwrap()))
            .collect();
        for chunk in values.chunks(5_000) {
            let sends = chunk.iter().map(|(envelope, value)| {
                let mut record = FutureRecord::to(self.topics.main())
                    .key(&envelope.aggregate_id)
                    .payload(value);
                record.partition = partition;
                self.producer.send_result(record).map_err(|(error, _)| error).unwrap()
            });
            for report in try_join_all(sends.collect::<Vec<_>>()).await.unwrap() {
                report.map_err(|(error, _)| error).unwrap();
            }
        }
    }

    pub(crate) async fn effects(&self) -> i64 {
        self.number("SELECT count(*) FROM t.effects").await
    }

    pub(crate) async fn number(&self, query: &'static str) -> i64 {
        sqlx::query_scalar(query).fetch_one(&self.pool).await.unwrap()
    }

    /// Sends an event to the first partition and lets it wait for the inbox table until the lock is given up, so that what comes
    /// behind it gathers.
    pub(crate) async fn hold_up(&self, first: &Envelope) -> PgTransaction<'static> {
        let mut lock = self.pool.begin().await.unwrap();
        sqlx::query("LOCK TABLE t.inbox IN EXCLUSIVE MODE")
            .execute(&mut *lock)
            .await
            .unwrap();
        self.send_events_to(Some(0), [first]).await;
        until("the first event to wait", async || self.lock_waits().await == 1).await;
        lock
    }

    /// Sessions that wait for a lock.
    pub(crate) async fn lock_waits(&self) -> i64 {
        self.number(
            "SELECT count(*) FROM pg_stat_activity
              WHERE datname = current_database() AND wait_event_type = 'Lock'",
        )
        .await
    }

    /// The sequences of a key's effects, in the order in which they took place.
    pub(crate) async fn sequences(&self, key: &str) -> Vec<i64> {
        sqlx::query_scalar("SELECT sequence FROM t.effects WHERE aggregate_id = $1 ORDER BY id")
            .bind(key)
            .fetch_all(&self.pool)
            .await
            .unwrap()
    }

    /// The state of a held key, and how many events wait behind it.
    pub(crate) async fn held(&self, key: &str) -> Option<(String, i64)> {
        sqlx::query_as("SELECT state, parked FROM t.held_keys WHERE aggregate_id = $1")
            .bind(key)
            .fetch_optional(&self.pool)
            .await
            .unwrap()
    }

    /// Effects and inbox rows agree, nothing happened twice, and each key's events took effect in sequence.
    pub(crate) async fn assert_once_and_in_order(&self, events: i64) {
        assert_eq!(self.effects().await, events);
        assert_eq!(
            self.number("SELECT count(DISTINCT event_id) FROM t.effects").await,
            events
        );
        assert_eq!(self.number("SELECT count(*) FROM t.inbox").await, events);
        let inversions = "SELECT count(*) FROM (SELECT sequence <= lag(sequence) OVER
            (PARTITION BY aggregate_id ORDER BY id) AS back FROM t.effects) e WHERE back";
        assert_eq!(self.number(inversions).await, 0);
    }

    /// Everything that stands in a topic now.
    pub(crate) fn read(&self, topic: &str) -> Vec<Found> {
        let consumer = self.reader();
        let mut list = TopicPartitionList::new();
        let mut left = 0;
        for partition in 0..PARTITIONS {
            let (low, high) = watermarks(&consumer, topic, partition);
            left += high - low;
            list.add_partition_offset(topic, partition, Offset::Beginning).unwrap();
        }
        consumer.assign(&list).unwrap();
        let mut found = Vec::new();
        while left > 0 {
            let message = consumer.poll(DEADLINE).unwrap().unwrap();
            left -= 1;
            found.push(Found {
                partition: message.partition(),
                key: message.key().map(<[u8]>::to_vec),
                value: message.payload().map(<[u8]>::to_vec),
                headers: message.headers().map(readable).unwrap_or_default(),
            });
        }
        found
    }

    pub(crate) fn dead_letters(&self) -> Vec<Found> {
        self.read(&self.topics.dead_letter())
    }

    /// How many records of the main topic are committed as done.
    pub(crate) fn committed(&self) -> i64 {
        let mut list = TopicPartitionList::new();
        list.add_partition_range(self.topics.main(), 0, PARTITIONS - 1);
        let committed = self.reader().committed_offsets(list, DEADLINE).unwrap();
        committed
            .elements()
            .iter()
            .map(|element| match element.offset() {
                Offset::Offset(offset) => offset,
                _ => 0,
            })
            .sum()
    }

    pub(crate) fn brokers(&self) -> &str {
        &self.brokers
    }

    /// Every record of the main topic comes again to the next engine, as after offsets that were lost.
    pub(crate) fn rewind(&self) {
        let mut list = TopicPartitionList::new();
        for partition in 0..PARTITIONS {
            list.add_partition_offset(self.topics.main(), partition, Offset::Offset(0))
                .unwrap();
        }
        self.reader().commit(&list, CommitMode::Sync).unwrap();
    }

    /// From now on the broker refuses larger batches for this topic, as they are on the wire.
    pub(crate) async fn limit_bytes(&self, topic: &str, bytes: u32) {
        let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
            .set("bootstrap.servers", &self.brokers)
            .create()
            .unwrap();
        let bytes = bytes.to_string();
        let limit = AlterConfig::new(ResourceSpecifier::Topic(topic)).set("max.message.bytes", &bytes);
        let options = AdminOptions::new().request_timeout(Some(DEADLINE));
        for result in admin.alter_configs([&limit], &options).await.unwrap() {
            result.unwrap();
        }
    }

    /// Deletes every record of the main topic, as its retention would.
    pub(crate) async fn delete_records(&self) {
        let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
            .set("bootstrap.servers", &self.brokers)
            .create()
            .unwrap();
        let mut before = TopicPartitionList::new();
        for partition in 0..PARTITIONS {
            before
                .add_partition_offset(self.topics.main(), partition, Offset::End)
                .unwrap();
        }
        let options = AdminOptions::new().request_timeout(Some(DEADLINE));
        let deleted = admin.delete_records(&before, &options).await.unwrap();
        assert!(deleted.elements().iter().all(|element| element.error().is_ok()));
    }

    fn reader(&self) -> BaseConsumer {
        ClientConfig::new()
            .set("bootstrap.servers", &self.brokers)
            .set("group.id", self.topics.group())
            .set("enable.auto.commit", "false")
            .create()
            .unwrap()
    }
}

/// A partition that was created a moment ago may not have found its leader yet.
fn watermarks(consumer: &BaseConsumer, topic: &str, partition: i32) -> (i64, i64) {
    let start = Instant::now();
    loop {
        match consumer.fetch_watermarks(topic, partition, DEADLINE) {
            Ok(watermarks) => return watermarks,
            Err(error) => assert!(start.elapsed() < DEADLINE, "{topic}[{partition}]: {error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn readable(headers: &BorrowedHeaders) -> HashMap<String, Vec<u8>> {
    headers
        .iter()
        .map(|header| (header.key.to_owned(), header.value.unwrap_or_default().to_vec()))
        .collect()
}

async fn pool(url: &str) -> PgPool {
    PgPoolOptions::new()
        .max_connections(8)
        .acquire_timeout(Duration::from_secs(2))
        .connect(url)
        .await
        .unwrap()
}

pub(crate) fn event(event_type: &str, aggregate_id: &str, sequence: i64) -> Envelope {
    Envelope {
        id: Uuid::now_v7(),
        event_type: event_type.to_owned(),
        version: 1,
        timestamp: OffsetDateTime::now_utc(),
        aggregate_type: "thing".to_owned(),
        aggregate_id: aggregate_id.to_owned(),
        sequence,
        transaction_key: Uuid::now_v7(),
        payload: RawValue::from_string(json!({"note": "x".repeat(100)}).to_string()).unwrap(),
    }
}

/// `count` events over `keys` keys, each key's sequence from 1.
pub(crate) fn events(count: usize, keys: usize) -> Vec<Envelope> {
    (0..count)
        .map(|n| event(EFFECT, &format!("key-{}", n % keys), (n / keys) as i64 + 1))
        .collect()
}

/// Polls until a condition holds; the name of what never came is the failure.
pub(crate) async fn until<F: Future<Output = bool>>(what: &str, condition: impl Fn() -> F) {
    until_or(what, condition, async || String::new()).await;
}

/// The same, and says what was there instead.
pub(crate) async fn until_or<F: Future<Output = bool>>(
    what: &str,
    condition: impl Fn() -> F,
    instead: impl AsyncFn() -> String,
) {
    let start = Instant::now();
    while !condition().await {
        if start.elapsed() >= DEADLINE {
            panic!("{what} did not come within {DEADLINE:?} {}", instead().await);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The traceparent of nobody, for a record's headers.
pub(crate) const TRACEPARENT: (&str, &[u8]) = (
    headers::TRACEPARENT,
    b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
);
