//! `logistics.shipments` and `logistics.shipment_lines`. Every statement takes any number of shipments: one is a batch of one.

use std::collections::HashMap;

use sqlx::{FromRow, PgExecutor, PgTransaction};
use time::OffsetDateTime;

use crate::shipment::{Shipment, ShipmentLine, Status};

#[derive(Debug, FromRow)]
struct ShipmentRow {
    id: i64,
    order_id: String,
    warehouse: String,
    carrier: String,
    tracking_number: Option<String>,
    status: String,
    sequence: i64,
    reason: Option<String>,
    created_at: OffsetDateTime,
    updated_at: OffsetDateTime,
    completed_at: Option<OffsetDateTime>,
}

/// The lines of one shipment, in the order of their skus.
#[derive(Debug, FromRow)]
struct LinesRow {
    skus: Vec<String>,
    quantities: Vec<i32>,
    returned_quantities: Vec<i32>,
}

#[derive(Debug, FromRow)]
struct LockedLinesRow {
    shipment_id: i64,
    #[sqlx(flatten)]
    lines: LinesRow,
}

/// What the list may be narrowed to.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    pub status: Option<Status>,
    pub order_id: Option<String>,
}

/// Numbers for shipments about to be inserted, rising; as many as asked for.
pub async fn next_ids(tx: &mut PgTransaction<'_>, count: usize) -> Result<Vec<i64>, sqlx::Error> {
    if count == 0 {
        return Ok(Vec::new());
    }
    let ids = sqlx::query_scalar("SELECT nextval('logistics.shipments_id_seq') FROM generate_series(1, $1)")
        .bind(i64::try_from(count).unwrap_or(i64::MAX))
        .fetch_all(&mut **tx)
        .await?;
    if ids.len() < count {
        return Err(sqlx::Error::Protocol(format!(
            "{} numbers for {count} shipments",
            ids.len()
        )));
    }
    Ok(ids)
}

pub async fn insert(tx: &mut PgTransaction<'_>, shipments: &[Shipment]) -> Result<(), sqlx::Error> {
    if shipments.is_empty() {
        return Ok(());
    }
    let ids: Vec<i64> = shipments.iter().map(|shipment| shipment.id).collect();
    let column = |field: fn(&Shipment) -> &str| shipments.iter().map(field).collect::<Vec<&str>>();
    sqlx::query(
        "INSERT INTO logistics.shipments (id, order_id, warehouse, carrier, status, sequence, created_at, updated_at)
         SELECT id, order_id, warehouse, carrier, status, sequence, created_at, created_at
           FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[], $7::timestamptz[])
             AS new(id, order_id, warehouse, carrier, status, sequence, created_at)",
    )
    .bind(&ids)
    .bind(column(|shipment| &shipment.order_id))
    .bind(column(|shipment| &shipment.warehouse))
    .bind(column(|shipment| &shipment.carrier))
    .bind(column(|shipment| shipment.status.as_str()))
    .bind(shipments.iter().map(|shipment| shipment.sequence).collect::<Vec<_>>())
    .bind(shipments.iter().map(|shipment| shipment.created_at).collect::<Vec<_>>())
    .execute(&mut **tx)
    .await?;

    let lines = LineColumns::of(shipments);
    sqlx::query(
        "INSERT INTO logistics.shipment_lines (shipment_id, sku, quantity)
         SELECT shipment_id, sku, quantity
           FROM unnest($1::bigint[], $2::text[], $3::int[]) AS new(shipment_id, sku, quantity)",
    )
    .bind(lines.shipment_ids)
    .bind(lines.skus)
    .bind(lines.quantities)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// What [`lock`] does about a shipment that another transaction has locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Locked {
    WaitFor,
    LeaveOut,
}

