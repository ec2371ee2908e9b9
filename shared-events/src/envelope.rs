use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::value::RawValue;
use time::{OffsetDateTime, UtcOffset, format_description::BorrowedFormatItem, macros::format_description};
use uuid::Uuid;

/// The longest `aggregateId`, in bytes. It is the Kafka key and a database key, so it stays short.
pub const MAX_AGGREGATE_ID_BYTES: usize = 255;

/// A payload type of one event at one version.
pub trait Payload: Serialize + DeserializeOwned {
    /// The envelope's `type`, past tense, e.g. `ShipmentCompleted`.
    const TYPE: &'static str;
    /// The envelope's `version`. A change that is not a new optional field is a new version, published beside the old.
    const VERSION: i32;
    /// Refuses values that parse but cannot be meant; the error names the field.
    fn validate(&self) -> Result<(), InvalidField>;
}

/// A field whose value parses but cannot be meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct InvalidField {
    /// Path of the field inside the payload, e.g. `lines[2].quantity`.
    pub field: String,
    pub reason: String,
}

impl InvalidField {
    pub fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            reason: reason.into(),
        }
    }
}

/// An event as it stands in the outbox column `payload` and, byte for byte, as the Kafka value.
///
/// The field order is the order on the wire. Unknown fields are ignored when decoding, so that fields can be added.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Envelope {
    /// UUIDv7, the deduplication id: the same on every relay, retry and redrive.
    pub id: Uuid,
    #[serde(rename = "type")]
    pub event_type: String,
    pub version: i32,
    /// When the change was decided, RFC 3339 UTC with microseconds.
    #[serde(with = "rfc3339_micros")]
    #[schemars(with = "String", extend("format" = "date-time"))]
    pub timestamp: OffsetDateTime,
    pub aggregate_type: String,
    /// The Kafka key: events of one aggregate share a partition and keep their order.
    pub aggregate_id: String,
    /// 1, 2, 3… per aggregate, without gaps; taken under the aggregate's row lock.
    pub sequence: i64,
    /// Shared by all events that one business transaction appended.
    pub transaction_key: Uuid,
    #[schemars(with = "serde_json::Map<String, serde_json::Value>")]
    pub payload: Box<RawValue>,
}

/// Where and when an event happened, and to what: everything of the envelope but id, type and payload.
#[derive(Debug, Clone)]
pub struct Fact<'a> {
    pub aggregate_type: &'a str,
    pub aggregate_id: String,
    pub sequence: i64,
    pub transaction_key: Uuid,
    pub timestamp: OffsetDateTime,
}

/// Why bytes are not an event that this build understands. Each variant decides differently in the consumer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// Not UTF-8, not JSON, a field missing or of the wrong type.
    #[error("not an envelope: {0}")]
    Malformed(String),
    /// An envelope with a value that cannot be meant, e.g. `sequence` 0.
    #[error("invalid envelope: {0}")]
    InvalidEnvelope(InvalidField),
    /// It may be meant for others.
    #[error("unknown event type {0:?}")]
    UnknownType(String),
    #[error("unknown version {version} of {event_type}")]
    UnknownVersion { event_type: String, version: i32 },
    #[error("invalid payload of {event_type} v{version}: {error}")]
    InvalidPayload {
        event_type: String,
        version: i32,
        error: InvalidField,
    },
}

impl Rejection {
    /// Stable short name for headers, metrics and grouping.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed",
            Self::InvalidEnvelope(_) => "invalid_envelope",
            Self::UnknownType(_) => "unknown_type",
            Self::UnknownVersion { .. } => "unknown_version",
            Self::InvalidPayload { .. } => "invalid_payload",
        }
    }
}

impl Envelope {
    /// Wraps a payload. The caller brings the id, so that a test can fix it.
    ///
    /// # Errors
    /// Only if the payload cannot be written as JSON (a map with non-string keys, say), which no payload here can.
    pub fn new<P: Payload>(id: Uuid, fact: Fact<'_>, payload: &P) -> Result<Self, serde_json::Error> {
        Ok(Self {
            id,
            event_type: P::TYPE.to_owned(),
            version: P::VERSION,
            // Truncated here, so that the value in memory is the value on the wire.
            timestamp: truncate_to_micros(fact.timestamp),
            aggregate_type: fact.aggregate_type.to_owned(),
            aggregate_id: fact.aggregate_id,
            sequence: fact.sequence,
            transaction_key: fact.transaction_key,
            payload: serde_json::value::to_raw_value(payload)?,
        })
    }

