//! Headers are hints for tools: the value alone is enough to apply an event. Only the redirect headers are read back,
//! and they are parsed with bounds, because anyone who can write to the topic can forge them.

use std::sync::Arc;

use time::OffsetDateTime;

use crate::envelope::format_timestamp;

pub const TRACEPARENT: &str = "traceparent";
pub const CONTENT_TYPE: &str = "content-type";
pub const CE_ID: &str = "ce_id";
pub const CE_TYPE: &str = "ce_type";
pub const CE_SOURCE: &str = "ce_source";
pub const CE_TIME: &str = "ce_time";
pub const CE_SPECVERSION: &str = "ce_specversion";
pub const CE_SUBJECT: &str = "ce_subject";

pub const ORIGIN_TOPIC: &str = "origin-topic";
pub const ORIGIN_PARTITION: &str = "origin-partition";
pub const ORIGIN_OFFSET: &str = "origin-offset";
pub const ORIGIN_TIMESTAMP: &str = "origin-timestamp";
pub const ATTEMPT: &str = "attempt";
pub const NOT_BEFORE: &str = "not-before";
pub const ERROR_CLASS: &str = "error-class";
pub const ERROR_TYPE: &str = "error-type";
pub const ERROR_MESSAGE: &str = "error-message";
pub const CONSUMER_VERSION: &str = "consumer-version";

const REDIRECT_HEADERS: [&str; 10] = [
    ORIGIN_TOPIC,
    ORIGIN_PARTITION,
    ORIGIN_OFFSET,
    ORIGIN_TIMESTAMP,
    ATTEMPT,
    NOT_BEFORE,
    ERROR_CLASS,
    ERROR_TYPE,
    ERROR_MESSAGE,
    CONSUMER_VERSION,
];

/// The longest error message in a header, in bytes: a long text must not make the record too large for its topic.
pub const MAX_ERROR_MESSAGE_BYTES: usize = 1_024;
/// The highest attempt that is believed; a forged larger one counts as this.
pub const MAX_ATTEMPT: u32 = 1_000;

/// A header as Kafka has it: a name and bytes.
pub type Header = (String, Vec<u8>);

/// CloudEvents 1.0 in Kafka binary mode (`kafka-protocol-binding`, section 3.2), and the trace.
#[derive(Debug, Clone, Copy)]
pub struct EventHeaders<'a> {
    pub id: &'a str,
    pub event_type: &'a str,
    pub version: i32,
    /// Who announces, e.g. `logistics`: `ce_source`, and the first part of `ce_type`.
    pub source: &'a str,
    pub time: &'a str,
    pub subject: &'a str,
    pub traceparent: Option<&'a str>,
}

impl EventHeaders<'_> {
    /// Hands each header to `put`, so that a publisher can write them without a list in between.
    pub fn for_each(&self, mut put: impl FnMut(&'static str, &str)) {
        put(CE_ID, self.id);
        put(
            CE_TYPE,
            &format!("{}.{}.v{}", self.source, self.event_type, self.version),
        );
        put(CE_SOURCE, self.source);
        put(CE_TIME, self.time);
        put(CE_SPECVERSION, "1.0");
        put(CE_SUBJECT, self.subject);
        put(CONTENT_TYPE, "application/json");
        if let Some(traceparent) = self.traceparent {
            put(TRACEPARENT, traceparent);
        }
    }
}

/// Where a record first stood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    pub topic: Arc<str>,
    pub partition: i32,
    pub offset: i64,
    /// The broker's or producer's time of the first record, milliseconds since 1970; absent if the record had none.
    pub timestamp_ms: Option<i64>,
}

/// What a retry or dead-letter record says about its past.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redirect {
    pub origin: Origin,
    /// How many times the event has been tried, at least 1.
    pub attempt: u32,
    /// When a retry is due; absent on a dead letter.
    pub not_before: Option<OffsetDateTime>,
    pub error_class: String,
    pub error_type: String,
    pub error_message: String,
    pub consumer_version: String,
}

