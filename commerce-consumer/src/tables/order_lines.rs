use std::collections::HashMap;

use samples::northwind;
use sqlx::PgTransaction;

use crate::order::{Order, OrderLine};

/// The lines of orders whose rows the caller has locked. Read in a statement of its own: one that waits for the locks
/// would see the lines as they were before the wait.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn read(
    transaction: &mut PgTransaction<'_>,
    order_ids: &[&str],
) -> Result<HashMap<String, Order>, sqlx::Error> {
    let rows: Vec<(String, String, i32, i32, i32, i32)> = sqlx::query_as(
        "SELECT order_id, sku, quantity, shipped_quantity, returned_quantity, cancelled_quantity
         FROM commerce.order_lines WHERE order_id = ANY($1)",
    )
    .bind(order_ids)
    .fetch_all(&mut **transaction)
    .await?;
    let mut orders: HashMap<String, Order> = HashMap::new();
    for (order_id, sku, ordered, shipped, returned, cancelled) in rows {
        let line = OrderLine {
            ordered,
            shipped,
            returned,
            cancelled,
        };
        orders.entry(order_id).or_default().lines.insert(sku, line);
    }
    Ok(orders)
}

/// Writes lines that have changed; the caller holds their orders' locks.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn save(transaction: &mut PgTransaction<'_>, lines: &[(&str, &str, OrderLine)]) -> Result<(), sqlx::Error> {
    let pieces = |of: fn(&OrderLine) -> i32| -> Vec<i32> { lines.iter().map(|(_, _, line)| of(line)).collect() };
    sqlx::query(
        "UPDATE commerce.order_lines AS l
         SET shipped_quantity = new.shipped, returned_quantity = new.returned, cancelled_quantity = new.cancelled
         FROM unnest($1::text[], $2::text[], $3::integer[], $4::integer[], $5::integer[])
             AS new (order_id, sku, shipped, returned, cancelled)
         WHERE l.order_id = new.order_id AND l.sku = new.sku",
    )
    .bind(lines.iter().map(|(order_id, _, _)| *order_id).collect::<Vec<&str>>())
    .bind(lines.iter().map(|(_, sku, _)| *sku).collect::<Vec<&str>>())
    .bind(pieces(|line| line.shipped))
    .bind(pieces(|line| line.returned))
    .bind(pieces(|line| line.cancelled))
    .execute(&mut **transaction)
    .await?;
    Ok(())
}

/// A line as the REST interface shows it.
#[derive(Debug, sqlx::FromRow)]
pub struct LineRow {
    pub sku: String,
    pub product_name: String,
    pub unit_price: String,
    pub quantity: i32,
    pub shipped_quantity: i32,
    pub returned_quantity: i32,
    pub cancelled_quantity: i32,
}

/// # Errors
/// Any database error.
pub async fn list(executor: impl sqlx::PgExecutor<'_>, order_id: &str) -> Result<Vec<LineRow>, sqlx::Error> {
    sqlx::query_as(
        "SELECT l.sku, p.name AS product_name, trim_scale(l.unit_price)::text AS unit_price, l.quantity,
                l.shipped_quantity, l.returned_quantity, l.cancelled_quantity
         FROM commerce.order_lines l JOIN commerce.products p USING (sku)
         WHERE l.order_id = $1 ORDER BY l.sku",
    )
    .bind(order_id)
    .fetch_all(executor)
    .await
}

/// Pieces shipped and returned over all orders.
///
/// # Errors
/// Any database error.
pub async fn totals(executor: impl sqlx::PgExecutor<'_>) -> Result<(i64, i64), sqlx::Error> {
    sqlx::query_as(
        "SELECT coalesce(sum(shipped_quantity), 0)::bigint, coalesce(sum(returned_quantity), 0)::bigint
         FROM commerce.order_lines",
    )
    .fetch_one(executor)
    .await
}

/// Inserts lines, nothing of them shipped, and returns how many.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn insert(transaction: &mut PgTransaction<'_>, lines: &[&northwind::OrderLine]) -> Result<u64, sqlx::Error> {
    let result = sqlx::query(
        "INSERT INTO commerce.order_lines (order_id, sku, unit_price, quantity)
         SELECT * FROM unnest($1::text[], $2::text[], $3::text[]::numeric[], $4::integer[])",
    )
    .bind(
        lines
            .iter()
            .map(|line| line.order_id.to_string())
            .collect::<Vec<String>>(),
    )
    .bind(
        lines
            .iter()
            .map(|line| line.product_id.to_string())
            .collect::<Vec<String>>(),
    )
    .bind(lines.iter().map(|line| line.unit_price.as_str()).collect::<Vec<&str>>())
    .bind(lines.iter().map(|line| line.quantity).collect::<Vec<i32>>())
    .execute(&mut **transaction)
    .await?;
    Ok(result.rows_affected())
}

/// An order's rows; the caller holds its lock.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn rows(transaction: &mut PgTransaction<'_>, order_id: &str) -> Result<Vec<inbox::Row>, sqlx::Error> {
    let select = "SELECT to_jsonb(r)::text FROM commerce.order_lines AS r WHERE order_id = $1";
    let found = sqlx::query_scalar(select)
        .bind(order_id)
        .fetch_all(&mut **transaction)
        .await?;
    super::as_rows("order_lines", &["order_id", "sku"], found)
}
