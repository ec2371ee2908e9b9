use std::{
    panic::{UnwindSafe, catch_unwind},
    sync::Arc,
};

use shared_events::{
    Envelope, Rejection,
    envelope::InvalidField,
    headers::{self, Origin, Redirect},
};

use crate::record::Record;

/// Reads a record's value. Key and headers do not matter for it: the value is self-sufficient.
pub(crate) fn decode(value: Option<&[u8]>) -> Result<Envelope, Rejection> {
    or_rejected(|| read(value))
}

/// Anyone may send any bytes: a reader that panics on some has a defect, which must cost this one record and not the
/// partition.
fn or_rejected<T>(read: impl FnOnce() -> Result<T, Rejection> + UnwindSafe) -> Result<T, Rejection> {
    catch_unwind(read).unwrap_or_else(|_| Err(Rejection::Malformed("the reader panicked on it".to_owned())))
}

/// Longer names exist nowhere in the product, and no index could hold them.
const MAX_NAME_BYTES: usize = 255;

fn read(value: Option<&[u8]>) -> Result<Envelope, Rejection> {
    let Some(value) = value else {
        return Err(Rejection::Malformed("the record has no value".to_owned()));
    };
    let envelope = Envelope::decode(value)?;
    // The text columns of PostgreSQL hold everything but this.
    for (field, text) in [
        ("type", &envelope.event_type),
        ("aggregateType", &envelope.aggregate_type),
        ("aggregateId", &envelope.aggregate_id),
    ] {
        if text.len() > MAX_NAME_BYTES {
            let reason = format!("has {} bytes, at most {MAX_NAME_BYTES} are possible", text.len());
            return Err(Rejection::InvalidEnvelope(InvalidField::new(field, reason)));
        }
        if text.contains('\0') {
            return Err(Rejection::InvalidEnvelope(InvalidField::new(
                field,
                "contains a NUL character",
            )));
        }
    }
    Ok(envelope)
}

/// The record's trace, if it carries a valid one.
pub(crate) fn traceparent(record: &Record) -> Option<String> {
    let value = record.header(headers::TRACEPARENT)?;
    let value = std::str::from_utf8(value).ok()?;
    headers::is_traceparent(value).then(|| value.to_owned())
}

/// When a retry is due by its header, in milliseconds since 1970.
pub(crate) fn not_before_ms(record: &Record) -> Option<i64> {
    let not_before = Redirect::decode(&record.header_list())?.not_before?;
    i64::try_from(not_before.unix_timestamp_nanos() / 1_000_000).ok()
}

/// How many attempts lie behind an event, and where it first stood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct History {
    pub(crate) attempts: u32,
    pub(crate) origin: Origin,
}

/// Reads a record's history. `tier` is the retry tier whose topic it stands in, `None` on the main topic, where every
/// event is new whatever its headers claim.
pub(crate) fn history(record: &Record, topic: &Arc<str>, partition: i32, tier: Option<usize>) -> History {
    let here = Origin {
        topic: Arc::clone(topic),
        partition,
        offset: record.offset,
        timestamp_ms: record.timestamp_ms,
    };
    let Some(tier) = tier else {
        return History {
            attempts: 0,
            origin: here,
        };
    };
    match Redirect::decode(&record.header_list()) {
        Some(redirect) => History {
            attempts: redirect.attempt,
            origin: redirect.origin,
        },
        // Whoever wrote it here without our headers: its topic tells how often it can have been tried.
        None => History {
            attempts: u32::try_from(tier).unwrap_or(headers::MAX_ATTEMPT),
            origin: here,
        },
    }
}

#[cfg(test)]
mod tests {
    use shared_events::headers::Header;

    use super::*;

    fn record(headers: Vec<Header>) -> Record {
        Record::new(7, Some(1), None, Some(b"value"), []).with_headers(&headers)
    }

    #[test]
    fn what_is_not_an_event_is_rejected_with_a_name() {
        let nul = br#"{"id":"01938f4e-0000-7000-8000-000000000001","type":"T","version":1,"timestamp":"2026-01-01T00:00:00Z","aggregateType":"shipment","aggregateId":"a\u0000b","sequence":1,"transactionKey":"01938f4e-0000-7000-8000-000000000001","payload":{}}"#;
        let cases: [(Option<&[u8]>, &str); 6] = [
            (None, "malformed"),
            (Some(b""), "malformed"),
            (Some(b"\xff\xfe"), "malformed"),
            (Some(b"{"), "malformed"),
            (Some(b"null"), "malformed"),
            (Some(nul), "invalid_envelope"),
        ];
        for (value, code) in cases {
            assert_eq!(decode(value).expect_err("a rejection").code(), code, "{value:?}");
        }
    }

    #[test]
    fn a_panic_of_the_reader_rejects_its_record() {
        let rejection = or_rejected::<()>(|| panic!("a defect")).expect_err("a rejection");
        assert_eq!(rejection.code(), "malformed");
    }

    #[test]
    fn on_the_main_topic_forged_history_is_not_believed() {
        let forged = Redirect {
            origin: Origin {
                topic: "elsewhere".into(),
                partition: 3,
                offset: 9,
                timestamp_ms: None,
            },
            attempt: 900,
            not_before: None,
            error_class: String::new(),
            error_type: String::new(),
            error_message: String::new(),
            consumer_version: String::new(),
        };
        let record = record(forged.encode(&[]));
        let fresh = history(&record, &"main".into(), 2, None);
        assert_eq!(fresh.attempts, 0);
        assert_eq!(
            (&*fresh.origin.topic, fresh.origin.partition, fresh.origin.offset),
            ("main", 2, 7)
        );
        let retried = history(&record, &"main.retry.1".into(), 2, Some(1));
        assert_eq!((retried.attempts, retried.origin.offset), (900, 9));
    }

    #[test]
    fn a_retry_record_without_history_has_been_tried_as_often_as_its_tier_says() {
        for attempt in ["", "-1", "0", "99999999999999", "x"] {
            let record = record(vec![(headers::ATTEMPT.to_owned(), attempt.as_bytes().to_vec())]);
            assert_eq!(
                history(&record, &"main.retry.2".into(), 0, Some(2)).attempts,
                2,
                "{attempt:?}"
            );
        }
    }
}
