use sqlx::PgPool;

use crate::{
    fault::Fault,
    shipment::Shipment,
    tables::shipments::{self, Filter},
};

/// The read side. No transaction: every answer is one statement.
#[derive(Debug, Clone)]
pub struct FindShipments {
    pool: PgPool,
}

/// Shipments with falling ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    pub items: Vec<Shipment>,
    /// The next page has the ids below this one; `None` on the last page.
    pub next_before: Option<i64>,
}

impl FindShipments {
    pub fn new(pool: PgPool) -> Self {
        Self { pool }
    }

    /// # Errors
    /// [`Fault`].
    pub async fn one(&self, id: i64) -> Result<Option<Shipment>, Fault> {
        Ok(shipments::find(&self.pool, id).await?)
    }

    /// At most `limit` shipments with ids below `before`.
    ///
    /// # Errors
    /// [`Fault`].
    pub async fn page(&self, filter: &Filter, before: Option<i64>, limit: u16) -> Result<Page, Fault> {
        let limit = usize::from(limit);
        // One more than asked for tells whether there is a next page.
        let mut items = shipments::list(&self.pool, filter, before, limit as i64 + 1).await?;
        let more = items.len() > limit;
        items.truncate(limit);
        let next_before = items.last().filter(|_| more).map(|last| last.id);
        Ok(Page { items, next_before })
    }
}