impl Redirect {
    /// The record's own headers first, earlier redirect headers replaced by these.
    pub fn encode(&self, original: &[Header]) -> Vec<Header> {
        let mut headers = without_redirect(original);
        let mut put = |name: &str, value: String| headers.push((name.to_owned(), value.into_bytes()));
        put(ORIGIN_TOPIC, self.origin.topic.to_string());
        put(ORIGIN_PARTITION, self.origin.partition.to_string());
        put(ORIGIN_OFFSET, self.origin.offset.to_string());
        if let Some(timestamp_ms) = self.origin.timestamp_ms {
            put(ORIGIN_TIMESTAMP, timestamp_ms.to_string());
        }
        put(ATTEMPT, self.attempt.to_string());
        if let Some(not_before) = self.not_before.and_then(|time| format_timestamp(time).ok()) {
            put(NOT_BEFORE, not_before);
        }
        put(ERROR_CLASS, self.error_class.clone());
        put(ERROR_TYPE, self.error_type.clone());
        put(
            ERROR_MESSAGE,
            cut(&self.error_message, MAX_ERROR_MESSAGE_BYTES).to_owned(),
        );
        put(CONSUMER_VERSION, self.consumer_version.clone());
        headers
    }

    /// Reads what [`Redirect::encode`] wrote. `None` if origin or attempt is missing or not a number in range; the
    /// reader then treats the record as a first attempt from where it stands.
    pub fn decode(headers: &[Header]) -> Option<Self> {
        let text = |name: &str| last(headers, name).and_then(|bytes| std::str::from_utf8(bytes).ok());
        let partition: i32 = text(ORIGIN_PARTITION)?.parse().ok()?;
        let offset: i64 = text(ORIGIN_OFFSET)?.parse().ok()?;
        let attempt: u32 = text(ATTEMPT)?.parse().ok()?;
        if partition < 0 || offset < 0 || attempt == 0 {
            return None;
        }
        let not_before = text(NOT_BEFORE)
            .and_then(|value| OffsetDateTime::parse(value, &time::format_description::well_known::Rfc3339).ok());
        let or_unknown = |name: &str| text(name).unwrap_or("unknown").to_owned();
        Some(Self {
            origin: Origin {
                topic: text(ORIGIN_TOPIC)?.into(),
                partition,
                offset,
                timestamp_ms: text(ORIGIN_TIMESTAMP).and_then(|value| value.parse().ok()),
            },
            attempt: attempt.min(MAX_ATTEMPT),
            not_before,
            error_class: or_unknown(ERROR_CLASS),
            error_type: or_unknown(ERROR_TYPE),
            error_message: or_unknown(ERROR_MESSAGE),
            consumer_version: or_unknown(CONSUMER_VERSION),
        })
    }
}

/// The headers that a record had of its own.
pub fn without_redirect(headers: &[Header]) -> Vec<Header> {
    let own = headers
        .iter()
        .filter(|(name, _)| !REDIRECT_HEADERS.contains(&name.as_str()));
    own.cloned().collect()
}

/// The last header of a name: later ones win, as in HTTP clients that append.
pub fn last<'a>(headers: &'a [Header], name: &str) -> Option<&'a [u8]> {
    headers
        .iter()
        .rev()
        .find(|(candidate, _)| candidate == name)
        .map(|(_, value)| value.as_slice())
}

/// Whether a text is a W3C trace context version 00 `traceparent` with non-zero ids.
pub fn is_traceparent(value: &str) -> bool {
    let parts: Vec<&str> = value.split('-').collect();
    let [version, trace_id, span_id, flags] = parts[..] else {
        return false;
    };
    let lower_hex = |text: &str, length: usize| {
        text.len() == length && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let non_zero = |text: &str| text.bytes().any(|byte| byte != b'0');
    version == "00"
        && lower_hex(trace_id, 32)
        && non_zero(trace_id)
        && lower_hex(span_id, 16)
        && non_zero(span_id)
        && lower_hex(flags, 2)
}

fn cut(text: &str, max_bytes: usize) -> &str {
    let mut end = text.len().min(max_bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
