//! PostgreSQL documentation, chapter 55.9 "Logical Replication Message Formats", protocol version 1. Pure: bytes in,
//! a change or a typed error out. What is unknown stops the relay with a reason instead of being skipped.

use std::collections::HashMap;

use sqlx::types::Uuid;

use crate::watermark::Lsn;

/// Microseconds from 1970 to 2000, PostgreSQL's zero.
const EPOCH_MICROS: i64 = 946_684_800_000_000;

/// One message of the stream, borrowed from its bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Change<'a> {
    Begin {
        committed_micros: i64,
    },
    Insert(Row<'a>),
    Commit {
        /// Position after the whole transaction.
        end: Lsn,
    },
    /// A description, or something that an insert-only publication sends for others.
    Nothing,
}

/// An outbox row, as far as the wire needs it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Row<'a> {
    pub(crate) id: Uuid,
    pub(crate) aggregate_id: &'a str,
    pub(crate) event_type: &'a str,
    pub(crate) version: i32,
    pub(crate) payload: &'a [u8],
    pub(crate) traceparent: Option<&'a str>,
    /// As PostgreSQL prints it: `2026-11-22 05:00:00.123456+00`.
    pub(crate) created_at: &'a str,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DecodeError {
    #[error("message {tag:?} is cut short")]
    Short { tag: char },
    #[error("unknown message {0:?}")]
    UnknownMessage(char),
    #[error("a row of relation {0}, which was not described")]
    UnknownRelation(u32),
    #[error("table {table} of the publication has no column {column}")]
    ColumnMissing { table: String, column: &'static str },
    #[error("column {0} is null")]
    Null(&'static str),
    /// Cannot be in an INSERT; if it ever is, the value is not there to be published (HAZARDS H19).
    #[error("column {0} came without its value (unchanged TOAST)")]
    Unchanged(&'static str),
    #[error("column {column} has the value {value:?}")]
    Value { column: &'static str, value: String },
    #[error("a row has {actual} columns, its relation has {described}")]
    ColumnCount { described: usize, actual: usize },
}

/// Where in a row the columns stand that the wire needs.
#[derive(Debug, Clone, Copy)]
struct Columns {
    count: usize,
    id: usize,
    aggregate_id: usize,
    event_type: usize,
    version: usize,
    payload: usize,
    traceparent: usize,
    created_at: usize,
}

/// Remembers the descriptions of relations, which come before their first row and again after every change.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    relations: HashMap<u32, Columns>,
}

impl Decoder {
    pub(crate) fn decode<'a>(&mut self, message: &'a [u8]) -> Result<Change<'a>, DecodeError> {
        let (&tag, rest) = message.split_first().ok_or(DecodeError::Short { tag: ' ' })?;
        let mut reader = Reader {
            rest,
            tag: char::from(tag),
        };
        match tag {
            b'B' => {
                reader.u64()?;
                Ok(Change::Begin {
                    committed_micros: reader.i64()? + EPOCH_MICROS,
                })
            }
            b'C' => {
                reader.u8()?;
                reader.u64()?;
                Ok(Change::Commit {
                    end: Lsn(reader.u64()?),
                })
            }
            b'R' => {
                let (id, columns) = relation(&mut reader)?;
                self.relations.insert(id, columns);
                Ok(Change::Nothing)
            }
            b'I' => {
                let id = reader.u32()?;
                let columns = self.relations.get(&id).ok_or(DecodeError::UnknownRelation(id))?;
                reader.u8()?;
                row(&mut reader, columns).map(Change::Insert)
            }
            // Origin, type, logical message; update, delete and truncate only if the publication was widened.
            b'O' | b'Y' | b'M' | b'U' | b'D' | b'T' => Ok(Change::Nothing),
            other => Err(DecodeError::UnknownMessage(char::from(other))),
        }
    }
}

