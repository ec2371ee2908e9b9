use axum::{Json, extract::State};
use serde::Serialize;
use service_runtime::problem::Problem;
use shared_events::envelope::rfc3339_micros;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{
    Api,
    error::{Id, ORDER_NOT_FOUND, database},
    problems::OrderProblems,
};
use crate::tables::{order_lines, order_timeline, orders, shipments};

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct OrderView {
    id: String,
    customer_id: String,
    /// `2012-07-04`.
    ordered_on: String,
    required_on: Option<String>,
    carrier: String,
    ship_name: String,
    ship_city: String,
    ship_country: String,
    /// `paid`, `partially_shipped`, `shipped`, `cancelled` or `returned`: it follows from the lines.
    status: String,
    lines: Vec<LineView>,
    /// Ids of the shipments that commerce knows of.
    shipment_ids: Vec<String>,
    timeline: Vec<EntryView>,
    #[serde(with = "rfc3339_micros")]
    #[schema(value_type = String, format = DateTime)]
    updated_at: OffsetDateTime,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct LineView {
    sku: String,
    product_name: String,
    /// Decimal text.
    unit_price: String,
    /// Pieces ordered.
    quantity: i32,
    shipped_quantity: i32,
    /// Of those shipped, came back.
    returned_quantity: i32,
    cancelled_quantity: i32,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct EntryView {
    /// `shipped`, `delayed`, `resumed`, `cancelled` or `returned`.
    kind: String,
    /// When the warehouse decided it.
    #[serde(with = "rfc3339_micros")]
    #[schema(value_type = String, format = DateTime)]
    happened_at: OffsetDateTime,
    shipment_id: String,
    event_id: Uuid,
    /// Pieces.
    units: i64,
    carrier: String,
    tracking_number: Option<String>,
    reason: Option<String>,
}

/// Read an order with its lines and the customer's timeline.
#[utoipa::path(get, path = "/v1/orders/{id}", operation_id = "readOrder", tag = "orders",
    params(("id" = String, Path, example = "10248")),
    responses((status = 200, body = OrderView), OrderProblems))]
pub(super) async fn read(State(api): State<Api>, id: Id) -> Result<Json<OrderView>, Problem> {
    if !id.is_possible() {
        return Err(id.not_found(&ORDER_NOT_FOUND));
    }
    find(&api, &id.0)
        .await
        .map_err(database)?
        .map(Json)
        .ok_or_else(|| id.not_found(&ORDER_NOT_FOUND))
}

/// One snapshot: lines and timeline belong together.
async fn find(api: &Api, id: &str) -> Result<Option<OrderView>, sqlx::Error> {
    let mut transaction = api
        .pool
        .begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        .await?;
    let Some(order) = orders::find(&mut *transaction, id).await? else {
        return Ok(None);
    };
    let lines = order_lines::list(&mut *transaction, id).await?;
    let shipment_ids = shipments::ids_of_order(&mut *transaction, id).await?;
    let entries = order_timeline::list(&mut *transaction, id).await?;
    transaction.commit().await?;
    Ok(Some(OrderView {
        id: order.id,
        customer_id: order.customer_id,
        ordered_on: order.ordered_on.to_string(),
        required_on: order.required_on.map(|date| date.to_string()),
        carrier: order.carrier,
        ship_name: order.ship_name,
        ship_city: order.ship_city,
        ship_country: order.ship_country,
        status: order.status,
        lines: lines.into_iter().map(LineView::from).collect(),
        shipment_ids,
        timeline: entries.into_iter().map(EntryView::from).collect(),
        updated_at: order.updated_at,
    }))
}

impl From<order_lines::LineRow> for LineView {
    fn from(row: order_lines::LineRow) -> Self {
        Self {
            sku: row.sku,
            product_name: row.product_name,
            unit_price: row.unit_price,
            quantity: row.quantity,
            shipped_quantity: row.shipped_quantity,
            returned_quantity: row.returned_quantity,
            cancelled_quantity: row.cancelled_quantity,
        }
    }
}

impl From<order_timeline::EntryRow> for EntryView {
    fn from(row: order_timeline::EntryRow) -> Self {
        Self {
            kind: row.kind,
            happened_at: row.happened_at,
            shipment_id: row.shipment_id,
            event_id: row.event_id,
            units: row.units,
            carrier: row.carrier,
            tracking_number: row.tracking_number,
            reason: row.reason,
        }
    }
}
