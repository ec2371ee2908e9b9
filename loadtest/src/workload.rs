use std::borrow::Cow;

use anyhow::Context;
use serde::Deserialize;
use shared_events::{
    Envelope,
    envelope::Fact,
    shipment::{AGGREGATE_TYPE, Line, ShipmentCreated, ShipmentHeld, ShipmentReleased},
};
use time::OffsetDateTime;
use uuid::Uuid;

/// Below this no envelope of the contract fits, whatever its numbers.
pub const SMALLEST_PAYLOAD: u32 = 400;
/// About what the most lines of a shipment fill.
pub const LARGEST_PAYLOAD: u32 = 40_000;

/// The `orderId` of the event that proves, before the measurement, that a contender is connected.
pub const PROOF: &str = "proof";

/// Padding: a warehouse's name takes up to this much, lines take the rest.
const WAREHOUSE_PADDING: usize = 60;
/// A line of the shortest and of the longest sku, with its comma.
const SHORTEST_LINE: usize = 29;
const LONGEST_LINE: usize = 88;

/// The events of one measurement. Event `index` belongs to key `index % keys` and carries its own index as `orderId`, so
/// that a record found in the topic says which event it is.
#[derive(Debug, Clone)]
pub struct Workload {
    events: u64,
    keys: u64,
    lanes: u64,
    payload_bytes: usize,
}

impl Workload {
    /// The number of keys is a multiple of the number of lanes, so that lanes which take every
    /// [`lanes`](Self::lanes)-th event share no key. With fewer keys than `lanes` there is one.
    pub fn new(events: u64, events_per_key: u64, payload_bytes: u32, lanes: u64) -> Self {
        let keys = events.div_ceil(events_per_key);
        let lanes = if keys < lanes { 1 } else { lanes };
        Self {
            events,
            keys: keys.next_multiple_of(lanes),
            lanes,
            payload_bytes: payload_bytes as usize,
        }
    }

    /// How many connections can append at once, each its share of the keys.
    pub fn lanes(&self) -> u64 {
        self.lanes
    }

    pub fn events(&self) -> u64 {
        self.events
    }

    pub fn keys(&self) -> u64 {
        self.keys
    }

    /// Key and sequence of an event, both counted from 1 as shipments are.
    pub fn position(&self, index: u64) -> (u64, u64) {
        (index % self.keys + 1, index / self.keys + 1)
    }

    /// The event as the product would append it at that time: created first, then held and released in turn, with a new
    /// UUIDv7 and exactly as many bytes as asked for.
    ///
    /// # Errors
    /// Only if it cannot be written as JSON: a defect.
    pub fn event(&self, index: u64, at: OffsetDateTime) -> anyhow::Result<Envelope> {
        let (key, sequence) = self.position(index);
        let fact = Fact {
            aggregate_type: AGGREGATE_TYPE,
            aggregate_id: key.to_string(),
            sequence: sequence.cast_signed(),
            transaction_key: Uuid::now_v7(),
            timestamp: at,
        };
        let id = Uuid::now_v7();
        let bare = event(id, fact.clone(), index.to_string(), &Parcel::bare())?;
        let missing = self.payload_bytes.saturating_sub(bare.encode()?.len());
        event(id, fact, index.to_string(), &Parcel::padded(missing))
    }
}

/// The proof event, of a key of its own.
///
/// # Errors
/// Only if it cannot be written as JSON: a defect.
pub fn proof(at: OffsetDateTime) -> anyhow::Result<Envelope> {
    let fact = Fact {
        aggregate_type: AGGREGATE_TYPE,
        aggregate_id: PROOF.to_owned(),
        sequence: 1,
        transaction_key: Uuid::now_v7(),
        timestamp: at,
    };
    event(Uuid::now_v7(), fact, PROOF.to_owned(), &Parcel::bare())
}

/// A record of the topic, recognised.
#[derive(Debug)]
pub struct Recognised {
    /// Which event it is; `None` for the proof.
    pub index: Option<u64>,
    pub envelope: Envelope,
}

