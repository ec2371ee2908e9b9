use proptest::prelude::*;
use shared_events::{
    Envelope, Payload, Rejection,
    envelope::{Fact, truncate_to_micros},
    shipment::{
        AGGREGATE_TYPE, Line, ShipmentCancelled, ShipmentCompleted, ShipmentCreated, ShipmentEvent, ShipmentHeld,
        ShipmentReleased, ShipmentReturned,
    },
};
use time::{OffsetDateTime, macros::datetime};
use uuid::Uuid;

use crate::assert_committed;

const ID: Uuid = Uuid::from_u128(0x0193_6A2E_1B3C_7D4E_8F50_6172_8394_A5B6);
const TRANSACTION: Uuid = Uuid::from_u128(0x1122_3344_5566_4788_99AA_BBCC_DDEE_FF00);
const TIME: OffsetDateTime = datetime!(2026-11-22 05:00:00.120_000 UTC);

fn envelope<P: Payload>(sequence: i64, payload: &P) -> Envelope {
    let fact = Fact {
        aggregate_type: AGGREGATE_TYPE,
        aggregate_id: "10248".to_owned(),
        sequence,
        transaction_key: TRANSACTION,
        timestamp: TIME,
    };
    Envelope::new(ID, fact, payload).unwrap()
}

fn lines() -> Vec<Line> {
    vec![
        Line {
            sku: "11".to_owned(),
            quantity: 12,
        },
        Line {
            sku: "42".to_owned(),
            quantity: 10,
        },
    ]
}

fn text(value: &str) -> String {
    value.to_owned()
}

fn samples() -> Vec<(&'static str, Envelope, ShipmentEvent)> {
    let (order_id, warehouse, carrier) = (text("10248"), text("main"), text("Federal Shipping"));
    let created = ShipmentCreated {
        order_id: order_id.clone(),
        warehouse: warehouse.clone(),
        carrier: carrier.clone(),
        lines: lines(),
        created_at: TIME,
    };
    let completed = ShipmentCompleted {
        order_id: order_id.clone(),
        warehouse: warehouse.clone(),
        carrier: carrier.clone(),
        tracking_number: text("1Z-10248"),
        lines: lines(),
        completed_at: TIME,
    };
    let held = ShipmentHeld {
        order_id: order_id.clone(),
        warehouse: warehouse.clone(),
        carrier: carrier.clone(),
        reason: text("address \"unclear\", Münster"),
        lines: lines(),
        held_at: TIME,
    };
    let released = ShipmentReleased {
        order_id: order_id.clone(),
        warehouse: warehouse.clone(),
        carrier: carrier.clone(),
        lines: lines(),
        released_at: TIME,
    };
    let cancelled = ShipmentCancelled {
        order_id: order_id.clone(),
        warehouse: warehouse.clone(),
        carrier: carrier.clone(),
        reason: text("out of stock"),
        lines: lines(),
        cancelled_at: TIME,
    };
    let returned = ShipmentReturned {
        order_id,
        warehouse,
        carrier,
        tracking_number: text("1Z-10248"),
        reason: text("damaged"),
        lines: lines()[..1].to_vec(),
        returned_at: TIME,
    };
    vec![
        (
            "shipment_created.v1.json",
            envelope(1, &created),
            ShipmentEvent::Created(created),
        ),
        (
            "shipment_completed.v1.json",
            envelope(2, &completed),
            ShipmentEvent::Completed(completed),
        ),
        ("shipment_held.v1.json", envelope(2, &held), ShipmentEvent::Held(held)),
        (
            "shipment_released.v1.json",
            envelope(3, &released),
            ShipmentEvent::Released(released),
        ),
        (
            "shipment_cancelled.v1.json",
            envelope(4, &cancelled),
            ShipmentEvent::Cancelled(cancelled),
        ),
        (
            "shipment_returned.v1.json",
            envelope(3, &returned),
            ShipmentEvent::Returned(returned),
        ),
    ]
}

#[test]
fn every_event_has_its_golden_bytes_and_reads_back() {
    for (file, envelope, event) in samples() {
        let bytes = envelope.encode().unwrap();
        assert_committed("golden", file, &bytes);
        let decoded = Envelope::decode(bytes.as_bytes()).unwrap();
        assert_eq!(ShipmentEvent::from_envelope(&decoded).unwrap(), event, "{file}");
        assert_eq!(
            decoded.encode().unwrap(),
            bytes,
            "{file}: decoding and encoding again keeps the bytes"
        );
    }
}

#[test]
fn unknown_fields_are_ignored_in_envelope_and_payload() {
    let (_, envelope, event) = samples().remove(1);
    let bytes = envelope.encode().unwrap();
    let newer = bytes
        .replacen('{', "{\"sourceEpoch\":7,", 1)
        .replace("\"payload\":{", "\"payload\":{\"gift\":true,");
    let decoded = Envelope::decode(newer.as_bytes()).unwrap();
    assert_eq!(ShipmentEvent::from_envelope(&decoded).unwrap(), event);
}

