use proptest::prelude::*;
use shared_events::headers::{self, EventHeaders, Header, MAX_ATTEMPT, Origin, Redirect, is_traceparent};
use time::macros::datetime;

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn redirect() -> Redirect {
    Redirect {
        origin: Origin {
            topic: "logistics.shipments".into(),
            partition: 3,
            offset: 4_711,
            timestamp_ms: Some(1_763_787_600_123),
        },
        attempt: 2,
        not_before: Some(datetime!(2026-11-22 05:00:30 UTC)),
        error_class: "event-transient".to_owned(),
        error_type: "unknown_order".to_owned(),
        error_message: "order 4 is not known".to_owned(),
        consumer_version: "1.2.3".to_owned(),
    }
}

#[test]
fn every_redirect_header_comes_back_as_it_was_written() {
    let own: Vec<Header> = vec![
        ("ce_id".to_owned(), b"x".to_vec()),
        ("attempt".to_owned(), b"1".to_vec()),
    ];
    let written = redirect().encode(&own);
    assert_eq!(Redirect::decode(&written), Some(redirect()));
    assert_eq!(written[0], own[0], "the record's own headers stay");
    let attempts = written.iter().filter(|(name, _)| name == headers::ATTEMPT).count();
    assert_eq!(attempts, 1, "an earlier redirect's headers are replaced");
}

#[test]
fn cloud_events_headers_are_in_binary_mode() {
    let mut written = Vec::new();
    let event = EventHeaders {
        id: "i",
        event_type: "ShipmentCompleted",
        version: 1,
        source: "logistics",
        time: "t",
        subject: "10248",
        traceparent: Some(TRACEPARENT),
    };
    event.for_each(|name, value| written.push((name, value.to_owned())));
    let expected = [
        ("ce_id", "i"),
        ("ce_type", "logistics.ShipmentCompleted.v1"),
        ("ce_source", "logistics"),
        ("ce_time", "t"),
        ("ce_specversion", "1.0"),
        ("ce_subject", "10248"),
        ("content-type", "application/json"),
        ("traceparent", TRACEPARENT),
    ];
    assert_eq!(written, expected.map(|(name, value)| (name, value.to_owned())));
}

#[test]
fn forged_headers_are_bounded_or_ignored() {
    let with = |name: &str, value: &[u8]| {
        let mut headers = redirect().encode(&[]);
        headers.push((name.to_owned(), value.to_vec()));
        Redirect::decode(&headers)
    };
    assert_eq!(with("attempt", b"4000000000").unwrap().attempt, MAX_ATTEMPT);
    for (name, value) in [
        ("attempt", &b"0"[..]),
        ("attempt", b"-1"),
        ("attempt", b"99999999999999999999"),
        ("attempt", b"two"),
        ("attempt", b"\xFF"),
        ("origin-partition", b"-4"),
        ("origin-offset", b"1e9"),
    ] {
        assert_eq!(with(name, value), None, "{name}={value:?}");
    }
    assert_eq!(with("not-before", b"tomorrow").unwrap().not_before, None);
    let long = Redirect {
        error_message: "ä".repeat(5_000),
        ..redirect()
    };
    let read = Redirect::decode(&long.encode(&[])).unwrap();
    assert!(read.error_message.len() <= headers::MAX_ERROR_MESSAGE_BYTES);
}

#[test]
fn only_w3c_trace_contexts_are_taken() {
    assert!(is_traceparent(TRACEPARENT));
    for wrong in [
        "",
        "00-0-0-01",
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
        "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
        "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    ] {
        assert!(!is_traceparent(wrong), "{wrong}");
    }
}

proptest! {
    #[test]
    fn any_headers_are_read_without_a_panic(
        list in prop::collection::vec(
            (prop::sample::select(vec!["attempt", "origin-topic", "origin-partition", "origin-offset", "not-before"]),
             prop::collection::vec(any::<u8>(), 0..20)), 0..10)
    ) {
        let list: Vec<Header> = list.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let _either = Redirect::decode(&list);
    }
}