/// Locks the shipments against other changes and reads them. Locks are taken in the order of the ids, whatever order the
/// caller has, so that two overlapping calls cannot deadlock (HAZARDS H65). Unknown ids are left out.
pub async fn lock(
    tx: &mut PgTransaction<'_>,
    ids: &[i64],
    locked: Locked,
) -> Result<HashMap<i64, Shipment>, sqlx::Error> {
    if ids.is_empty() {
        return Ok(HashMap::new());
    }
    let select = match locked {
        Locked::WaitFor => {
            "SELECT id, order_id, warehouse, carrier, tracking_number, status, sequence, reason,
                    created_at, updated_at, completed_at
               FROM logistics.shipments WHERE id = ANY($1)
              ORDER BY id FOR NO KEY UPDATE"
        }
        Locked::LeaveOut => {
            "SELECT id, order_id, warehouse, carrier, tracking_number, status, sequence, reason,
                    created_at, updated_at, completed_at
               FROM logistics.shipments WHERE id = ANY($1)
              ORDER BY id FOR NO KEY UPDATE SKIP LOCKED"
        }
    };
    let rows: Vec<ShipmentRow> = sqlx::query_as(select).bind(ids).fetch_all(&mut **tx).await?;
    // A statement of its own: its snapshot is younger than the locks, so it sees the returns that the locks waited for.
    let lines: Vec<LockedLinesRow> = sqlx::query_as(
        "SELECT shipment_id, array_agg(sku ORDER BY sku) AS skus, array_agg(quantity ORDER BY sku) AS quantities,
                array_agg(returned_quantity ORDER BY sku) AS returned_quantities
           FROM logistics.shipment_lines WHERE shipment_id = ANY($1)
          GROUP BY shipment_id",
    )
    .bind(ids)
    .fetch_all(&mut **tx)
    .await?;
    let mut lines: HashMap<i64, LinesRow> = lines.into_iter().map(|row| (row.shipment_id, row.lines)).collect();
    rows.into_iter()
        .map(|row| {
            let lines = lines
                .remove(&row.id)
                .ok_or_else(|| sqlx::Error::Decode(format!("shipment {} has no lines", row.id).into()))?;
            Ok((row.id, row.into_shipment(lines)?))
        })
        .collect()
}

/// How many lines these shipments have together; what [`lock`] would load.
pub async fn count_lines(tx: &mut PgTransaction<'_>, ids: &[i64]) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT count(*) FROM logistics.shipment_lines WHERE shipment_id = ANY($1)")
        .bind(ids)
        .fetch_one(&mut **tx)
        .await
}

/// Writes the new state of shipments that [`lock`] has locked.
///
/// # Errors
/// `Decode` if a sequence would not move forward: somebody has written past the lock.
pub async fn update(tx: &mut PgTransaction<'_>, shipments: &[&Shipment]) -> Result<(), sqlx::Error> {
    if shipments.is_empty() {
        return Ok(());
    }
    let updated = sqlx::query(
        "UPDATE logistics.shipments AS shipment
            SET status = new.status, sequence = new.sequence, tracking_number = new.tracking_number,
                reason = new.reason, updated_at = new.updated_at, completed_at = new.completed_at
           FROM unnest($1::bigint[], $2::text[], $3::bigint[], $4::text[], $5::text[], $6::timestamptz[],
                       $7::timestamptz[])
             AS new(id, status, sequence, tracking_number, reason, updated_at, completed_at)
          WHERE shipment.id = new.id AND shipment.sequence < new.sequence",
    )
    .bind(shipments.iter().map(|shipment| shipment.id).collect::<Vec<_>>())
    .bind(
        shipments
            .iter()
            .map(|shipment| shipment.status.as_str())
            .collect::<Vec<_>>(),
    )
    .bind(shipments.iter().map(|shipment| shipment.sequence).collect::<Vec<_>>())
    .bind(
        shipments
            .iter()
            .map(|shipment| shipment.tracking_number.as_deref())
            .collect::<Vec<_>>(),
    )
    .bind(
        shipments
            .iter()
            .map(|shipment| shipment.reason.as_deref())
            .collect::<Vec<_>>(),
    )
    .bind(shipments.iter().map(|shipment| shipment.updated_at).collect::<Vec<_>>())
    .bind(
        shipments
            .iter()
            .map(|shipment| shipment.completed_at)
            .collect::<Vec<_>>(),
    )
    .execute(&mut **tx)
    .await?;
    if usize::try_from(updated.rows_affected()).ok() != Some(shipments.len()) {
        let message = format!(
            "{updated:?} for {} shipments: one was changed past its lock",
            shipments.len()
        );
        return Err(sqlx::Error::Decode(message.into()));
    }
    Ok(())
}

