use outbox::{AppendError, Outbox, RelayState};
use shared_events::headers::EventHeaders;

use crate::stage::{Stage, sequences};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn committed_events_arrive_in_order_with_the_bytes_of_the_row() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let relay = stage.start_relay().await?;
    relay.reaches(RelayState::Streaming).await?;

    let mut events = Vec::new();
    for sequence in 1..=20 {
        let mut event = Stage::event("10248", sequence);
        event.traceparent = Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".to_owned());
        stage.commit(std::slice::from_ref(&event)).await?;
        events.push(event);
    }
    let records = stage.read_until(|records| records.len() >= 20).await?;

    for (record, event) in records.iter().zip(&events) {
        let envelope = &event.envelope;
        assert_eq!(record.value, envelope.encode()?);
        let row: String = sqlx::query_scalar("SELECT payload::text FROM logistics.outbox WHERE id = $1")
            .bind(envelope.id)
            .fetch_one(&stage.pool)
            .await?;
        assert_eq!(record.value, row, "the column and the wire have the same bytes");
        let mut expected = Vec::new();
        let time = shared_events::envelope::format_timestamp(envelope.timestamp)?;
        let headers = EventHeaders {
            id: &envelope.id.to_string(),
            event_type: "ShipmentCreated",
            version: 1,
            source: "logistics",
            time: &time,
            subject: "10248",
            traceparent: event.traceparent.as_deref(),
        };
        headers.for_each(|name, value| expected.push((name.to_owned(), value.to_owned())));
        assert_eq!(record.headers, expected);
    }
    stage.all_marked().await?;
    relay.stop().await
}

/// The partition of each key as Kafka's Java client computes it (`Utils.toPositive(Utils.murmur2(key)) % partitions`),
/// taken from that client: every publisher must agree, or a change of relay breaks the order of a key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_has_the_partition_that_java_clients_give_it() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let relay = stage.start_relay().await?;
    let keys = ["1", "10248", "10249", "11077", "shipment-42", "ä"];
    let events: Vec<_> = keys.iter().map(|key| Stage::event(key, 1)).collect();
    stage.commit(&events).await?;
    let records = stage.read_until(|records| records.len() >= keys.len()).await?;
    for record in records {
        assert_eq!(
            record.partition,
            java_partition(record.key.as_bytes(), 4),
            "key {}",
            record.key
        );
    }
    relay.stop().await
}

/// `org.apache.kafka.common.utils.Utils.murmur2`, written again from its published algorithm (MurmurHash2, seed
/// 0x9747b28c) so that the test does not trust the client library it checks.
fn java_partition(key: &[u8], partitions: i32) -> i32 {
    const M: u32 = 0x5bd1_e995;
    let mut hash: u32 = 0x9747_b28c ^ key.len() as u32;
    let mut chunks = key.chunks_exact(4);
    for chunk in &mut chunks {
        let mut word = u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
        word = word.wrapping_mul(M);
        word ^= word >> 24;
        word = word.wrapping_mul(M);
        hash = hash.wrapping_mul(M) ^ word;
    }
    let rest = chunks.remainder();
    if !rest.is_empty() {
        for (index, byte) in rest.iter().enumerate() {
            hash ^= u32::from(*byte) << (8 * index);
        }
        hash = hash.wrapping_mul(M);
    }
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(M);
    hash ^= hash >> 15;
    (hash & 0x7FFF_FFFF) as i32 % partitions
}

#[test]
fn the_reference_partitioner_gives_javas_published_values() {
    // Kafka's own UtilsTest.testMurmur2: murmur2("21") = -973932308, murmur2("foobar") = -790332482.
    for (key, murmur2) in [("21", -973_932_308_i32), ("foobar", -790_332_482)] {
        assert_eq!(java_partition(key.as_bytes(), i32::MAX), murmur2 & 0x7FFF_FFFF);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_committed_inserts_become_events() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let relay = stage.start_relay().await?;
    relay.reaches(RelayState::Streaming).await?;

    let mut rolled_back = stage.pool.begin().await?;
    stage.append(&mut rolled_back, &[Stage::event("k", 1)]).await?;
    rolled_back.rollback().await?;

    let mut partly = stage.pool.begin().await?;
    sqlx::raw_sql("SAVEPOINT before").execute(&mut *partly).await?;
    stage.append(&mut partly, &[Stage::event("k", 2)]).await?;
    sqlx::raw_sql("ROLLBACK TO before").execute(&mut *partly).await?;
    stage.append(&mut partly, &[Stage::event("k", 3)]).await?;
    partly.commit().await?;

    sqlx::raw_sql("UPDATE logistics.outbox SET traceparent = 'changed'")
        .execute(&stage.pool)
        .await?;
    sqlx::raw_sql("DELETE FROM logistics.outbox")
        .execute(&stage.pool)
        .await?;
    stage.commit(&[Stage::event("k", 4)]).await?;

    // One key, one partition: whatever came before the last one has been read when it comes.
    let records = stage.read_until(|records| sequences(records, "k").contains(&4)).await?;
    assert_eq!(sequences(&records, "k"), [3, 4]);
    relay.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_larger_than_the_window_arrives_whole() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let relay = stage.start_relay().await?;
    relay.reaches(RelayState::Streaming).await?;
    // 20 times what may be in flight.
    let events: Vec<_> = (1..=20_000).map(|sequence| Stage::event("huge", sequence)).collect();
    stage.commit(&events).await?;
    let records = stage.read_until(|records| records.len() >= 20_000).await?;
    assert_eq!(sequences(&records, "huge"), (1..=20_000).collect::<Vec<_>>());
    stage.all_marked().await?;
    relay.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_kafka_would_refuse_is_refused_before_the_commit() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let event = Stage::event("10248", 1);
    let mut tx = stage.pool.begin().await?;
    let too_small = Outbox::new("logistics", "logistics", 600);
    let refused = too_small.append(&mut tx, std::slice::from_ref(&event)).await;
    let Err(AppendError::TooLarge {
        aggregate_id,
        bytes,
        limit: 600,
    }) = refused
    else {
        panic!("{refused:?}");
    };
    assert_eq!(aggregate_id, "10248");
    let exact = Outbox::new("logistics", "logistics", bytes);
    exact.append(&mut tx, std::slice::from_ref(&event)).await?;
    let one_less = Outbox::new("logistics", "logistics", bytes - 1);
    assert!(matches!(
        one_less.append(&mut tx, &[event]).await,
        Err(AppendError::TooLarge { .. })
    ));
    Ok(tx.rollback().await?)
}
