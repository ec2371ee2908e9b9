use std::{iter, time::Duration};

use anyhow::Context;
use e2e::{
    client::Client,
    flag::{ADMIN, Flag},
    ledger,
    pair::{Role, Running},
    place::Place,
    workload,
};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgPool};
use tokio::{sync::mpsc, task::JoinSet, time::Instant};

use super::{PATIENCE, QUIET, create};

/// G4: commerce's tables are locked, for three seconds and in the full run for thirty; who completes shipments does not notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g4_locked_tables_of_commerce_fail_no_request_in_mode_outbox() -> anyhow::Result<()> {
    let full = std::env::var_os("E2E_FULL").is_some();
    let locked_for = Duration::from_secs(if full { 30 } else { 3 });
    let place = Place::shared().await?;
    let owner = place.owner_pool()?;
    workload::prepare_orders(&owner, 50_000).await?;
    let api = Running::start(&place, Role::Api, &[ADMIN]).await?;
    let relay = Running::start(&place, Role::Relay, &[]).await?;
    let consumer = Running::start(&place, Role::Consumer(0), &[]).await?;
    let mut lock = owner.begin().await?;
    sqlx::raw_sql(
        "LOCK TABLE commerce.orders, commerce.order_lines, commerce.shipments, commerce.products, commerce.inbox
         IN ACCESS EXCLUSIVE MODE",
    )
    .execute(&mut *lock)
    .await?;
    let http = reqwest::Client::new();
    let end = Instant::now() + locked_for;
    let mut completed = 0;
    let mut order = 0;
    while Instant::now() < end {
        order += 1;
        let body = json!({"order_id": order.to_string(), "warehouse": "main", "carrier": "Speedy",
                          "lines": [{"sku": workload::line_of(order, 0).sku, "quantity": 1}]});
        // Each once: an answer that only comes at the second try is an error here.
        let created = http.post(api.url("/v1/shipments")).json(&body).send().await?;
        assert_eq!(created.status(), 201);
        let created: Value = created.json().await?;
        let path = format!("/v1/shipments/{}/complete", created["id"]);
        let answer = http.post(api.url(&path)).json(&json!({})).send().await?;
        assert_eq!(answer.status(), 200, "{}", answer.text().await?);
        completed += 1;
    }
    lock.rollback().await?;
    println!("{completed} shipments were completed while commerce's tables were locked for {locked_for:?}");
    ledger::quiet(&owner, QUIET).await?;
    let ledger = ledger::check(&place, &owner, &[]).await?;
    assert!(ledger.is_clean(), "{ledger}");
    assert_eq!(ledger.committed, 2 * completed);
    api.stop().await?;
    relay.stop().await?;
    consumer.stop().await
}

/// A state of commerce's database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Commerce {
    Healthy,
    /// A second time in each round: how far the same lies apart from itself.
    Again,
    /// 50 ms for each statement that changes one of its tables.
    Slow,
    Locked,
}

impl Commerce {
    const ALL: [Self; 4] = [Self::Healthy, Self::Again, Self::Slow, Self::Locked];
}

/// Those of commerce that a change writes to.
const TABLES: [&str; 6] = [
    "inbox",
    "orders",
    "order_lines",
    "shipments",
    "order_timeline",
    "products",
];

/// One statement after the other, so that none waits for two tables at once.
async fn be_slow(owner: &PgPool, slow: bool) -> anyhow::Result<()> {
    sqlx::raw_sql(
        "CREATE OR REPLACE FUNCTION commerce.slow() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN PERFORM pg_sleep(0.05); RETURN NULL; END $$",
    )
    .execute(owner)
    .await?;
    for table in TABLES {
        let statement = if slow {
            format!(
                "CREATE TRIGGER slow BEFORE INSERT OR UPDATE ON commerce.{table}
                 FOR EACH STATEMENT EXECUTE FUNCTION commerce.slow()"
            )
        } else {
            format!("DROP TRIGGER slow ON commerce.{table}")
        };
        sqlx::raw_sql(AssertSqlSafe(statement)).execute(owner).await?;
    }
    Ok(())
}

