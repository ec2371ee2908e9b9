use uuid::Uuid;

use super::{Actor, LetterFilter, MEANT, Operator, bind_filter};

/// Whether letters that need nobody any more are shown with the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shelving {
    /// They are left out of lists and groups, and deleted after their retention.
    Archive,
    /// They are back in the state that they had.
    Restore,
}

impl Shelving {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Archive => "archive",
            Self::Restore => "restore",
        }
    }

    /// The letters that it may be done to.
    fn possible(self) -> &'static str {
        match self {
            Self::Archive => {
                "archived_at IS NULL AND (state = 'resolved' OR (state = 'open' AND aggregate_id IS NULL AND NOT holds))"
            }
            Self::Restore => "archived_at IS NOT NULL",
        }
    }
}

impl Operator {
    /// The letters that a filter means and that this may be done to, the latest first, at most `most`.
    ///
    /// # Errors
    /// Any database error.
    pub async fn select_for(
        &self,
        shelving: Shelving,
        filter: &LetterFilter,
        most: u32,
    ) -> Result<Vec<Uuid>, sqlx::Error> {
        let state = match shelving {
            Shelving::Archive => filter.state.clone(),
            Shelving::Restore => Some("archived".to_owned()),
        };
        let filter = LetterFilter {
            state,
            ..filter.clone()
        };
        let sql = format!(
            "SELECT id FROM {{schema}}.dead_letters WHERE {MEANT} AND {} ORDER BY last_died_at DESC, id DESC LIMIT $10",
            shelving.possible()
        );
        bind_filter!(sqlx::query_scalar(self.table.sql(&sql)), self.table.consumer(), &filter)
            .bind(i64::from(most))
            .fetch_all(&self.pool)
            .await
    }

    /// Those of these letters that this may be done to.
    ///
    /// # Errors
    /// Any database error.
    pub async fn possible_for(&self, shelving: Shelving, ids: &[Uuid]) -> Result<Vec<Uuid>, sqlx::Error> {
        let sql = format!(
            "SELECT id FROM {{schema}}.dead_letters WHERE consumer = $1 AND id = ANY($2) AND {} ORDER BY id",
            shelving.possible()
        );
        sqlx::query_scalar(self.table.sql(&sql))
            .bind(self.table.consumer())
            .bind(ids)
            .fetch_all(&self.pool)
            .await
    }

    /// Archives letters or takes them back, and returns the ids of those that were meant; the others are left as they are.
    ///
    /// # Errors
    /// Any database error; nothing has changed then.
    pub async fn shelve(&self, ids: &[Uuid], shelving: Shelving, actor: Actor<'_>) -> Result<Vec<Uuid>, sqlx::Error> {
        let archived_at = match shelving {
            Shelving::Archive => "clock_timestamp()",
            Shelving::Restore => "NULL",
        };
        let mut transaction = self.pool.begin().await?;
        self.lock_letters(&mut transaction, ids).await?;
        let sql = format!(
            "UPDATE {{schema}}.dead_letters SET archived_at = {archived_at}
              WHERE consumer = $1 AND id = ANY($2) AND {} RETURNING id",
            shelving.possible()
        );
        let mut shelved: Vec<Uuid> = sqlx::query_scalar(self.table.sql(&sql))
            .bind(self.table.consumer())
            .bind(ids)
            .fetch_all(&mut *transaction)
            .await?;
        if !shelved.is_empty() {
            shelved.sort();
            let target = serde_json::json!({ "letters": shelved }).to_string();
            self.note(&mut transaction, shelving.as_str(), &target, actor).await?;
        }
        transaction.commit().await?;
        Ok(shelved)
    }
}
