use sqlx::{FromRow, PgConnection, PgPool};
use time::OffsetDateTime;

use super::Table;
use crate::rate_limit::{Budget, Rate};

/// What operators have set for all instances of a consumer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Remembered {
    /// Why nothing is applied, if nothing is.
    pub paused: Option<String>,
    /// Where the settings do not decide.
    pub rates: Vec<(Budget, Rate)>,
    /// When and by whom it was set last.
    pub changed: Option<(OffsetDateTime, String)>,
    /// Raised with each change; 0 if nothing was ever set.
    pub(crate) version: i64,
}

#[derive(FromRow)]
struct Row {
    paused: Option<String>,
    live_rate: Option<String>,
    retry_rate: Option<String>,
    redrive_rate: Option<String>,
    changed_at: OffsetDateTime,
    changed_by: String,
    version: i64,
}

impl Remembered {
    /// The rate that was set for a budget, if one was.
    pub fn rate(&self, budget: Budget) -> Option<Rate> {
        self.rates.iter().find(|(of, _)| *of == budget).map(|(_, rate)| *rate)
    }

    /// `None`: as the settings say.
    pub(crate) fn set_rate(&mut self, budget: Budget, rate: Option<Rate>) {
        self.rates.retain(|(of, _)| *of != budget);
        self.rates.extend(rate.map(|rate| (budget, rate)));
    }
}

impl Table {
    pub(crate) async fn controls(&self, pool: &PgPool) -> Result<Remembered, sqlx::Error> {
        let row: Option<Row> = sqlx::query_as(self.sql(&format!("{READ} WHERE consumer = $1")))
            .bind(self.consumer())
            .fetch_optional(pool)
            .await?;
        Ok(row.map(remembered).unwrap_or_default())
    }

    /// The same, to be changed by this transaction and nobody else until it ends.
    pub(crate) async fn lock_controls(
        &self,
        connection: &mut PgConnection,
        by: &str,
    ) -> Result<Remembered, sqlx::Error> {
        let insert =
            "INSERT INTO {schema}.consumer_controls (consumer, changed_by) VALUES ($1, $2) ON CONFLICT DO NOTHING";
        sqlx::query(self.sql(insert))
            .bind(self.consumer())
            .bind(by)
            .execute(&mut *connection)
            .await?;
        let row: Row = sqlx::query_as(self.sql(&format!("{READ} WHERE consumer = $1 FOR UPDATE")))
            .bind(self.consumer())
            .fetch_one(connection)
            .await?;
        Ok(remembered(row))
    }

    pub(crate) async fn set_controls(
        &self,
        connection: &mut PgConnection,
        controls: &mut Remembered,
        by: &str,
    ) -> Result<(), sqlx::Error> {
        let rate = |budget| controls.rate(budget).map(|rate| rate.to_string());
        controls.version = sqlx::query_scalar(self.sql(
            "UPDATE {schema}.consumer_controls
                SET paused = $2, live_rate = $3, retry_rate = $4, redrive_rate = $5, changed_by = $6,
                    changed_at = clock_timestamp(), version = version + 1
              WHERE consumer = $1 RETURNING version",
        ))
        .bind(self.consumer())
        .bind(&controls.paused)
        .bind(rate(Budget::Live))
        .bind(rate(Budget::Retry))
        .bind(rate(Budget::Redrive))
        .bind(by)
        .fetch_one(connection)
        .await?;
        Ok(())
    }

    /// Sessions that wait for a lock in this database, whoever they are.
    pub(crate) async fn lock_waits(&self, pool: &PgPool) -> Result<u32, sqlx::Error> {
        let waits: i64 = sqlx::query_scalar(
            "SELECT count(DISTINCT pid) FROM pg_catalog.pg_locks JOIN pg_catalog.pg_stat_activity USING (pid)
              WHERE NOT granted AND datname = current_database()",
        )
        .fetch_one(pool)
        .await?;
        Ok(u32::try_from(waits).unwrap_or(u32::MAX))
    }
}

const READ: &str = "SELECT paused, live_rate, retry_rate, redrive_rate, changed_at, changed_by, version FROM {schema}.consumer_controls";

fn remembered(row: Row) -> Remembered {
    let mut remembered = Remembered {
        paused: row.paused,
        rates: Vec::new(),
        changed: Some((row.changed_at, row.changed_by)),
        version: row.version,
    };
    for (budget, rate) in [
        (Budget::Live, row.live_rate),
        (Budget::Retry, row.retry_rate),
        (Budget::Redrive, row.redrive_rate),
    ] {
        // The table's own constraints let nothing else in.
        remembered.set_rate(budget, rate.and_then(|rate| rate.parse().ok()));
    }
    remembered
}
