//! The JSON of the interface. Its fields are a contract with clients: nothing here is the table's or the event's type.

use serde::{Deserialize, Serialize};
use shared_events::{envelope::rfc3339_micros, shipment::Line};
use time::OffsetDateTime;
use utoipa::ToSchema;

use super::error;
use crate::{
    change_shipments::Outcome,
    shipment::{NewShipment, Shipment},
};

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"order_id": "10248", "warehouse": "main", "carrier": "Federal Shipping",
                          "lines": [{"sku": "11", "quantity": 12}, {"sku": "42", "quantity": 10}]}))]
pub(super) struct CreateShipment {
    /// 1 to 64 bytes.
    order_id: String,
    /// 1 to 64 bytes.
    warehouse: String,
    /// 1 to 64 bytes.
    carrier: String,
    /// 1 to 500 lines, each sku once.
    lines: Vec<LineInput>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct LineInput {
    /// 1 to 64 bytes.
    sku: String,
    /// Pieces, 1 to 1,000,000.
    #[schema(minimum = 1, maximum = 1_000_000)]
    quantity: i32,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CreateShipments {
    /// 1 to 1,000 shipments.
    pub(super) shipments: Vec<CreateShipment>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"tracking_number": "1Z999AA10123456784"}))]
pub(super) struct CompleteShipment {
    /// The carrier's number, 1 to 64 bytes. Without one the warehouse's own label number is used.
    pub(super) tracking_number: Option<String>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"ids": [1, 2, 3]}))]
pub(super) struct CompleteShipments {
    /// 1 to 10,000 ids; one that occurs again is reported once.
    pub(super) ids: Vec<i64>,
}

/// A body without fields; it may be left out.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({}))]
pub(super) struct ReleaseShipment {}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"reason": "address to be checked"}))]
pub(super) struct Reason {
    /// 1 to 500 bytes.
    pub(super) reason: String,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"reason": "damaged", "lines": [{"sku": "11", "quantity": 2}]}))]
pub(super) struct ReturnShipment {
    /// 1 to 500 bytes.
    pub(super) reason: String,
    /// What came back. Left out: everything that has not come back yet.
    pub(super) lines: Option<Vec<LineInput>>,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Shipment, example = json!({
    "id": 1, "order_id": "10248", "warehouse": "main", "carrier": "Federal Shipping", "tracking_number": "LS-0000000001",
    "status": "completed", "sequence": 2, "reason": null,
    "lines": [{"sku": "11", "quantity": 12, "returned_quantity": 0}],
    "created_at": "2026-11-22T06:06:48.818181Z", "updated_at": "2026-11-22T06:06:48.900518Z",
    "completed_at": "2026-11-22T06:06:48.900518Z"}))]
pub(super) struct ShipmentView<'a> {
    id: i64,
    order_id: &'a str,
    warehouse: &'a str,
    carrier: &'a str,
    /// Known once completed.
    tracking_number: Option<&'a str>,
    /// `open`, `on_hold`, `completed`, `cancelled` or `returned`. Partly returned is still `completed`.
    #[schema(example = "completed")]
    status: &'static str,
    /// The number of the shipment's last event, from 1.
    sequence: i64,
    /// Of the hold in force, of the cancellation, or of the latest return.
    reason: Option<&'a str>,
    /// In the order of their skus.
    lines: Vec<LineView<'a>>,
    #[serde(with = "rfc3339_micros")]
    created_at: OffsetDateTime,
    /// The last event's time.
    #[serde(with = "rfc3339_micros")]
    updated_at: OffsetDateTime,
    #[serde(serialize_with = "optional_time")]
    completed_at: Option<OffsetDateTime>,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ShipmentLine)]
pub(super) struct LineView<'a> {
    sku: &'a str,
    quantity: i32,
    returned_quantity: i32,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Shipments)]
pub(super) struct ShipmentsView<'a> {
    pub(super) items: Vec<ShipmentView<'a>>,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ShipmentPage)]
