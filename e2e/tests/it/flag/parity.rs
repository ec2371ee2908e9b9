use std::sync::Arc;

use e2e::{
    client::Client,
    flag::{ADMIN, Flag},
    pair::{Role, Running},
    place::Place,
    wait_for, workload,
};
use serde_json::json;
use sqlx::AssertSqlSafe;

use super::{PATIENCE, QUIET, count};

/// What both paths leave: every row, without the times at which it was written and the ids that were drawn for it.
const ROWS: [(&str, &str); 8] = [
    (
        "orders",
        "SELECT to_jsonb(r) - 'updated_at' FROM commerce.orders AS r ORDER BY id",
    ),
    (
        "order lines",
        "SELECT to_jsonb(r) FROM commerce.order_lines AS r ORDER BY order_id, sku",
    ),
    (
        "products",
        "SELECT to_jsonb(r) - 'updated_at' FROM commerce.products AS r ORDER BY sku",
    ),
    (
        "commerce's shipments",
        "SELECT to_jsonb(r) - '{updated_at,last_event_id,last_event_at}'::text[] FROM commerce.shipments AS r ORDER BY id",
    ),
    (
        "timeline",
        "SELECT to_jsonb(r) - '{id,event_id,happened_at}'::text[] FROM commerce.order_timeline AS r
          ORDER BY order_id, shipment_id, id",
    ),
    (
        "inbox",
        "SELECT jsonb_build_array(aggregate_type, aggregate_id, sequence) FROM commerce.inbox
          ORDER BY aggregate_type, aggregate_id, sequence",
    ),
    (
        "dead letters",
        "SELECT jsonb_build_array(aggregate_id, sequence, event_type, error_type, state) FROM commerce.dead_letters
          ORDER BY aggregate_id, sequence",
    ),
    (
        "logistics' shipments",
        "SELECT to_jsonb(r) - '{created_at,updated_at,completed_at}'::text[] FROM logistics.shipments AS r ORDER BY id",
    ),
];

/// One recorded scenario by both paths, from the same start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_paths_leave_the_same_rows() -> anyhow::Result<()> {
    let mut left = Vec::new();
    for mode in ["outbox", "legacy"] {
        left.push(scenario(mode).await?);
    }
    let [by_outbox, synchronously] = left.as_slice() else {
        anyhow::bail!("two paths");
    };
    for ((what, _), (by_outbox, synchronously)) in ROWS.iter().zip(by_outbox.iter().zip(synchronously)) {
        assert!(!by_outbox.is_empty(), "{what}: nothing is compared");
        println!("{what}: {} rows", by_outbox.len());
        assert_eq!(by_outbox, synchronously, "{what}");
    }
    Ok(())
}

/// The sample, then lives of every kind: held and released, cancelled, returned, in part and whole, and what commerce refuses.
async fn scenario(mode: &str) -> anyhow::Result<Vec<Vec<String>>> {
    let place = Place::shared().await?;
    let owner = place.owner_pool()?;
    workload::prepare_orders(&owner, 30).await?;
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../samples/northwind");
    crate::northwind::import(&place, &dir).await?;
    let api = Running::start(&place, Role::ApiAndRelay, &[ADMIN]).await?;
    let consumer = Running::start(&place, Role::Consumer(0), &[]).await?;
    let flag = Flag::new(&api.url(""))?;
    let client = Client::new(&api.url(""), PATIENCE)?;
    flag.set(&json!({"mode": mode, "reason": "parity"})).await?;

    crate::northwind::ship(&client, &dir).await?;
    // One client, so that both paths see the same requests in the same order.
    workload::run(&client, 30, 1, Arc::default()).await?;
    // Nobody ordered it; more than was ordered; and behind that one, a change of the same shipment.
    for (order, quantity) in [("none", 1), ("10248", 100_000)] {
        let body = json!({"order_id": order, "warehouse": "main", "carrier": "Speedy",
                          "lines": [{"sku": "11", "quantity": quantity}]});
        let created = client.post("/v1/shipments", &body).await?;
        let path = format!("/v1/shipments/{}/complete", created["id"]);
        client.post(&path, &json!({})).await?;
    }
    let settled = "SELECT count(*) FROM logistics.outbox AS o
                    WHERE NOT EXISTS (SELECT FROM commerce.inbox AS i WHERE i.event_id = o.id)
                      AND NOT EXISTS (SELECT FROM commerce.dead_letters AS d WHERE d.id = o.id)
                      AND NOT EXISTS (SELECT FROM commerce.parked_events AS p WHERE p.event_id = o.id)";
    wait_for("every event to be settled", QUIET, async || {
        Ok(count(&owner, settled).await? == 0)
    })
    .await?;
    let synchronous = count(
        &owner,
        "SELECT count(*) FROM commerce.inbox WHERE topic = 'synchronous'",
    )
    .await?;
    let applied = count(&owner, "SELECT count(*) FROM commerce.inbox").await?;
    println!("{mode}: {applied} events took effect, {synchronous} of them synchronously");
    assert_eq!(synchronous, if mode == "legacy" { applied } else { 0 });
    let mut left = Vec::new();
    for (_, query) in ROWS {
        let rows: Vec<String> = sqlx::query_scalar(AssertSqlSafe(format!("SELECT r::text FROM ({query}) AS rows(r)")))
            .fetch_all(&owner)
            .await?;
        left.push(rows);
    }
    api.stop().await?;
    consumer.stop().await?;
    Ok(left)
}
