use std::time::{Duration, Instant};

use devstack::testing::{PrivateKafka, PrivatePostgres, TestServers};
use outbox::{Mode, RelayState, Source};
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::stage::{Stage, first_seen, sequences, wait_for};

async fn commit_run(stage: &Stage, from: i64, to: i64) -> anyhow::Result<()> {
    for sequence in from..=to {
        stage.commit(&[Stage::event("k", sequence)]).await?;
    }
    Ok(())
}

async fn arrived(stage: &Stage, last: i64) -> anyhow::Result<()> {
    let records = stage
        .read_until(|records| first_seen(&sequences(records, "k")).len() == last as usize)
        .await?;
    assert_eq!(first_seen(&sequences(&records, "k")), (1..=last).collect::<Vec<_>>());
    Ok(())
}

/// A login that may not replicate, as after a slip in an access change; the table is enough meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_replication_connection_is_polled_around_and_returned_from() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let login = stage.slot.replace("slot", "login");
    let sql = format!("CREATE ROLE {login} LOGIN PASSWORD 'secret' NOREPLICATION IN ROLE logistics_relay");
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&stage.pool).await?;
    let mut url = url::Url::parse(&stage.database.superuser_url())?;
    url.set_username(&login).unwrap();
    url.set_password(Some("secret")).unwrap();

    let relay = stage
        .start_relay_with(|settings| settings.database_url = url.to_string())
        .await?;
    commit_run(&stage, 1, 20).await?;
    relay.reaches(RelayState::Polling).await?;
    stage.all_marked().await?;
    let view = relay.status.view();
    assert_eq!(view.source, Source::Poll);
    assert!(!view.last_switch.unwrap().reason.is_empty());

    sqlx::raw_sql(AssertSqlSafe(format!("ALTER ROLE {login} REPLICATION")))
        .execute(&stage.pool)
        .await?;
    relay.reaches(RelayState::Streaming).await?;
    assert_eq!(relay.status.view().source, Source::Wal);
    commit_run(&stage, 21, 40).await?;
    arrived(&stage, 40).await?;
    stage.all_marked().await?;
    relay.stop().await?;
    stage.pool.close().await;
    let mut owner = PgConnection::connect(&stage.database.superuser_url()).await?;
    sqlx::raw_sql(AssertSqlSafe(format!("DROP OWNED BY {login}; DROP ROLE {login}")))
        .execute(&mut owner)
        .await?;
    Ok(owner.close().await?)
}

/// HAZARDS H14: the server's own limit ends the slot while the relay is away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_the_server_invalidates_is_made_again_and_nothing_is_lost() -> anyhow::Result<()> {
    let postgres = PrivatePostgres::start_with(&[("max_slot_wal_keep_size", "1MB")]).await?;
    let brokers = TestServers::from_env()?.brokers().to_owned();
    for mode in [Mode::Auto, Mode::Wal] {
        let stage = Stage::on(postgres.with_broker(&brokers)?, brokers.clone()).await?;
        let relay = stage.start_relay_with(|settings| settings.mode = mode).await?;
        relay.reaches(RelayState::Streaming).await?;
        commit_run(&stage, 1, 20).await?;
        stage.all_marked().await?;
        relay.stop().await?;

        commit_run(&stage, 21, 40).await?;
        wait_for("the server to give the slot up", async || {
            let noise = "CREATE TABLE noise AS SELECT repeat('x', 1000) AS text FROM generate_series(1, 20000);
                         DROP TABLE noise; SELECT pg_switch_wal(); CHECKPOINT";
            sqlx::raw_sql(noise).execute(&stage.pool).await?;
            let status: String = sqlx::query_scalar("SELECT wal_status FROM pg_replication_slots WHERE slot_name = $1")
                .bind(&stage.slot)
                .fetch_one(&stage.pool)
                .await?;
            Ok(status == "lost")
        })
        .await?;
        commit_run(&stage, 41, 60).await?;
        let relay = stage.start_relay_with(|settings| settings.mode = mode).await?;
        stage.all_marked().await?;
        relay.reaches(RelayState::Streaming).await?;
        commit_run(&stage, 61, 80).await?;
        arrived(&stage, 80).await?;
        relay.stop().await?;
    }
    Ok(())
}

