use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use outbox::{Mode, Relay};
use sqlx::{Connection, PgConnection};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::auto::commit_beside_an_open_transaction;
use crate::stage::{Stage, first_seen, sequences, wait_for};

fn poll(settings: &mut outbox::RelaySettings) {
    settings.mode = Mode::Poll;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn polled_events_arrive_once_and_in_order() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    for sequence in 1..=50 {
        stage.commit(&[Stage::event("early", sequence)]).await?;
    }
    let relay = stage.start_relay_with(poll).await?;
    for sequence in 51..=300 {
        stage.commit(&[Stage::event("early", sequence)]).await?;
    }
    stage.all_marked().await?;
    let records = stage.read_until(|records| records.len() >= 300).await?;
    assert_eq!(
        sequences(&records, "early"),
        (1..=300).collect::<Vec<_>>(),
        "each once: a relay does not repeat itself"
    );
    relay.stop().await
}

/// HAZARDS H22: ids are given out before the commit, so a cursor over them would pass the rows that commit late.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_that_commit_late_lose_nothing() -> anyhow::Result<()> {
    const WRITERS: usize = 200;
    let stage = Stage::with_connections(60).await?;
    let relay = stage.start_relay_with(poll).await?;
    let writers = (0..WRITERS).map(|writer| {
        let stage = &stage;
        async move {
            let mut tx = stage.pool.begin().await?;
            stage.append(&mut tx, &[Stage::event(&format!("w{writer}"), 1)]).await?;
            // Late by something else for each, so that the order of the commits is not that of the ids.
            tokio::time::sleep(Duration::from_millis((writer as u64 * 7919) % 400)).await;
            anyhow::Ok(tx.commit().await?)
        }
    });
    futures_util::future::try_join_all(writers).await?;
    stage.all_marked().await?;
    let records = stage.read_until(|records| records.len() >= WRITERS).await?;
    for writer in 0..WRITERS {
        assert_eq!(sequences(&records, &format!("w{writer}")), [1]);
    }
    relay.stop().await
}

/// HAZARDS H24: with rows locked one by one, the second relay would send a key's second event before its first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_pollers_share_the_keys_and_keep_the_order_of_hot_ones() -> anyhow::Result<()> {
    const EVENTS: i64 = 300;
    let stage = Stage::new().await?;
    let first = stage.start_relay_with(poll).await?;
    let second = stage.start_relay_with(poll).await?;
    wait_for("the keys to be shared", async || Ok(shares(&stage).await? == [32, 32])).await?;
    let keys: Vec<String> = (0..8).map(|key| format!("hot-{key}")).collect();
    for sequence in 1..=EVENTS {
        let events: Vec<_> = keys.iter().map(|key| Stage::event(key, sequence)).collect();
        stage.commit(&events).await?;
    }
    stage.all_marked().await?;
    let all = EVENTS as usize * keys.len();
    let records = stage.read_until(|records| records.len() >= all).await?;
    for key in &keys {
        let sequences = sequences(&records, key);
        assert_eq!(out_of_order(&sequences), None, "{key}: an event before its predecessor");
        assert_eq!(sequences.len() as i64, EVENTS, "{key}: each once");
    }
    first.stop().await?;
    second.stop().await
}

/// The first event that came before its predecessor, and that one's place.
fn out_of_order(sequences: &[i64]) -> Option<(i64, i64)> {
    let first_seen = first_seen(sequences);
    (1..).zip(first_seen).find(|(expected, seen)| expected != seen)
}

/// How many keys' buckets each poller has leased.
async fn shares(stage: &Stage) -> anyhow::Result<Vec<i64>> {
    let shares = sqlx::query_scalar(
        "SELECT count(*) FROM logistics.outbox_relay_buckets WHERE leased_until > clock_timestamp() GROUP BY owner ORDER BY 1",
    );
    Ok(shares.fetch_all(&stage.pool).await?)
}

