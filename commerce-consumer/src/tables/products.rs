use std::collections::BTreeMap;

use samples::northwind::Product;
use sqlx::PgTransaction;
use time::OffsetDateTime;

use crate::shipment::StockChange;

/// What several events add to a product's pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StockChanges {
    pub sellable: i64,
    pub committed: i64,
    pub events: i64,
}

impl StockChanges {
    pub fn add(&mut self, change: StockChange) {
        self.sellable += change.sellable;
        self.committed += change.committed;
        self.events += 1;
    }
}

/// Adds to the stock of these products. The last statements before the commit: every batch wants these rows.
///
/// The locks are a statement of their own, in the order of the skus whatever plan is chosen. In one statement with the
/// update, a row that another transaction changed meanwhile is found again by a recheck, and plans that read the table by
/// the locked row lost the update then (seen on PostgreSQL 18.1: nested loop over the locked rows, once bloat made the
/// index cheaper than the table). The second statement's snapshot is younger than the locks and needs no recheck.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn add(
    transaction: &mut PgTransaction<'_>,
    changes: &BTreeMap<String, StockChanges>,
) -> Result<(), sqlx::Error> {
    let skus: Vec<&str> = changes.keys().map(String::as_str).collect();
    sqlx::query("SELECT FROM commerce.products WHERE sku = ANY($1) ORDER BY sku FOR NO KEY UPDATE")
        .bind(&skus)
        .execute(&mut **transaction)
        .await?;
    sqlx::query(include_str!("add_to_products.sql"))
        .bind(&skus)
        .bind(changes.values().map(|change| change.sellable).collect::<Vec<i64>>())
        .bind(changes.values().map(|change| change.committed).collect::<Vec<i64>>())
        .bind(changes.values().map(|change| change.events).collect::<Vec<i64>>())
        .execute(&mut **transaction)
        .await?;
    Ok(())
}

/// A product as the REST interface shows it.
#[derive(Debug, sqlx::FromRow)]
pub struct ProductRow {
    pub sku: String,
    pub name: String,
    pub unit_price: String,
    pub sellable: i64,
    pub committed: i64,
    pub updated_at: OffsetDateTime,
}

/// # Errors
/// Any database error.
pub async fn find(executor: impl sqlx::PgExecutor<'_>, sku: &str) -> Result<Option<ProductRow>, sqlx::Error> {
    sqlx::query_as(
        "SELECT sku, name, trim_scale(unit_price)::text AS unit_price, sellable, committed, updated_at
         FROM commerce.products WHERE sku = $1",
    )
    .bind(sku)
    .fetch_optional(executor)
    .await
}

/// Inserts products that are not there yet, all of their stock sellable, and returns how many.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn insert_new(transaction: &mut PgTransaction<'_>, products: &[Product]) -> Result<u64, sqlx::Error> {
    let result = sqlx::query(
        "INSERT INTO commerce.products (sku, name, unit_price, sellable, committed)
         SELECT new.sku, new.name, new.unit_price, new.sellable, 0
         FROM unnest($1::text[], $2::text[], $3::text[]::numeric[], $4::bigint[])
             AS new (sku, name, unit_price, sellable)
         ON CONFLICT (sku) DO NOTHING",
    )
    .bind(
        products
            .iter()
            .map(|product| product.id.to_string())
            .collect::<Vec<String>>(),
    )
    .bind(
        products
            .iter()
            .map(|product| product.name.as_str())
            .collect::<Vec<&str>>(),
    )
    .bind(
        products
            .iter()
            .map(|product| product.unit_price.as_str())
            .collect::<Vec<&str>>(),
    )
    .bind(
        products
            .iter()
            .map(|product| i64::from(product.units_in_stock))
            .collect::<Vec<i64>>(),
    )
    .execute(&mut **transaction)
    .await?;
    Ok(result.rows_affected())
}

/// The rows of products, locked.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn rows(transaction: &mut PgTransaction<'_>, skus: &[&str]) -> Result<Vec<inbox::Row>, sqlx::Error> {
    let select =
        "SELECT to_jsonb(r)::text FROM commerce.products AS r WHERE sku = ANY($1) ORDER BY sku FOR NO KEY UPDATE";
    let found = sqlx::query_scalar(select)
        .bind(skus)
        .fetch_all(&mut **transaction)
        .await?;
    super::as_rows("products", &["sku"], found)
}