/// Holds a transaction open in another database while events are committed and must arrive: until `events` have, and in the
/// full run for a minute.
pub(crate) async fn commit_beside_an_open_transaction(stage: &Stage, events: i64) -> anyhow::Result<i64> {
    let mut elsewhere = PgConnection::connect(&stage.servers.superuser_url("postgres")).await?;
    sqlx::raw_sql("BEGIN; SELECT pg_current_xact_id()")
        .execute(&mut elsewhere)
        .await?;
    let held = Instant::now();
    let least = if std::env::var_os("E2E_FULL").is_some() { 60 } else { 0 };
    let mut committed = 0;
    loop {
        commit_run(stage, committed + 1, committed + events).await?;
        committed += events;
        stage.all_marked().await?;
        if held.elapsed() >= Duration::from_secs(least) {
            break;
        }
    }
    println!(
        "{committed} events arrived beside a transaction open for {:.0?}",
        held.elapsed()
    );
    sqlx::raw_sql("ROLLBACK").execute(&mut elsewhere).await?;
    Ok(committed)
}

/// HAZARDS H23: a slot cannot be made while somebody holds a transaction open; events do not wait for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_flow_while_an_open_transaction_keeps_the_slot_from_being_made() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    // Before the slot is: begun here, so that it cannot be made.
    let mut elsewhere = PgConnection::connect(&stage.servers.superuser_url("postgres")).await?;
    sqlx::raw_sql("BEGIN; SELECT pg_current_xact_id()")
        .execute(&mut elsewhere)
        .await?;
    let relay = stage.start_relay_with(|_| {}).await?;
    let committed = commit_beside_an_open_transaction(&stage, 20).await?;
    assert_eq!(relay.status.view().source, Source::Poll);

    sqlx::raw_sql("ROLLBACK").execute(&mut elsewhere).await?;
    relay.reaches(RelayState::Streaming).await?;
    commit_run(&stage, committed + 1, committed + 10).await?;
    arrived(&stage, committed + 10).await?;
    relay.stop().await
}

/// HAZARDS H12, H14: the broker is away and log gathers behind the slot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_past_its_budget_is_given_up_and_made_again_when_the_backlog_is_published() -> anyhow::Result<()> {
    let mut kafka = PrivateKafka::start().await?;
    let stage = Stage::on(TestServers::from_env()?, kafka.brokers()).await?;
    let relay = stage
        .start_relay_with(|settings| settings.wal_budget.bytes = 32 << 20)
        .await?;
    relay.reaches(RelayState::Streaming).await?;
    commit_run(&stage, 1, 10).await?;
    stage.all_marked().await?;

    kafka.kill()?;
    commit_run(&stage, 11, 20).await?;
    sqlx::raw_sql("CREATE TABLE noise AS SELECT repeat('x', 1000) AS text FROM generate_series(1, 60000)")
        .execute(&stage.pool)
        .await?;
    let slots = async || -> anyhow::Result<i64> {
        let count = sqlx::query_scalar("SELECT count(*) FROM pg_replication_slots WHERE slot_name = $1");
        Ok(count.bind(&stage.slot).fetch_one(&stage.pool).await?)
    };
    wait_for("the slot to be given up", async || Ok(slots().await? == 0)).await?;
    commit_run(&stage, 21, 30).await?;
    // A relay that makes it again at once does so within one of these.
    for _ in 0..30 {
        assert_eq!(slots().await?, 0, "made again while the backlog is not published");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(
        stage.unpublished().await? >= 20,
        "nothing is lost, nothing is published"
    );

    kafka.start_again().await?;
    stage.all_marked().await?;
    relay.reaches(RelayState::Streaming).await?;
    assert_eq!(relay.status.view().source, Source::Wal);
    commit_run(&stage, 31, 40).await?;
    arrived(&stage, 40).await?;
    relay.stop().await
}

