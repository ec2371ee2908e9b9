use sqlx::{PgPool, types::Uuid};

use crate::{
    limited_pool::LimitedPool,
    table::{self, EventState, Selection, StateCount, Table},
};

/// The outbox of one schema as an operator sees it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Operator {
    table: Table,
    pool: LimitedPool,
}

impl Operator {
    /// # Panics
    /// If `schema` is not a plain lower-case identifier: a defect of the program, found at its start.
    pub fn new(schema: &str, pool: PgPool) -> Self {
        Self {
            table: Table::new(schema),
            pool: pool.into(),
        }
    }

    /// Events per state, in the order of a life; at most 1,000,000 are counted of each.
    ///
    /// # Errors
    /// If the database refuses.
    pub async fn counts(&self) -> Result<Vec<StateCount>, sqlx::Error> {
        table::counts(&self.table, &self.pool).await
    }

    /// One event's life; `None` if there is no such event, or no more.
    ///
    /// # Errors
    /// If the database refuses.
    pub async fn event(&self, id: Uuid) -> Result<Option<EventState>, sqlx::Error> {
        table::event(&self.table, &self.pool, id).await
    }

    /// Ids of the events meant, each key's in its order, at most `limit`.
    ///
    /// # Errors
    /// If the database refuses.
    pub async fn select(&self, meant: &Selection, limit: i64) -> Result<Vec<Uuid>, sqlx::Error> {
        table::select_resends(&self.table, &self.pool, meant, limit).await
    }

    /// Asks the relay to send these events again, within a second or two while it works; those already asked for and not yet
    /// sent are left out. Returns how many. The request stays on record with who and why.
    ///
    /// # Errors
    /// If the database refuses; nothing is asked for then.
    pub async fn resend(&self, ids: &[Uuid], requested_by: &str, reason: &str) -> Result<u64, sqlx::Error> {
        table::request_resends(&self.table, &self.pool, ids, requested_by, reason).await
    }
}