/// HAZARDS H25, the other half: whoever cannot renew its leases must believe that somebody else has them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_poller_whose_leases_ran_out_publishes_nothing() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let relay = stage.start_relay_with(poll).await?;
    stage.commit(&[Stage::event("k", 1)]).await?;
    stage.all_marked().await?;
    // Leases are given out one at a time, so this lock keeps them from being renewed.
    let mut lock = PgConnection::connect(&stage.database.superuser_url()).await?;
    sqlx::raw_sql("SELECT pg_advisory_lock(hashtextextended('logistics.lease_outbox_buckets', 0))")
        .execute(&mut lock)
        .await?;
    wait_for("the leases to run out", async || {
        let over = "SELECT bool_and(leased_until < clock_timestamp()) FROM logistics.outbox_relay_buckets";
        Ok(sqlx::query_scalar(over).fetch_one(&stage.pool).await?)
    })
    .await?;
    stage.commit(&[Stage::event("k", 2)]).await?;
    // It looks every 50 ms.
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(stage.unpublished().await?, 1, "published without a lease");
    }
    lock.close().await?;
    stage.all_marked().await?;
    let records = stage.read_until(|records| records.len() >= 2).await?;
    assert_eq!(sequences(&records, "k"), [1, 2]);
    relay.stop().await
}

/// HAZARDS H25: nobody gives the leases back, and the epochs tell the two owners apart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_keys_of_a_dead_poller_are_taken_over_with_a_higher_epoch() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let first = stage.start_relay_with(poll).await?;
    stage.commit(&[Stage::event("k", 1)]).await?;
    stage.all_marked().await?;
    let epoch = async || -> anyhow::Result<i64> {
        let epoch = sqlx::query_scalar(
            "SELECT epoch FROM logistics.outbox_relay_buckets WHERE bucket = logistics.outbox_bucket('k')",
        );
        Ok(epoch.fetch_one(&stage.pool).await?)
    };
    let before = epoch().await?;
    first.abort().await;
    stage.commit(&[Stage::event("k", 2)]).await?;

    let second = stage.start_relay_with(poll).await?;
    stage.all_marked().await?;
    assert!(epoch().await? > before);
    let records = stage.read_until(|records| records.len() >= 2).await?;
    assert_eq!(first_seen(&sequences(&records, "k")), [1, 2]);
    second.stop().await
}

/// HAZARDS H25: a process that is stopped with rows in its hands goes on when another one has long had their keys.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_poller_that_slept_through_its_takeover_sends_nothing_that_it_had_in_hand() -> anyhow::Result<()> {
    const EVENTS: i64 = 60;
    let stage = Arc::new(Stage::new().await?);
    let keys: Vec<String> = (0..64).map(|key| format!("k{key}")).collect();
    let backlog: Vec<_> = (1..=EVENTS)
        .flat_map(|sequence| keys.iter().map(move |key| Stage::event(key, sequence)))
        .collect();
    stage.commit(&backlog).await?;

    // All that the sleeper runs has one thread, which sleeps as soon as a first row is marked.
    let (slept, asleep) = oneshot::channel();
    let (wake, woken) = std::sync::mpsc::channel::<()>();
    let stop = CancellationToken::new();
    let _ended_with_the_test = stop.clone().drop_guard();
    let sleeper = {
        let (stage, stop, rows) = (stage.clone(), stop.clone(), backlog.len() as i64);
        std::thread::spawn(move || -> anyhow::Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let (settings, pool, kafka) = stage.relay_parts(|settings| {
                    poll(settings);
                    // One by one, so that most of the backlog is still in hand.
                    settings.max_in_flight = 1;
                })?;
                let relay = Relay::new(settings, pool.clone(), kafka)?;
                let sleep = async {
                    wait_for("a first mark", async || {
                        let unsent = "SELECT count(*) FROM logistics.outbox WHERE published_at IS NULL";
                        let unsent: i64 = sqlx::query_scalar(unsent).fetch_one(&pool).await?;
                        Ok(unsent < rows)
                    })
                    .await?;
                    slept.send(()).ok();
                    anyhow::Ok(woken.recv()?)
                };
                let ((), slept) = futures_util::future::join(relay.run(stop), sleep).await;
                slept
            })
        })
    };
    asleep.await?;
    let in_hand = stage.unpublished().await?;
    assert!(in_hand > 0, "it slept too late");

    let other = stage.start_relay_with(poll).await?;
    stage.all_marked().await?;
    let before = stage.records()?;
    wake.send(())?;
    wait_for("the sleeper to have keys again", async || {
        Ok(shares(&stage).await? == [32, 32])
    })
    .await?;
    // Some of these are its own, and it comes to them when it is done with what it had in hand.
    let next: Vec<_> = keys.iter().map(|key| Stage::event(key, EVENTS + 1)).collect();
    stage.commit(&next).await?;
    wait_for("the next events to be marked", async || {
        let sent = stage.records()? - before;
        let new = next.len() as i64;
        assert!(sent <= new, "{sent} records for {new} events: it had {in_hand} in hand");
        Ok(stage.unpublished().await? == 0)
    })
    .await?;
    assert_eq!(stage.records()? - before, next.len() as i64);
    stop.cancel();
    tokio::task::spawn_blocking(|| sleeper.join().unwrap()).await??;
    other.stop().await
}