#[test]
fn what_is_not_understood_says_which_kind_it_is() {
    let (_, known, _) = samples().remove(1);
    let change = |edit: fn(&mut Envelope)| {
        let mut envelope = known.clone();
        edit(&mut envelope);
        Envelope::decode(envelope.encode().unwrap().as_bytes()).and_then(|read| ShipmentEvent::from_envelope(&read))
    };
    let code = |edit| change(edit).unwrap_err().code();
    assert_eq!(
        code(|envelope| envelope.event_type = "ShipmentLost".to_owned()),
        "unknown_type"
    );
    assert_eq!(code(|envelope| envelope.version = 2), "unknown_version");
    assert_eq!(code(|envelope| envelope.version = 0), "invalid_envelope");
    assert_eq!(code(|envelope| envelope.sequence = 0), "invalid_envelope");
    assert_eq!(
        code(|envelope| envelope.aggregate_id = String::new()),
        "invalid_envelope"
    );
    assert_eq!(
        code(|envelope| envelope.aggregate_id = "x".repeat(256)),
        "invalid_envelope"
    );
    assert_eq!(Envelope::decode(b"").unwrap_err().code(), "malformed");
    assert_eq!(Envelope::decode(&[0xFF, 0xFE]).unwrap_err().code(), "malformed");
    assert_eq!(
        Envelope::decode("[".repeat(100_000).as_bytes()).unwrap_err().code(),
        "malformed"
    );
}

#[test]
fn a_time_that_utc_cannot_hold_is_rejected() {
    let (_, envelope, _) = samples().remove(1);
    let bytes = envelope.encode().unwrap();
    for time in [
        "9999-12-31T23:59:59-01:00",
        "0000-01-01T00:00:00+01:00",
        "2026-11-22T05:00:60Z",
        "2026-11-22",
    ] {
        let broken = bytes.replace("2026-11-22T05:00:00.120000Z", time);
        assert_eq!(
            Envelope::decode(broken.as_bytes()).unwrap_err().code(),
            "malformed",
            "{time}"
        );
        let only_payload = bytes.replace(
            "\"completedAt\":\"2026-11-22T05:00:00.120000Z",
            &format!("\"completedAt\":\"{time}"),
        );
        let read = Envelope::decode(only_payload.as_bytes()).unwrap();
        assert_eq!(
            ShipmentEvent::from_envelope(&read).unwrap_err().code(),
            "invalid_payload",
            "{time}"
        );
    }
}

#[test]
fn an_invalid_payload_names_its_field() {
    let (_, envelope, _) = samples().remove(1);
    let bytes = envelope.encode().unwrap();
    for (from, to, field) in [
        ("\"quantity\":10", "\"quantity\":0", "lines[1].quantity"),
        ("\"quantity\":10", "\"quantity\":-3", "lines[1].quantity"),
        ("\"quantity\":10", "\"quantity\":\"ten\"", "lines[1].quantity"),
        ("\"sku\":\"42\"", "\"sku\":\"11\"", "lines[1].sku"),
        ("\"carrier\":\"Federal Shipping\"", "\"carrier\":\"\\u0000\"", "carrier"),
        ("\"completedAt\":\"2026", "\"completedAt\":\"26", "completedAt"),
    ] {
        let broken = bytes.replacen(from, to, 1);
        assert_ne!(broken, bytes);
        let rejection = Envelope::decode(broken.as_bytes())
            .and_then(|read| ShipmentEvent::from_envelope(&read))
            .expect_err(field);
        match rejection {
            Rejection::InvalidPayload { error, .. } => assert_eq!(error.field, field),
            other => panic!("{field}: {other}"),
        }
    }
}

proptest! {
    #[test]
    fn any_envelope_survives_the_wire(
        id in any::<u128>(),
        key in "[^\\x00]{1,60}",
        sequence in 1..i64::MAX,
        micros in 0_i64..4_000_000_000_000_000,
        sku in "[a-zA-Z0-9 äöü\"\\\\]{1,20}",
        quantity in 1..=1_000_000_i32,
    ) {
        let timestamp = OffsetDateTime::from_unix_timestamp_nanos(i128::from(micros) * 1_000 + 999).unwrap();
        let payload = ShipmentCreated {
            order_id: "1".to_owned(), warehouse: "w".to_owned(), carrier: "c".to_owned(),
            lines: vec![Line { sku: format!("s{sku}"), quantity }],
            created_at: truncate_to_micros(timestamp),
        };
        let fact = Fact {
            aggregate_type: AGGREGATE_TYPE, aggregate_id: key, sequence,
            transaction_key: TRANSACTION, timestamp,
        };
        let envelope = Envelope::new(Uuid::from_u128(id), fact, &payload).unwrap();
        let bytes = envelope.encode().unwrap();
        let read = Envelope::decode(bytes.as_bytes()).unwrap();
        prop_assert_eq!(read.timestamp, envelope.timestamp);
        prop_assert_eq!(read.encode().unwrap(), bytes);
        prop_assert_eq!(ShipmentEvent::from_envelope(&read).unwrap(), ShipmentEvent::Created(payload));
    }

    #[test]
    fn random_bytes_are_rejected_and_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Envelope::decode(&bytes).is_err());
    }

    #[test]
    fn cut_and_flipped_bytes_never_panic(cut in 0_usize..400, position in 0_usize..400, bit in 0_u8..8) {
        let (_, envelope, _) = samples().remove(0);
        let mut bytes = envelope.encode().unwrap().into_bytes();
        prop_assert!(Envelope::decode(&bytes[..cut.min(bytes.len() - 1)]).is_err());
        let length = bytes.len();
        bytes[position % length] ^= 1 << bit;
        if let Ok(read) = Envelope::decode(&bytes) {
            let _either = ShipmentEvent::from_envelope(&read);
        }
    }
}
