use sqlx::{PgConnection, PgExecutor};
use time::OffsetDateTime;
use uuid::Uuid;

/// What is exceeded when a roll-out is taken back; what is `None` is not looked at.
#[derive(Debug, Clone, Copy, sqlx::FromRow)]
pub struct StopConditions {
    pub most_mismatches: Option<i64>,
    pub most_lag_seconds: Option<f64>,
    pub most_error_ratio: Option<f64>,
    pub most_dead_letters: Option<i64>,
}

/// A roll-out as it stands.
#[derive(Debug, Clone, sqlx::FromRow)]
pub struct Rollout {
    pub id: i64,
    pub state: String,
    pub mode: String,
    pub rest: String,
    /// Hundredths of a percent, rising.
    pub steps: Vec<i32>,
    pub soak_seconds: f64,
    #[sqlx(flatten)]
    pub stop: StopConditions,
    /// How many steps have begun.
    pub step: i32,
    pub version: Option<i64>,
    pub step_began_at: Option<OffsetDateTime>,
    pub safe_version: i64,
    pub requests_before: Option<i64>,
    pub failures_before: Option<i64>,
    pub compared_before: Option<i64>,
    /// Of the step in force, by the database's clock.
    pub step_age_seconds: Option<f64>,
    /// Since a process last looked at it; `None` if none has, and where it was not asked for.
    #[sqlx(default)]
    pub unwatched_seconds: Option<f64>,
    pub started_at: OffsetDateTime,
    pub started_by: String,
    pub reason: String,
    pub ended_at: Option<OffsetDateTime>,
    pub ended_because: Option<String>,
}

/// One that is to begin.
#[derive(Debug, Clone)]
pub struct NewRollout {
    pub mode: &'static str,
    pub rest: &'static str,
    pub steps: Vec<i32>,
    pub soak_seconds: f64,
    pub stop: StopConditions,
    pub safe_version: i64,
    pub started_by: String,
    pub reason: String,
}

/// `None` if one runs already.
///
/// # Errors
/// Any database error.
pub async fn begin(connection: &mut PgConnection, new: &NewRollout) -> Result<Option<Rollout>, sqlx::Error> {
    sqlx::query_as(
        "INSERT INTO logistics.flag_rollouts (mode, rest, steps, soak_seconds, most_mismatches, most_lag_seconds,
                most_error_ratio, most_dead_letters, safe_version, started_by, reason)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
         ON CONFLICT ((true)) WHERE state = 'running' DO NOTHING
         RETURNING *, NULL::double precision AS step_age_seconds",
    )
    .bind(new.mode)
    .bind(new.rest)
    .bind(&new.steps)
    .bind(new.soak_seconds)
    .bind(new.stop.most_mismatches)
    .bind(new.stop.most_lag_seconds)
    .bind(new.stop.most_error_ratio)
    .bind(new.stop.most_dead_letters)
    .bind(new.safe_version)
    .bind(&new.started_by)
    .bind(&new.reason)
    .fetch_optional(connection)
    .await
}

/// The newest ones.
///
/// # Errors
/// Any database error.
pub async fn newest(executor: impl PgExecutor<'_>, most: i64) -> Result<Vec<Rollout>, sqlx::Error> {
    sqlx::query_as(
        "SELECT *, extract(epoch FROM clock_timestamp() - step_began_at)::double precision AS step_age_seconds
           FROM logistics.flag_rollouts ORDER BY id DESC LIMIT $1",
    )
    .bind(most)
    .fetch_all(executor)
    .await
}

/// The one that runs, locked; `None` also while another process moves it.
///
/// # Errors
/// Any database error.
pub async fn lock_running(connection: &mut PgConnection) -> Result<Option<Rollout>, sqlx::Error> {
    sqlx::query_as(
        "SELECT *, extract(epoch FROM clock_timestamp() - step_began_at)::double precision AS step_age_seconds,
                extract(epoch FROM clock_timestamp() - watched_at)::double precision AS unwatched_seconds
           FROM logistics.flag_rollouts WHERE state = 'running' FOR UPDATE SKIP LOCKED",
    )
    .fetch_optional(connection)
    .await
}

/// A step begins: this version of the flag is it, that one is where a stop now returns to, and this had been counted before.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn note_step(
    connection: &mut PgConnection,
    id: i64,
    (version, safe_version): (i64, i64),
    (requests, failures): (i64, i64),
    compared: i64,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "UPDATE logistics.flag_rollouts
            SET step = step + 1, version = $2, safe_version = $3, step_began_at = clock_timestamp(),
                requests_before = $4, failures_before = $5, compared_before = $6
          WHERE id = $1",
    )
    .bind(id)
    .bind(version)
    .bind(safe_version)
    .bind(requests)
    .bind(failures)
    .bind(compared)
    .execute(connection)
    .await?;
    Ok(())
}

/// A process looks at it. With `soaks_again` its step begins to soak now.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn note_watched(connection: &mut PgConnection, id: i64, soaks_again: bool) -> Result<(), sqlx::Error> {
    sqlx::query(
        "UPDATE logistics.flag_rollouts
            SET watched_at = clock_timestamp(),
                step_began_at = CASE WHEN $2 THEN clock_timestamp() ELSE step_began_at END
          WHERE id = $1",
    )
    .bind(id)
    .bind(soaks_again)
    .execute(connection)
    .await?;
    Ok(())
}

/// `state` is `done`, `returned` or `superseded`.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn end(connection: &mut PgConnection, id: i64, state: &str, because: &str) -> Result<(), sqlx::Error> {
    sqlx::query(
        "UPDATE logistics.flag_rollouts
            SET state = $2, ended_because = $3, ended_at = clock_timestamp() WHERE id = $1 AND state = 'running'",
    )
    .bind(id)
    .bind(state)
    .bind(because)
    .execute(connection)
    .await?;
    Ok(())
}

/// Ends the one that runs, if one does: somebody has set the flag.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn supersede(connection: &mut PgConnection, because: &str) -> Result<(), sqlx::Error> {
    sqlx::query(
        "UPDATE logistics.flag_rollouts
            SET state = 'superseded', ended_because = $1, ended_at = clock_timestamp() WHERE state = 'running'",
    )
    .bind(because)
    .execute(connection)
    .await?;
    Ok(())
}

/// The last events that are older than this, the newest first: what commerce may have of them says whether it lags by more.
///
/// # Errors
/// Any database error.
pub async fn events_older_than(executor: impl PgExecutor<'_>, seconds: f64) -> Result<Vec<Uuid>, sqlx::Error> {
    sqlx::query_scalar(
        "SELECT id FROM logistics.outbox
          WHERE id < logistics.outbox_id_floor(now() - make_interval(secs => $1)) ORDER BY id DESC LIMIT 1000",
    )
    .bind(seconds)
    .fetch_all(executor)
    .await
}