/// Writes the returned quantities of shipments that [`lock`] has locked.
pub async fn update_returned(tx: &mut PgTransaction<'_>, shipments: &[&Shipment]) -> Result<(), sqlx::Error> {
    if shipments.is_empty() {
        return Ok(());
    }
    let lines = LineColumns::of(shipments.iter().copied());
    sqlx::query(
        "UPDATE logistics.shipment_lines AS line
            SET returned_quantity = new.returned_quantity
           FROM unnest($1::bigint[], $2::text[], $3::int[]) AS new(shipment_id, sku, returned_quantity)
          WHERE line.shipment_id = new.shipment_id AND line.sku = new.sku
            AND line.returned_quantity < new.returned_quantity",
    )
    .bind(lines.shipment_ids)
    .bind(lines.skus)
    .bind(lines.returned_quantities)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// One shipment as of now; one statement, so that state and lines belong together.
pub async fn find(executor: impl PgExecutor<'_>, id: i64) -> Result<Option<Shipment>, sqlx::Error> {
    let row: Option<WholeRow> = sqlx::query_as(
        "SELECT shipment.*, lines.*
           FROM logistics.shipments AS shipment
          CROSS JOIN LATERAL (
                SELECT array_agg(sku ORDER BY sku) AS skus, array_agg(quantity ORDER BY sku) AS quantities,
                       array_agg(returned_quantity ORDER BY sku) AS returned_quantities
                  FROM logistics.shipment_lines WHERE shipment_id = shipment.id) AS lines
          WHERE shipment.id = $1",
    )
    .bind(id)
    .fetch_optional(executor)
    .await?;
    row.map(WholeRow::into_shipment).transpose()
}

/// At most `limit` shipments with ids below `before`, the newest id first.
pub async fn list(
    executor: impl PgExecutor<'_>,
    filter: &Filter,
    before: Option<i64>,
    limit: i64,
) -> Result<Vec<Shipment>, sqlx::Error> {
    let rows: Vec<WholeRow> = sqlx::query_as(
        "SELECT shipment.*, lines.*
           FROM (SELECT * FROM logistics.shipments
                  WHERE ($1::text IS NULL OR status = $1) AND ($2::text IS NULL OR order_id = $2)
                    AND ($3::bigint IS NULL OR id < $3)
                  ORDER BY id DESC LIMIT $4) AS shipment
          CROSS JOIN LATERAL (
                SELECT array_agg(sku ORDER BY sku) AS skus, array_agg(quantity ORDER BY sku) AS quantities,
                       array_agg(returned_quantity ORDER BY sku) AS returned_quantities
                  FROM logistics.shipment_lines WHERE shipment_id = shipment.id) AS lines
          ORDER BY shipment.id DESC",
    )
    // Planned for the filters that are given: a plan kept for all of them would read the table from its end.
    .persistent(false)
    .bind(filter.status.map(Status::as_str))
    .bind(filter.order_id.as_deref())
    .bind(before)
    .bind(limit)
    .fetch_all(executor)
    .await?;
    rows.into_iter().map(WholeRow::into_shipment).collect()
}

#[derive(Debug, FromRow)]
struct WholeRow {
    #[sqlx(flatten)]
    shipment: ShipmentRow,
    #[sqlx(flatten)]
    lines: LinesRow,
}

impl WholeRow {
    fn into_shipment(self) -> Result<Shipment, sqlx::Error> {
        self.shipment.into_shipment(self.lines)
    }
}

impl ShipmentRow {
    fn into_shipment(self, lines: LinesRow) -> Result<Shipment, sqlx::Error> {
        let status = Status::from_name(&self.status).ok_or_else(|| sqlx::Error::ColumnDecode {
            index: "status".to_owned(),
            source: format!("unknown status {:?} of shipment {}", self.status, self.id).into(),
        })?;
        Ok(Shipment {
            id: self.id,
            order_id: self.order_id,
            warehouse: self.warehouse,
            carrier: self.carrier,
            tracking_number: self.tracking_number,
            status,
            sequence: self.sequence,
            reason: self.reason,
            lines: lines.into_lines(),
            created_at: self.created_at,
            updated_at: self.updated_at,
            completed_at: self.completed_at,
        })
    }
}

impl LinesRow {
    fn into_lines(self) -> Vec<ShipmentLine> {
        let quantities = self.quantities.into_iter().zip(self.returned_quantities);
        self.skus
            .into_iter()
            .zip(quantities)
            .map(|(sku, (quantity, returned_quantity))| ShipmentLine {
                sku,
                quantity,
                returned_quantity,
            })
            .collect()
    }
}

/// The lines of several shipments, ready for one `unnest`.
#[derive(Default)]
struct LineColumns<'a> {
    shipment_ids: Vec<i64>,
    skus: Vec<&'a str>,
    quantities: Vec<i32>,
    returned_quantities: Vec<i32>,
}

impl<'a> LineColumns<'a> {
    fn of(shipments: impl IntoIterator<Item = &'a Shipment>) -> Self {
        let mut columns = Self::default();
        for shipment in shipments {
            for line in &shipment.lines {
                columns.shipment_ids.push(shipment.id);
                columns.skus.push(&line.sku);
                columns.quantities.push(line.quantity);
                columns.returned_quantities.push(line.returned_quantity);
            }
        }
        columns
    }
}

/// The orders that these shipments belong to; of those that exist.
///
/// # Errors
/// Any database error.
pub async fn order_ids(executor: impl sqlx::PgExecutor<'_>, ids: &[i64]) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar("SELECT DISTINCT order_id FROM logistics.shipments WHERE id = ANY($1)")
        .bind(ids)
        .fetch_all(executor)
        .await
}
