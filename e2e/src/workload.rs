use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use serde_json::{Value, json};
use shared_events::shipment::Line;
use sqlx::PgPool;
use tokio::{task::JoinSet, time::MissedTickBehavior};

use crate::client::Client;

/// Products of the prepared orders; few, so that they are contended.
const PRODUCTS: i64 = 20;
/// Bulk calls under way at once; more wait.
const CALLS_AT_ONCE: usize = 8;
/// Pieces in each product's stock at the start.
const STOCK: i64 = 1_000_000;

/// What a client was promised about one shipment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Promise {
    pub shipment: i64,
    pub status: &'static str,
    pub sequence: i64,
}

/// Orders `1..=orders` of two lines with ten pieces each, as the shop would have handed them to commerce.
///
/// # Errors
/// If the database refuses.
pub async fn prepare_orders(owner: &PgPool, orders: i64) -> anyhow::Result<()> {
    sqlx::query(
        "WITH new_products AS (
             INSERT INTO commerce.products (sku, name, unit_price, sellable, committed)
             SELECT 's' || n, 'product ' || n, 1, $3, 0 FROM generate_series(1, $2) AS n
         ), new_orders AS (
             INSERT INTO commerce.orders
                    (id, customer_id, ordered_on, carrier, ship_name, ship_city, ship_country, status)
             SELECT n::text, 'c', '2026-11-22', 'Speedy', 'n', 'c', 'c', 'paid' FROM generate_series(1, $1) AS n
         )
         SELECT 1",
    )
    .bind(orders)
    .bind(PRODUCTS)
    .bind(STOCK)
    .execute(owner)
    .await?;
    sqlx::query(
        "INSERT INTO commerce.order_lines (order_id, sku, quantity, unit_price)
         SELECT n::text, 's' || (1 + (n + line) % $2), 10, 1
           FROM generate_series(1, $1) AS n, generate_series(0, 1) AS line",
    )
    .bind(orders)
    .bind(PRODUCTS)
    .execute(owner)
    .await?;
    sqlx::query(
        "UPDATE commerce.products SET committed = line.quantity
           FROM (SELECT sku, sum(quantity) AS quantity FROM commerce.order_lines GROUP BY sku) AS line
          WHERE line.sku = products.sku",
    )
    .execute(owner)
    .await?;
    Ok(())
}

/// A line of a prepared order, 0 or 1.
pub fn line_of(order: i64, line: i64) -> Line {
    Line {
        sku: format!("s{}", 1 + (order + line) % PRODUCTS),
        quantity: 10,
    }
}

/// Stock of each product when [`prepare_orders`] is done.
pub const fn initial_stock() -> i64 {
    STOCK
}

/// Ships orders with `clients` clients until `stop` or until there are no more; returns what was promised.
///
/// # Errors
/// The first answer that a client must not get.
pub async fn run(client: &Client, orders: i64, clients: usize, stop: Arc<AtomicBool>) -> anyhow::Result<Vec<Promise>> {
    let next = Arc::new(AtomicI64::new(1));
    let mut running = JoinSet::new();
    for _ in 0..clients {
        let (client, next, stop) = (client.clone(), next.clone(), stop.clone());
        running.spawn(async move {
            let mut promises = Vec::new();
            loop {
                let order = next.fetch_add(1, Ordering::Relaxed);
                if stop.load(Ordering::Acquire) || order > orders {
                    return anyhow::Ok(promises);
                }
                promises.extend(ship(&client, order).await?);
            }
        });
    }
    let mut promises = Vec::new();
    while let Some(finished) = running.join_next().await {
        promises.extend(finished??);
    }
    Ok(promises)
}

/// Ships each order in one shipment, `batch` orders in one call, `rate` of them a second, until `stop` or until there are no
/// more; returns what was promised.
///
/// # Errors
/// The first answer that a client must not get.
pub async fn run_in_bulk(
    client: &Client,
    orders: i64,
    batch: i64,
    rate: i64,
    stop: Arc<AtomicBool>,
) -> anyhow::Result<Vec<Promise>> {
    run_in_bulk_from(client, 1..=orders, batch, rate, stop).await
}

