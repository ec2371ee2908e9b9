use std::time::{Duration, Instant};

use devstack::testing::{PrivatePostgres, TestServers};
use outbox::RelayState;
use sqlx::{Connection, PgConnection};

use crate::stage::{Stage, first_seen, sequences, wait_for};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_older_than_the_slot_are_published_all_the_same() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    for sequence in 1..=50 {
        stage.commit(&[Stage::event("early", sequence)]).await?;
    }
    let relay = stage.start_relay().await?;
    relay.reaches(RelayState::Streaming).await?;
    for sequence in 51..=60 {
        stage.commit(&[Stage::event("early", sequence)]).await?;
    }
    let records = stage
        .read_until(|records| first_seen(&sequences(records, "early")).len() == 60)
        .await?;
    assert_eq!(first_seen(&sequences(&records, "early")), (1..=60).collect::<Vec<_>>());
    stage.all_marked().await?;
    relay.stop().await
}

/// HAZARDS H14: whatever was committed before the new slot is made has no slot that streams it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_dropped_by_someone_else_loses_nothing() -> anyhow::Result<()> {
    without_the_relays_slot(async |_| Ok(())).await
}

/// HAZARDS H16: there is a slot with the right name, and it begins after events that were never sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_made_again_by_someone_else_loses_nothing() -> anyhow::Result<()> {
    without_the_relays_slot(async |stage| {
        sqlx::query("SELECT pg_create_logical_replication_slot($1, 'pgoutput')")
            .bind(&stage.slot)
            .execute(&stage.pool)
            .await?;
        Ok(())
    })
    .await
}

/// Drops the slot between two lives of the relay, with events on either side, and does something in its place.
async fn without_the_relays_slot(instead: impl AsyncFn(&Stage) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let relay = stage.start_relay().await?;
    // Only then does its position get recorded.
    relay.reaches(RelayState::Streaming).await?;
    stage.commit(&[Stage::event("k", 1)]).await?;
    stage.all_marked().await?;
    relay.stop().await?;

    stage.commit(&[Stage::event("k", 2)]).await?;
    sqlx::query("SELECT pg_drop_replication_slot($1)")
        .bind(&stage.slot)
        .execute(&stage.pool)
        .await?;
    stage.commit(&[Stage::event("k", 3)]).await?;
    instead(&stage).await?;
    stage.commit(&[Stage::event("k", 4)]).await?;

    let relay = stage.start_relay().await?;
    let records = stage
        .read_until(|records| first_seen(&sequences(records, "k")).len() == 4)
        .await?;
    assert_eq!(first_seen(&sequences(&records, "k")), [1, 2, 3, 4]);
    stage.all_marked().await?;
    relay.stop().await
}

/// HAZARDS H13: the server writes a slot's position down now and then. After a crash the slot is where it was written down,
/// and events that were acknowledged long ago come again: in their order, and nothing between them is left out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_position_rewound_by_a_crash_repeats_events_and_leaves_none_out() -> anyhow::Result<()> {
    let mut postgres = PrivatePostgres::start().await?;
    let brokers = TestServers::from_env()?.brokers().to_owned();
    let stage = Stage::on(postgres.with_broker(&brokers)?, brokers).await?;
    let (mut events, mut rewound) = (0, false);
    // A crash right after the position was written down rewinds nothing.
    while !rewound {
        let relay = stage.start_relay().await?;
        relay.reaches(RelayState::Streaming).await?;
        for _ in 0..10 {
            events += 1;
            stage.commit(&[Stage::event("k", events)]).await?;
        }
        stage.all_marked().await?;
        relay.stop().await?;
        let acknowledged = stage.slot_position().await?;
        postgres.stop_immediate().await?;
        postgres.start_again().await?;
        rewound = stage.slot_position().await? < acknowledged;
    }

    let relay = stage.start_relay().await?;
    relay.reaches(RelayState::Streaming).await?;
    stage.commit(&[Stage::event("k", events + 1)]).await?;
    let records = stage
        .read_until(|records| sequences(records, "k").contains(&(events + 1)))
        .await?;
    let sequences = sequences(&records, "k");
    assert!(sequences.len() as i64 > events + 1, "nothing came again");
    assert_eq!(first_seen(&sequences), (1..=events + 1).collect::<Vec<_>>());
    stage.all_marked().await?;
    relay.stop().await
}

/// The other tables' and databases' log must not be held back by an outbox in which nothing happens.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_outbox_lets_the_log_of_others_go() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let relay = stage.start_relay().await?;
    relay.reaches(RelayState::Streaming).await?;
    let mut other = PgConnection::connect(&stage.servers.superuser_url("postgres")).await?;
    let table = stage.slot.replace("slot", "noise");
    let least = if std::env::var_os("E2E_FULL").is_some() { 600 } else { 0 };
    let (started, mut most, mut rounds) = (Instant::now(), 0, 0);
    while rounds == 0 || started.elapsed() < Duration::from_secs(least) {
        let noise = format!(
            "CREATE TABLE {table} AS SELECT repeat('x', 1000) AS text FROM generate_series(1, 20000); DROP TABLE {table}"
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(noise)).execute(&mut other).await?;
        let lag = stage.slot_lag().await?;
        if rounds == 0 {
            assert!(lag > 1 << 20, "the noise is log that the slot has not confirmed");
        }
        most = most.max(lag);
        wait_for("the slot to follow", async || Ok(stage.slot_lag().await? < 1 << 20)).await?;
        rounds += 1;
    }
    println!(
        "idle for {:.0?}: {rounds} x 20 MB of others' log, at most {} MiB unconfirmed, below 1 MiB each time",
        started.elapsed(),
        most >> 20
    );
    relay.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_relay_stands_by_and_takes_over() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let first = stage.start_relay().await?;
    first.reaches(RelayState::Streaming).await?;
    let second = stage.start_relay().await?;
    second.reaches(RelayState::Standby).await?;
    stage.commit(&[Stage::event("k", 1)]).await?;
    stage.all_marked().await?;
    assert_eq!(second.status.get().0, RelayState::Standby);

    first.abort().await;
    stage.commit(&[Stage::event("k", 2)]).await?;
    second.reaches(RelayState::Streaming).await?;
    let records = stage
        .read_until(|records| first_seen(&sequences(records, "k")).len() == 2)
        .await?;
    assert_eq!(first_seen(&sequences(&records, "k")), [1, 2]);
    second.stop().await
}
