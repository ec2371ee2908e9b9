use std::time::Duration;

use anyhow::{Context, ensure};
use devstack::progress::Progress;
use e2e::{
    client::Client,
    wait_for,
    workload::{Promise, line_of},
};
use reqwest::StatusCode;
use serde_json::{Value, json};

/// How many orders are used, from the first one given.
pub(crate) const ORDERS: i64 = 32;

/// Until commerce shows a change.
const ARRIVAL: Duration = Duration::from_secs(30);

/// Creates, completes, completes in bulk, sends what is wrong, and looks for the result on the other side. Returns what was
/// promised.
///
/// # Errors
/// An answer that is not as documented.
pub(crate) async fn send(
    logistics: &Client,
    commerce: &Client,
    first: i64,
    progress: &Progress,
) -> anyhow::Result<Vec<Promise>> {
    let created = logistics.post("/v1/shipments", &shipment(first)).await?;
    ensure!(created["status"] == "open", "created: {created}");
    let id = created["id"].as_i64().context("no id")?;
    let completed = logistics
        .post(
            &format!("/v1/shipments/{id}/complete"),
            &json!({"tracking_number": "1Z999"}),
        )
        .await?;
    ensure!(completed["status"] == "completed", "completed: {completed}");
    let mut promises = vec![Promise {
        shipment: id,
        status: "completed",
        sequence: 2,
    }];
    wait_for("commerce to show the order as shipped", ARRIVAL, async || {
        let (status, order) = commerce.get(&format!("/v1/orders/{first}")).await?;
        Ok(status == StatusCode::OK && order["status"] == "shipped")
    })
    .await?;
    progress.note("✓ a shipment created and completed, its order shipped in commerce");

    let shipments: Vec<Value> = (first + 1..first + ORDERS).map(shipment).collect();
    let many = shipments.len();
    let created = logistics
        .post("/v1/shipments/batch", &json!({ "shipments": shipments }))
        .await?;
    let items = created["items"].as_array().context("no items")?;
    let ids: Vec<i64> = items.iter().filter_map(|item| item["id"].as_i64()).collect();
    ensure!(ids.len() == many, "{many} were asked for: {created}");
    let completed = logistics.post("/v1/shipments/complete", &json!({ "ids": ids })).await?;
    ensure!(completed["counts"]["completed"] == many, "in bulk: {completed}");
    promises.extend(ids.iter().map(|&shipment| Promise {
        shipment,
        status: "completed",
        sequence: 2,
    }));
    progress.note(&format!("✓ {many} created in one call and completed in another"));

    let mut wrong = shipment(first);
    wrong["lines"][0]["quantity"] = json!(-1);
    let (status, problem) = logistics.try_post("/v1/shipments", &wrong).await?;
    let pointer = problem.pointer("/errors/0/pointer").cloned().unwrap_or_default();
    ensure!(
        status == StatusCode::UNPROCESSABLE_ENTITY && pointer == "/lines/0/quantity",
        "wrong input: {status} {problem}"
    );
    let (status, problem) = logistics.get("/v1/shipments/999999999").await?;
    ensure!(status == StatusCode::NOT_FOUND, "unknown shipment: {status} {problem}");
    progress.note("✓ wrong input is refused by its field, an unknown shipment by 404");
    Ok(promises)
}

/// All that is left of a prepared order.
fn shipment(order: i64) -> Value {
    let lines = [0, 1].map(|line| line_of(order, line));
    let lines = lines.map(|line| json!({"sku": line.sku, "quantity": line.quantity}));
    json!({"order_id": order.to_string(), "warehouse": "main", "carrier": "Speedy", "lines": lines})
}
