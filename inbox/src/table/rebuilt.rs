use shared_events::{Envelope, headers::Redirect};
use sqlx::{Arguments, PgPool, postgres::PgArguments};

use super::{Table, records};
use crate::{decode::History, fingerprint::fingerprint, record::Record};

/// A record of the dead-letter topic.
pub(crate) struct FromTopic {
    /// `None` if it could not be read, or was not taken.
    pub(crate) envelope: Option<Envelope>,
    /// With its own headers only.
    pub(crate) record: Record,
    pub(crate) history: History,
    pub(crate) partition: i32,
    /// What its headers say of its last failure.
    pub(crate) redirect: Redirect,
    pub(crate) holds: bool,
}

impl Table {
    /// Inserts the letters that the table lacks; returns how many. No event stands twice among them.
    pub(crate) async fn rebuild(&self, pool: &PgPool, letters: &[FromTopic]) -> Result<u64, sqlx::Error> {
        let envelopes = || letters.iter().map(|letter| letter.envelope.as_ref());
        let redirects = || letters.iter().map(|letter| &letter.redirect);
        // The one character that PostgreSQL's text cannot hold, and headers can.
        let plain = |text: &str| text.replace('\0', "");
        let mut arguments = PgArguments::default();
        let added = [
            arguments.add(&*self.consumer),
            arguments.add(envelopes().map(|envelope| Some(envelope?.id)).collect::<Vec<_>>()),
            arguments.add(
                envelopes()
                    .map(|envelope| Some(envelope?.aggregate_type.as_str()))
                    .collect::<Vec<_>>(),
            ),
            arguments.add(
                envelopes()
                    .map(|envelope| Some(envelope?.aggregate_id.as_str()))
                    .collect::<Vec<_>>(),
            ),
            arguments.add(envelopes().map(|envelope| Some(envelope?.sequence)).collect::<Vec<_>>()),
            arguments.add(
                envelopes()
                    .map(|envelope| Some(envelope?.event_type.as_str()))
                    .collect::<Vec<_>>(),
            ),
            arguments.add(
                redirects()
                    .map(|redirect| plain(&redirect.error_class))
                    .collect::<Vec<_>>(),
            ),
            arguments.add(
                redirects()
                    .map(|redirect| plain(&redirect.error_type))
                    .collect::<Vec<_>>(),
            ),
            arguments.add(
                redirects()
                    .map(|redirect| plain(&redirect.error_message))
                    .collect::<Vec<_>>(),
            ),
            arguments.add(
                redirects()
                    .map(|redirect| fingerprint(&plain(&redirect.error_type), &plain(&redirect.error_message)))
                    .collect::<Vec<_>>(),
            ),
            arguments.add(
                redirects()
                    .map(|redirect| plain(&redirect.consumer_version))
                    .collect::<Vec<_>>(),
            ),
        ];
        added
            .into_iter()
            .collect::<Result<(), _>>()
            .map_err(sqlx::Error::Encode)?;
        let records = letters
            .iter()
            .map(|letter| (&letter.record, &letter.history, letter.partition));
        records::add(&mut arguments, records)?;
        let holds: Vec<bool> = letters.iter().map(|letter| letter.holds).collect();
        let died: Vec<Option<i64>> = letters.iter().map(|letter| letter.record.timestamp_ms).collect();
        arguments
            .add(holds)
            .and_then(|()| arguments.add(died))
            .map_err(sqlx::Error::Encode)?;
        let rows: Vec<bool> = sqlx::query_scalar_with(self.sql(include_str!("rebuild.sql")), arguments)
            .fetch_all(pool)
            .await?;
        Ok(rows.into_iter().filter(|added| *added).count() as u64)
    }
}