impl Recognised {
    /// Reads a Kafka value.
    ///
    /// # Errors
    /// If it is no envelope of the contract, or none of a load test.
    pub fn from_value(value: &[u8]) -> anyhow::Result<Self> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Order<'a> {
            #[serde(borrow)]
            order_id: Cow<'a, str>,
        }
        let envelope = Envelope::decode(value)?;
        let order: Order<'_> = serde_json::from_str(envelope.payload.get()).context("read the order id")?;
        let index = match order.order_id.as_ref() {
            PROOF => None,
            number => Some(
                number
                    .parse()
                    .with_context(|| format!("{number:?} is no event's number"))?,
            ),
        };
        Ok(Self { index, envelope })
    }
}

struct Parcel {
    warehouse: String,
    lines: Vec<Line>,
}

impl Parcel {
    fn bare() -> Self {
        Self {
            warehouse: "W".to_owned(),
            lines: vec![line("A".to_owned())],
        }
    }

    /// Takes exactly `bytes` more than the bare one.
    fn padded(bytes: usize) -> Self {
        let mut parcel = Self::bare();
        let mut left = bytes;
        while left > WAREHOUSE_PADDING {
            let taken = left.min(LONGEST_LINE);
            // What is shorter than a line is left for the warehouse.
            let number = parcel.lines.len();
            let sku = format!("S{number:04}{}", "x".repeat(taken - SHORTEST_LINE));
            parcel.lines.push(line(sku));
            left -= taken;
        }
        parcel.warehouse.push_str(&"x".repeat(left));
        parcel
    }
}

fn line(sku: String) -> Line {
    Line { sku, quantity: 1 }
}

fn event(id: Uuid, fact: Fact<'_>, order_id: String, parcel: &Parcel) -> anyhow::Result<Envelope> {
    let (warehouse, carrier, lines) = (parcel.warehouse.clone(), "UPS".to_owned(), parcel.lines.clone());
    let at = fact.timestamp;
    let envelope = match fact.sequence {
        1 => Envelope::new(
            id,
            fact,
            &ShipmentCreated {
                order_id,
                warehouse,
                carrier,
                lines,
                created_at: at,
            },
        ),
        even if even % 2 == 0 => {
            let reason = "-".to_owned();
            Envelope::new(
                id,
                fact,
                &ShipmentHeld {
                    order_id,
                    warehouse,
                    carrier,
                    reason,
                    lines,
                    held_at: at,
                },
            )
        }
        _ => Envelope::new(
            id,
            fact,
            &ShipmentReleased {
                order_id,
                warehouse,
                carrier,
                lines,
                released_at: at,
            },
        ),
    };
    envelope.context("write the event as JSON")
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use shared_events::shipment::ShipmentEvent;

    use super::*;

    #[test]
    fn every_envelope_is_valid_and_has_exactly_the_bytes_asked_for() {
        for payload_bytes in (SMALLEST_PAYLOAD..600).chain([4_096, LARGEST_PAYLOAD]) {
            let workload = Workload::new(20_000_000, 10, payload_bytes, 4);
            for index in [0, 7, 1_999_999, 2_000_000, 4_000_000, 19_999_999] {
                let text = workload
                    .event(index, OffsetDateTime::now_utc())
                    .unwrap()
                    .encode()
                    .unwrap();
                assert_eq!(text.len(), payload_bytes as usize, "{text}");
                let event = ShipmentEvent::from_envelope(&Envelope::decode(text.as_bytes()).unwrap()).unwrap();
                assert_eq!(event.order_id(), index.to_string());
            }
        }
    }

    #[test]
    fn sequences_are_gapless_per_key_and_lanes_share_no_key() {
        let workload = Workload::new(1_003, 7, 400, 4);
        let mut last: HashMap<u64, u64> = HashMap::new();
        let mut lanes: HashMap<u64, u64> = HashMap::new();
        for index in 0..workload.events() {
            let (key, sequence) = workload.position(index);
            assert_eq!(sequence, last.get(&key).copied().unwrap_or_default() + 1);
            last.insert(key, sequence);
            assert_eq!(*lanes.entry(key).or_insert(index % 4), index % 4);
        }
        assert!(last.values().all(|last| *last <= 7));
        let few = Workload::new(1_000, 500, 400, 4);
        assert_eq!((few.keys(), few.lanes()), (2, 1));
    }
}
