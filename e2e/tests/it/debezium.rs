use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use devstack::services::RELAY_PUBLICATION;
use devstack::testing::{OutboxConnector, PrivateConnect, PrivateKafka, PrivatePostgres, TestServers, TestTopics};
use e2e::{
    client::Client,
    ledger,
    pair::{Role, Running},
    place::{PARTITIONS, Place, TIERS},
    topic::{self, Record},
    wait_for, workload,
};
use serde_json::json;
use shared_events::headers;
use sqlx::PgPool;
use uuid::Uuid;

const PATIENCE: Duration = Duration::from_secs(60);
const QUIET: Duration = Duration::from_secs(120);
/// Orders in one call.
const BATCH: i64 = 25;
/// Longer than Debezium waits before it starts its task again.
const LONG_OUTAGE: Duration = Duration::from_secs(20);
const BUILT_IN: [(&str, &str); 1] = [("RELAY_MODE", "wal")];
const EXTERNAL: [(&str, &str); 1] = [("RELAY_MODE", "external")];

/// Every relay is interchangeable only if nobody behind the topic can tell which one has published: the same row gives
/// the same key, value, partition and headers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn debezium_publishes_a_row_as_the_built_in_relay_does() -> anyhow::Result<()> {
    let place = Place::shared().await?;
    let owner = place.owner_pool()?;
    let other = TestTopics::create(&TestServers::from_env()?, TIERS, PARTITIONS).await?;
    let other_slot = format!("{}_wal", place.slot);
    let own = [
        ("RELAY_MODE", "wal"),
        ("RELAY_SLOT", other_slot.as_str()),
        ("SHIPMENTS_TOPIC", other.main()),
    ];
    let (_debezium, relay, api) = tokio::try_join!(
        PrivateConnect::start(connector(&place)),
        Running::start(&place, Role::Relay, &own),
        Running::start(&place, Role::Api, &[]),
    )?;
    let client = Client::new(&api.url(""), PATIENCE)?;
    every_kind_of_event(&client).await?;
    rows_no_request_writes(&owner).await?;

    let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM logistics.outbox")
        .fetch_one(&owner)
        .await?;
    let by_debezium = every_event(&place.brokers, place.topics.main(), rows).await?;
    let mut by_relay = every_event(&place.brokers, other.main(), rows).await?;
    for (id, own) in &mut by_relay {
        // Debezium knows no way to leave a header out: a row without a trace, which no request writes, has an empty one.
        own.headers.entry(headers::TRACEPARENT.to_owned()).or_default();
        let debezium = by_debezium
            .get(id)
            .with_context(|| format!("{id} is not in Debezium's topic"))?;
        assert_eq!(debezium, own, "of event {id}");
    }
    println!("{rows} rows compared");
    api.stop().await?;
    relay.stop().await
}

#[derive(Debug)]
enum Fault {
    Kill,
    RestartWithoutOffsets,
    PostgresImmediate,
    PostgresAway,
    KafkaAway,
}

const FAULTS: [Fault; 3] = [Fault::Kill, Fault::PostgresImmediate, Fault::RestartWithoutOffsets];
const LONG_FAULTS: [Fault; 3] = [Fault::PostgresAway, Fault::KafkaAway, Fault::Kill];

