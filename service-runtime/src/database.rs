use std::{str::FromStr, time::Duration};

use clap::Args;
use sqlx::{
    ConnectOptions, Connection, PgConnection,
    postgres::{PgConnectOptions, PgPool, PgPoolOptions},
};

use crate::settings::Secret;

/// Longest wait for a connection that comes back.
const RETURN_LIMIT: Duration = Duration::from_secs(5);

/// What every connection of a service has in common. TLS is part of the URL: `?sslmode=verify-full&sslrootcert=FILE`.
#[derive(Debug, Clone, Args)]
pub struct PoolSettings {
    /// Most connections of one pool, counted. Too few make requests wait, too many exhaust the server.
    #[arg(long, env = "DATABASE_MAX_CONNECTIONS", default_value = "16", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub database_max_connections: u32,
    /// Longest wait for a free connection, e.g. `2s`; afterwards the request gets a 503.
    #[arg(long, env = "DATABASE_ACQUIRE_TIMEOUT", default_value = "2s", value_parser = humantime::parse_duration)]
    pub database_acquire_timeout: Duration,
    /// Longest run time of one statement, e.g. `20s`; the server cancels it afterwards.
    #[arg(long, env = "DATABASE_STATEMENT_TIMEOUT", default_value = "20s", value_parser = humantime::parse_duration)]
    pub database_statement_timeout: Duration,
}

/// Connection options from a URL, with the limits that keep a lost client from holding locks.
///
/// # Errors
/// A URL that does not parse; the message does not contain it.
pub fn connect_options(
    application: &str,
    url: &Secret,
    settings: &PoolSettings,
) -> Result<PgConnectOptions, sqlx::Error> {
    let millis = |duration: Duration| duration.as_millis().to_string();
    Ok(PgConnectOptions::from_str(url.expose())?
        .application_name(application)
        .log_statements(log::LevelFilter::Off)
        .log_slow_statements(log::LevelFilter::Warn, Duration::from_secs(1))
        .options([
            ("statement_timeout", millis(settings.database_statement_timeout)),
            // A client that froze between two statements must not hold row locks for ever (HAZARDS H3, H23).
            ("idle_in_transaction_session_timeout", "30000".to_owned()),
            // Nor one whose machine vanished in the middle of a statement: noticed after a minute instead of two hours.
            ("tcp_keepalives_idle", "30".to_owned()),
            ("tcp_keepalives_interval", "10".to_owned()),
            ("tcp_keepalives_count", "3".to_owned()),
        ]))
}

/// A pool of one connection, for a purpose that must neither wait for the requests nor hold them up: health checks (a service
/// whose own pool is busy is busy, not unready), and what operators ask.
///
/// # Errors
/// A URL that does not parse.
pub fn single_pool(application: &str, url: &Secret, settings: &PoolSettings) -> Result<PgPool, sqlx::Error> {
    pool(
        application,
        url,
        &PoolSettings {
            database_max_connections: 1,
            ..settings.clone()
        },
    )
}

/// A pool that opens connections when they are needed, so that a service starts while its database is away.
///
/// # Errors
/// A URL that does not parse.
pub fn pool(application: &str, url: &Secret, settings: &PoolSettings) -> Result<PgPool, sqlx::Error> {
    Ok(PgPoolOptions::new()
        .max_connections(settings.database_max_connections)
        .acquire_timeout(settings.database_acquire_timeout)
        .max_lifetime(Duration::from_secs(30 * 60))
        // A `begin` that is dropped half-way leaves a transaction that the driver knows nothing of; whoever got the
        // connection next would work inside it, unseen by anybody else (HAZARDS H3, transact-rs/sqlx 4385).
        .after_release(|connection, _| {
            Box::pin(async move {
                let outside = tokio::time::timeout(RETURN_LIMIT, is_outside_transaction(connection)).await;
                // Without an answer it is closed: a server that vanished must not keep a place in the pool.
                outside.unwrap_or(Ok(false))
            })
        })
        .connect_lazy_with(connect_options(application, url, settings)?))
}

/// Asks the server, because the driver does not know. A ROLLBACK would cure the connection, and have the server log a warning
/// for each one that was well: it says that there is no transaction in progress.
///
/// # Errors
/// If the server says no, as it does in a transaction that has failed.
async fn is_outside_transaction(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    match connection.begin_with("SELECT").await {
        // The server is in no transaction after the statement.
        Err(sqlx::Error::BeginFailed) => Ok(true),
        Ok(_in_one) => Ok(false),
        Err(error) => Err(error),
    }
}
