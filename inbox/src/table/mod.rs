//! All SQL of the engine: the inbox, one row per event that took effect, written in the transaction of the effect; the keys
//! that are held, and the events parked behind them; the dead letters; what operators set.
//!
//! A service's migration creates the tables as `migrations/commerce/0005_inbox.sql`, `0006_held_keys.sql`,
//! `0007_dead_letters.sql` to `0010_edited_and_archived_letters.sql` and `0012_inbox_time.sql` do. No default of the inbox may be
//! volatile, or its rows cannot be streamed page by page.

use std::sync::Arc;

/// The inbox rows.
mod claim;

/// Keys that are held, and for what.
mod held;

/// Events that wait behind them.
mod parked;

/// Tries that failed, and what died of it.
mod dead_letters;

/// Dead letters read back from their topic.
mod rebuilt;

/// What operators set while the consumer runs.
pub(crate) mod controls;

/// Records in columns.
mod records;

pub use controls::Remembered;
pub(crate) use dead_letters::Failed;
pub(crate) use held::Hold;
pub use held::{HeldKeyRow, HeldKeysPage};
pub(crate) use parked::{Parked, ParkedRow};
pub(crate) use rebuilt::FromTopic;

/// The inbox of one schema, for one consumer group.
#[derive(Debug, Clone)]
pub struct Table {
    consumer: Arc<str>,
    schema: Arc<str>,
    claim: Arc<str>,
    claim_new: Arc<str>,
    release: Arc<str>,
    holds_any: Arc<str>,
    lock_held: Arc<str>,
}

/// The schema name is put into SQL text, so only plain lower-case identifiers are taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a schema name: expected a-z, 0-9 and _, not starting with a digit, at most 63 bytes")]
pub struct InvalidSchema(String);

impl Table {
    /// `consumer` is the name under which the rows stand: the consumer group.
    ///
    /// # Errors
    /// [`InvalidSchema`].
    pub fn new(schema: &str, consumer: &str) -> Result<Self, InvalidSchema> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        let starts_well = schema.bytes().next().is_some_and(|first| !first.is_ascii_digit());
        if !starts_well || schema.len() > 63 || !schema.bytes().all(plain) {
            return Err(InvalidSchema(schema.to_owned()));
        }
        Ok(Self {
            consumer: consumer.into(),
            schema: schema.into(),
            claim: include_str!("claim.sql").replace("{schema}", schema).into(),
            claim_new: claim::copy_statement(schema).into(),
            release: format!("DELETE FROM {schema}.inbox WHERE consumer = $1 AND event_id = ANY($2)").into(),
            holds_any: format!("SELECT EXISTS (SELECT FROM {schema}.held_keys WHERE consumer = $1)").into(),
            lock_held: include_str!("lock_held_keys.sql").replace("{schema}", schema).into(),
        })
    }

    /// The consumer group.
    pub(crate) fn consumer(&self) -> &str {
        &self.consumer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_identifiers_become_part_of_sql() {
        for good in ["commerce", "_private", "a1"] {
            assert!(Table::new(good, "group").is_ok(), "{good}");
        }
        for bad in ["", "1a", "a b", "a;drop table x", "Commerce", "ä", "a\"b"] {
            assert!(Table::new(bad, "group").is_err(), "{bad}");
        }
        assert!(Table::new(&"a".repeat(64), "group").is_err());
    }
}
