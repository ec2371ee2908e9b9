use std::time::Duration;

use e2e::{
    client::Client,
    ledger,
    pair::{Role, Running},
    place::Place,
    workload,
};
use serde_json::json;
use tokio::{task::JoinSet, time::Instant};

const RATE: u64 = 200;
/// Connections are opened and caches filled in this time; what happens in it is not counted.
const WARM_UP: u64 = 2;

/// From commit to commit, everything on its default: what `/health` and metrics cannot show is shown by the server's own
/// commit times. Prints the figures and holds that all events arrived; a figure is no assertion on a shared machine.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commit_to_applied_is_measured_at_200_per_second() -> anyhow::Result<()> {
    let seconds = WARM_UP + if std::env::var_os("E2E_FULL").is_some() { 60 } else { 5 };
    let place = Place::shared().await?;
    let owner = place.owner_pool()?;
    workload::prepare_orders(&owner, 1_000).await?;
    let api = Running::start(&place, Role::Api, &[]).await?;
    let relay = Running::start(&place, Role::Relay, &[]).await?;
    let consumer = Running::start(&place, Role::Consumer(0), &[("RETRY_DELAYS", "5s,30s,5m")]).await?;
    let client = Client::new(&api.url(""), Duration::from_secs(120))?;

    let start = Instant::now();
    let mut calls = JoinSet::new();
    for number in 0..RATE * seconds {
        tokio::time::sleep_until(start + Duration::from_micros(1_000_000 / RATE * number)).await;
        let client = client.clone();
        let order = 1 + number % 1_000;
        let body = json!({"order_id": order.to_string(), "warehouse": "main", "carrier": "Speedy",
                          "lines": [{"sku": format!("s{}", 1 + order % 20), "quantity": 1}]});
        calls.spawn(async move { client.post("/v1/shipments", &body).await });
    }
    while let Some(answer) = calls.join_next().await {
        answer??;
    }
    ledger::quiet(&owner, Duration::from_secs(60)).await?;
    sqlx::query(
        "CREATE TABLE took AS
         WITH committed AS (
             SELECT s.id::text AS id, pg_xact_commit_timestamp(l.xmin) AS at
               FROM logistics.shipments AS s
               JOIN LATERAL (SELECT xmin FROM logistics.shipment_lines WHERE shipment_id = s.id LIMIT 1) AS l ON true)
         SELECT extract(epoch FROM c.at - (SELECT min(at) FROM committed))::float8 AS second,
                extract(epoch FROM pg_xact_commit_timestamp(i.xmin) - c.at)::float8 * 1000 AS ms
           FROM commerce.inbox AS i JOIN committed AS c ON c.id = i.aggregate_id",
    )
    .execute(&owner)
    .await?;
    sqlx::query("DELETE FROM took WHERE second < $1")
        .bind(WARM_UP as f64)
        .execute(&owner)
        .await?;
    let (count, p50, p99, largest): (i64, f64, f64, f64) = sqlx::query_as(
        "SELECT count(*), percentile_cont(0.5) WITHIN GROUP (ORDER BY ms),
                percentile_cont(0.99) WITHIN GROUP (ORDER BY ms), max(ms) FROM took",
    )
    .fetch_one(&owner)
    .await?;
    println!("commit → applied at {RATE}/s, {count} events: p50 {p50:.1} ms, p99 {p99:.1} ms, max {largest:.1} ms");
    // One stall makes many events late at once: when they were, and how many.
    let slow: Vec<(f64, i64, f64)> =
        sqlx::query_as("SELECT floor(second * 2) / 2, count(*), max(ms) FROM took WHERE ms > 40 GROUP BY 1 ORDER BY 1")
            .fetch_all(&owner)
            .await?;
    for (second, events, longest) in slow {
        println!("  at {second:.1} s: {events} events took more than 40 ms, the longest {longest:.0} ms");
    }
    let counted = RATE * (seconds - WARM_UP);
    assert!(
        (counted / 2..=counted * 2).contains(&(count as u64)),
        "{count} events were measured"
    );
    for process in [api, relay, consumer] {
        print_stages(&process).await?;
        process.stop().await?;
    }
    Ok(())
}

/// The mean of each stage as the process itself counts it: where the time goes when the total is too long.
async fn print_stages(process: &Running) -> anyhow::Result<()> {
    let metrics = reqwest::get(process.url("/metrics")).await?.text().await?;
    let value = |name: &str, stage: &str| {
        let stage = format!("stage=\"{stage}\"");
        let line = metrics
            .lines()
            .find(|line| line.starts_with(name) && line.contains(&stage))?;
        line.rsplit(' ').next()?.parse::<f64>().ok()
    };
    for stage in ["commit", "publish", "consume", "apply", "end_to_end"] {
        let sum = value("flow_stage_duration_seconds_sum", stage);
        let count = value("flow_stage_duration_seconds_count", stage);
        if let (Some(sum), Some(count)) = (sum, count) {
            println!(
                "  {:?} {stage}: mean {:.1} ms of {count}",
                process.role,
                sum / count * 1e3
            );
        }
    }
    Ok(())
}
