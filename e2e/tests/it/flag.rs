//! The switch between the outbox and the synchronous path, on the real processes.

/// Turned at random under load, with processes that are killed.
mod changes;

/// Both paths from one start, and what they leave.
mod parity;

/// Steps, and what takes them back.
mod rollout;

/// Bugs of the consumer, found by shadow mode.
mod shadow;

/// Who completes shipments while commerce is slow or locked.
mod slow_commerce;

use std::time::Duration;

use anyhow::Context;
use e2e::{client::Client, wait_for, workload};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgPool};

const PATIENCE: Duration = Duration::from_secs(120);
const QUIET: Duration = Duration::from_secs(180);

/// Creates a shipment of both lines of an order and completes it.
async fn complete(client: &Client, order: i64, quantity: i64) -> anyhow::Result<i64> {
    let id = create(client, order, quantity).await?;
    client.post(&format!("/v1/shipments/{id}/complete"), &json!({})).await?;
    Ok(id)
}

/// The same, completed when commerce knows it: shadow mode tries out nothing that commerce is behind with.
async fn complete_when_created(client: &Client, owner: &PgPool, order: i64, quantity: i64) -> anyhow::Result<i64> {
    let id = create(client, order, quantity).await?;
    let known = format!("SELECT count(*) FROM commerce.shipments WHERE id = '{id}'");
    wait_for("commerce to know the shipment", PATIENCE, async || {
        Ok(count(owner, &known).await? == 1)
    })
    .await?;
    client.post(&format!("/v1/shipments/{id}/complete"), &json!({})).await?;
    Ok(id)
}

async fn create(client: &Client, order: i64, quantity: i64) -> anyhow::Result<i64> {
    let lines: Vec<Value> = (0..2)
        .map(|line| json!({"sku": workload::line_of(order, line).sku, "quantity": quantity}))
        .collect();
    let body = json!({"order_id": order.to_string(), "warehouse": "main", "carrier": "Speedy", "lines": lines});
    let created = client.post("/v1/shipments", &body).await?;
    created["id"].as_i64().context("no id")
}

async fn count(owner: &PgPool, query: &str) -> anyhow::Result<i64> {
    Ok(sqlx::query_scalar(AssertSqlSafe(query.to_owned()))
        .fetch_optional(owner)
        .await?
        .unwrap_or(0))
}
