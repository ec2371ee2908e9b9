use std::{path::Path, time::Duration};

use anyhow::Context;
use devstack::testing::{Service, binary};
use e2e::{
    client::Client,
    ledger,
    pair::{Role, Running},
    place::Place,
};
use samples::northwind;
use serde_json::json;
use sqlx::PgPool;

const PATIENCE: Duration = Duration::from_secs(60);

/// The sample as `./dev up` ships it, compared with its files by SQL.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_northwind_sample_arrives_line_by_line() -> anyhow::Result<()> {
    let place = Place::shared().await?;
    let owner = place.owner_pool()?;
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../samples/northwind");
    import(&place, &dir).await?;
    // A second import finds everything there.
    import(&place, &dir).await?;

    let api = Running::start(&place, Role::ApiAndRelay, &[]).await?;
    let consumer = Running::start(&place, Role::Consumer(0), &[]).await?;
    let client = Client::new(&api.url(""), PATIENCE)?;

    ship(&client, &dir).await?;
    let sample = northwind::load(&dir)?;
    ledger::quiet(&owner, PATIENCE).await?;

    let ledger = ledger::check(&place, &owner, &[]).await?;
    println!("{ledger}");
    assert!(ledger.is_clean(), "{ledger}");
    assert_eq!(ledger.committed, 830 + 809);

    assert_eq!(count(&owner, "SELECT count(*) FROM commerce.orders").await?, 830);
    assert_eq!(count(&owner, "SELECT count(*) FROM commerce.order_lines").await?, 2_155);
    let shipped = "SELECT count(*) FROM commerce.shipments WHERE status = 'completed'";
    assert_eq!(count(&owner, shipped).await?, 809);
    assert_eq!(
        count(&owner, "SELECT sum(shipped_quantity) FROM commerce.order_lines").await?,
        50_119
    );
    let untouched = "SELECT count(*) FROM commerce.orders AS o WHERE status = 'paid'
        AND NOT EXISTS (SELECT FROM commerce.order_lines AS l WHERE l.order_id = o.id
                         AND shipped_quantity + returned_quantity + cancelled_quantity > 0)
        AND NOT EXISTS (SELECT FROM commerce.order_timeline AS t WHERE t.order_id = o.id)";
    assert_eq!(count(&owner, untouched).await?, 21);

    // Line by line against the files.
    let lines: Vec<(String, String, i32, i32)> =
        sqlx::query_as("SELECT order_id, sku, quantity, shipped_quantity FROM commerce.order_lines")
            .fetch_all(&owner)
            .await?;
    let mut arrived = lines;
    arrived.sort();
    let mut expected: Vec<_> = sample
        .lines
        .iter()
        .map(|line| {
            let is_shipped = sample
                .orders
                .iter()
                .any(|order| order.id == line.order_id && order.shipped_date.is_some());
            let shipped = if is_shipped { line.quantity } else { 0 };
            (
                line.order_id.to_string(),
                line.product_id.to_string(),
                line.quantity,
                shipped,
            )
        })
        .collect();
    expected.sort();
    assert_eq!(arrived, expected);

    let commerce = Client::new(&consumer.url(""), PATIENCE)?;
    let (_, summary) = commerce.get("/v1/summary").await?;
    assert_eq!(summary["units_shipped"], 50_119, "{summary}");
    assert_eq!(summary["orders"]["shipped"], 809, "{summary}");

    for process in [api, consumer] {
        let metrics = reqwest::get(process.url("/metrics")).await?.text().await?;
        assert!(metrics.contains("flow_stage_duration_seconds_bucket"), "{metrics}");
        let log = process.service.log()?;
        assert!(!log.contains("description conflict"), "{log}");
        process.stop().await?;
    }
    Ok(())
}

/// Creates a shipment for each order of the sample, and completes those that were shipped.
pub(crate) async fn ship(client: &Client, dir: &Path) -> anyhow::Result<()> {
    let sample = northwind::load(dir)?;
    let mut to_complete = Vec::new();
    for orders in sample.orders.chunks(100) {
        let shipments: Vec<_> = orders
            .iter()
            .map(|order| {
                let lines: Vec<_> = sample
                    .lines
                    .iter()
                    .filter(|line| line.order_id == order.id)
                    .map(|line| json!({"sku": line.product_id.to_string(), "quantity": line.quantity}))
                    .collect();
                json!({"order_id": order.id.to_string(), "warehouse": "main", "carrier": order.carrier, "lines": lines})
            })
            .collect();
        let answer = client
            .post("/v1/shipments/batch", &json!({"shipments": shipments}))
            .await?;
        let items = answer["items"].as_array().context("no items")?;
        for (order, item) in orders.iter().zip(items) {
            if order.shipped_date.is_some() {
                to_complete.push(item["id"].clone());
            }
        }
    }
    client
        .post("/v1/shipments/complete", &json!({"ids": to_complete}))
        .await?;
    Ok(())
}

/// A file with a broken line is refused by its place, and nothing of it is loaded.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_sample_file_is_refused_by_file_line_and_column() -> anyhow::Result<()> {
    let place = Place::shared().await?;
    let owner = place.owner_pool()?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../samples/northwind");
    let dir = std::env::temp_dir().join(format!("broken-{}", place.slot));
    std::fs::create_dir(&dir)?;
    for file in ["orders.csv", "order_lines.csv", "products.csv"] {
        std::fs::copy(source.join(file), dir.join(file))?;
    }
    let lines = std::fs::read_to_string(dir.join("order_lines.csv"))?;
    std::fs::write(
        dir.join("order_lines.csv"),
        lines.replacen("10248,42,9.8,10,0", "10248,42,9.8,-10,0", 1),
    )?;

    let mut import = spawn_import(&place, &dir)?;
    let status = import.wait(PATIENCE).await?;
    let log = import.log()?;
    assert_eq!(status.code(), Some(2), "{log}");
    for part in ["order_lines.csv", "line 3", "quantity", "-10"] {
        assert!(log.contains(part), "{part} is not in: {log}");
    }
    assert_eq!(count(&owner, "SELECT count(*) FROM commerce.products").await?, 0);
    std::fs::remove_dir_all(dir)?;
    Ok(())
}

fn spawn_import(place: &Place, dir: &Path) -> anyhow::Result<Service> {
    let dir = dir.to_str().context("a path that is not UTF-8")?;
    let env = [("COMMERCE_DATABASE_URL", place.commerce_url.as_str())];
    Service::spawn(&binary("commerce-consumer")?, &["import", dir], &env)
}

pub(crate) async fn import(place: &Place, dir: &Path) -> anyhow::Result<()> {
    let mut import = spawn_import(place, dir)?;
    let status = import.wait(PATIENCE).await?;
    anyhow::ensure!(status.success(), "{status}: {}", import.log()?);
    Ok(())
}

async fn count(owner: &PgPool, query: &'static str) -> anyhow::Result<i64> {
    Ok(sqlx::query_scalar(query).fetch_one(owner).await?)
}