/// HAZARDS H16: under the relay's eyes this time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_dropped_under_load_loses_nothing() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let relay = stage.start_relay_with(|_| {}).await?;
    relay.reaches(RelayState::Streaming).await?;
    for round in 0..5 {
        commit_run(&stage, round * 20 + 1, round * 20 + 10).await?;
        // The walsender is ended and its slot dropped before the relay is back, or after; both happen.
        sqlx::query("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1")
            .bind(&stage.slot)
            .execute(&stage.pool)
            .await?;
        wait_for("the slot to be dropped", async || {
            let dropped = sqlx::query(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1 AND NOT active",
            )
            .bind(&stage.slot)
            .execute(&stage.pool)
            .await;
            // Streamed from again already: the next look ends that, and finds it free or gone.
            sqlx::query("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1")
                .bind(&stage.slot)
                .execute(&stage.pool)
                .await?;
            let slots: i64 = sqlx::query_scalar("SELECT count(*) FROM pg_replication_slots WHERE slot_name = $1")
                .bind(&stage.slot)
                .fetch_one(&stage.pool)
                .await?;
            Ok(slots == 0 || dropped.is_ok_and(|dropped| dropped.rows_affected() == 1))
        })
        .await?;
        commit_run(&stage, round * 20 + 11, round * 20 + 20).await?;
    }
    arrived(&stage, 100).await?;
    stage.all_marked().await?;
    relay.stop().await
}

/// A migration gone wrong. Since PostgreSQL 18 the server streams on without the rows, and only warns.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_committed_while_their_publication_does_not_exist_are_read_from_the_table() -> anyhow::Result<()> {
    let publication = "FOR TABLE logistics.outbox WITH (publish = 'insert', publish_via_partition_root = true)";
    for mode in [Mode::Auto, Mode::Wal] {
        let stage = Stage::new().await?;
        let relay = stage.start_relay_with(|settings| settings.mode = mode).await?;
        relay.reaches(RelayState::Streaming).await?;
        commit_run(&stage, 1, 20).await?;
        arrived(&stage, 20).await?;

        sqlx::raw_sql("DROP PUBLICATION logistics_outbox")
            .execute(&stage.pool)
            .await?;
        commit_run(&stage, 21, 40).await?;
        if mode == Mode::Auto {
            relay.reaches(RelayState::Polling).await?;
            arrived(&stage, 40).await?;
        } else {
            wait_for("it to say what is missing", async || {
                let state = relay.status.get().0;
                Ok(matches!(state, RelayState::Failing { reason } if reason.contains("no publication logistics_outbox")))
            })
            .await?;
        }

        sqlx::raw_sql(AssertSqlSafe(format!(
            "CREATE PUBLICATION logistics_outbox {publication}"
        )))
        .execute(&stage.pool)
        .await?;
        relay.reaches(RelayState::Streaming).await?;
        commit_run(&stage, 41, 60).await?;
        arrived(&stage, 60).await?;
        stage.all_marked().await?;
        assert_eq!(relay.status.view().source, Source::Wal);
        relay.stop().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_relay_stands_by_without_polling() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let first = stage.start_relay_with(|_| {}).await?;
    first.reaches(RelayState::Streaming).await?;
    let second = stage.start_relay_with(|_| {}).await?;
    second.reaches(RelayState::Standby).await?;
    commit_run(&stage, 1, 10).await?;
    stage.all_marked().await?;
    assert_eq!(second.status.get().0, RelayState::Standby);
    first.abort().await;
    commit_run(&stage, 11, 20).await?;
    tokio::time::timeout(Duration::from_secs(30), second.reaches(RelayState::Streaming)).await??;
    arrived(&stage, 20).await?;
    second.stop().await
}
