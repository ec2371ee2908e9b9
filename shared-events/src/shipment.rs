use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::envelope::{Envelope, InvalidField, Payload, Rejection, rfc3339_micros};

/// The envelope's `aggregateType` of every event here.
pub const AGGREGATE_TYPE: &str = "shipment";

/// The most lines a shipment may have.
pub const MAX_LINES: usize = 500;
/// The largest quantity of one line, in pieces.
pub const MAX_QUANTITY: i32 = 1_000_000;
/// The longest name (order id, sku, warehouse, carrier, tracking number), in bytes.
pub const MAX_NAME_BYTES: usize = 64;
/// The longest free text (a reason), in bytes.
pub const MAX_REASON_BYTES: usize = 500;

/// Pieces of one product.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Line {
    pub sku: String,
    /// Pieces, at least 1.
    pub quantity: i32,
}

/// The warehouse has taken on a shipment for an order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ShipmentCreated {
    pub order_id: String,
    pub warehouse: String,
    pub carrier: String,
    pub lines: Vec<Line>,
    #[serde(with = "rfc3339_micros")]
    #[schemars(with = "String", extend("format" = "date-time"))]
    pub created_at: OffsetDateTime,
}

/// The goods have left the warehouse; `lines` is what is in the parcel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ShipmentCompleted {
    pub order_id: String,
    pub warehouse: String,
    pub carrier: String,
    pub tracking_number: String,
    pub lines: Vec<Line>,
    #[serde(with = "rfc3339_micros")]
    #[schemars(with = "String", extend("format" = "date-time"))]
    pub completed_at: OffsetDateTime,
}

/// The shipment waits; nothing leaves until it is released.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ShipmentHeld {
    pub order_id: String,
    pub warehouse: String,
    pub carrier: String,
    pub reason: String,
    pub lines: Vec<Line>,
    #[serde(with = "rfc3339_micros")]
    #[schemars(with = "String", extend("format" = "date-time"))]
    pub held_at: OffsetDateTime,
}

/// The hold is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ShipmentReleased {
    pub order_id: String,
    pub warehouse: String,
    pub carrier: String,
    pub lines: Vec<Line>,
    #[serde(with = "rfc3339_micros")]
    #[schemars(with = "String", extend("format" = "date-time"))]
    pub released_at: OffsetDateTime,
}

/// These goods will not be sent; `lines` is what the customer will not get.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ShipmentCancelled {
    pub order_id: String,
    pub warehouse: String,
    pub carrier: String,
    pub reason: String,
    pub lines: Vec<Line>,
    #[serde(with = "rfc3339_micros")]
    #[schemars(with = "String", extend("format" = "date-time"))]
    pub cancelled_at: OffsetDateTime,
}

/// Goods have come back after completion; `lines` is what came back this time, which may be a part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ShipmentReturned {
    pub order_id: String,
    pub warehouse: String,
    pub carrier: String,
    pub tracking_number: String,
    pub reason: String,
    pub lines: Vec<Line>,
    #[serde(with = "rfc3339_micros")]
    #[schemars(with = "String", extend("format" = "date-time"))]
    pub returned_at: OffsetDateTime,
}

/// Any event of a shipment, decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ShipmentEvent {
    Created(ShipmentCreated),
    Completed(ShipmentCompleted),
    Held(ShipmentHeld),
    Released(ShipmentReleased),
    Cancelled(ShipmentCancelled),
    Returned(ShipmentReturned),
}

impl ShipmentEvent {
    /// Reads the envelope's payload by its type and version.
    pub fn from_envelope(envelope: &Envelope) -> Result<Self, Rejection> {
        let event_type = envelope.event_type.as_str();
        let known = match event_type {
            ShipmentCreated::TYPE => ShipmentCreated::VERSION,
            ShipmentCompleted::TYPE => ShipmentCompleted::VERSION,
            ShipmentHeld::TYPE => ShipmentHeld::VERSION,
            ShipmentReleased::TYPE => ShipmentReleased::VERSION,
            ShipmentCancelled::TYPE => ShipmentCancelled::VERSION,
            ShipmentReturned::TYPE => ShipmentReturned::VERSION,
            _ => return Err(Rejection::UnknownType(event_type.to_owned())),
        };
        if envelope.version != known {
            return Err(Rejection::UnknownVersion {
                event_type: event_type.to_owned(),
                version: envelope.version,
            });
        }
        Ok(match event_type {
            ShipmentCreated::TYPE => Self::Created(envelope.payload_as()?),
            ShipmentCompleted::TYPE => Self::Completed(envelope.payload_as()?),
            ShipmentHeld::TYPE => Self::Held(envelope.payload_as()?),
            ShipmentReleased::TYPE => Self::Released(envelope.payload_as()?),
            ShipmentCancelled::TYPE => Self::Cancelled(envelope.payload_as()?),
            _ => Self::Returned(envelope.payload_as()?),
        })
    }

    pub fn order_id(&self) -> &str {
        match self {
            Self::Created(event) => &event.order_id,
            Self::Completed(event) => &event.order_id,
            Self::Held(event) => &event.order_id,
            Self::Released(event) => &event.order_id,
            Self::Cancelled(event) => &event.order_id,
            Self::Returned(event) => &event.order_id,
        }
    }

