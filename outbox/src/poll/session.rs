use std::{sync::Arc, time::Duration};

use sqlx::types::Uuid;
use time::OffsetDateTime;
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

use super::leases::Leases;
use crate::{
    delivery::Delivery,
    limited_pool::LimitedPool,
    status::StatusWriter,
    sweep::{SweepError, pass},
    table::{Table, Unsent},
    upkeep::Upkeep,
};

/// First pause after a pass that found nothing; doubled with each, up to the setting.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
/// A pass that finds fewer rows has caught up with those who commit.
const FEW: u64 = 1_000;
const UPKEEP_INTERVAL: Duration = Duration::from_secs(1);
/// How long a stop waits for the broker to acknowledge what is on its way; the rest comes again.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, Clone)]
pub(crate) struct PollSettings {
    /// Longest pause between two passes that find nothing.
    pub(crate) longest_pause: Duration,
    /// Rows younger than this are left to whoever else publishes them.
    pub(crate) grace: Duration,
    /// Rows created before it count as sent, marked or not.
    pub(crate) since: Option<OffsetDateTime>,
    /// Somebody in this process has committed events.
    pub(crate) wake: Arc<Notify>,
}

/// One life of the table as a source.
pub(crate) struct Poll<'a> {
    pub(crate) table: &'a Table,
    pub(crate) pool: &'a LimitedPool,
    /// This instance among those that share the keys.
    pub(crate) member: Uuid,
    pub(crate) status: &'a StatusWriter,
    pub(crate) settings: &'a PollSettings,
    /// Told of each pass that finds little to send while the broker answers: the backlog is published.
    pub(crate) drained: &'a Notify,
}

impl Poll<'_> {
    /// Passes over the unsent rows of the leased keys: next pages → publish → mark, until told to stop.
    pub(crate) async fn run(
        &self,
        delivery: &mut Delivery,
        upkeep: &mut Upkeep,
        stop: &CancellationToken,
    ) -> Result<(), SweepError> {
        let Self {
            table,
            pool,
            member,
            status,
            settings,
            drained,
        } = *self;
        let mut leases = Leases::keep(table.clone(), pool.clone(), member);
        let mut pause = FIRST_PAUSE;
        let mut upkeep_due = Instant::now() + UPKEEP_INTERVAL;
        loop {
            let held = leases.held();
            let keep = held.keep();
            if !held.is_valid() || keep.is_empty() {
                // Others have them all, or the database does not answer.
                status.without_keys(held.is_valid());
                if held.is_valid() {
                    drained.notify_one();
                }
                tokio::select! {
                    () = stop.cancelled() => break,
                    () = leases.changed() => continue,
                    () = tokio::time::sleep(UPKEEP_INTERVAL) => continue,
                }
            }
            status.polling(delivery.is_stalled());
            let surplus = held.surplus();
            if !surplus.is_empty() {
                // Whoever gets them must find marked what we have sent, or it goes out twice.
                tokio::select! {
                    () = stop.cancelled() => break,
                    finished = delivery.finish() => { finished?; }
                }
                leases.give_back(&surplus).await?;
            }
            let wanted = Unsent {
                buckets: Some(keep),
                since: settings.since,
                before: (!settings.grace.is_zero()).then(|| OffsetDateTime::now_utc() - settings.grace),
            };
            let sent = tokio::select! {
                () = stop.cancelled() => break,
                passed = pass(table, pool, delivery, &wanted, || held.is_valid()) => passed,
            };
            let sent = match sent {
                // The lease may have been renewed meanwhile.
                Err(SweepError::LeaseLost) if leases.held().is_valid() => 1,
                Err(error) => return Err(error),
                Ok(passed) => {
                    if passed.is_all && passed.sent < FEW && !delivery.is_lagging() {
                        drained.notify_one();
                    }
                    passed.sent
                }
            };
            if upkeep_due <= Instant::now() {
                tokio::select! {
                    () = stop.cancelled() => break,
                    kept = upkeep.round(delivery, &wanted, OffsetDateTime::now_utc()) => kept?,
                }
                upkeep_due = Instant::now() + UPKEEP_INTERVAL;
            }
            if sent > 0 {
                pause = FIRST_PAUSE;
            }
            let next_pass = Instant::now() + pause;
            let mut waiting = true;
            while waiting && sent == 0 {
                tokio::select! {
                    () = stop.cancelled() => waiting = false,
                    () = settings.wake.notified() => { pause = FIRST_PAUSE; waiting = false }
                    () = leases.changed() => waiting = false,
                    () = tokio::time::sleep_until(next_pass) => {
                        pause = (pause * 2).min(settings.longest_pause);
                        waiting = false;
                    }
                    progress = delivery.progress() => progress?,
                }
            }
            if stop.is_cancelled() {
                break;
            }
        }
        match tokio::time::timeout(DRAIN_LIMIT, delivery.finish()).await {
            Ok(finished) => finished?,
            Err(_) => tracing::warn!("the broker did not acknowledge in time; unacknowledged events are sent again"),
        }
        leases.leave().await;
        Ok(())
    }
}