/// G4: how long `complete` takes by each path, while commerce's database is healthy, slow and locked. Requests are due at fixed
/// times, so that one that waits does not spare the others. The states take turns in short pieces, each round in another order:
/// measured one after the other, the last one pays for tables that have grown meanwhile. Prints the figures; holds that by the
/// outbox none fails.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g4_complete_is_measured_by_both_paths_while_commerce_is_healthy_slow_and_locked() -> anyhow::Result<()> {
    let full = std::env::var_os("E2E_FULL").is_some();
    // Requests of a piece by each path, and how many a second: the old one is slower by so much that a few tell.
    let offered = |count, rate| Offered { count, rate };
    let (rounds, outbox, legacy) = if full {
        (12, offered(1_008, 50), offered(84, 50))
    } else {
        (1, offered(25, 25), offered(25, 25))
    };
    let place = Place::shared().await?;
    let owner = place.owner_pool()?;
    let orders = Commerce::ALL.len() * rounds * (outbox.count + legacy.count);
    workload::prepare_orders(&owner, i64::try_from(orders)?).await?;
    // What waits for a lock is given up soon, and the queue behind it with it.
    let env = [
        ADMIN,
        ("DATABASE_STATEMENT_TIMEOUT", "2s"),
        ("DATABASE_ACQUIRE_TIMEOUT", "2s"),
    ];
    let api = Running::start(&place, Role::Api, &env).await?;
    let relay = Running::start(&place, Role::Relay, &[]).await?;
    let consumer = Running::start(&place, Role::Consumer(0), &[]).await?;
    let flag = Flag::new(&api.url(""))?;
    let client = Client::new(&api.url(""), PATIENCE)?;
    let mut orders = 1..;
    let mut parts: Vec<Part> = Commerce::ALL
        .into_iter()
        .flat_map(|state| [Part::new(state, "outbox", outbox), Part::new(state, "legacy", legacy)])
        .collect();
    for round in 0..rounds {
        let count = parts.len();
        for turn in 0..count {
            // Forwards and backwards in turns, and after both from another one.
            let turn = if round % 2 == 0 { turn } else { count - 1 - turn };
            let part = &mut parts[(turn + round) % count];
            flag.set(&json!({"mode": part.mode, "reason": "to be measured"}))
                .await?;
            let mut shipments = Vec::new();
            for order in orders.by_ref().take(part.offered.count) {
                shipments.push(create(&client, order, 1).await?);
            }
            ledger::quiet(&owner, QUIET).await?;
            let mut lock = owner.begin().await?;
            match part.state {
                Commerce::Healthy | Commerce::Again => {}
                Commerce::Slow => be_slow(&owner, true).await?,
                Commerce::Locked => {
                    let tables = "LOCK TABLE commerce.orders, commerce.products IN ACCESS EXCLUSIVE MODE";
                    sqlx::raw_sql(tables).execute(&mut *lock).await?;
                }
            }
            let (took, failed) = measure(&api, &shipments, part.offered.rate).await?;
            lock.rollback().await?;
            if part.state == Commerce::Slow {
                be_slow(&owner, false).await?;
            }
            part.rounds.push(Took::new(took));
            part.failed += failed;
        }
        println!("round {} of {rounds} is done", round + 1);
    }
    println!("the ratios are the median of the rounds' and their quartiles, each to the healthy one of the same round");
    println!("commerce    path     rate/s    p50 ms    p99 ms         p50 / healthy         p99 / healthy    failed");
    for part in &parts {
        let all = Took::new(part.rounds.iter().flat_map(|round| round.0.iter().copied()).collect());
        let healthy = parts
            .iter()
            .find(|other| other.mode == part.mode && other.state == Commerce::Healthy)
            .context("no healthy commerce")?;
        println!(
            "{:<10}  {:<7}  {:>6}  {:>8.1}  {:>8.1}  {:>20}  {:>20}    {} of {}",
            format!("{:?}", part.state),
            part.mode,
            part.offered.rate,
            millis(all.quantile(0.5)),
            millis(all.quantile(0.99)),
            part.ratio_to(healthy, 0.5),
            part.ratio_to(healthy, 0.99),
            part.failed,
            all.0.len(),
        );
    }
    for Part {
        state,
        mode,
        rounds,
        failed,
        ..
    } in parts
    {
        // What is slow may be too slow for the rate by the old path; what is locked fails there.
        match (mode, state) {
            ("outbox", _) | (_, Commerce::Healthy | Commerce::Again) => assert_eq!(failed, 0, "{state:?} {mode}"),
            (_, Commerce::Slow) => {}
            (_, Commerce::Locked) => {
                let sent: usize = rounds.iter().map(|round| round.0.len()).sum();
                assert_eq!(failed, sent, "it waits for what is locked");
            }
        }
    }
    ledger::quiet(&owner, QUIET).await?;
    let ledger = ledger::check(&place, &owner, &[]).await?;
    assert!(ledger.is_clean(), "{ledger}");
    api.stop().await?;
    relay.stop().await?;
    consumer.stop().await
}