    pub fn lines(&self) -> &[Line] {
        match self {
            Self::Created(event) => &event.lines,
            Self::Completed(event) => &event.lines,
            Self::Held(event) => &event.lines,
            Self::Released(event) => &event.lines,
            Self::Cancelled(event) => &event.lines,
            Self::Returned(event) => &event.lines,
        }
    }
}

impl Payload for ShipmentCreated {
    const TYPE: &'static str = "ShipmentCreated";
    const VERSION: i32 = 1;
    fn validate(&self) -> Result<(), InvalidField> {
        check_shipment(&self.order_id, &self.warehouse, &self.carrier, &self.lines)
    }
}

impl Payload for ShipmentCompleted {
    const TYPE: &'static str = "ShipmentCompleted";
    const VERSION: i32 = 1;
    fn validate(&self) -> Result<(), InvalidField> {
        check_shipment(&self.order_id, &self.warehouse, &self.carrier, &self.lines)?;
        check_name("trackingNumber", &self.tracking_number)
    }
}

impl Payload for ShipmentHeld {
    const TYPE: &'static str = "ShipmentHeld";
    const VERSION: i32 = 1;
    fn validate(&self) -> Result<(), InvalidField> {
        check_shipment(&self.order_id, &self.warehouse, &self.carrier, &self.lines)?;
        check_reason(&self.reason)
    }
}

impl Payload for ShipmentReleased {
    const TYPE: &'static str = "ShipmentReleased";
    const VERSION: i32 = 1;
    fn validate(&self) -> Result<(), InvalidField> {
        check_shipment(&self.order_id, &self.warehouse, &self.carrier, &self.lines)
    }
}

impl Payload for ShipmentCancelled {
    const TYPE: &'static str = "ShipmentCancelled";
    const VERSION: i32 = 1;
    fn validate(&self) -> Result<(), InvalidField> {
        check_shipment(&self.order_id, &self.warehouse, &self.carrier, &self.lines)?;
        check_reason(&self.reason)
    }
}

impl Payload for ShipmentReturned {
    const TYPE: &'static str = "ShipmentReturned";
    const VERSION: i32 = 1;
    fn validate(&self) -> Result<(), InvalidField> {
        check_shipment(&self.order_id, &self.warehouse, &self.carrier, &self.lines)?;
        check_name("trackingNumber", &self.tracking_number)?;
        check_reason(&self.reason)
    }
}

fn check_shipment(order_id: &str, warehouse: &str, carrier: &str, lines: &[Line]) -> Result<(), InvalidField> {
    check_name("orderId", order_id)?;
    check_name("warehouse", warehouse)?;
    check_name("carrier", carrier)?;
    check_lines(lines)
}

/// The rule for order ids, skus, warehouses, carriers and tracking numbers: 1 to 64 bytes, no control characters.
pub fn check_name(field: &str, value: &str) -> Result<(), InvalidField> {
    if value.trim().is_empty() {
        return Err(InvalidField::new(field, "is empty"));
    }
    if value.len() > MAX_NAME_BYTES {
        let reason = format!("has {} bytes, allowed are {MAX_NAME_BYTES}", value.len());
        return Err(InvalidField::new(field, reason));
    }
    if value.chars().any(char::is_control) {
        return Err(InvalidField::new(field, "contains a control character"));
    }
    Ok(())
}

/// The rule for free text: at most 500 bytes, no control characters; PostgreSQL cannot store NUL.
pub fn check_reason(value: &str) -> Result<(), InvalidField> {
    if value.len() > MAX_REASON_BYTES {
        let reason = format!("has {} bytes, allowed are {MAX_REASON_BYTES}", value.len());
        return Err(InvalidField::new("reason", reason));
    }
    if value.chars().any(char::is_control) {
        return Err(InvalidField::new("reason", "contains a control character"));
    }
    Ok(())
}

/// The rule for lines: 1 to 500 of them, each sku once, each quantity from 1 to 1,000,000.
pub fn check_lines(lines: &[Line]) -> Result<(), InvalidField> {
    if lines.is_empty() {
        return Err(InvalidField::new("lines", "is empty"));
    }
    if lines.len() > MAX_LINES {
        let reason = format!("has {} entries, allowed are {MAX_LINES}", lines.len());
        return Err(InvalidField::new("lines", reason));
    }
    let mut seen = std::collections::HashSet::with_capacity(lines.len());
    for (index, line) in lines.iter().enumerate() {
        check_name(&format!("lines[{index}].sku"), &line.sku)?;
        if !(1..=MAX_QUANTITY).contains(&line.quantity) {
            let reason = format!("{} is outside 1 to {MAX_QUANTITY}", line.quantity);
            return Err(InvalidField::new(format!("lines[{index}].quantity"), reason));
        }
        if !seen.insert(line.sku.as_str()) {
            let reason = format!("{:?} occurs twice", line.sku);
            return Err(InvalidField::new(format!("lines[{index}].sku"), reason));
        }
    }
    Ok(())
}
