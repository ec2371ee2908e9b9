use std::{
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use sqlx::PgPool;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::{
    flood::Flood,
    pace::{Commits, Regulator},
    rate_limit::{Budget, Rate, RateLimits},
    retry::{Backoff, random_unit},
    status::Status,
    table::{Remembered, Table},
};

/// How often an instance looks at what operators set elsewhere.
const LOOK: Duration = Duration::from_secs(1);
/// How long it waits for the answer.
const ANSWER: Duration = Duration::from_secs(5);
/// How often archived letters are looked for that have been kept for long enough.
const UPKEEP: Duration = Duration::from_secs(60);
/// Most letters deleted at once; the rest at the next look.
const DELETED_AT_ONCE: u32 = 500;

/// What an operator may do to this instance; a handle that may be cloned and kept.
#[derive(Debug, Clone)]
pub struct Controls {
    pub(crate) flood: Arc<Flood>,
    limits: RateLimits,
    status: Status,
    /// In force where nothing else is remembered.
    by_settings: [(Budget, Rate); 3],
    /// The version of what is in force.
    followed: Arc<Mutex<i64>>,
}

impl Controls {
    pub(crate) fn new(flood: Flood, limits: RateLimits, status: Status, by_settings: [(Budget, Rate); 3]) -> Self {
        Self {
            flood: Arc::new(flood),
            limits,
            status,
            by_settings,
            followed: Arc::default(),
        }
    }

    /// Why it is stopped by its flood limit, if it is.
    pub fn stopped(&self) -> Option<String> {
        self.flood.stopped()
    }

    /// Goes on after a stop by the flood limit, with fresh counts.
    pub fn resume(&self) {
        self.flood.resume(false);
    }

    /// Brings what is remembered into force here, without waiting for the next look at the table.
    pub fn follow(&self, remembered: &Remembered) {
        let mut followed = self.followed.lock().unwrap_or_else(PoisonError::into_inner);
        // A look that began before a change must not undo it.
        if remembered.version < *followed {
            return;
        }
        *followed = remembered.version;
        for (budget, by_settings) in self.by_settings {
            let rate = remembered.rate(budget).unwrap_or(by_settings);
            if self.limits.total(budget) != rate {
                tracing::info!(budget = budget.as_str(), %rate, "the rate limit has changed");
                self.limits.set(budget, rate);
            }
        }
        self.limits.close(remembered.paused.is_some());
        self.status.paused_by_operator(remembered.paused.clone());
    }
}

/// Follows what is remembered in the table, and the database's health; and deletes what has been archived for long enough.
pub(crate) struct Watch {
    pub(crate) table: Table,
    pub(crate) pool: PgPool,
    pub(crate) controls: Controls,
    /// Whether the limits follow the database, and by which commits.
    pub(crate) regulator: Option<Regulator>,
    pub(crate) commits: Arc<Commits>,
    pub(crate) letters_retention: Duration,
}

impl Watch {
    /// Waits for the first answer: a consumer that was paused must not begin because it was started again.
    pub(crate) async fn begin(&self, stop: &CancellationToken) {
        let known = async {
            let mut backoff = Backoff::new();
            let mut told = false;
            while let Err(reason) = self.look().await {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(
                        reason,
                        "not started: the database does not say whether the group is paused"
                    );
                }
                tokio::time::sleep(backoff.pause(random_unit())).await;
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = known => {}
        }
    }

    /// Looks again and again, until it is dropped. While the database is away, what was set last stays in force.
    pub(crate) async fn run(mut self) -> Infallible {
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut upkeep = Instant::now();
        loop {
            looks.tick().await;
            self.controls.status.sample();
            self.regulate().await;
            if let Err(reason) = self.look().await {
                tracing::debug!(reason, "what operators have set is not known now");
            }
            if Instant::now() >= upkeep && !self.delete_archived().await {
                upkeep = Instant::now() + UPKEEP;
            }
        }
    }

    async fn regulate(&mut self) {
        let commit = self.commits.take_mean();
        let Some(regulator) = &mut self.regulator else { return };
        let limit = match self.controls.limits.total(Budget::Live) {
            Rate::PerSecond(limit) => Some(limit),
            Rate::Unlimited => None,
        };
        // A database that does not answer this is strained, whatever its commits took.
        let lock_waits = match tokio::time::timeout(ANSWER, self.table.lock_waits(&self.pool)).await {
            Ok(Ok(lock_waits)) => lock_waits,
            Ok(Err(_)) | Err(_) => u32::MAX,
        };
        self.controls.limits.pace(regulator.next(commit, lock_waits, limit));
    }

    /// Whether there may be more to delete.
    async fn delete_archived(&self) -> bool {
        let deleted = self
            .table
            .delete_archived(&self.pool, self.letters_retention, DELETED_AT_ONCE);
        match tokio::time::timeout(ANSWER, deleted).await {
            Ok(Ok(0)) => false,
            Ok(Ok(letters)) => {
                tracing::info!(letters, "archived dead letters are deleted after their retention");
                letters == DELETED_AT_ONCE
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, "archived dead letters cannot be deleted for now");
                false
            }
            Err(_) => {
                tracing::warn!("archived dead letters cannot be deleted for now: the database does not answer");
                false
            }
        }
    }

    async fn look(&self) -> Result<(), String> {
        // A server that is gone without a word never answers.
        let asked = tokio::time::timeout(ANSWER, self.table.controls(&self.pool)).await;
        let remembered = asked.map_err(|_| format!("no answer within {ANSWER:?}"))?;
        self.controls.follow(&remembered.map_err(|error| error.to_string())?);
        Ok(())
    }
}
