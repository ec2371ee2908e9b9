use std::{
    collections::HashMap,
    sync::{Arc, atomic::AtomicBool, atomic::Ordering},
    time::Duration,
};

use devstack::testing::{PrivateKafka, PrivatePostgres};
use e2e::{
    client::Client,
    ledger,
    pair::{Role, Running},
    place::Place,
    workload,
};

use crate::random::Random;

/// How long a client tries for an answer: longer than any outage here.
const PATIENCE: Duration = Duration::from_secs(120);
const QUIET: Duration = Duration::from_secs(180);
/// More than a run ships.
const ORDERS: i64 = 80_000;
const CLIENTS: usize = 6;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Fault {
    Kill(Role),
    /// SIGTERM, and the process must drain.
    Restart(Role),
    PostgresStop,
    PostgresImmediate,
    KafkaStop,
    KafkaKill,
}

const FAULTS: [Fault; 10] = [
    Fault::Kill(Role::Api),
    Fault::Kill(Role::Relay),
    Fault::Kill(Role::Consumer(0)),
    Fault::Restart(Role::Api),
    Fault::Restart(Role::Relay),
    Fault::Restart(Role::Consumer(0)),
    Fault::PostgresStop,
    Fault::PostgresImmediate,
    Fault::KafkaStop,
    Fault::KafkaKill,
];

/// G1, G2, G3 and G10 under every fault that a process or a server can have, at random moments under load. Once each by
/// default, ten times each in the full run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crashes_of_every_process_and_server_lose_double_and_reorder_nothing() -> anyhow::Result<()> {
    let times = if std::env::var_os("E2E_FULL").is_some() { 10 } else { 1 };
    let mut random = Random::new();
    println!("seed {}", random.seed());

    let mut postgres = PrivatePostgres::start().await?;
    let mut kafka = PrivateKafka::start().await?;
    let place = Place::private(&postgres, &kafka).await?;
    let owner = place.owner_pool()?;
    workload::prepare_orders(&owner, ORDERS).await?;
    let mut processes = HashMap::new();
    for role in [Role::Api, Role::Relay, Role::Consumer(0)] {
        processes.insert(role, Running::start(&place, role, &[]).await?);
    }

    let stop = Arc::new(AtomicBool::new(false));
    let client = Client::new(&processes[&Role::Api].url(""), PATIENCE)?;
    let clients = tokio::spawn({
        let stop = stop.clone();
        async move { workload::run(&client, ORDERS, CLIENTS, stop).await }
    });

    let mut faults: Vec<Fault> = FAULTS
        .iter()
        .flat_map(|fault| std::iter::repeat_n(*fault, times))
        .collect();
    random.shuffle(&mut faults);
    for (number, fault) in faults.iter().enumerate() {
        // Under load, and at another moment of it each time.
        tokio::time::sleep(Duration::from_millis(200 + random.below(1_000))).await;
        println!("fault {:>3} of {}: {fault:?}", number + 1, faults.len());
        match *fault {
            Fault::Kill(role) => {
                if let Some(mut process) = processes.remove(&role) {
                    process.service.kill9()?;
                }
                processes.insert(role, Running::start(&place, role, &[]).await?);
            }
            Fault::Restart(role) => {
                if let Some(process) = processes.remove(&role) {
                    process.stop().await?;
                }
                processes.insert(role, Running::start(&place, role, &[]).await?);
            }
            Fault::PostgresStop => {
                postgres.stop_fast().await?;
                tokio::time::sleep(Duration::from_millis(random.below(2_000))).await;
                postgres.start_again().await?;
            }
            Fault::PostgresImmediate => {
                postgres.stop_immediate().await?;
                postgres.start_again().await?;
            }
            Fault::KafkaStop => {
                kafka.stop().await?;
                tokio::time::sleep(Duration::from_millis(random.below(2_000))).await;
                kafka.start_again().await?;
            }
            Fault::KafkaKill => {
                kafka.kill()?;
                kafka.start_again().await?;
            }
        }
        for process in processes.values_mut() {
            // No fault of a server may end a process, and each comes back by itself.
            assert_eq!(
                process.service.exited()?,
                None,
                "{:?} ended\n{}",
                process.role,
                process.service.log()?
            );
            process.ready().await.expect("each comes back by itself");
        }
    }
    stop.store(true, Ordering::Release);
    // Panics, so that the logs are shown.
    let promises = clients.await?.expect("every request has a definite answer");
    ledger::quiet(&owner, QUIET).await.expect("everything arrives");
    for (_, process) in processes.drain() {
        process.stop().await?;
    }

    let ledger = ledger::check(&place, &owner, &promises).await?;
    println!("{} faults\n{ledger}", faults.len());
    assert!(ledger.is_clean(), "{ledger}");
    assert!(
        promises.len() > faults.len() * 4,
        "only {} shipments: the load did not go on",
        promises.len()
    );
    assert!(
        (promises.len() as i64) < 2 * ORDERS,
        "the load ended before the faults did"
    );
    let stock: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM commerce.products AS p JOIN
                (SELECT sku, sum(returned_quantity + cancelled_quantity) AS back
                   FROM commerce.order_lines GROUP BY sku) AS l ON l.sku = p.sku
          WHERE p.sellable <> $1 + l.back",
    )
    .bind(workload::initial_stock())
    .fetch_one(&owner)
    .await?;
    assert_eq!(stock, 0, "products whose sellable stock is not what came back");
    Ok(())
}