/// The same with the orders of a range.
///
/// # Errors
/// The first answer that a client must not get.
pub async fn run_in_bulk_from(
    client: &Client,
    orders: std::ops::RangeInclusive<i64>,
    batch: i64,
    rate: i64,
    stop: Arc<AtomicBool>,
) -> anyhow::Result<Vec<Promise>> {
    let mut calls = JoinSet::new();
    let mut promises = Vec::new();
    let mut due = tokio::time::interval(Duration::from_secs(1) * u32::try_from(batch)? / u32::try_from(rate)?);
    // After an outage at the same rate: the backlog is the relay's, not the client's.
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut first = *orders.start();
    while !stop.load(Ordering::Acquire) && first + batch <= orders.end() + 1 {
        due.tick().await;
        while calls.len() >= CALLS_AT_ONCE {
            if let Some(finished) = calls.join_next().await {
                promises.extend(finished??);
            }
        }
        let client = client.clone();
        calls.spawn(async move { ship_in_bulk(&client, first..first + batch).await });
        first += batch;
    }
    while let Some(finished) = calls.join_next().await {
        promises.extend(finished??);
    }
    Ok(promises)
}

async fn ship_in_bulk(client: &Client, orders: std::ops::Range<i64>) -> anyhow::Result<Vec<Promise>> {
    let shipments: Vec<Value> = orders
        .map(|order| {
            let sku = |line: i64| format!("s{}", 1 + (order + line) % PRODUCTS);
            let lines = json!([{"sku": sku(0), "quantity": 10}, {"sku": sku(1), "quantity": 10}]);
            json!({"order_id": order.to_string(), "warehouse": "main", "carrier": "Speedy", "lines": lines})
        })
        .collect();
    let created = client
        .post("/v1/shipments/batch", &json!({ "shipments": shipments }))
        .await?;
    let items = created["items"].as_array().context("no items")?;
    let ids = items.iter().map(id).collect::<anyhow::Result<Vec<i64>>>()?;
    let completed = client.post("/v1/shipments/complete", &json!({ "ids": ids })).await?;
    let results = completed["results"].as_array().context("no results")?;
    results
        .iter()
        .map(|result| {
            Ok(Promise {
                shipment: id(result)?,
                status: "completed",
                sequence: result["sequence"].as_i64().context("no sequence")?,
            })
        })
        .collect()
}

/// An order in two shipments, whose lives differ from order to order: held and released, cancelled, returned in part or
/// whole.
async fn ship(client: &Client, order: i64) -> anyhow::Result<[Promise; 2]> {
    let sku = |line: i64| format!("s{}", 1 + (order + line) % PRODUCTS);
    let create =
        |lines: Value| json!({"order_id": order.to_string(), "warehouse": "main", "carrier": "Speedy", "lines": lines});
    let first = create(json!([{"sku": sku(0), "quantity": 4}, {"sku": sku(1), "quantity": 10}]));
    let second = create(json!([{"sku": sku(0), "quantity": 6}]));
    let first = id(&client.post("/v1/shipments", &first).await?)?;
    let second = id(&client.post("/v1/shipments", &second).await?)?;

    let step = async |shipment: i64, verb: &str, body: Value| {
        client.post(&format!("/v1/shipments/{shipment}/{verb}"), &body).await
    };
    if order % 3 == 0 {
        step(first, "hold", json!({"reason": "address"})).await?;
        step(first, "release", json!({})).await?;
    }
    let mut first_answer = step(first, "complete", json!({})).await?;
    if order % 4 == 0 {
        let lines = json!([{"sku": sku(1), "quantity": 3}]);
        first_answer = step(first, "return", json!({"reason": "damaged", "lines": lines})).await?;
    }
    let second_answer = match order % 5 {
        0 => step(second, "cancel", json!({"reason": "lost"})).await?,
        1 => {
            step(second, "complete", json!({})).await?;
            step(second, "return", json!({"reason": "refused"})).await?
        }
        _ => step(second, "complete", json!({})).await?,
    };
    Ok([promise(&first_answer)?, promise(&second_answer)?])
}

fn id(answer: &Value) -> anyhow::Result<i64> {
    answer["id"].as_i64().with_context(|| format!("no id in {answer}"))
}

fn promise(answer: &Value) -> anyhow::Result<Promise> {
    let status = match answer["status"].as_str() {
        Some("completed") => "completed",
        Some("cancelled") => "cancelled",
        Some("returned") => "returned",
        _ => anyhow::bail!("unexpected state in {answer}"),
    };
    Ok(Promise {
        shipment: id(answer)?,
        status,
        sequence: answer["sequence"]
            .as_i64()
            .with_context(|| format!("no sequence in {answer}"))?,
    })
}
