use axum::{Json, extract::State};
use serde::Serialize;
use service_runtime::problem::Problem;
use shared_events::envelope::rfc3339_micros;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{
    Api,
    error::{Id, SHIPMENT_NOT_FOUND, database},
    problems::ShipmentProblems,
};
use crate::tables::shipments::{self, ShipmentRow};

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ShipmentView {
    id: String,
    order_id: String,
    /// `open`, `on_hold`, `completed`, `cancelled` or `returned` (all of it).
    status: String,
    warehouse: String,
    carrier: String,
    tracking_number: Option<String>,
    /// Of the hold in force, of the cancellation, or of the latest return.
    reason: Option<String>,
    /// Pieces in the parcel.
    units: i64,
    /// Of them, came back.
    returned_units: i64,
    last_event: LastEvent,
    #[serde(with = "rfc3339_micros")]
    #[schema(value_type = String, format = DateTime)]
    updated_at: OffsetDateTime,
}

/// The event through which commerce knows all this, and how it came.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct LastEvent {
    id: Uuid,
    #[serde(rename = "type")]
    event_type: String,
    sequence: i64,
    /// When the warehouse decided it.
    #[serde(with = "rfc3339_micros")]
    #[schema(value_type = String, format = DateTime)]
    happened_at: OffsetDateTime,
    /// The Kafka record; absent when its inbox row has expired.
    #[serde(skip_serializing_if = "Option::is_none")]
    record: Option<Record>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Record {
    /// The main topic, or a retry topic.
    topic: String,
    partition: i32,
    offset: i64,
    #[serde(with = "rfc3339_micros")]
    #[schema(value_type = String, format = DateTime)]
    applied_at: OffsetDateTime,
}

/// Read what commerce knows of a shipment, and through which event.
#[utoipa::path(get, path = "/v1/shipments/{id}", operation_id = "readShipment", tag = "shipments",
    params(("id" = String, Path, example = "1")),
    responses((status = 200, body = ShipmentView), ShipmentProblems))]
pub(super) async fn read(State(api): State<Api>, id: Id) -> Result<Json<ShipmentView>, Problem> {
    if !id.is_possible() {
        return Err(id.not_found(&SHIPMENT_NOT_FOUND));
    }
    let row = shipments::find(&api.pool, &id.0, &api.group).await.map_err(database)?;
    row.map(|row| Json(row.into()))
        .ok_or_else(|| id.not_found(&SHIPMENT_NOT_FOUND))
}

impl From<ShipmentRow> for ShipmentView {
    fn from(row: ShipmentRow) -> Self {
        let record = match (row.topic, row.partition, row.record_offset, row.applied_at) {
            (Some(topic), Some(partition), Some(offset), Some(applied_at)) => Some(Record {
                topic,
                partition,
                offset,
                applied_at,
            }),
            _ => None,
        };
        Self {
            id: row.id,
            order_id: row.order_id,
            status: row.status,
            warehouse: row.warehouse,
            carrier: row.carrier,
            tracking_number: row.tracking_number,
            reason: row.reason,
            units: row.units,
            returned_units: row.returned_units,
            last_event: LastEvent {
                id: row.last_event_id,
                event_type: row.last_event_type,
                sequence: row.sequence,
                happened_at: row.last_event_at,
                record,
            },
            updated_at: row.updated_at,
        }
    }
}
