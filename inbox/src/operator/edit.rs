use serde_json::value::RawValue;
use shared_events::{Envelope, Rejection};
use sqlx::{FromRow, PgTransaction};
use uuid::Uuid;

use super::{Actor, Operator};
use crate::{
    decode,
    handler::{IncomingEvent, Position},
};

/// What is to stand in a letter's place. The id is new; aggregate, sequence, time, transaction key and headers are locked.
#[derive(Debug, Clone)]
pub enum Edit {
    /// Other values for some fields of its event.
    Fields {
        event_type: Option<String>,
        version: Option<i32>,
        payload: Option<Box<RawValue>>,
    },
    /// A whole event, for a record that is none. It must be of the aggregate that the record's key names, if it has one. Its
    /// id is not used.
    Event(Box<Envelope>),
}

/// A letter's record before, and what takes its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edited {
    /// Of the new letter and its event.
    pub id: Uuid,
    pub before: Option<Vec<u8>>,
    /// The new event, as it goes through.
    pub value: String,
}

/// Why a letter was not edited. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    #[error("there is no such dead letter")]
    NotFound,
    #[error("the dead letter is {0}, only an open one can be edited")]
    NotOpen(String),
    #[error("the event has taken effect meanwhile; redriven, the letter is resolved")]
    TookEffect,
    /// Fields of nothing.
    #[error("the record is no event, so a whole envelope is needed: {0}")]
    NoEvent(#[source] Rejection),
    /// An envelope would change what is locked.
    #[error("the record is an event, of which only type, version and payload can be changed")]
    IsEvent,
    #[error("aggregateId is {given:?}, but the record's key is {key:?}")]
    OtherKey { given: String, key: String },
    #[error("the edited record would be no event: {0}")]
    Rejected(#[source] Rejection),
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

#[derive(FromRow)]
struct Original {
    state: String,
    record_key: Option<Vec<u8>>,
    record_value: Option<Vec<u8>>,
    origin_topic: String,
    origin_partition: i32,
    origin_offset: i64,
}

impl Operator {
    /// What an edit would make of a letter now. Nothing is written; the id will be another one.
    ///
    /// # Errors
    /// [`EditError`].
    pub async fn preview_edit(&self, id: Uuid, edit: Edit) -> Result<Edited, EditError> {
        let mut connection = self.pool.acquire().await?;
        let original = self.original(&mut connection, id, "").await?;
        let (_, envelope, value) = edited(&original, edit)?;
        Ok(Edited {
            id: envelope.id,
            before: original.record_value,
            value,
        })
    }

    /// Puts another event in the place of an open letter's: a new open letter with a new id, in its key's order where the first
    /// one was. A later copy of the first event is a duplicate.
    ///
    /// # Errors
    /// [`EditError`].
    pub async fn edit(&self, id: Uuid, edit: Edit, actor: Actor<'_>) -> Result<Edited, EditError> {
        let mut transaction = self.pool.begin().await?;
        // Inbox, then key, then letter: the order in which a copy of the event that comes right now locks them too, and an
        // operator who decides about the letter.
        let original = self.original(&mut transaction, id, "").await?;
        let (event, envelope, value) = edited(&original, edit)?;
        if let Some(event) = event {
            let claimed = self.table.claim(&mut transaction, &[event]).await?;
            if claimed.is_empty() {
                return Err(EditError::TookEffect);
            }
        }
        sqlx::query(self.table.sql(
            "SELECT FROM {schema}.held_keys WHERE consumer = $1 AND aggregate_type = $2 AND aggregate_id = $3 FOR UPDATE",
        ))
        .bind(self.table.consumer())
        .bind(&envelope.aggregate_type)
        .bind(&envelope.aggregate_id)
        .execute(&mut *transaction)
        .await?;
        self.original(&mut transaction, id, "FOR UPDATE").await?;
        self.replace(&mut transaction, id, &envelope, &value).await?;
        let target = serde_json::json!({ "letter": id, "replaced_by": envelope.id }).to_string();
        self.note(&mut transaction, "edit", &target, actor).await?;
        transaction.commit().await?;
        Ok(Edited {
            id: envelope.id,
            before: original.record_value,
            value,
        })
    }

    /// A letter that is open.
    async fn original(&self, connection: &mut sqlx::PgConnection, id: Uuid, lock: &str) -> Result<Original, EditError> {
        let sql = format!(
            "SELECT CASE WHEN archived_at IS NULL THEN state ELSE 'archived' END AS state, record_key, record_value,
                    origin_topic, origin_partition, origin_offset
               FROM {{schema}}.dead_letters WHERE consumer = $1 AND id = $2 {lock}"
        );
        let original: Option<Original> = sqlx::query_as(self.table.sql(&sql))
            .bind(self.table.consumer())
            .bind(id)
            .fetch_optional(connection)
            .await?;
        let original = original.ok_or(EditError::NotFound)?;
        if original.state == "open" {
            Ok(original)
        } else {
            Err(EditError::NotOpen(original.state))
        }
    }

    async fn replace(
        &self,
        transaction: &mut PgTransaction<'_>,
        id: Uuid,
        envelope: &Envelope,
        value: &str,
    ) -> Result<(), sqlx::Error> {
        sqlx::query(self.table.sql(include_str!("../table/edit_letter.sql")))
            .bind(self.table.consumer())
            .bind(id)
            .bind(envelope.id)
            .bind(&envelope.aggregate_type)
            .bind(&envelope.aggregate_id)
            .bind(envelope.sequence)
            .bind(&envelope.event_type)
            .bind(value.as_bytes())
            .execute(&mut **transaction)
            .await?;
        sqlx::query(self.table.sql(
            "UPDATE {schema}.dead_letters SET state = 'resolved', resolved_at = clock_timestamp(), replaced_by = $3
              WHERE consumer = $1 AND id = $2",
        ))
        .bind(self.table.consumer())
        .bind(id)
        .bind(envelope.id)
        .execute(&mut **transaction)
        .await?;
        sqlx::query(self.table.sql(
            "UPDATE {schema}.held_keys SET event_id = $3, event_type = $6, changed_at = clock_timestamp()
              WHERE consumer = $1 AND event_id = $2 AND aggregate_type = $4 AND aggregate_id = $5",
        ))
        .bind(self.table.consumer())
        .bind(id)
        .bind(envelope.id)
        .bind(&envelope.aggregate_type)
        .bind(&envelope.aggregate_id)
        .bind(&envelope.event_type)
        .execute(&mut **transaction)
        .await?;
        Ok(())
    }
}

/// The event that a letter is, if it is one; and the one that takes its place, with its bytes.
fn edited(original: &Original, edit: Edit) -> Result<(Option<IncomingEvent>, Envelope, String), EditError> {
    let decoded = decode::decode(original.record_value.as_deref());
    let (event, mut envelope) = match (decoded, edit) {
        (Err(rejection), Edit::Fields { .. }) => return Err(EditError::NoEvent(rejection)),
        (Ok(_), Edit::Event(_)) => return Err(EditError::IsEvent),
        (Err(_), Edit::Event(envelope)) => {
            if let Some(key) = &original.record_key
                && key != envelope.aggregate_id.as_bytes()
            {
                return Err(EditError::OtherKey {
                    given: envelope.aggregate_id,
                    key: String::from_utf8_lossy(key).into_owned(),
                });
            }
            (None, *envelope)
        }
        (
            Ok(before),
            Edit::Fields {
                event_type,
                version,
                payload,
            },
        ) => {
            let after = Envelope {
                event_type: event_type.unwrap_or_else(|| before.event_type.clone()),
                version: version.unwrap_or(before.version),
                payload: payload.unwrap_or_else(|| before.payload.clone()),
                ..before.clone()
            };
            let event = IncomingEvent {
                envelope: before,
                position: Position {
                    topic: original.origin_topic.as_str().into(),
                    partition: original.origin_partition,
                    offset: original.origin_offset,
                },
                traceparent: None,
            };
            (Some(event), after)
        }
    };
    envelope.id = Uuid::now_v7();
    let malformed = |error: serde_json::Error| EditError::Rejected(Rejection::Malformed(error.to_string()));
    let value = envelope.encode().map_err(malformed)?;
    // What goes through is what is read again.
    let envelope = decode::decode(Some(value.as_bytes())).map_err(EditError::Rejected)?;
    Ok((event, envelope, value))
}