/// Requests of a piece, and how many of them are due in a second.
#[derive(Debug, Clone, Copy)]
struct Offered {
    count: usize,
    rate: u32,
}

/// What was measured of one path in one state of commerce's database.
#[derive(Debug)]
struct Part {
    state: Commerce,
    mode: &'static str,
    offered: Offered,
    rounds: Vec<Took>,
    failed: usize,
}

impl Part {
    fn new(state: Commerce, mode: &'static str, offered: Offered) -> Self {
        Self {
            state,
            mode,
            offered,
            rounds: Vec::new(),
            failed: 0,
        }
    }

    /// The median over the rounds, and the quartiles: a pause of the machine falls into one round, and shows in the figures of all.
    fn ratio_to(&self, other: &Self, share: f64) -> String {
        let mut ratios: Vec<f64> = iter::zip(&self.rounds, &other.rounds)
            .map(|(own, other)| own.quantile(share).as_secs_f64() / other.quantile(share).as_secs_f64())
            .collect();
        ratios.sort_by(f64::total_cmp);
        let count = ratios.len();
        let median = f64::midpoint(ratios[(count - 1) / 2], ratios[count / 2]);
        format!(
            "{median:.2} ({:.2} to {:.2})",
            ratios[count / 4],
            ratios[(count - 1) * 3 / 4]
        )
    }
}

/// Sorted.
#[derive(Debug)]
struct Took(Vec<Duration>);

impl Took {
    fn new(mut took: Vec<Duration>) -> Self {
        took.sort();
        Self(took)
    }

    fn quantile(&self, share: f64) -> Duration {
        self.0[((self.0.len() - 1) as f64 * share) as usize]
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// From when each request was due; and how many failed.
async fn measure(api: &Running, shipments: &[i64], rate: u32) -> anyhow::Result<(Vec<Duration>, usize)> {
    let http = reqwest::Client::new();
    let mut calls = JoinSet::new();
    let mut due = pace(rate, u32::try_from(shipments.len())?);
    for shipment in shipments {
        let url = api.url(&format!("/v1/shipments/{shipment}/complete"));
        let http = http.clone();
        let due = due.recv().await.context("the pacer ended")?;
        calls.spawn(async move {
            let answer = http.post(url).json(&json!({})).send().await?;
            anyhow::Ok((due.elapsed(), answer.status().is_success()))
        });
    }
    let (mut took, mut failed) = (Vec::new(), 0);
    while let Some(call) = calls.join_next().await {
        let (elapsed, done) = call??;
        took.push(elapsed);
        failed += usize::from(!done);
    }
    Ok((took, failed))
}

/// The times at which requests are due, each when it has come. A thread of its own, because the runtime's timers wake up to a
/// millisecond late, by the same in a whole piece: a fifth of what is measured.
fn pace(rate: u32, count: u32) -> mpsc::Receiver<Instant> {
    let (sender, receiver) = mpsc::channel(1);
    let start = Instant::now();
    std::thread::spawn(move || {
        for number in 0..count {
            let due = start + Duration::from_secs(1) / rate * number;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            // Nobody measures any longer.
            if sender.blocking_send(due).is_err() {
                return;
            }
        }
    });
    receiver
}
