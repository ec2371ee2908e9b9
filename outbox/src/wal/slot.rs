use std::time::Duration;

use super::connection::{Connection, ConnectionError};
use crate::{table::SlotIdentity, watermark::Lsn};

/// How often a standby asks whether the slot has become free.
const STANDBY_INTERVAL: Duration = Duration::from_millis(500);

/// A replication slot and the publication it is read through.
#[derive(Debug, Clone)]
pub(crate) struct Slot {
    pub(crate) name: String,
    pub(crate) publication: String,
}

/// What was found when the slot was acquired.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Origin {
    pub(crate) identity: SlotIdentity,
    /// From where the slot streams.
    pub(crate) confirmed: Lsn,
    pub(crate) found: Found,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    Existing,
    /// There was none: the first start, or somebody dropped it.
    Missing,
    /// The server had given up keeping its log (`wal_status` lost).
    Lost,
}

impl Slot {
    /// Becomes the one relay of this slot, waiting while another instance is. The lock belongs to the connection, so it
    /// ends with it.
    pub(crate) async fn lead(&self, connection: &mut Connection, on_standby: impl Fn()) -> Result<(), ConnectionError> {
        let attempt = format!(
            "SELECT pg_catalog.pg_try_advisory_lock(pg_catalog.hashtextextended('{}', 0))",
            self.name
        );
        loop {
            let rows = connection.query(&attempt).await?;
            if rows == [[Some("t".to_owned())]] {
                return Ok(());
            }
            on_standby();
            tokio::time::sleep(STANDBY_INTERVAL).await;
        }
    }

    /// Finds or makes the slot, and replaces one that the server has invalidated.
    ///
    /// Making a slot waits until every transaction then open has ended, and it streams all that commit later. So the
    /// rows that it will not stream are visible to any query that starts afterwards.
    ///
    /// # Errors
    /// [`ConnectionError::PublicationMissing`] before anything is made: the server would stream without it, and bring nothing.
    pub(crate) async fn acquire(&self, connection: &mut Connection) -> Result<Origin, ConnectionError> {
        let name = &self.name;
        let publication = self.publication.replace('\'', "''");
        let published = format!("SELECT FROM pg_catalog.pg_publication WHERE pubname = '{publication}'");
        if connection.query(&published).await?.is_empty() {
            return Err(ConnectionError::PublicationMissing(self.publication.clone()));
        }
        let system = connection.query("IDENTIFY_SYSTEM").await?;
        let system_identifier = first(&system).ok_or_else(|| missing("IDENTIFY_SYSTEM"))?;
        let status = format!("SELECT wal_status FROM pg_catalog.pg_replication_slots WHERE slot_name = '{name}'");
        let rows = connection.query(&status).await?;
        let found = match rows.first() {
            None => Found::Missing,
            Some(row) if row.first() == Some(&Some("lost".to_owned())) => Found::Lost,
            Some(_) => Found::Existing,
        };
        if found == Found::Lost {
            connection
                .query(&format!("SELECT pg_catalog.pg_drop_replication_slot('{name}')"))
                .await?;
        }
        if found != Found::Existing {
            connection
                .query(&format!(
                    "CREATE_REPLICATION_SLOT {name} LOGICAL pgoutput (SNAPSHOT 'nothing')"
                ))
                .await?;
        }
        let position = connection
            .query(&format!(
                "SELECT confirmed_flush_lsn - '0/0' FROM pg_catalog.pg_replication_slots WHERE slot_name = '{name}'"
            ))
            .await?;
        let confirmed = first(&position)
            .and_then(|text| text.parse().ok())
            .map(Lsn)
            .ok_or_else(|| missing("the slot's position"))?;
        let identity = SlotIdentity {
            slot: name.clone(),
            system_identifier,
        };
        Ok(Origin {
            identity,
            confirmed,
            found,
        })
    }

    /// Streams from the slot's position.
    pub(crate) async fn start(&self, connection: &mut Connection) -> Result<(), ConnectionError> {
        connection.start_replication(&self.name, &self.publication).await
    }
}

fn first(rows: &[Vec<Option<String>>]) -> Option<String> {
    rows.first()?.first()?.clone()
}

fn missing(what: &str) -> ConnectionError {
    ConnectionError::Protocol(format!("no answer to {what}"))
}
