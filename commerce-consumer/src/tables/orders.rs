use samples::northwind::Order;
use sqlx::PgTransaction;
use time::Date;

use crate::order::OrderStatus;

/// Locks the rows of these orders and returns the ids and statuses of those that exist.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn lock(transaction: &mut PgTransaction<'_>, ids: &[&str]) -> Result<Vec<(String, String)>, sqlx::Error> {
    sqlx::query_as("SELECT id, status FROM commerce.orders WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE")
        .bind(ids)
        .fetch_all(&mut **transaction)
        .await
}

/// Writes statuses that have changed; the caller holds the locks.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn save(transaction: &mut PgTransaction<'_>, statuses: &[(&str, OrderStatus)]) -> Result<(), sqlx::Error> {
    let (ids, names): (Vec<&str>, Vec<&str>) = statuses.iter().map(|(id, status)| (*id, status.as_str())).unzip();
    sqlx::query(
        "UPDATE commerce.orders AS o SET status = new.status, updated_at = now()
         FROM unnest($1::text[], $2::text[]) AS new (id, status)
         WHERE o.id = new.id",
    )
    .bind(ids)
    .bind(names)
    .execute(&mut **transaction)
    .await?;
    Ok(())
}

/// An order as the REST interface shows it.
#[derive(Debug, sqlx::FromRow)]
pub struct OrderRow {
    pub id: String,
    pub customer_id: String,
    pub ordered_on: Date,
    pub required_on: Option<Date>,
    pub carrier: String,
    pub ship_name: String,
    pub ship_city: String,
    pub ship_country: String,
    pub status: String,
    pub updated_at: time::OffsetDateTime,
}

/// # Errors
/// Any database error.
pub async fn find(executor: impl sqlx::PgExecutor<'_>, id: &str) -> Result<Option<OrderRow>, sqlx::Error> {
    sqlx::query_as(
        "SELECT id, customer_id, ordered_on, required_on, carrier, ship_name, ship_city, ship_country, status, updated_at
         FROM commerce.orders WHERE id = $1",
    )
    .bind(id)
    .fetch_optional(executor)
    .await
}

/// How many orders stand where.
///
/// # Errors
/// Any database error.
pub async fn count_by_status(executor: impl sqlx::PgExecutor<'_>) -> Result<Vec<(String, i64)>, sqlx::Error> {
    sqlx::query_as("SELECT status, count(*) FROM commerce.orders GROUP BY status")
        .fetch_all(executor)
        .await
}

/// Inserts orders that are not there yet, as paid, and returns their ids.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn insert_new(transaction: &mut PgTransaction<'_>, orders: &[Order]) -> Result<Vec<String>, sqlx::Error> {
    let column = |of: fn(&Order) -> &str| -> Vec<&str> { orders.iter().map(of).collect() };
    sqlx::query_scalar(include_str!("insert_orders.sql"))
        .bind(orders.iter().map(|order| order.id.to_string()).collect::<Vec<String>>())
        .bind(column(|order| &order.customer_id))
        .bind(orders.iter().map(|order| order.order_date).collect::<Vec<Date>>())
        .bind(orders.iter().map(|order| order.required_date).collect::<Vec<Date>>())
        .bind(column(|order| &order.carrier))
        .bind(column(|order| &order.ship_name))
        .bind(column(|order| &order.ship_city))
        .bind(column(|order| &order.ship_country))
        .bind(OrderStatus::Paid.as_str())
        .fetch_all(&mut **transaction)
        .await
}

/// An order's row, locked.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn rows(transaction: &mut PgTransaction<'_>, id: &str) -> Result<Vec<inbox::Row>, sqlx::Error> {
    let select = "SELECT to_jsonb(r)::text FROM commerce.orders AS r WHERE id = $1 FOR NO KEY UPDATE";
    let found = sqlx::query_scalar(select)
        .bind(id)
        .fetch_all(&mut **transaction)
        .await?;
    super::as_rows("orders", &["id"], found)
}
