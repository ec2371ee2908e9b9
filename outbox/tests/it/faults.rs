use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use devstack::testing::{PrivateKafka, TestServers};
use outbox::{Mode, RelayState};

use crate::stage::{Stage, first_seen, sequences, wait_for};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cut_connections_and_crashes_lose_and_reorder_nothing() -> anyhow::Result<()> {
    const KEYS: i64 = 5;
    const FAULTS: usize = 10;
    let stage = Stage::new().await?;
    let mut relay = stage.start_relay().await?;
    let enough = AtomicBool::new(false);
    let write = async {
        let mut sequence = 0;
        while !enough.load(Ordering::Acquire) {
            sequence += 1;
            for key in 0..KEYS {
                stage.commit(&[Stage::event(&format!("key-{key}"), sequence)]).await?;
            }
        }
        anyhow::Ok(sequence)
    };
    let break_it = async {
        for fault in 0..FAULTS {
            relay.reaches(RelayState::Streaming).await?;
            if fault % 2 == 0 {
                sqlx::query("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1")
                    .bind(&stage.slot)
                    .execute(&stage.pool)
                    .await?;
                wait_for("the relay to notice", async || {
                    Ok(relay.status.get().0 != RelayState::Streaming)
                })
                .await?;
            } else {
                relay.abort().await;
                relay = stage.start_relay().await?;
            }
        }
        enough.store(true, Ordering::Release);
        anyhow::Ok(relay)
    };
    let (written, relay) = futures_util::future::join(write, break_it).await;
    let (events, relay) = (written?, relay?);

    stage.all_marked().await?;
    let complete = |records: &[crate::stage::Published]| {
        (0..KEYS).all(|key| first_seen(&sequences(records, &format!("key-{key}"))).len() == events as usize)
    };
    let records = stage.read_until(complete).await?;
    for key in 0..KEYS {
        let seen = sequences(&records, &format!("key-{key}"));
        assert_eq!(first_seen(&seen), (1..=events).collect::<Vec<_>>(), "key {key}");
    }
    let repeated = records.len() as i64 - KEYS * events;
    println!(
        "{FAULTS} faults, {} events, {repeated} of them more than once on the wire",
        KEYS * events
    );
    relay.stop().await
}

/// What the broker has not acknowledged is neither marked nor confirmed, however long the broker is away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_confirmed_before_the_broker_has_it() -> anyhow::Result<()> {
    let mut kafka = PrivateKafka::start().await?;
    let stage = Stage::on(TestServers::from_env()?, kafka.brokers()).await?;
    let relay = stage.start_relay().await?;
    relay.reaches(RelayState::Streaming).await?;
    stage.commit(&[Stage::event("k", 1)]).await?;
    stage.all_marked().await?;

    kafka.kill()?;
    // With nothing in flight the slot follows the log that other databases write, whether the broker is there or not; the
    // first event that waits is what it must stop at.
    stage.commit(&[Stage::event("k", 2)]).await?;
    let waiting: i64 = sqlx::query_scalar("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint")
        .fetch_one(&stage.pool)
        .await?;
    for sequence in 3..=30 {
        stage.commit(&[Stage::event("k", sequence)]).await?;
    }
    // Many rounds of status messages, and as many chances to confirm too much.
    wait_for("the relay to say that the broker is away", async || {
        assert!(
            stage.slot_position().await? < waiting,
            "confirmed before the broker has it"
        );
        assert_eq!(stage.unpublished().await?, 29, "marked before the broker has it");
        Ok(relay.status.get().0 == RelayState::Stalled)
    })
    .await?;

    kafka.start_again().await?;
    stage.all_marked().await?;
    relay.reaches(RelayState::Streaming).await?;
    let records = stage
        .read_until(|records| first_seen(&sequences(records, "k")).len() == 30)
        .await?;
    assert_eq!(first_seen(&sequences(&records, "k")), (1..=30).collect::<Vec<_>>());
    relay.stop().await
}

/// HAZARDS H6: what the broker never had must come again, whatever the relay had written down before it died. And the first
/// events of a producer, which wait for each other, are not a reason to fall silent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_while_the_broker_is_away_loses_nothing() -> anyhow::Result<()> {
    let mut kafka = PrivateKafka::start().await?;
    for mode in [Mode::Wal, Mode::Poll] {
        let stage = Stage::on(TestServers::from_env()?, kafka.brokers()).await?;
        let relay = stage.start_relay_with(|settings| settings.mode = mode).await?;
        let at_work = if mode == Mode::Wal {
            RelayState::Streaming
        } else {
            RelayState::Polling
        };
        relay.reaches(at_work).await?;
        kafka.kill()?;
        for sequence in 1..=10 {
            stage.commit(&[Stage::event("k", sequence)]).await?;
        }
        // Marks and positions have had many chances by then.
        wait_for("the relay to say that the broker is away", async || {
            let unpublished = stage.unpublished().await?;
            assert_eq!(unpublished, 10, "{mode:?}: marked, and the broker never had it");
            Ok(relay.status.get().0 == RelayState::Stalled)
        })
        .await?;
        relay.abort().await;
        kafka.start_again().await?;
        let relay = stage.start_relay_with(|settings| settings.mode = mode).await?;
        let records = stage
            .read_until(|records| first_seen(&sequences(records, "k")).len() == 10)
            .await?;
        assert_eq!(
            first_seen(&sequences(&records, "k")),
            (1..=10).collect::<Vec<_>>(),
            "{mode:?}"
        );
        stage.all_marked().await?;
        relay.stop().await?;
    }
    Ok(())
}

/// Whether the brokers are away or the client has lost its way to them cannot be told apart from here: a new producer finds out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_producer_that_hears_nothing_is_replaced() -> anyhow::Result<()> {
    for mode in [Mode::Wal, Mode::Poll] {
        let mut kafka = PrivateKafka::start().await?;
        let stage = Stage::on(TestServers::from_env()?, kafka.brokers()).await?;
        let relay = stage
            .start_relay_with(|settings| {
                settings.mode = mode;
                settings.silent_after = Duration::from_secs(1);
            })
            .await?;
        stage.commit(&[Stage::event("k", 1)]).await?;
        stage.all_marked().await?;
        kafka.kill()?;
        stage.commit(&[Stage::event("k", 2)]).await?;
        wait_for("the producer to be given up", async || {
            let state = relay.status.get().0;
            Ok(matches!(state, RelayState::Failing { reason } if reason.contains("acknowledged nothing")))
        })
        .await?;
        kafka.start_again().await?;
        stage.all_marked().await?;
        let records = stage
            .read_until(|records| first_seen(&sequences(records, "k")).len() == 2)
            .await?;
        assert_eq!(first_seen(&sequences(&records, "k")), [1, 2]);
        relay.stop().await?;
    }
    Ok(())
}
