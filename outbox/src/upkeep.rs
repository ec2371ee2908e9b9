use std::time::Duration;

use shared_events::envelope::format_timestamp;
use sqlx::types::Uuid;
use time::OffsetDateTime;
use tokio::time::Instant;

use crate::{
    delivery::{Delivery, DeliveryError, Handed},
    limited_pool::LimitedPool,
    status::Metrics,
    sweep::SweepError,
    table::{self, After, Table, Unsent, UnsentRow},
};

/// Rows of one round; the next round goes on.
const ROUND: i64 = 500;
/// Rows looked at in one round for their confirmation.
const LOOKED_AT: i64 = 100_000;
/// How long a round waits for the broker; the next one goes on.
const PATIENCE: Duration = Duration::from_secs(1);
/// Stands in the requests of rows that nobody has confirmed.
const SWEEPER: &str = "sweeper";

/// When a row counts as stuck.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StuckAfter {
    /// Unsent for this long although its source should have brought it; `None` where the source itself finds such rows.
    pub(crate) unsent: Option<Duration>,
    /// Published and not confirmed; `None` without confirmations.
    pub(crate) unconfirmed: Option<Duration>,
}

/// A look at the rows that nobody has confirmed goes on here.
#[derive(Debug, Clone, Copy)]
struct Look {
    from: Uuid,
    /// Nothing before it is left to be confirmed.
    is_settled: bool,
}

/// What a relay does every second beside the next batch: repaired keys, rows asked for again, rows that are stuck.
pub(crate) struct Upkeep {
    table: Table,
    pool: LimitedPool,
    metrics: Metrics,
    stuck_after: StuckAfter,
    confirm_group: String,
    sweep_due: Instant,
    /// Where the next look for stuck rows begins; behind a whole key.
    stuck_from: After,
    /// The round before has not seen all rows.
    look: Option<Look>,
}

impl Upkeep {
    pub(crate) fn new(
        table: Table,
        pool: LimitedPool,
        metrics: Metrics,
        stuck_after: StuckAfter,
        confirm_group: String,
    ) -> Self {
        Self {
            table,
            pool,
            metrics,
            stuck_after,
            confirm_group,
            look: None,
            stuck_from: After::default(),
            sweep_due: Instant::now() + Self::interval(&stuck_after),
        }
    }

    /// One round. `wanted` are the keys of this relay; `horizon` is the time up to which its source has brought
    /// everything. May be dropped half-way: what it has sent is on its way, the rest comes in the next round.
    pub(crate) async fn round(
        &mut self,
        delivery: &mut Delivery,
        wanted: &Unsent,
        horizon: OffsetDateTime,
    ) -> Result<(), SweepError> {
        // With the broker away nothing here helps, and everything would be sent twice when it comes back.
        if delivery.is_stalled() {
            return Ok(());
        }
        let is_all = self.resend(delivery, wanted).await?;
        self.release_keys(delivery).await?;
        let is_due = self.sweep_due <= Instant::now();
        if is_due {
            self.sweep(delivery, wanted, horizon).await?;
            self.sweep_due = Instant::now() + Self::interval(&self.stuck_after);
        }
        // Not more than can be sent: the requests would only gather.
        if let Some(patience) = self.stuck_after.unconfirmed
            && is_all
            && (is_due || self.look.is_some())
        {
            self.look = self.ask_for_unconfirmed(patience).await?;
        }
        Ok(())
    }

    /// A quarter of the shortest patience, so that a row waits little longer than it has to.
    fn interval(stuck_after: &StuckAfter) -> Duration {
        let shortest = stuck_after.unsent.into_iter().chain(stuck_after.unconfirmed).min();
        shortest.map_or(Duration::from_secs(60), |patience| patience / 4)
    }