fn relation(reader: &mut Reader<'_>) -> Result<(u32, Columns), DecodeError> {
    let id = reader.u32()?;
    let schema = reader.text()?;
    let table = reader.text()?;
    reader.u8()?;
    let count = usize::from(reader.u16()?);
    let mut names = Vec::with_capacity(count);
    for _ in 0..count {
        reader.u8()?;
        names.push(reader.text()?);
        reader.u32()?;
        reader.u32()?;
    }
    let position = |column: &'static str| {
        names
            .iter()
            .position(|name| *name == column)
            .ok_or_else(|| DecodeError::ColumnMissing {
                table: format!("{schema}.{table}"),
                column,
            })
    };
    let columns = Columns {
        count,
        id: position("id")?,
        aggregate_id: position("aggregateid")?,
        event_type: position("type")?,
        version: position("version")?,
        payload: position("payload")?,
        traceparent: position("traceparent")?,
        created_at: position("created_at")?,
    };
    Ok((id, columns))
}

/// A value of a row before anyone asked for it.
#[derive(Clone, Copy)]
enum Cell<'a> {
    Null,
    Unchanged,
    Text(&'a [u8]),
}

fn row<'a>(reader: &mut Reader<'a>, columns: &Columns) -> Result<Row<'a>, DecodeError> {
    let actual = usize::from(reader.u16()?);
    if actual != columns.count {
        return Err(DecodeError::ColumnCount {
            described: columns.count,
            actual,
        });
    }
    let mut cells = Vec::with_capacity(actual);
    for _ in 0..actual {
        cells.push(match reader.u8()? {
            b'n' => Cell::Null,
            b'u' => Cell::Unchanged,
            b't' | b'b' => {
                let length = reader.u32()? as usize;
                Cell::Text(reader.bytes(length)?)
            }
            other => return Err(DecodeError::UnknownMessage(char::from(other))),
        });
    }
    let bytes = |position: usize, column: &'static str| match cells[position] {
        Cell::Text(bytes) => Ok(bytes),
        Cell::Null => Err(DecodeError::Null(column)),
        Cell::Unchanged => Err(DecodeError::Unchanged(column)),
    };
    let text = |position: usize, column: &'static str| {
        let bytes = bytes(position, column)?;
        std::str::from_utf8(bytes).map_err(|_| DecodeError::Value {
            column,
            value: format!("{bytes:?}"),
        })
    };
    let wrong = |column: &'static str, value: &str| DecodeError::Value {
        column,
        value: value.to_owned(),
    };
    let id = text(columns.id, "id")?;
    let version = text(columns.version, "version")?;
    Ok(Row {
        id: Uuid::try_parse(id).map_err(|_| wrong("id", id))?,
        aggregate_id: text(columns.aggregate_id, "aggregateid")?,
        event_type: text(columns.event_type, "type")?,
        version: version.parse().map_err(|_| wrong("version", version))?,
        payload: bytes(columns.payload, "payload")?,
        traceparent: match cells[columns.traceparent] {
            Cell::Null => None,
            _ => Some(text(columns.traceparent, "traceparent")?),
        },
        created_at: text(columns.created_at, "created_at")?,
    })
}

