use std::{sync::Arc, time::Duration};

use sqlx::types::Uuid;
use tokio::{
    sync::{Mutex, watch},
    task::JoinHandle,
    time::{Instant, MissedTickBehavior},
};

use crate::{
    limited_pool::LimitedPool,
    status::with_causes,
    table::{self, Holding, Table},
};

/// How long others wait before they take over the keys of an instance that says nothing.
const TERM: Duration = Duration::from_secs(3);
const RENEWAL: Duration = Duration::from_secs(1);
/// What clocks and scheduling may lose: this instance stops before others begin.
const MARGIN: Duration = Duration::from_millis(500);

/// What this instance holds at one moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Held {
    buckets: Arc<[Holding]>,
    /// By the monotonic clock, counted from before the lease was asked for: a process that was stopped and goes on finds
    /// that its time is over before it publishes anything (HAZARDS H25, H83).
    until: Option<Instant>,
}

impl Held {
    pub(crate) fn is_valid(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() < until)
    }

    /// Buckets to publish.
    pub(crate) fn keep(&self) -> Vec<i32> {
        self.which(false)
    }

    /// Buckets to give back.
    pub(crate) fn surplus(&self) -> Vec<i32> {
        self.which(true)
    }

    fn which(&self, surplus: bool) -> Vec<i32> {
        self.buckets
            .iter()
            .filter(|held| held.surplus == surplus)
            .map(|held| held.bucket)
            .collect()
    }

    /// Whether the same buckets are held under the same epochs.
    fn is_same(&self, other: &[Holding]) -> bool {
        *self.buckets == *other
    }
}

/// Keeps this instance's leases alive, beside whatever it publishes. Dropping it ends the renewal, not the leases.
pub(crate) struct Leases {
    table: Table,
    pool: LimitedPool,
    member: Uuid,
    held: watch::Receiver<Held>,
    told: Arc<Told>,
    renewal: JoinHandle<()>,
}

/// What the table and this process last agreed on.
struct Told {
    held: watch::Sender<Held>,
    /// For whoever asks the table and notes the answer: what is given back meanwhile could be noted as held.
    turn: Mutex<()>,
}

impl Leases {
    pub(crate) fn keep(table: Table, pool: LimitedPool, member: Uuid) -> Self {
        let (sender, held) = watch::channel(Held::default());
        let told = Arc::new(Told {
            held: sender,
            turn: Mutex::new(()),
        });
        let renewal = tokio::spawn(renew(table.clone(), pool.clone(), member, told.clone()));
        Self {
            table,
            pool,
            member,
            held,
            told,
            renewal,
        }
    }

    pub(crate) fn held(&self) -> Held {
        self.held.borrow().clone()
    }

    /// Waits until other buckets are held than before.
    pub(crate) async fn changed(&mut self) {
        // The sender is ours.
        if self.held.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Gives back those of the buckets that are still one too many. One that was given back before, and came back to us when its
    /// next owner left, is ours to publish: given back once more it would have two publishers until the next renewal.
    pub(crate) async fn give_back(&self, buckets: &[i32]) -> Result<(), sqlx::Error> {
        let _turn = self.told.turn.lock().await;
        let mut surplus = self.held().surplus();
        surplus.retain(|bucket| buckets.contains(bucket));
        table::release(&self.table, &self.pool, self.member, &surplus).await?;
        self.told.held.send_if_modified(|held| {
            let left = held.buckets.iter().filter(|held| !surplus.contains(&held.bucket));
            held.buckets = left.copied().collect();
            // Nothing to publish has come or gone.
            false
        });
        Ok(())
    }

    /// Gives everything back at once, so that others need not wait for the end of the term.
    pub(crate) async fn leave(self) {
        self.renewal.abort();
        if let Err(error) = self.table.leave(&self.pool, self.member).await {
            tracing::warn!(
                error = with_causes(&error),
                "the leases were not given back; they run out by themselves"
            );
        }
    }
}

impl Drop for Leases {
    fn drop(&mut self) {
        self.renewal.abort();
    }
}

async fn renew(table: Table, pool: LimitedPool, member: Uuid, told: Arc<Told>) {
    let mut warned = false;
    let mut due = tokio::time::interval(RENEWAL);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        due.tick().await;
        let _turn = told.turn.lock().await;
        let asked = Instant::now();
        let leased = tokio::time::timeout(TERM, table::lease(&table, &pool, member, TERM)).await;
        match leased.unwrap_or(Err(sqlx::Error::PoolTimedOut)) {
            Ok(buckets) => {
                let until = Some(asked + TERM - MARGIN);
                warned = false;
                told.held.send_if_modified(|held| {
                    let changed = !held.is_same(&buckets) || !held.is_valid();
                    if changed {
                        tracing::info!(
                            buckets = buckets.len(),
                            epoch = buckets.iter().map(|held| held.epoch).max(),
                            "keys leased"
                        );
                        held.buckets = buckets.into();
                    }
                    held.until = until;
                    changed
                });
            }
            Err(error) => {
                if !warned {
                    tracing::warn!(error = with_causes(&error), "the leases could not be renewed");
                }
                warned = true;
            }
        }
    }
}
