use std::time::Duration;

use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;

use crate::{
    delivery::UNMARKED_MARGIN,
    limited_pool::LimitedPool,
    relay::WalBudget,
    status::{Metrics, Seen, SlotHealth, with_causes},
    table::{self, Table},
};

/// The slot is looked at this often: a log volume fills in minutes.
const SLOT_INTERVAL: Duration = Duration::from_secs(1);
/// Counting a long backlog costs more.
const BACKLOG_EVERY: u32 = 5;
/// A slot that stands still for so long has no reader, or one that cannot go on.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(60);
/// A server that vanished without a reset never answers.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is looked at, and when it costs too much.
pub(crate) struct Watched {
    pub(crate) slot: String,
    /// Rows bear marks; without them the recorded position says what is published.
    pub(crate) marks: bool,
    pub(crate) budget: WalBudget,
}

/// Looks at backlog and slot until told to stop, also while the relay fails or stands by: a relay that is down must not
/// take the view of its backlog with it. `breach` says why the slot costs more than its budget, while it does.
pub(crate) async fn monitor(
    table: Table,
    pool: LimitedPool,
    Watched { slot, marks, budget }: Watched,
    metrics: Metrics,
    breach: watch::Sender<Option<String>>,
    stop: CancellationToken,
) {
    let mut due = tokio::time::interval(SLOT_INTERVAL);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut seen = Seen::default();
    let mut position = Stillness::default();
    let mut reachable = true;
    let mut told = false;
    for round in 0_u32.. {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = due.tick() => {}
        }
        let look = async {
            if round % BACKLOG_EVERY == 0 {
                let unmarked_before = table::unmarked_before(&table, &pool, &slot).await?;
                // Nearer than what counts as sent after a switch: the margin would be the backlog of an idle outbox.
                let since = unmarked_before.map(|before| if marks { before } else { before + UNMARKED_MARGIN });
                seen.backlog = Some(table::backlog(&table, &pool, since).await?);
            }
            let row = table::slot(&pool, &slot).await?;
            seen.slot = row.and_then(|row| {
                Some(SlotHealth {
                    lag_bytes: row.lag?,
                    // A slot that the server has given up holds nothing back.
                    retained_bytes: row.retained.unwrap_or_default(),
                    still_for: position.still_for(row.confirmed?, row.lag?),
                })
            });
            Ok(())
        };
        let looked = tokio::time::timeout(PATIENCE, look)
            .await
            .unwrap_or(Err(sqlx::Error::PoolTimedOut));
        if let Err(error) = &looked {
            if reachable {
                tracing::warn!(
                    error = with_causes(error),
                    "backlog and slot are unknown until the database answers"
                );
            }
            seen = Seen::default();
        }
        reachable = looked.is_ok();
        metrics.seen(seen.clone());
        if let Some(health) = seen.slot
            && health.still_for > FORGOTTEN_AFTER
            && !told
        {
            told = true;
            tracing::warn!(
                slot,
                retained_bytes = health.retained_bytes,
                "nobody moves this slot, and the server keeps log for it; drop it if no relay is to follow the log again"
            );
        }
        // While nothing is known, the last judgement stands.
        if reachable {
            let reason = seen.slot.and_then(|slot| budget.breach(&slot));
            breach.send_if_modified(|current| {
                let changed = current.is_some() != reason.is_some();
                if let (true, Some(reason)) = (changed, &reason) {
                    tracing::error!(slot, reason, "the slot costs more than its budget");
                }
                *current = reason;
                changed
            });
        }
    }
}

/// Since when a position has not moved.
#[derive(Default)]
struct Stillness(Option<(i64, Instant)>);

impl Stillness {
    fn still_for(&mut self, confirmed: i64, lag: i64) -> Duration {
        match self.0 {
            Some((position, since)) if position == confirmed && lag > 0 => since.elapsed(),
            _ => {
                self.0 = Some((confirmed, Instant::now()));
                Duration::ZERO
            }
        }
    }
}
