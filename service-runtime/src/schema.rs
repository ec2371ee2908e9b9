use std::{str::FromStr, time::Duration};

use sqlx::{
    ConnectOptions, Connection, PgConnection,
    migrate::{MigrateError, Migrator},
    postgres::{PgConnectOptions, PgPool},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{health::Readiness, settings::Secret};

const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Why the schema is not what this build needs.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    #[error("the database cannot be reached")]
    Unreachable(#[source] sqlx::Error),
    #[error("a migration failed")]
    Migration(#[source] MigrateError),
    #[error("schema {schema} lacks migration {version}; run `migrate`, or give the migration URL")]
    Behind { schema: &'static str, version: i64 },
}

/// Creates the schema if need be and applies what is missing, as the owner. Several processes may do this at once: the
/// first one works, the others wait for it and find nothing to do.
///
/// # Errors
/// [`SchemaError`]; a migration that fails is rolled back.
pub async fn migrate(url: &Secret, schema: &'static str, migrator: &Migrator) -> Result<(), SchemaError> {
    let mut connection = owner_connection(url, schema).await.map_err(SchemaError::Unreachable)?;
    // CREATE SCHEMA IF NOT EXISTS is not safe against itself; the lock is the schema's own and ends with the session.
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
        "SELECT pg_advisory_lock(hashtext('migrate {schema}'));
         CREATE SCHEMA IF NOT EXISTS {schema};"
    )))
    .execute(&mut connection)
    .await
    .map_err(SchemaError::Unreachable)?;
    migrator
        .run_direct(None, &mut connection, false)
        .await
        .map_err(SchemaError::Migration)?;
    connection.close().await.map_err(SchemaError::Unreachable)
}

async fn owner_connection(url: &Secret, schema: &str) -> Result<PgConnection, sqlx::Error> {
    // sqlx keeps its record of applied migrations in the first schema of the path: one record per service.
    PgConnectOptions::from_str(url.expose())?
        .application_name("migrate")
        .log_statements(log::LevelFilter::Off)
        .options([("search_path", schema)])
        .connect()
        .await
}

/// Whether every migration of this build has been applied; for a service that may not migrate by itself.
///
/// # Errors
/// [`SchemaError::Behind`] names the first one missing.
pub async fn verify_schema(pool: &PgPool, schema: &'static str, migrator: &Migrator) -> Result<(), SchemaError> {
    let first = migrator
        .iter()
        .map(|migration| migration.version)
        .min()
        .unwrap_or_default();
    let applied: Result<Vec<(i64,)>, sqlx::Error> = sqlx::query_as(sqlx::AssertSqlSafe(format!(
        "SELECT version FROM {schema}._sqlx_migrations WHERE success"
    )))
    .fetch_all(pool)
    .await;
    let applied = match applied {
        Ok(rows) => rows,
        // 42P01 undefined table, 3F000 invalid schema: nothing was ever migrated here.
        Err(sqlx::Error::Database(error)) if matches!(error.code().as_deref(), Some("42P01" | "3F000")) => {
            return Err(SchemaError::Behind { schema, version: first });
        }
        Err(error) => return Err(SchemaError::Unreachable(error)),
    };
    match migrator
        .iter()
        .find(|migration| !applied.contains(&(migration.version,)))
    {
        Some(missing) => Err(SchemaError::Behind {
            schema,
            version: missing.version,
        }),
        None => Ok(()),
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// Not known yet, or the database is away; the text says which.
    Waiting(String),
    Current,
    /// A migration is missing and this process may not apply it. Final.
    Behind,
}

/// Makes sure, once per process, that the schema has every migration of this build.
#[derive(Debug)]
pub struct SchemaCheck {
    pool: PgPool,
    migration_url: Option<Secret>,
    schema: &'static str,
    migrator: &'static Migrator,
    state: watch::Sender<State>,
}

impl SchemaCheck {
    /// With a migration URL the check applies what is missing, without one it only looks.
    pub fn new(pool: PgPool, migration_url: Option<Secret>, schema: &'static str, migrator: &'static Migrator) -> Self {
        Self {
            pool,
            migration_url,
            schema,
            migrator,
            state: watch::Sender::new(State::Waiting("not checked yet".to_owned())),
        }
    }

    /// For `/health/ready`.
    pub fn readiness(&self) -> Readiness {
        match &*self.state.borrow() {
            State::Current => Readiness::Ready,
            State::Waiting(reason) => Readiness::NotReady(reason.clone()),
            State::Behind => Readiness::NotReady("a migration is missing".to_owned()),
        }
    }

    /// Whether the process must end with the code of a configuration error.
    pub fn is_behind(&self) -> bool {
        *self.state.borrow() == State::Behind
    }

    /// Migrates or verifies; while the database is away, tries again until `stop`. The process lives on meanwhile, so
    /// that an orchestrator does not restart it for somebody else's outage.
    ///
    /// # Errors
    /// The schema is behind, or a migration failed.
    pub async fn run(&self, stop: &CancellationToken) -> Result<(), SchemaError> {
        let mut pause = FIRST_PAUSE;
        loop {
            match self.check().await {
                Ok(()) => {
                    self.state.send_replace(State::Current);
                    return Ok(());
                }
                // A URL that is none stays so.
                Err(SchemaError::Unreachable(error)) if !matches!(error, sqlx::Error::Configuration(_)) => {
                    tracing::warn!(%error, ?pause, "the schema could not be checked, trying again");
                    self.state.send_replace(State::Waiting(error.to_string()));
                }
                Err(error) => {
                    if matches!(error, SchemaError::Behind { .. }) {
                        self.state.send_replace(State::Behind);
                    }
                    return Err(error);
                }
            }
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
            }
        }
    }

    /// Waits until the schema is current; false if `stop` came first.
    pub async fn is_current(&self, stop: &CancellationToken) -> bool {
        let mut state = self.state.subscribe();
        tokio::select! {
            () = stop.cancelled() => false,
            current = state.wait_for(|state| *state == State::Current) => current.is_ok(),
        }
    }

    async fn check(&self) -> Result<(), SchemaError> {
        match &self.migration_url {
            Some(url) => migrate(url, self.schema, self.migrator).await,
            None => verify_schema(&self.pool, self.schema, self.migrator).await,
        }
    }
}
