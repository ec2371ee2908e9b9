/// A statement that failed, by what can be done about it.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// Lost against another transaction: run the transaction again.
    #[error("the transaction lost against another one")]
    Conflict(#[source] sqlx::Error),
    /// The database is away, busy or read-only: the client may try again later.
    #[error("the database is not available")]
    Unavailable(#[source] sqlx::Error),
    /// A defect of the program or the schema: a person is needed.
    #[error("a statement failed")]
    Defect(#[source] sqlx::Error),
}

impl From<sqlx::Error> for Fault {
    /// The one place that decides. What is not known is a defect, never a reason to try again.
    fn from(error: sqlx::Error) -> Self {
        use sqlx::Error;
        match &error {
            Error::Io(_) | Error::Tls(_) | Error::PoolTimedOut | Error::PoolClosed | Error::WorkerCrashed => {
                Self::Unavailable(error)
            }
            // Among others: a server that goes away while it is asked for TLS ("unexpected response from SSLRequest: 0x00").
            Error::BeginFailed | Error::Protocol(_) => Self::Unavailable(error),
            Error::Database(database) => match database.code().as_deref().unwrap_or_default() {
                // serialization_failure, deadlock_detected
                "40001" | "40P01" => Self::Conflict(error),
                // read_only_sql_transaction (a standby), lock_not_available, query_canceled (statement_timeout),
                // idle_in_transaction_session_timeout, transaction_timeout
                "25006" | "55P03" | "57014" | "25P03" | "25P04" => Self::Unavailable(error),
                // connection exceptions, insufficient resources, operator intervention, system errors, bad login
                code if ["08", "53", "57", "58", "28"]
                    .iter()
                    .any(|class| code.starts_with(class)) =>
                {
                    Self::Unavailable(error)
                }
                _ => Self::Defect(error),
            },
            _ => Self::Defect(error),
        }
    }
}

/// Whether an error of COMMIT itself leaves open if the transaction was committed: any but the server's own refusal.
pub fn commit_outcome_unknown(error: &sqlx::Error) -> bool {
    match error {
        // 40: serialization, deadlock; 23: a deferred constraint. The server says: rolled back.
        sqlx::Error::Database(database) => {
            let code = database.code().unwrap_or_default();
            !(code.starts_with("40") || code.starts_with("23"))
        }
        _ => true,
    }
}
