use std::collections::BTreeMap;

use axum::{Json, extract::State};
use serde::Serialize;
use service_runtime::problem::Problem;
use utoipa::ToSchema;

use super::{Api, error::database, problems::SummaryProblems};
use crate::{
    order::OrderStatus,
    tables::{order_lines, orders, shipments},
};

#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"orders": {"paid": 21, "partially_shipped": 0, "shipped": 809, "cancelled": 0, "returned": 0},
                          "units_shipped": 50119, "units_returned": 0, "events_applied": 1639}))]
pub(super) struct Summary {
    /// How many orders stand where.
    orders: BTreeMap<String, i64>,
    /// Pieces shipped over all orders, those that came back included.
    units_shipped: i64,
    units_returned: i64,
    /// Shipment events that have taken effect.
    events_applied: i64,
}

/// Read how many orders stand where. It counts, so its cost grows with the tables.
#[utoipa::path(get, path = "/v1/summary", operation_id = "readSummary", tag = "summary",
    responses((status = 200, body = Summary), SummaryProblems))]
pub(super) async fn read(State(api): State<Api>) -> Result<Json<Summary>, Problem> {
    summarize(&api).await.map(Json).map_err(database)
}

/// One snapshot: the numbers belong together.
async fn summarize(api: &Api) -> Result<Summary, sqlx::Error> {
    let mut transaction = api
        .pool
        .begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        .await?;
    let mut by_status: BTreeMap<String, i64> = OrderStatus::ALL
        .iter()
        .map(|status| (status.as_str().to_owned(), 0))
        .collect();
    by_status.extend(orders::count_by_status(&mut *transaction).await?);
    let (units_shipped, units_returned) = order_lines::totals(&mut *transaction).await?;
    let events_applied = shipments::events_applied(&mut *transaction).await?;
    transaction.commit().await?;
    Ok(Summary {
        orders: by_status,
        units_shipped,
        units_returned,
        events_applied,
    })
}