    /// Sends what operators asked for. False if there may be more.
    async fn resend(&self, delivery: &mut Delivery, wanted: &Unsent) -> Result<bool, SweepError> {
        let buckets = wanted.buckets.as_deref();
        let (rows, failed) = table::next_resends(&self.table, &self.pool, buckets, ROUND).await?;
        let mut sent = Vec::new();
        for row in &rows {
            delivery.try_again(row.id);
            if failed.contains(&row.id) {
                self.repair(delivery, row).await?;
                continue;
            }
            match self.publish(delivery, row).await? {
                Some(Handed::Over) => sent.push(row.id),
                // One behind a row that was set aside stays asked for: it goes when its key does.
                Some(Handed::Withheld | Handed::Published) => {}
                // The others would wait in vain as well.
                None => break,
            }
        }
        let is_all = (rows.len() as i64) < ROUND;
        if sent.is_empty() || !delivery.finish_within(PATIENCE).await? {
            return Ok(is_all);
        }
        table::mark_published_again(&self.table, &self.pool, &sent).await?;
        table::resend_done(&self.table, &self.pool, &sent, None).await?;
        self.metrics.resent(sent.len());
        tracing::info!(rows = sent.len(), first = %sent[0], "sent again as asked");
        Ok(is_all)
    }

    /// Sends a row that was set aside, alone, so that a second refusal is its own; then its key's waiting rows in their
    /// order. Until all of them are acknowledged the row stays set aside: a crash finds the key waiting, and the request open.
    async fn repair(&self, delivery: &mut Delivery, row: &UnsentRow) -> Result<(), SweepError> {
        let time = format_timestamp(row.created_at)?;
        let event = row.outgoing(&time);
        delivery.hold_mark(row.id);
        if let Some(error) = delivery.publish_alone(event).await? {
            delivery.set_aside(event, &error).await?;
            let refusal = error.to_string();
            table::resend_done(&self.table, &self.pool, &[row.id], Some(&refusal)).await?;
            return Err(DeliveryError::Renew.into());
        }
        let key = &row.aggregate_id;
        if !self.send_waiting(delivery, key, row.sequence).await? {
            return Ok(());
        }
        let repaired = [row.id];
        table::mark_published(&self.table, &self.pool, &repaired).await?;
        table::resend_done(&self.table, &self.pool, &repaired, None).await?;
        self.metrics.resent(1);
        tracing::info!(event_id = %row.id, key, "the row is repaired, its key goes on");
        Ok(())
    }

    /// Lets keys go on whose row was found to be published by somebody else.
    async fn release_keys(&self, delivery: &mut Delivery) -> Result<(), SweepError> {
        let failed = table::failed_keys(&self.table, &self.pool).await?;
        let repaired: Vec<String> = delivery
            .blocked()
            .keys()
            .filter(|key| !failed.contains(key))
            .cloned()
            .collect();
        delivery.block(failed);
        for key in repaired {
            if self.send_waiting(delivery, &key, 0).await? {
                tracing::info!(key, "the key goes on");
            }
        }
        Ok(())
    }

    /// Sends a key's unsent rows after `sequence`, and waits until they are acknowledged. False if the key must wait on.
    async fn send_waiting(&self, delivery: &mut Delivery, key: &str, sequence: i64) -> Result<bool, SweepError> {
        // The log brings a row before it can be seen. Once the last one is seen, so are those before it: the row lock of
        // their aggregate orders the commits.
        if let Some(last_withheld) = delivery.blocked().get(key).copied().flatten()
            && !table::is_seen(&self.table, &self.pool, last_withheld).await?
        {
            return Ok(false);
        }
        let last_withheld = delivery.unblock(key);
        let mut after = sequence;
        loop {
            let rows = table::unsent_of_key(&self.table, &self.pool, key, after, ROUND).await?;
            for row in &rows {
                if self.publish(delivery, row).await?.is_none() {
                    delivery.withhold_again(key, last_withheld);
                    return Ok(false);
                }
                after = row.sequence;
            }
            if (rows.len() as i64) < ROUND {
                break;
            }
        }
        let finished = delivery.finish_within(PATIENCE).await?;
        if !finished {
            delivery.withhold_again(key, last_withheld);
        }
        Ok(finished)
    }

