use std::sync::atomic::{AtomicU32, Ordering};

use sqlx::PgTransaction;

use crate::{handler::IncomingEvent, table::Table};

/// From so many events on, rows that are expected to be new go as a stream; for fewer, its one more round trip is dear.
const STREAMED_FROM: usize = 16;

/// After so many batches in a row that brought nothing known, the next one is expected to bring nothing known either. Events come
/// again in numbers after a crash, a rebalance, a relay that sends again, and hardly ever in between; but steadily while some
/// orders take the synchronous path. A wrong guess costs a transaction; of those that follow one another, at most one in five.
const SURE_AFTER: u32 = 4;

/// What the next events are expected to be. Nothing depends on it but time: the key of the table decides.
#[derive(Debug, Default)]
pub(crate) struct Expectation {
    new_in_a_row: AtomicU32,
}

impl Expectation {
    fn all_new(&self) -> bool {
        self.new_in_a_row.load(Ordering::Relaxed) >= SURE_AFTER
    }

    fn learn(&self, all_new: bool) {
        let batches = self.new_in_a_row.load(Ordering::Relaxed);
        self.new_in_a_row
            .store(if all_new { batches.saturating_add(1) } else { 0 }, Ordering::Relaxed);
    }

    /// A transaction failed, and may have happened all the same; or a partition is new here.
    pub(crate) fn forget(&self) {
        self.learn(false);
    }
}

/// Events that were expected to be new have taken effect before: the transaction is of no use, and is to be made again.
#[derive(Debug)]
pub(crate) struct Known;

/// Inserts the inbox rows of a batch and tells which of its events are new.
pub(crate) async fn claim(
    table: &Table,
    transaction: &mut PgTransaction<'_>,
    events: &[IncomingEvent],
    expectation: &Expectation,
) -> Result<Result<Vec<bool>, Known>, sqlx::Error> {
    if events.len() >= STREAMED_FROM && expectation.all_new() {
        if table.claim_new(transaction, events).await? {
            return Ok(Ok(vec![true; events.len()]));
        }
        expectation.learn(false);
        return Ok(Err(Known));
    }
    let mut claimed = table.claim(transaction, events).await?;
    // The same id twice in one batch: the first one is the event, the second a duplicate of it.
    let is_new: Vec<bool> = events.iter().map(|event| claimed.remove(&event.envelope.id)).collect();
    expectation.learn(!is_new.contains(&false));
    Ok(Ok(is_new))
}