/// G2 and G3 while Debezium takes the slot over from the built-in relay under load, while its worker and PostgreSQL die,
/// and while the built-in relay takes the slot back. By default 100 completions a second and three faults; in the full run
/// 500 a second for at least a minute, and long outages.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_pair_runs_on_debezium_through_its_crashes_and_back() -> anyhow::Result<()> {
    let full = std::env::var_os("E2E_FULL").is_some();
    let (rate, least, orders) = if full {
        // For 20 minutes: on a busy machine the faults take as long as they take.
        (500, Duration::from_secs(60), 600_000)
    } else {
        (100, Duration::ZERO, 40_000)
    };
    let (mut postgres, mut kafka) = tokio::try_join!(PrivatePostgres::start(), PrivateKafka::start())?;
    let place = Place::private(&postgres, &kafka).await?;
    let owner = place.owner_pool()?;
    workload::prepare_orders(&owner, orders).await?;
    let (logistics, mut consumer) = tokio::try_join!(
        Running::start(&place, Role::ApiAndRelay, &BUILT_IN),
        Running::start(&place, Role::Consumer(0), &[]),
    )?;
    let stop = Arc::new(AtomicBool::new(false));
    let client = Client::new(&logistics.url(""), PATIENCE)?;
    let offered_since = Instant::now();
    let clients = tokio::spawn({
        let stop = stop.clone();
        async move { workload::run_in_bulk(&client, orders, BATCH, rate, stop).await }
    });
    load_arrives(&owner).await?;
    logistics.stop().await?;
    let (mut debezium, logistics) = tokio::try_join!(
        PrivateConnect::start(connector(&place)),
        Running::start(&place, Role::ApiAndRelay, &EXTERNAL),
    )?;

    let started = Instant::now();
    let mut rounds = 0;
    while rounds == 0 || started.elapsed() < least {
        for fault in FAULTS.iter().chain(full.then_some(&LONG_FAULTS).into_iter().flatten()) {
            load_arrives(&owner).await?;
            let start = Instant::now();
            match fault {
                Fault::Kill => {
                    debezium.kill()?;
                    debezium.start_again().await?;
                }
                Fault::RestartWithoutOffsets => {
                    debezium.stop().await?;
                    // The slot remembers as well.
                    debezium.forget_offsets()?;
                    debezium.start_again().await?;
                }
                Fault::PostgresImmediate => {
                    postgres.stop_immediate().await?;
                    postgres.start_again().await?;
                }
                Fault::PostgresAway => {
                    postgres.stop_fast().await?;
                    tokio::time::sleep(LONG_OUTAGE).await;
                    postgres.start_again().await?;
                }
                Fault::KafkaAway => {
                    kafka.kill()?;
                    tokio::time::sleep(LONG_OUTAGE).await;
                    kafka.start_again().await?;
                }
            }
            debezium.ready().await?;
            println!("{fault:?}: streams again after {:?}", start.elapsed());
        }
        rounds += 1;
    }
    load_arrives(&owner).await?;
    debezium.stop().await?;
    logistics.stop().await?;
    let logistics = Running::start(&place, Role::ApiAndRelay, &BUILT_IN).await?;
    load_arrives(&owner).await?;

    stop.store(true, Ordering::Release);
    let promises = clients.await??;
    println!("{} completions in {:.0?}", promises.len(), offered_since.elapsed());
    ledger::quiet(&owner, QUIET).await?;
    consumer.ready().await?;
    logistics.stop().await?;
    consumer.stop().await?;
    let ledger = ledger::check(&place, &owner, &promises).await?;
    println!("{ledger}");
    assert!(ledger.is_clean(), "{ledger}");
    assert!(
        promises.len() as i64 + BATCH < orders,
        "the load ended before the faults did"
    );
    Ok(())
}

fn connector(place: &Place) -> OutboxConnector {
    OutboxConnector {
        brokers: place.brokers.clone(),
        database_url: place.relay_url.clone(),
        slot: place.slot.clone(),
        publication: RELAY_PUBLICATION.to_owned(),
        topic: place.topics.main().to_owned(),
    }
}

/// What is committed now takes effect, and some more after it.
async fn load_arrives(owner: &PgPool) -> anyhow::Result<()> {
    let committed: i64 = sqlx::query_scalar("SELECT count(*) FROM logistics.outbox")
        .fetch_one(owner)
        .await?;
    wait_for("the load to arrive", QUIET, async || {
        let applied: i64 = sqlx::query_scalar("SELECT count(*) FROM commerce.inbox")
            .fetch_one(owner)
            .await?;
        Ok(applied > committed + 50)
    })
    .await
}

/// A record without what differs between two topics: its offset.
#[derive(Debug, PartialEq, Eq)]
struct Published {
    key: Option<String>,
    value: Option<String>,
    partition: i32,
    headers: BTreeMap<String, String>,
}

/// What a topic holds once all `rows` are in it.
async fn every_event(brokers: &str, topic: &str, rows: i64) -> anyhow::Result<HashMap<String, Published>> {
    let mut published = HashMap::new();
    wait_for("every row in the topic", PATIENCE, async || {
        published = by_event(topic::read(brokers, topic).await?)?;
        Ok(published.len() as i64 >= rows)
    })
    .await?;
    assert_eq!(published.len() as i64, rows, "in {topic}");
    Ok(published)
}