pub(super) struct PageView<'a> {
    pub(super) items: Vec<ShipmentView<'a>>,
    /// To be given back as `cursor`; null on the last page.
    pub(super) next_cursor: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = CompletionResults)]
pub(super) struct CompletionResults<'a> {
    /// One per distinct id, in the order of the request.
    results: Vec<CompletionResult<'a>>,
    counts: CompletionCounts,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = CompletionResult)]
struct CompletionResult<'a> {
    id: i64,
    /// `completed`, `already_completed`, `refused` or `not_found`.
    #[schema(example = "completed")]
    outcome: &'static str,
    /// The number of the shipment's last event; absent if refused or not found.
    #[serde(skip_serializing_if = "Option::is_none")]
    sequence: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tracking_number: Option<&'a str>,
    /// Of a refusal: the code that the problem of a single call would have.
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'static str>,
    /// Of a refusal: why.
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
}

#[derive(Debug, Default, Serialize, ToSchema)]
struct CompletionCounts {
    completed: u32,
    already_completed: u32,
    refused: u32,
    not_found: u32,
}

impl From<CreateShipment> for NewShipment {
    fn from(input: CreateShipment) -> Self {
        Self {
            order_id: input.order_id,
            warehouse: input.warehouse,
            carrier: input.carrier,
            lines: lines(input.lines),
        }
    }
}

pub(super) fn lines(lines: Vec<LineInput>) -> Vec<Line> {
    let line = |line: LineInput| Line {
        sku: line.sku,
        quantity: line.quantity,
    };
    lines.into_iter().map(line).collect()
}

impl<'a> From<&'a Shipment> for ShipmentView<'a> {
    fn from(shipment: &'a Shipment) -> Self {
        let line = |line: &'a crate::shipment::ShipmentLine| LineView {
            sku: &line.sku,
            quantity: line.quantity,
            returned_quantity: line.returned_quantity,
        };
        Self {
            id: shipment.id,
            order_id: &shipment.order_id,
            warehouse: &shipment.warehouse,
            carrier: &shipment.carrier,
            tracking_number: shipment.tracking_number.as_deref(),
            status: shipment.status.as_str(),
            sequence: shipment.sequence,
            reason: shipment.reason.as_deref(),
            lines: shipment.lines.iter().map(line).collect(),
            created_at: shipment.created_at,
            updated_at: shipment.updated_at,
            completed_at: shipment.completed_at,
        }
    }
}

impl<'a> CompletionResults<'a> {
    pub(super) fn new(outcomes: &'a [Outcome]) -> Self {
        let mut counts = CompletionCounts::default();
        let results = outcomes.iter().map(|outcome| counts.add(outcome)).collect();
        Self { results, counts }
    }
}

impl CompletionCounts {
    fn add<'a>(&mut self, outcome: &'a Outcome) -> CompletionResult<'a> {
        let done = |name: &'static str, shipment: &'a Shipment| CompletionResult {
            id: shipment.id,
            outcome: name,
            sequence: Some(shipment.sequence),
            tracking_number: shipment.tracking_number.as_deref(),
            code: None,
            detail: None,
        };
        let not_done = |name: &'static str, id: i64| CompletionResult {
            id,
            outcome: name,
            sequence: None,
            tracking_number: None,
            code: None,
            detail: None,
        };
        match outcome {
            Outcome::Changed(shipment) => {
                self.completed += 1;
                done("completed", shipment)
            }
            Outcome::AlreadyCompleted(shipment) => {
                self.already_completed += 1;
                done("already_completed", shipment)
            }
            Outcome::Refused { id, refusal } => {
                self.refused += 1;
                CompletionResult {
                    code: Some(error::refusal_code(refusal)),
                    detail: Some(refusal.to_string()),
                    ..not_done("refused", *id)
                }
            }
            Outcome::NotFound { id } => {
                self.not_found += 1;
                not_done("not_found", *id)
            }
        }
    }
}

fn optional_time<S: serde::Serializer>(time: &Option<OffsetDateTime>, serializer: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => rfc3339_micros::serialize(time, serializer),
        None => serializer.serialize_none(),
    }
}