/// HAZARDS H23: a transaction that somebody holds open, in whatever database, must not stop the events of others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_held_open_elsewhere_stops_nothing() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let relay = stage.start_relay_with(poll).await?;
    commit_beside_an_open_transaction(&stage, 20).await?;
    relay.stop().await
}

/// Keys change hands in order: whoever gets them finds marked what the other has sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_poller_gets_its_share_of_the_keys_and_gives_it_back() -> anyhow::Result<()> {
    let stage = Stage::new().await?;
    let first = stage.start_relay_with(poll).await?;
    wait_for("the first to have all", async || Ok(shares(&stage).await? == [64])).await?;
    let keys: Vec<String> = (0..64).map(|key| format!("hot-{key}")).collect();
    let (stop, written, wanted) = (AtomicBool::new(false), AtomicI64::new(0), AtomicI64::new(0));
    let write = async {
        while !stop.load(Ordering::Acquire) {
            let sequence = written.load(Ordering::Acquire) + 1;
            // As much as is asked for, however long a slow machine takes to move the keys.
            if sequence > wanted.load(Ordering::Acquire) {
                tokio::task::yield_now().await;
                continue;
            }
            let events: Vec<_> = keys.iter().map(|key| Stage::event(key, sequence)).collect();
            stage.commit(&events).await?;
            written.store(sequence, Ordering::Release);
        }
        anyhow::Ok(())
    };
    // Under load on both sides, so that events are on their way when the keys move.
    let load = async || {
        let enough = written.load(Ordering::Acquire) + 50;
        wanted.store(enough + 50, Ordering::Release);
        wait_for("some load", async || Ok(written.load(Ordering::Acquire) >= enough)).await
    };
    let hand_over = async {
        for _ in 0..2 {
            load().await?;
            let second = stage.start_relay_with(poll).await?;
            wait_for("the keys to be shared", async || Ok(shares(&stage).await? == [32, 32])).await?;
            load().await?;
            second.stop().await?;
            wait_for(
                "the first to have all again",
                async || Ok(shares(&stage).await? == [64]),
            )
            .await?;
            load().await?;
        }
        stop.store(true, Ordering::Release);
        anyhow::Ok(())
    };
    futures_util::future::try_join(write, hand_over).await?;
    let events = written.into_inner();
    stage.all_marked().await?;
    let all = usize::try_from(events)? * keys.len();
    let records = stage.read_until(|records| records.len() >= all).await?;
    for key in &keys {
        let arrived = sequences(&records, key);
        let wrong = (1..=events).zip(&arrived).find(|(due, came)| due != *came);
        assert!(
            wrong.is_none() && arrived.len() as i64 == events,
            "{key}: each once and in order, but {} came of {events}, and {wrong:?} (due, came) is the first that is wrong: {arrived:?}",
            arrived.len()
        );
    }
    first.stop().await
}
