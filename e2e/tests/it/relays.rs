use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use devstack::testing::{PrivateKafka, PrivatePostgres};
use e2e::{
    client::Client,
    ledger,
    pair::{Role, Running},
    place::Place,
    topic, wait_for, workload,
};
use tokio::time::Instant;

const PATIENCE: Duration = Duration::from_secs(120);
const QUIET: Duration = Duration::from_secs(180);
/// Orders in one call.
const BATCH: i64 = 25;

#[derive(Debug, Clone, Copy)]
enum Fault {
    Kill(usize),
    /// SIGSTOP, long enough for the other to take over, and SIGCONT: the zombie comes back with its old belief.
    Freeze(usize),
    Restart(usize),
    /// `pg_terminate_backend` of every connection of the relays.
    Terminate,
    PostgresImmediate,
    KafkaStop,
    KafkaKill,
}

/// In the full run each kind for one and for the other relay: in modes with a leader nobody knows which one leads.
const FAULTS: [Fault; 10] = [
    Fault::Kill(0),
    Fault::Freeze(1),
    Fault::Terminate,
    Fault::Restart(1),
    Fault::PostgresImmediate,
    Fault::KafkaStop,
    Fault::Freeze(0),
    Fault::Kill(1),
    Fault::Restart(0),
    Fault::KafkaKill,
];
/// Of a short run: each kind once.
const EACH_KIND: usize = 6;

