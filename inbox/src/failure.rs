use crate::{handler::HandlerError, process::BatchError};

/// What is at fault, and therefore what happens next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Database or broker: nothing moves, no attempt is counted, the same batch is tried again until it is over.
    Platform,
    /// The event cannot go now: retry tiers, then the dead letters. Also what nobody foresaw.
    EventTransient,
    /// The event can never go: dead letters at once.
    Permanent,
}

impl Class {
    /// The value of the `error-class` header and of metric labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Platform => "platform",
            Self::EventTransient => "event_transient",
            Self::Permanent => "permanent",
        }
    }
}

/// THE decision. The lists are short on purpose: what is not named is retried and then kept as a dead letter.
pub(crate) fn classify(error: &BatchError) -> Class {
    match error {
        // No event has been touched when a transaction cannot begin.
        BatchError::Begin(_) | BatchError::TimedOut(_) => Class::Platform,
        // Nothing is wrong with these events: they cannot even wait.
        BatchError::KeyFull { .. } | BatchError::TableFull(_) | BatchError::Undelivered(_) => Class::Platform,
        BatchError::Inbox(error) | BatchError::Commit(error) | BatchError::Handler(HandlerError::Database(error)) => {
            classify_database(error)
        }
        BatchError::Handler(HandlerError::Other(_)) | BatchError::WrongCount { .. } => Class::EventTransient,
        BatchError::Panicked(_) => Class::Permanent,
    }
}

fn classify_database(error: &sqlx::Error) -> Class {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => Class::Platform,
        sqlx::Error::Database(error) => error
            .code()
            .map_or(Class::EventTransient, |code| classify_sqlstate(&code)),
        _ => Class::EventTransient,
    }
}

fn classify_sqlstate(code: &str) -> Class {
    match code {
        // 40001 serialization failure, 40P01 deadlock, 55P03 lock timeout, 57014 statement cancelled or timed out,
        // 25006 read-only server, 25P02/25P03/25P04 the transaction was ended by the server.
        "40001" | "40P01" | "55P03" | "57014" | "25006" | "25P02" | "25P03" | "25P04" => Class::Platform,
        // A login, right, database, schema, table or column that is missing: the deployment's fault, not the event's.
        "42501" | "3D000" | "3F000" | "42P01" | "42703" => Class::Platform,
        // 08 connection, 28 login, 53 resources, 57P shutdown and start-up, 58 the server's own I/O.
        _ if ["08", "28", "53", "57P", "58"]
            .iter()
            .any(|class| code.starts_with(class)) =>
        {
            Class::Platform
        }
        // 22 data exception: the same bytes fail in the same way for ever.
        _ if code.starts_with("22") => Class::Permanent,
        _ => Class::EventTransient,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_the_platforms_fault() {
        for code in [
            "57P01", "57P03", "40001", "40P01", "53300", "53100", "55P03", "57014", "25006", "08006", "28P01",
        ] {
            assert_eq!(classify_sqlstate(code), Class::Platform, "{code}");
        }
        for error in [
            sqlx::Error::PoolTimedOut,
            sqlx::Error::PoolClosed,
            sqlx::Error::WorkerCrashed,
        ] {
            assert_eq!(classify(&BatchError::Commit(error)), Class::Platform);
        }
        assert_eq!(classify(&BatchError::Begin(sqlx::Error::RowNotFound)), Class::Platform);
    }

    #[test]
    fn what_nobody_foresaw_is_retried() {
        for code in ["23503", "23505", "23514", "XX000", "P0001", "42601"] {
            assert_eq!(classify_sqlstate(code), Class::EventTransient, "{code}");
        }
        assert_eq!(
            classify(&BatchError::Handler(HandlerError::Other("odd".into()))),
            Class::EventTransient
        );
        assert_eq!(
            classify(&BatchError::Handler(HandlerError::Database(sqlx::Error::RowNotFound))),
            Class::EventTransient
        );
    }

    #[test]
    fn bytes_the_database_cannot_hold_and_panics_are_permanent() {
        assert_eq!(classify_sqlstate("22021"), Class::Permanent);
        assert_eq!(classify_sqlstate("22003"), Class::Permanent);
        assert_eq!(classify(&BatchError::Panicked("boom".into())), Class::Permanent);
    }
}