    /// Sends rows that are stuck. Nothing of the source is read meanwhile, and a backlog that is on its way may be long: mostly one
    /// look says that none of it is stuck, and a walk through it ends after a second and goes on the next time.
    async fn sweep(
        &mut self,
        delivery: &mut Delivery,
        wanted: &Unsent,
        horizon: OffsetDateTime,
    ) -> Result<(), SweepError> {
        let Some(patience) = self.stuck_after.unsent else {
            return Ok(());
        };
        // Nothing of them may be on its way.
        if !delivery.finish_within(PATIENCE).await? {
            return Ok(());
        }
        let stuck = Unsent {
            before: Some(horizon - patience),
            ..wanted.clone()
        };
        if !table::is_any_unsent(&self.table, &self.pool, &stuck).await? {
            return Ok(());
        }
        let give_up = Instant::now() + PATIENCE;
        while Instant::now() < give_up {
            let (rows, next) = table::unsent(&self.table, &self.pool, &stuck, &self.stuck_from, ROUND).await?;
            for row in &rows {
                if self.publish(delivery, row).await?.is_none() {
                    return Ok(());
                }
            }
            if let Some(row) = rows.first() {
                self.metrics.swept("init", rows.len());
                tracing::warn!(rows = rows.len(), first = %row.id, ?patience, "rows were stuck unsent; sent now");
                // What is stuck goes some at a time, and the next look begins here.
                return Ok(());
            }
            // Rows that are not stuck fill looks too.
            let is_through = next.is_none();
            self.stuck_from = next.unwrap_or_default();
            if is_through {
                break;
            }
        }
        Ok(())
    }

    /// Asks for what nobody has read back in time to be sent again; returns where the next round goes on. Each look begins
    /// where the rows before are settled, so nothing is passed for good that is still to be confirmed.
    async fn ask_for_unconfirmed(&self, patience: Duration) -> Result<Option<Look>, SweepError> {
        let (table, pool, group) = (&self.table, &self.pool, &self.confirm_group);
        let patience_s = patience.as_secs_f64();
        let (settled_to, horizon) = table::settled_to(table, pool, group, patience_s).await?;
        let begin = Look {
            from: settled_to,
            is_settled: true,
        };
        let Look { from, is_settled } = self.look.unwrap_or(begin);
        let found = table::unconfirmed(table, pool, from, horizon, patience_s, LOOKED_AT).await?;
        let reason = format!("not confirmed within {} s", patience.as_secs());
        let rows = table::request_resends(table, pool, &found.due, SWEEPER, &reason).await?;
        if rows > 0 {
            self.metrics.swept("published", rows as usize);
            tracing::warn!(rows, first = %found.due[0], ?patience, "published and not confirmed; sending again");
        }
        if is_settled {
            let to = found.first.or(found.next).unwrap_or(horizon);
            table::record_settled(table, pool, group, to, patience_s).await?;
        }
        Ok(found.next.map(|from| Look {
            from,
            is_settled: is_settled && found.first.is_none(),
        }))
    }

    /// `None` if there was no room for it in time: the broker is slow or away, and whoever called us has more to do.
    async fn publish(&self, delivery: &mut Delivery, row: &UnsentRow) -> Result<Option<Handed>, SweepError> {
        let give_up = Instant::now() + PATIENCE;
        while !delivery.has_room_for(&row.aggregate_id) {
            match tokio::time::timeout_at(give_up, delivery.progress()).await {
                Ok(progress) => progress?,
                Err(_) => return Ok(None),
            }
        }
        let time = format_timestamp(row.created_at)?;
        Ok(Some(delivery.publish(row.outgoing(&time)).await?))
    }
}
