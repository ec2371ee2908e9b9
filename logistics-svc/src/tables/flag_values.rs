use sqlx::{PgConnection, PgExecutor};
use time::OffsetDateTime;

use crate::flag::{Flag, Mode, Share};

/// A value with who set it, when and why.
#[derive(Debug, Clone)]
pub struct SetFlag {
    pub flag: Flag,
    pub set_at: OffsetDateTime,
    pub set_by: String,
    pub reason: String,
    /// The roll-out whose step it is, or whose end.
    pub rollout: Option<i64>,
}

#[derive(sqlx::FromRow)]
struct Row {
    version: i64,
    mode: String,
    rest: String,
    share: i32,
    set_at: OffsetDateTime,
    set_by: String,
    reason: String,
    rollout: Option<i64>,
}

impl TryFrom<Row> for SetFlag {
    type Error = sqlx::Error;

    fn try_from(row: Row) -> Result<Self, sqlx::Error> {
        let mode = |name: &str| {
            Mode::from_name(name).ok_or_else(|| sqlx::Error::Decode(format!("unknown mode {name:?}").into()))
        };
        let share = Share::from_hundredths(row.share);
        Ok(Self {
            flag: Flag {
                version: row.version,
                mode: mode(&row.mode)?,
                rest: mode(&row.rest)?,
                share: share.ok_or_else(|| sqlx::Error::Decode("a share above 100 %".into()))?,
            },
            set_at: row.set_at,
            set_by: row.set_by,
            reason: row.reason,
            rollout: row.rollout,
        })
    }
}

/// The newest values first, before `version` if that is given.
///
/// # Errors
/// Any database error.
pub async fn newest(
    executor: impl PgExecutor<'_>,
    most: i64,
    before: Option<i64>,
) -> Result<Vec<SetFlag>, sqlx::Error> {
    let rows: Vec<Row> = sqlx::query_as(
        "SELECT version, mode, rest, share, set_at, set_by, reason, rollout
           FROM logistics.flag_values WHERE $2::bigint IS NULL OR version < $2 ORDER BY version DESC LIMIT $1",
    )
    .bind(most)
    .bind(before)
    .fetch_all(executor)
    .await?;
    rows.into_iter().map(SetFlag::try_from).collect()
}

/// The value in force.
///
/// # Errors
/// Any database error.
pub async fn in_force(executor: impl PgExecutor<'_>) -> Result<Flag, sqlx::Error> {
    let newest = newest(executor, 1, None).await?;
    Ok(newest.first().map_or(Flag::FIRST, |set| set.flag))
}

/// The value of this version; before the first one it is [`Flag::FIRST`].
///
/// # Errors
/// Any database error.
pub async fn of_version(executor: impl PgExecutor<'_>, version: i64) -> Result<Flag, sqlx::Error> {
    let found = newest(executor, 1, version.checked_add(1)).await?;
    Ok(found.first().map_or(Flag::FIRST, |set| set.flag))
}

/// Adds a value after the newest one, and returns it with its version. One at a time: another one waits for this transaction.
/// `None` if the newest one is not `after`, where that is given.
///
/// # Errors
/// Any database error; the transaction is then of no use.
pub async fn add(
    connection: &mut PgConnection,
    flag: Flag,
    (set_by, reason): (&str, &str),
    rollout: Option<i64>,
    after: Option<i64>,
) -> Result<Option<Flag>, sqlx::Error> {
    sqlx::query("SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended('logistics.flag_values', 0))")
        .execute(&mut *connection)
        .await?;
    let version: Option<i64> = sqlx::query_scalar(
        "INSERT INTO logistics.flag_values (version, mode, rest, share, set_by, reason, rollout)
         SELECT coalesce(max(version), 0) + 1, $1, $2, $3, $4, $5, $6 FROM logistics.flag_values
         HAVING $7::bigint IS NULL OR coalesce(max(version), 0) = $7
         RETURNING version",
    )
    .bind(flag.mode.name())
    .bind(flag.rest.name())
    .bind(i32::from(flag.share.hundredths()))
    .bind(set_by)
    .bind(reason)
    .bind(rollout)
    .bind(after)
    .fetch_optional(&mut *connection)
    .await?;
    Ok(version.map(|version| Flag { version, ..flag }))
}