const RELAYS: [Role; 2] = [Role::Relay, Role::OtherRelay];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_relays_in_mode_wal_lose_double_and_reorder_nothing_under_faults() -> anyhow::Result<()> {
    checked("wal").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_relays_in_mode_poll_lose_double_and_reorder_nothing_under_faults() -> anyhow::Result<()> {
    checked("poll").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_relays_in_mode_after_commit_lose_double_and_reorder_nothing_under_faults() -> anyhow::Result<()> {
    checked("after-commit").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_relays_in_mode_auto_lose_double_and_reorder_nothing_under_faults() -> anyhow::Result<()> {
    checked("auto").await
}

/// By default 100 completions a second and one fault after another; in the full run 500 a second for at least a minute.
async fn checked(mode: &str) -> anyhow::Result<()> {
    let full = std::env::var_os("E2E_FULL").is_some();
    let (rate, least, orders) = if full {
        (500, Duration::from_secs(60), 200_000)
    } else {
        (100, Duration::ZERO, 40_000)
    };
    let mut postgres = PrivatePostgres::start().await?;
    let mut kafka = PrivateKafka::start().await?;
    let place = Place::private(&postgres, &kafka).await?;
    let owner = place.owner_pool()?;
    workload::prepare_orders(&owner, orders).await?;
    let env = [("RELAY_MODE", mode)];
    let api = Running::start(&place, Role::Api, &env).await?;
    let mut consumer = Running::start(&place, Role::Consumer(0), &env).await?;
    let mut relays = Vec::new();
    for role in RELAYS {
        relays.push(Running::start(&place, role, &env).await?);
    }

    let stop = Arc::new(AtomicBool::new(false));
    let client = Client::new(&api.url(""), PATIENCE)?;
    let started = Instant::now();
    let clients = tokio::spawn({
        let stop = stop.clone();
        async move { workload::run_in_bulk(&client, orders, BATCH, rate, stop).await }
    });
    let mut rounds = 0;
    while rounds == 0 || started.elapsed() < least {
        for fault in FAULTS.into_iter().take(if full { FAULTS.len() } else { EACH_KIND }) {
            println!("{mode}: {fault:?} after {:.0?}", started.elapsed());
            match fault {
                Fault::Kill(relay) => {
                    relays[relay].service.kill9()?;
                    relays[relay] = Running::start(&place, RELAYS[relay], &env).await?;
                }
                Fault::Freeze(relay) => {
                    relays[relay].service.sigstop()?;
                    tokio::time::sleep(Duration::from_secs(5)).await;
                    relays[relay].service.sigcont()?;
                }
                Fault::Restart(relay) => {
                    let old = relays.remove(relay);
                    old.stop().await?;
                    relays.insert(relay, Running::start(&place, RELAYS[relay], &env).await?);
                }
                Fault::Terminate => {
                    sqlx::query(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'logistics_relay'",
                    )
                    .execute(&owner)
                    .await?;
                }
                Fault::PostgresImmediate => {
                    postgres.stop_immediate().await?;
                    postgres.start_again().await?;
                }
                Fault::KafkaStop => {
                    kafka.stop().await?;
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    kafka.start_again().await?;
                }
                Fault::KafkaKill => {
                    kafka.kill()?;
                    kafka.start_again().await?;
                }
            }
            for process in relays.iter_mut().chain([&mut consumer]) {
                assert_eq!(process.service.exited()?, None, "{:?} ended", process.role);
                process.ready().await.expect("each comes back by itself");
            }
            // Under load between two faults too.
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        rounds += 1;
    }
    stop.store(true, Ordering::Release);
    let promises = clients.await??;
    let shipped_for = started.elapsed();
    // A panic, so that the logs are shown.
    ledger::quiet(&owner, QUIET).await.expect("everything arrives");
    for relay in relays {
        relay.stop().await?;
    }
    consumer.stop().await?;
    api.stop().await?;

    let ledger = ledger::check(&place, &owner, &promises).await?;
    println!(
        "mode {mode}: {} faults in {shipped_for:.0?}, {} completions\n{ledger}",
        FAULTS.len() * rounds,
        promises.len()
    );
    assert!(ledger.is_clean(), "{ledger}");
    assert!(
        promises.len() as i64 + BATCH < orders,
        "the load ended before the faults did"
    );
    Ok(())
}

/// How long nothing reaches the broker when the relay that works is killed while another one stands by.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_relay_takes_over_when_the_first_is_killed() -> anyhow::Result<()> {
    for mode in ["wal", "poll", "auto"] {
        let place = Place::shared().await?;
        let owner = place.owner_pool()?;
        workload::prepare_orders(&owner, 20_000).await?;
        let env = [("RELAY_MODE", mode)];
        let api = Running::start(&place, Role::Api, &env).await?;
        let mut first = Running::start(&place, Role::Relay, &env).await?;
        let second = Running::start(&place, Role::OtherRelay, &env).await?;
        let stop = Arc::new(AtomicBool::new(false));
        let client = Client::new(&api.url(""), PATIENCE)?;
        let clients = tokio::spawn({
            let stop = stop.clone();
            async move { workload::run_in_bulk(&client, 20_000, 10, 200, stop).await }
        });
        tokio::time::sleep(Duration::from_secs(2)).await;
        let killed = Instant::now();
        first.service.kill9()?;
        // Every event that was committed before the kill or just after it.
        let committed: i64 = sqlx::query_scalar("SELECT count(*) FROM logistics.outbox")
            .fetch_one(&owner)
            .await?;
        wait_for("the events of the dead relay", PATIENCE, async || {
            let unsent: i64 = sqlx::query_scalar(
                "SELECT count(*) FROM (SELECT published_at FROM logistics.outbox ORDER BY id LIMIT $1) AS early
                  WHERE published_at IS NULL",
            )
            .bind(committed)
            .fetch_one(&owner)
            .await?;
            Ok(unsent == 0)
        })
        .await?;
        let marked = killed.elapsed();
        stop.store(true, Ordering::Release);
        clients.await??;
        let gap = longest_gap(&topic::times(&place.brokers, place.topics.main()).await?);
        println!("mode {mode}: longest gap at the broker {gap} ms; all events of before marked after {marked:.1?}");
        second.stop().await?;
        api.stop().await?;
    }
    Ok(())
}

/// Milliseconds between two records that follow each other, at most.
fn longest_gap(times: &[i64]) -> i64 {
    times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
}