/// Delivery is at least once (a busy machine makes the sweeper send what the stream is about to send): an event may stand
/// twice, and then both records are the same.
fn by_event(records: Vec<Record>) -> anyhow::Result<HashMap<String, Published>> {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).context("a record that is not UTF-8");
    let mut published = HashMap::new();
    for record in records {
        let count = record.headers.len();
        let mut headers = BTreeMap::new();
        for (name, value) in record.headers {
            headers.insert(name, text(value)?);
        }
        anyhow::ensure!(headers.len() == count, "a header stands twice: {headers:?}");
        let id = headers.get(headers::CE_ID).context("no ce_id")?.clone();
        let record = Published {
            key: record.key.map(text).transpose()?,
            value: record.value.map(text).transpose()?,
            partition: record.partition,
            headers,
        };
        if let Some(first) = published.insert(id.clone(), record) {
            anyhow::ensure!(first == published[&id], "event {id} stands twice, and differs");
        }
    }
    Ok(published)
}

/// Over HTTP, so that rows, traces and payloads are those of real requests.
async fn every_kind_of_event(client: &Client) -> anyhow::Result<()> {
    let lines = json!([{"sku": "s\"1\\ü", "quantity": 4}, {"sku": "s2", "quantity": 10}]);
    let new = json!({"order_id": "é 1", "warehouse": "main", "carrier": "Ünïted \u{1f4e6}\"\\", "lines": lines});
    let mut ids = Vec::new();
    for _ in 0..40 {
        let answer = client.post("/v1/shipments", &new).await?;
        ids.push(answer["id"].as_i64().context("no id")?);
    }
    let step = async |id: i64, verb: &str, body| client.post(&format!("/v1/shipments/{id}/{verb}"), &body).await;
    step(ids[0], "hold", json!({"reason": "„address“ \"\\\\"})).await?;
    step(ids[0], "release", json!({})).await?;
    step(ids[0], "complete", json!({"tracking_number": "1Z999"})).await?;
    step(
        ids[0],
        "return",
        json!({"reason": "wrong", "lines": [{"sku": "s2", "quantity": 3}]}),
    )
    .await?;
    step(ids[1], "cancel", json!({"reason": "lost"})).await?;
    client.post("/v1/shipments/complete", &json!({"ids": ids[2..]})).await?;
    Ok(())
}

/// What a column may hold and a request hardly ever gives: round times, no trace, text from all over, a large payload.
async fn rows_no_request_writes(owner: &PgPool) -> anyhow::Result<()> {
    let insert = "INSERT INTO logistics.outbox
            (id, aggregatetype, aggregateid, type, version, sequence, payload, traceparent, tx_key, created_at)
        VALUES ($1, 'shipment', $2, $3, $4, 1, $5::json, $6, gen_random_uuid(), $7::timestamptz)";
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let large = "x".repeat(900_000);
    for (key, kind, version, rest, traceparent, time) in [
        ("1", "ShipmentHeld", 1, "{}", Some(trace), "2026-11-22T05:00:00Z"),
        (
            "2",
            "ShipmentHeld",
            2,
            "{ \"b\" : 1.10,\n \"a\": null, \"a\": [] }",
            Some(trace),
            "2026-11-22T05:00:00.5Z",
        ),
        (
            "3",
            "ShipmentRenamed",
            12,
            "{\"e\":\"\\u00e9\"}",
            Some(trace),
            "2026-11-22T05:00:00.12345Z",
        ),
        (
            "ключ \u{1f511} \"4\"",
            "ShipmentHeld",
            1,
            "{}",
            Some(trace),
            "2026-11-22T04:59:59.000001Z",
        ),
        (
            "5",
            "ShipmentHeld",
            1,
            large.as_str(),
            Some(trace),
            "2026-11-22T05:00:00.999999Z",
        ),
        ("6", "ShipmentHeld", 1, "{}", None, "2026-11-22T05:00:00.999999Z"),
    ] {
        let id = Uuid::now_v7();
        let rest = if rest.starts_with('{') {
            rest.to_owned()
        } else {
            format!("\"{rest}\"")
        };
        let payload = format!(
            "{{\"id\":\"{id}\",\"type\":\"{kind}\",\"version\":{version},\"timestamp\":\"{time}\",\"payload\":{rest}}}"
        );
        sqlx::query(insert)
            .bind(id)
            .bind(key)
            .bind(kind)
            .bind(version)
            .bind(payload)
            .bind(traceparent)
            .bind(time)
            .execute(owner)
            .await
            .with_context(|| format!("insert the row of {key}"))?;
    }
    Ok(())
}
