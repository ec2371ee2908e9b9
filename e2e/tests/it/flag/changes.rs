use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use e2e::{
    client::Client,
    flag::{ADMIN, Flag},
    ledger,
    pair::{Role, Running},
    place::Place,
    workload,
};
use serde_json::json;
use sqlx::PgPool;
use tokio::time::Instant;

use super::{PATIENCE, QUIET, count};
use crate::random::Random;

const MODES: [&str; 3] = ["outbox", "shadow", "legacy"];
/// Orders of one call.
const BATCH: i64 = 5;
const PERCENT: [f64; 5] = [100.0, 50.0, 10.0, 1.0, 0.0];

/// G8: the mode of all orders, or of a share of them, is changed at random while orders ship, consumers lag, and processes are
/// killed. By default 16 changes; in the full run 200.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g8_the_flag_may_change_at_any_moment_in_any_direction() -> anyhow::Result<()> {
    let full = std::env::var_os("E2E_FULL").is_some();
    // More completions are offered than are wanted on average: while the API starts again, nobody ships.
    let (changes, clients, rate, orders) = if full {
        (200, 8, 450, 500_000)
    } else {
        (16, 6, 50, 20_000)
    };
    let mut random = Random::new();
    println!("E2E_SEED={}", random.seed());
    let place = Place::shared().await?;
    let owner = place.owner_pool()?;
    workload::prepare_orders(&owner, orders).await?;
    let mut api = Running::start(&place, Role::Api, &[ADMIN]).await?;
    let relay = Running::start(&place, Role::Relay, &[]).await?;
    // Slower than the clients now and then, so that there is a backlog to switch over.
    let consumer_env = [("RATE_LIMIT", "1500")];
    let mut consumers = Vec::new();
    for instance in 0..2 {
        consumers.push(Running::start(&place, Role::Consumer(instance), &consumer_env).await?);
    }
    let flag = Flag::new(&api.url(""))?;
    let stop = Arc::new(AtomicBool::new(false));
    let client = Client::new(&api.url(""), PATIENCE)?;
    let started = Instant::now();
    // Shipments of every kind of life one by one, and completions in small calls at a rate.
    let shipping = tokio::spawn({
        let stop = stop.clone();
        async move {
            let in_bulk = workload::run_in_bulk_from(&client, orders / 2 + 1..=orders, BATCH, rate, stop.clone());
            let one_by_one = workload::run(&client, orders / 2, clients, stop.clone());
            let (mut promises, others) = tokio::try_join!(one_by_one, in_bulk)?;
            promises.extend(others);
            anyhow::Ok(promises)
        }
    });

    let (mut pairs, mut last, mut backlogs) = (BTreeSet::new(), "outbox", 0);
    for change in 0..changes {
        let mode = MODES[random.below(3) as usize];
        let mut rest = MODES[random.below(3) as usize];
        let percent = PERCENT[random.below(5) as usize];
        if rest == mode {
            rest = if mode == "outbox" { "legacy" } else { "outbox" };
        }
        let value = json!({"mode": mode, "rest": rest, "percent": percent, "reason": format!("drill {change}")});
        // An API that was killed is up again soon.
        let end = Instant::now() + PATIENCE;
        while let Err(error) = flag.set(&value).await {
            anyhow::ensure!(Instant::now() < end, "{error:#}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        pairs.insert((last, mode));
        last = mode;
        match change % 8 {
            2 => {
                api.service.kill9()?;
                api = Running::start(&place, Role::Api, &[ADMIN]).await?;
            }
            4 => {
                let one = random.below(2) as usize;
                consumers[one].service.kill9()?;
                consumers[one] = Running::start(&place, Role::Consumer(one), &consumer_env).await?;
            }
            6 => {
                // Nobody applies for a moment: what is committed by the outbox now waits through the next changes.
                for consumer in &mut consumers {
                    consumer.service.sigstop()?;
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
                backlogs = backlogs.max(backlog(&owner).await?);
                flag.set(&json!({"mode": "legacy", "reason": "over a backlog"})).await?;
                tokio::time::sleep(Duration::from_millis(200)).await;
                for consumer in &mut consumers {
                    consumer.service.sigcont()?;
                }
            }
            _ => tokio::time::sleep(Duration::from_millis(50 + random.below(200))).await,
        }
    }
    stop.store(true, Ordering::Release);
    let promises = shipping.await??;
    let elapsed = started.elapsed();
    flag.set(&json!({"mode": "outbox", "reason": "the end of the drill"}))
        .await?;
    ledger::quiet(&owner, QUIET).await?;

    let ledger = ledger::check(&place, &owner, &promises).await?;
    let synchronously = count(
        &owner,
        "SELECT count(*) FROM commerce.inbox WHERE topic = 'synchronous'",
    )
    .await?;
    let completions = count(
        &owner,
        "SELECT count(*) FROM logistics.outbox WHERE type = 'ShipmentCompleted'",
    )
    .await?;
    println!("{ledger}");
    println!(
        "{} values, {} pairs of modes, {:.0} completions/s, {synchronously} events took effect synchronously, \
         the largest backlog {backlogs}",
        flag.read("/admin/flag").await?["flag"]["version"],
        pairs.len(),
        completions as f64 / elapsed.as_secs_f64(),
    );
    assert!(ledger.is_clean(), "{ledger}");
    assert!(
        synchronously > 0 && synchronously < ledger.applied,
        "both paths were gone"
    );
    assert!(backlogs > 0, "there was a backlog");
    let different = "SELECT count FROM logistics.shadow_tally WHERE outcome = 'different'";
    assert_eq!(count(&owner, different).await?, 0, "shadow mode found nothing");
    if full {
        assert_eq!(pairs.len(), 9, "all pairs of modes");
    }
    api.stop().await?;
    relay.stop().await?;
    for consumer in consumers {
        consumer.stop().await?;
    }
    Ok(())
}

async fn backlog(owner: &PgPool) -> anyhow::Result<i64> {
    let waiting = "SELECT (SELECT count(*) FROM logistics.outbox) - (SELECT count(*) FROM commerce.inbox)";
    count(owner, waiting).await
}
