use std::time::{Duration, Instant};

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_dropped_or_made_again_by_someone_else_loses_nothing() -> anyhow::Result<()> {
    for made_again in [false, true] {
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
        if made_again {
            sqlx::query("SELECT pg_create_logical_replication_slot($1, 'pgoutput')")
                .bind(&stage.slot)
                .execute(&stage.pool)
                .await?;
        }
        stage.commit(&[Stage::event("k", 4)]).await?;

        let relay = stage.start_relay().await?;
        let records = stage
            .read_until(|records| first_seen(&sequences(records, "k")).len() == 4)
            .await?;
        assert_eq!(
            first_seen(&sequences(&records, "k")),
            [1, 2, 3, 4],
            "made again: {made_again}"
        );
        stage.all_marked().await?;
        relay.stop().await?;
    }
    Ok(())
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
