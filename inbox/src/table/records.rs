use sqlx::{Arguments, FromRow, postgres::PgArguments};

use crate::{decode::History, record::Record};

/// A record, where it first stood and how often it was tried, as both tables that keep records have it.
#[derive(Debug, Clone, PartialEq, Eq, FromRow)]
pub(crate) struct StoredRecord {
    pub(crate) origin_topic: String,
    pub(crate) origin_partition: i32,
    pub(crate) origin_offset: i64,
    pub(crate) origin_timestamp_ms: Option<i64>,
    pub(crate) attempts: i32,
    /// In every topic of the group.
    pub(crate) partition: i32,
    pub(crate) record_key: Option<Vec<u8>>,
    pub(crate) record_value: Option<Vec<u8>>,
    pub(crate) header_names: Vec<String>,
    pub(crate) header_values: Vec<Vec<u8>>,
}

/// Appends the columns of many records to a statement's arguments, in the order of [`StoredRecord`]: eight arrays, then the
/// headers of all of them as two arrays, and each one's slice of those, from and to, counted from 1.
pub(super) fn add<'a>(
    arguments: &mut PgArguments,
    records: impl Iterator<Item = (&'a Record, &'a History, i32)>,
) -> Result<(), sqlx::Error> {
    let mut topics = Vec::new();
    let mut partitions = Vec::new();
    let mut offsets = Vec::new();
    let mut timestamps = Vec::new();
    let mut attempts = Vec::new();
    let mut own_partitions = Vec::new();
    let mut keys = Vec::new();
    let mut values = Vec::new();
    let mut header_names: Vec<String> = Vec::new();
    let mut header_values = Vec::new();
    let (mut headers_from, mut headers_to) = (Vec::new(), Vec::new());
    let place = |count: usize| i32::try_from(count).unwrap_or(i32::MAX);
    for (
        record,
        History {
            attempts: tried,
            origin,
        },
        partition,
    ) in records
    {
        topics.push(origin.topic.replace('\0', ""));
        partitions.push(origin.partition);
        offsets.push(origin.offset);
        timestamps.push(origin.timestamp_ms);
        attempts.push(i32::try_from(*tried).unwrap_or(i32::MAX));
        own_partitions.push(partition);
        keys.push(record.key());
        values.push(record.value());
        headers_from.push(place(header_names.len() + 1));
        for (name, value) in record.headers() {
            // The one character that PostgreSQL's text cannot hold.
            header_names.push(name.replace('\0', ""));
            header_values.push(value);
        }
        headers_to.push(place(header_names.len()));
    }
    let added = [
        arguments.add(topics),
        arguments.add(partitions),
        arguments.add(offsets),
        arguments.add(timestamps),
        arguments.add(attempts),
        arguments.add(own_partitions),
        arguments.add(keys),
        arguments.add(values),
        arguments.add(header_names),
        arguments.add(header_values),
        arguments.add(headers_from),
        arguments.add(headers_to),
    ];
    added
        .into_iter()
        .collect::<Result<(), _>>()
        .map_err(sqlx::Error::Encode)
}
