use crate::{
    delivery::DeliveryError,
    publisher::{PublishError, is_refusal},
    sweep::SweepError,
    wal::{ConnectionError, StreamError},
};

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    #[error("replication connection")]
    Connection(#[from] ConnectionError),
    #[error("outbox table")]
    Table(#[from] sqlx::Error),
    #[error(transparent)]
    Publish(#[from] PublishError),
    #[error("rows from the table")]
    Sweep(#[from] SweepError),
    #[error("stream")]
    Stream(#[from] StreamError),
    #[error("the slot costs more than its budget: {0}")]
    Budget(String),
}

impl SessionError {
    /// Whether the session did what it had to, and the next one begins at once.
    pub(crate) fn is_renewal(&self) -> bool {
        matches!(
            self,
            Self::Sweep(SweepError::Delivery(DeliveryError::Renew))
                | Self::Stream(StreamError::Delivery(DeliveryError::Renew))
                | Self::Stream(StreamError::Upkeep(SweepError::Delivery(DeliveryError::Renew)))
        )
    }

    /// Whether rows were left out of the log, so that only the table has them: a slot made anew is swept for before it is
    /// streamed from, and this one would stop at the same place for ever.
    pub(crate) fn leaves_gap(&self) -> bool {
        matches!(
            self,
            Self::Connection(ConnectionError::LeftOut(_))
                | Self::Stream(StreamError::Connection(ConnectionError::LeftOut(_)))
        )
    }

    /// Whether waiting alone will not help: a missing right, login, database, publication or topic, a row that cannot be
    /// read. The relay tries again all the same, and goes on once it is repaired.
    pub(crate) fn needs_a_person(&self) -> bool {
        match self {
            Self::Connection(error) | Self::Stream(StreamError::Connection(error)) => match error {
                ConnectionError::Authentication(_)
                | ConnectionError::PasswordMissing
                | ConnectionError::TlsRefused
                | ConnectionError::PublicationMissing(_)
                | ConnectionError::LeftOut(_) => true,
                error => error.sqlstate().is_some_and(lasts),
            },
            Self::Table(error) | Self::Sweep(SweepError::Read(error)) => table_error_lasts(error),
            Self::Publish(error) => publish_error_lasts(error),
            Self::Sweep(SweepError::Delivery(error)) | Self::Stream(StreamError::Delivery(error)) => {
                delivery_error_lasts(error)
            }
            Self::Stream(StreamError::Upkeep(error)) => match error {
                SweepError::Read(error) => table_error_lasts(error),
                SweepError::Delivery(error) => delivery_error_lasts(error),
                SweepError::Time(_) => true,
                SweepError::LeaseLost => false,
            },
            Self::Sweep(SweepError::Time(_)) | Self::Stream(StreamError::Decode(_)) => true,
            Self::Sweep(SweepError::LeaseLost) | Self::Budget(_) => false,
        }
    }
}

fn delivery_error_lasts(error: &DeliveryError) -> bool {
    match error {
        DeliveryError::Publish(error) => publish_error_lasts(error),
        DeliveryError::Mark(error) | DeliveryError::SetAside(error) => table_error_lasts(error),
        DeliveryError::Renew | DeliveryError::Silent(_) => false,
    }
}

fn publish_error_lasts(error: &PublishError) -> bool {
    match error {
        // The broker is away.
        PublishError::Metadata { .. } => false,
        // The next session finds the event at fault and sets it aside.
        PublishError::Undelivered { error, .. } => !is_refusal(error),
        PublishError::Client(_) | PublishError::TopicMissing(_) | PublishError::Refused(_) => true,
    }
}

fn table_error_lasts(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Database(error) if error.code().is_some_and(|code| lasts(&code)))
}

/// 42xxx no right, no table, no column; 28xxx bad login; 3D000 no database; 55000 wal_level too low.
fn lasts(sqlstate: &str) -> bool {
    sqlstate.starts_with("42") || sqlstate.starts_with("28") || matches!(sqlstate, "3D000" | "55000")
}