struct Reader<'a> {
    rest: &'a [u8],
    tag: char,
}

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self
            .rest
            .split_at_checked(count)
            .ok_or(DecodeError::Short { tag: self.tag })?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (taken, rest) = self
            .rest
            .split_first_chunk()
            .ok_or(DecodeError::Short { tag: self.tag })?;
        self.rest = rest;
        Ok(*taken)
    }

    fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array().map(u8::from_be_bytes)
    }

    fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_be_bytes)
    }

    fn i64(&mut self) -> Result<i64, DecodeError> {
        self.array().map(i64::from_be_bytes)
    }

    /// Up to and without the next NUL.
    fn text(&mut self) -> Result<&'a str, DecodeError> {
        let end = self
            .rest
            .iter()
            .position(|byte| *byte == 0)
            .ok_or(DecodeError::Short { tag: self.tag })?;
        let bytes = self.bytes(end)?;
        self.u8()?;
        std::str::from_utf8(bytes).map_err(|_| DecodeError::Value {
            column: "name",
            value: format!("{bytes:?}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NAMES: [&str; 8] = [
        "id",
        "aggregatetype",
        "aggregateid",
        "type",
        "version",
        "payload",
        "traceparent",
        "created_at",
    ];

    fn relation_message(names: &[&str]) -> Vec<u8> {
        let mut message = vec![b'R', 0, 0, 0, 9];
        message.extend(b"logistics\0outbox\0d");
        message.extend((names.len() as u16).to_be_bytes());
        for name in names {
            message.push(0);
            message.extend(name.as_bytes());
            message.extend([0; 9]);
        }
        message
    }

    fn insert_message(values: &[Option<&str>]) -> Vec<u8> {
        let mut message = vec![b'I', 0, 0, 0, 9, b'N'];
        message.extend((values.len() as u16).to_be_bytes());
        for value in values {
            match value {
                None => message.push(b'n'),
                Some(text) => {
                    message.push(b't');
                    message.extend((text.len() as u32).to_be_bytes());
                    message.extend(text.as_bytes());
                }
            }
        }
        message
    }

    const ID: &str = "01936a2e-0000-7000-8000-000000000001";

    fn values() -> [Option<&'static str>; 8] {
        [
            Some(ID),
            Some("shipment"),
            Some("10248"),
            Some("ShipmentCompleted"),
            Some("1"),
            Some("{}"),
            None,
            Some("2026-11-22 05:00:00+00"),
        ]
    }

    #[test]
    fn an_insert_is_read_by_column_name_whatever_their_order() {
        let mut decoder = Decoder::default();
        let mut names = NAMES.to_vec();
        names.reverse();
        decoder.decode(&relation_message(&names)).unwrap();
        let mut row = values().to_vec();
        row.reverse();
        let message = insert_message(&row);
        let Change::Insert(row) = decoder.decode(&message).unwrap() else {
            panic!("no insert")
        };
        assert_eq!(row.id.to_string(), ID);
        assert_eq!(
            (row.aggregate_id, row.event_type, row.version),
            ("10248", "ShipmentCompleted", 1)
        );
        assert_eq!((row.payload, row.traceparent), (&b"{}"[..], None));
    }

    #[test]
    fn a_commit_gives_the_position_after_the_transaction() {
        let mut message = vec![b'C', 0];
        message.extend(1_u64.to_be_bytes());
        message.extend(0x16_B374_D848_u64.to_be_bytes());
        message.extend(0_u64.to_be_bytes());
        let change = Decoder::default().decode(&message).unwrap();
        assert_eq!(
            change,
            Change::Commit {
                end: Lsn(0x16_B374_D848)
            }
        );
        assert_eq!(Lsn(0x16_B374_D848).to_string(), "16/B374D848");
    }

    #[test]
    fn what_cannot_be_published_is_an_error_with_its_reason() {
        let mut decoder = Decoder::default();
        assert_eq!(
            decoder.decode(&insert_message(&values())),
            Err(DecodeError::UnknownRelation(9))
        );
        assert_eq!(
            decoder.decode(&relation_message(&NAMES[1..])),
            Err(DecodeError::ColumnMissing {
                table: "logistics.outbox".to_owned(),
                column: "id"
            })
        );
        decoder.decode(&relation_message(&NAMES)).unwrap();
        let mut row = values();
        row[5] = None;
        assert_eq!(decoder.decode(&insert_message(&row)), Err(DecodeError::Null("payload")));
        row[5] = Some("{}");
        row[0] = Some("7");
        assert!(matches!(
            decoder.decode(&insert_message(&row)),
            Err(DecodeError::Value { column: "id", .. })
        ));
        assert!(matches!(
            decoder.decode(&insert_message(&row[1..])),
            Err(DecodeError::ColumnCount { .. })
        ));
        assert_eq!(decoder.decode(b"z"), Err(DecodeError::UnknownMessage('z')));
        assert_eq!(decoder.decode(b""), Err(DecodeError::Short { tag: ' ' }));
    }

    proptest! {
        #[test]
        fn cut_or_flipped_bytes_never_panic(cut in 0_usize..200, flip in 0_usize..200, bit in 0_u8..8) {
            let mut decoder = Decoder::default();
            decoder.decode(&relation_message(&NAMES)).unwrap();
            let mut message = insert_message(&values());
            let length = message.len();
            prop_assert!(decoder.decode(&message[..cut.min(length - 1)]).is_err());
            message[flip % length] ^= 1 << bit;
            let _either = decoder.decode(&message);
            let mut relation = relation_message(&NAMES);
            let length = relation.len();
            relation[flip % length] ^= 1 << bit;
            let _either = Decoder::default().decode(&relation);
        }
    }
}