    /// The bytes for outbox and Kafka.
    pub fn encode(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string(self)
    }

    /// Reads a Kafka value. Pure; the payload stays raw until someone asks for its type.
    pub fn decode(bytes: &[u8]) -> Result<Self, Rejection> {
        let envelope: Self = serde_json::from_slice(bytes).map_err(|error| Rejection::Malformed(error.to_string()))?;
        envelope.check().map_err(Rejection::InvalidEnvelope)?;
        Ok(envelope)
    }

    fn check(&self) -> Result<(), InvalidField> {
        if self.version < 1 {
            return Err(InvalidField::new("version", format!("{} is below 1", self.version)));
        }
        if self.sequence < 1 {
            return Err(InvalidField::new("sequence", format!("{} is below 1", self.sequence)));
        }
        if self.event_type.is_empty() {
            return Err(InvalidField::new("type", "is empty"));
        }
        if self.aggregate_type.is_empty() {
            return Err(InvalidField::new("aggregateType", "is empty"));
        }
        if self.aggregate_id.is_empty() || self.aggregate_id.len() > MAX_AGGREGATE_ID_BYTES {
            let reason = format!(
                "has {} bytes, allowed are 1 to {MAX_AGGREGATE_ID_BYTES}",
                self.aggregate_id.len()
            );
            return Err(InvalidField::new("aggregateId", reason));
        }
        Ok(())
    }

    /// Reads the payload as `P`; the caller has matched type and version.
    pub fn payload_as<P: Payload>(&self) -> Result<P, Rejection> {
        let invalid = |error| Rejection::InvalidPayload {
            event_type: self.event_type.clone(),
            version: self.version,
            error,
        };
        let mut reader = serde_json::Deserializer::from_str(self.payload.get());
        let payload: P = serde_path_to_error::deserialize(&mut reader)
            .map_err(|error| invalid(InvalidField::new(error.path().to_string(), error.inner().to_string())))?;
        payload.validate().map_err(invalid)?;
        Ok(payload)
    }
}

/// Microseconds are what PostgreSQL stores; more digits would not survive the round trip. A time whose UTC value lies
/// outside the years 0 to 9999 stays as it is.
pub fn truncate_to_micros(timestamp: OffsetDateTime) -> OffsetDateTime {
    let nanos = timestamp.nanosecond() / 1_000 * 1_000;
    let truncated = timestamp.replace_nanosecond(nanos).unwrap_or(timestamp);
    truncated.checked_to_offset(UtcOffset::UTC).unwrap_or(truncated)
}

const MICROS_UTC: &[BorrowedFormatItem<'static>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z");

/// `2026-11-22T05:00:00.123456Z`: always UTC, always six digits, so that equal times have equal bytes.
pub mod rfc3339_micros {
    use serde::{Deserialize, Deserializer, Serializer, de, ser};
    use time::{OffsetDateTime, format_description::well_known::Rfc3339};

    pub fn serialize<S: Serializer>(timestamp: &OffsetDateTime, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&super::format_timestamp(*timestamp).map_err(ser::Error::custom)?)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<OffsetDateTime, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        let parsed = OffsetDateTime::parse(&text, &Rfc3339)
            .map_err(|error| de::Error::custom(format_args!("not an RFC 3339 time: {error}")))?;
        // `to_offset` would panic: 9999-12-31T23:59:59-01:00 is well formed, and no UTC time.
        parsed
            .checked_to_offset(time::UtcOffset::UTC)
            .filter(|utc| (0..=9999).contains(&utc.year()))
            .map(super::truncate_to_micros)
            .ok_or_else(|| de::Error::custom("a time outside the years 0 to 9999"))
    }
}

/// The wire form of a time.
pub fn format_timestamp(timestamp: OffsetDateTime) -> Result<String, time::error::Format> {
    timestamp
        .checked_to_offset(UtcOffset::UTC)
        .unwrap_or(timestamp)
        .format(MICROS_UTC)
}
