use std::{
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use e2e::{
    client::Client,
    ledger,
    pair::{Role, Running},
    place::Place,
    wait_for, workload,
};

use crate::random::Random;

const PATIENCE: Duration = Duration::from_secs(120);
const QUIET: Duration = Duration::from_secs(300);
/// Orders in one call, and the calls' rate of orders a second.
const BATCH: i64 = 50;
const RATE: i64 = 1_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Kill,
    Terminate,
}

/// 6 restarts of 3 consumers; in the full run 64 of 8. Half of them by kill -9, half by SIGTERM, spread over the events.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumers_that_are_killed_and_restarted_lose_double_and_reorder_nothing() -> anyhow::Result<()> {
    let full = std::env::var_os("E2E_FULL").is_some();
    let (consumers, partitions, events, restarts) = if full { (8, 32, 200_000, 64) } else { (3, 8, 10_000, 6) };
    let mut random = Random::new();
    println!("seed {}", random.seed());
    let place = Place::with_partitions(partitions).await?;
    let owner = place.owner_pool()?;
    // Each order is one shipment with two events.
    let orders = events / 2;
    workload::prepare_orders(&owner, orders).await?;
    let pair = Running::start(&place, Role::ApiAndRelay, &[]).await?;
    let mut members = Vec::new();
    for number in 0..consumers {
        members.push(spawn(&place, number)?);
    }
    for member in &mut members {
        member.ready().await?;
    }
    let client = Client::new(&pair.url(""), PATIENCE)?;
    let clients = tokio::spawn(async move {
        workload::run_in_bulk(&client, orders, BATCH, RATE, Arc::new(AtomicBool::new(false))).await
    });

    let mut ends: Vec<End> = [End::Kill, End::Terminate].into_iter().cycle().take(restarts).collect();
    random.shuffle(&mut ends);
    let mut repeated = 0.0;
    for (done, end) in ends.iter().enumerate() {
        let applied = events * (done as i64 + 1) / (restarts as i64 + 1);
        wait_for("the next part of the events", QUIET, async || {
            let now: i64 = sqlx::query_scalar("SELECT count(*) FROM commerce.inbox")
                .fetch_one(&owner)
                .await?;
            Ok(now >= applied)
        })
        .await?;
        let number = random.below(consumers as u64) as usize;
        assert_eq!(members[number].service.exited()?, None, "ended by itself");
        repeated += repetitions(&mut members[number]).await?;
        match end {
            End::Kill => {
                members[number].service.kill9()?;
                members[number] = spawn(&place, number)?;
            }
            End::Terminate => {
                members.remove(number).stop().await?;
                members.insert(number, spawn(&place, number)?);
            }
        }
    }
    let promises = clients.await??;
    // A panic, so that the logs are shown.
    ledger::quiet(&owner, QUIET).await.expect("everything arrives");
    for mut member in members {
        repeated += repetitions(&mut member).await?;
        member.stop().await?;
    }
    pair.stop().await?;

    let ledger = ledger::check(&place, &owner, &promises).await?;
    let kills = ends.iter().filter(|end| **end == End::Kill).count();
    println!(
        "{restarts} restarts, {kills} by kill -9, of {consumers} consumers over {partitions} partitions: \
         at least {repeated} deliveries repeated\n{ledger}"
    );
    assert_eq!(ledger.applied, events);
    assert!(ledger.is_clean(), "{ledger}");
    let waiting: i64 = sqlx::query_scalar(
        "SELECT (SELECT count(*) FROM commerce.held_keys) + (SELECT count(*) FROM commerce.parked_events)
              + (SELECT count(*) FROM commerce.failed_attempts)",
    )
    .fetch_one(&owner)
    .await?;
    assert_eq!(waiting, 0, "keys held, events parked or tries failed");
    Ok(())
}

fn spawn(place: &Place, number: usize) -> anyhow::Result<Running> {
    Running::spawn(place, Role::Consumer(number), &[])
}

/// What the instance saw again although it had taken effect; what a killed one counted last is lost with it.
async fn repetitions(member: &mut Running) -> anyhow::Result<f64> {
    member.live().await?;
    member.counter("inbox_duplicates_total").await
}
