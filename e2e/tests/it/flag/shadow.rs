use anyhow::Context;
use e2e::{
    client::Client,
    flag::{ADMIN, Flag},
    pair::{Role, Running},
    place::Place,
    wait_for, workload,
};
use serde_json::{Value, json};
use sqlx::AssertSqlSafe;
use tokio::time::Instant;

use super::{PATIENCE, complete_when_created, count};

/// Bugs of the consumer: each changes what it writes, and nothing of what the synchronous path does.
const BUGS: [(&str, &str, &str, &str); 3] = [
    // A wrong column.
    (
        "order_timeline",
        "BEFORE INSERT",
        "NEW.carrier := coalesce(NEW.tracking_number, NEW.carrier); RETURN NEW",
        "carrier",
    ),
    // A rounding.
    (
        "order_lines",
        "BEFORE UPDATE",
        "NEW.shipped_quantity := NEW.shipped_quantity / 4 * 4; RETURN NEW",
        "shipped_quantity",
    ),
    // A forgotten line.
    (
        "order_lines",
        "BEFORE UPDATE",
        "IF NEW.sku = (SELECT max(sku) FROM commerce.order_lines WHERE order_id = NEW.order_id) THEN RETURN OLD; END IF; RETURN NEW",
        "shipped_quantity",
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shadow_mode_names_the_row_and_the_column_that_the_consumer_writes_wrong() -> anyhow::Result<()> {
    let place = Place::shared().await?;
    let owner = place.owner_pool()?;
    workload::prepare_orders(&owner, 1_000).await?;
    let api = Running::start(&place, Role::Api, &[ADMIN]).await?;
    let relay = Running::start(&place, Role::Relay, &[]).await?;
    let consumer = Running::start(&place, Role::Consumer(0), &[]).await?;
    let flag = Flag::new(&api.url(""))?;
    let client = Client::new(&api.url(""), PATIENCE)?;
    flag.set(&json!({"mode": "shadow", "reason": "drill"})).await?;

    // Every kind of change, and nothing to find.
    for order in 1..=20 {
        complete_when_created(&client, &owner, order, 10).await?;
    }
    let shadow = async || flag.read("/admin/shadow").await;
    wait_for("all to be compared", PATIENCE, async || {
        let view = shadow().await?;
        Ok(view["compared"] == 40 && view["waiting"] == 0)
    })
    .await?;
    let view = shadow().await?;
    assert_eq!((&view["different"], &view["groups"]), (&json!(0), &json!([])), "{view}");
    println!(
        "40 events compared, {} of their rows overtaken by others",
        view["rows_overtaken"]
    );

    for (number, (table, when, body, column)) in BUGS.into_iter().enumerate() {
        // The consumer logs in as commerce; the synchronous path only acts as it.
        let bug = format!(
            "CREATE OR REPLACE FUNCTION commerce.bug() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN IF session_user <> 'commerce_svc' THEN RETURN NEW; END IF; {body}; END $$;
             CREATE TRIGGER bug {when} ON commerce.{table} FOR EACH ROW EXECUTE FUNCTION commerce.bug()"
        );
        sqlx::raw_sql(AssertSqlSafe(bug)).execute(&owner).await?;
        let order = 100 + number as i64;
        let quantity = 10 - i64::try_from(number)?;
        let shipment = complete_when_created(&client, &owner, order, quantity)
            .await?
            .to_string();
        let applied = async || {
            let shipped = "SELECT count(*) FROM commerce.shipments WHERE status = 'completed' AND order_id = ";
            Ok(count(&owner, &format!("{shipped}'{order}'")).await? == 1)
        };
        wait_for("the event to be applied", PATIENCE, applied).await?;
        let applied = Instant::now();
        let mut found = Value::Null;
        wait_for("the mismatch", PATIENCE, async || {
            let view = shadow().await?;
            let groups = view["groups"].as_array().context("no groups")?;
            let this = groups.iter().find(|group| {
                group["table"] == table
                    && group["column"] == column
                    && group["shipment_id"].as_str() == Some(shipment.as_str())
            });
            found = this.cloned().unwrap_or_default();
            Ok(this.is_some())
        })
        .await?;
        println!(
            "{table}.{column}: found {:.0?} after it was applied: row {}, expected {}, found {}",
            applied.elapsed(),
            found["row"],
            found["expected"],
            found["found"]
        );
        assert!(found["row"].as_str().is_some_and(|row| row.contains("id")), "{found}");
        assert_ne!(found["expected"], found["found"]);
        assert_eq!(found["order_id"], order.to_string());
        sqlx::raw_sql(AssertSqlSafe(format!("DROP TRIGGER bug ON commerce.{table}")))
            .execute(&owner)
            .await?;
    }
    api.stop().await?;
    relay.stop().await?;
    consumer.stop().await
}
