use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use outbox::NewEvent;
use shared_events::shipment::ShipmentEvent;
use sqlx::{PgPool, PgTransaction};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    flag::{Flag, Mode},
    legacy::Legacy,
    rollout,
    tables::{
        flag_instances::{self, Heartbeat},
        flag_values, shadow,
    },
};

/// How often the flag is looked at: a change is in force everywhere within a second.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// As long as a request waits for a connection by default.
const PLACE_WITHIN: Duration = Duration::from_secs(2);
const BEAT_INTERVAL: Duration = Duration::from_secs(1);
const COMPARE_INTERVAL: Duration = Duration::from_millis(500);
const ROLL_OUT_INTERVAL: Duration = Duration::from_millis(500);
/// Rights and schemas change when people change them.
const INABILITY_INTERVAL: Duration = Duration::from_secs(10);
const FORGET_INTERVAL: Duration = Duration::from_secs(60 * 60);
const NOT_LOOKED: &str = "it has not looked at the database yet";
/// A server that vanished without a reset never answers.
const PATIENCE: Duration = Duration::from_secs(10);

/// The flag as this process runs it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Switch(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    instance: Uuid,
    address: String,
    legacy: Legacy,
    now: watch::Sender<InForce>,
    requests: AtomicI64,
    failures: AtomicI64,
    refused: AtomicBool,
    /// While some orders wait for commerce's tables and others must not.
    places: Arc<Semaphore>,
}

/// What this process goes by. Until it has looked, everything is left to the outbox, which is right whatever the flag says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct InForce {
    flag: Flag,
    /// Why the synchronous path is closed to it.
    unable: Option<String>,
}

impl Switch {
    /// `address` is where people reach this process; `group` commerce's consumer group. Of `connections`, half are for orders
    /// that are not on the outbox alone while others are.
    ///
    /// # Errors
    /// None that this service's constants could cause.
    pub fn new(address: String, group: &str, connections: u32) -> anyhow::Result<Self> {
        let unable = Some(NOT_LOOKED.to_owned());
        Ok(Self(Arc::new(Inner {
            instance: Uuid::now_v7(),
            address,
            legacy: Legacy::new(group)?,
            now: watch::Sender::new(InForce {
                flag: Flag::FIRST,
                unable,
            }),
            requests: AtomicI64::new(0),
            failures: AtomicI64::new(0),
            refused: AtomicBool::new(false),
            places: Arc::new(Semaphore::new((connections as usize / 2).max(1))),
        })))
    }

    /// The mode of this order, as far as this process can.
    pub(crate) fn mode_of(&self, order_id: &str) -> Mode {
        let now = self.0.now.borrow();
        match now.unable {
            None => now.flag.mode_of(order_id),
            Some(_) => Mode::Outbox,
        }
    }

    /// The mode of all orders, if they have the same.
    pub(crate) fn of_all(&self) -> Option<Mode> {
        let now = self.0.now.borrow();
        match now.unable {
            None => now.flag.of_all(),
            Some(_) => Some(Mode::Outbox),
        }
    }

    /// For a transaction that may wait for commerce while others must not: no more of these than leave connections to them, and
    /// no longer a wait than for a connection. `None` when the time is up.
    pub(crate) async fn place(&self) -> Option<OwnedSemaphorePermit> {
        let place = self.0.places.clone().acquire_owned();
        // It is never closed.
        tokio::time::timeout(PLACE_WITHIN, place).await.ok()?.ok()
    }

    /// Commerce's part of events that were appended in this transaction, for those whose orders are not on the outbox alone.
    ///
    /// # Errors
    /// Any database error: the change fails with it, as it did before there was an outbox.
    pub(crate) async fn take_effect(&self, tx: &mut PgTransaction<'_>, events: &[NewEvent]) -> Result<(), sqlx::Error> {
        if self.of_all() == Some(Mode::Outbox) {
            return Ok(());
        }
        let (mut shadow, mut legacy) = (Vec::new(), Vec::new());
        for event in events {
            // Written by this very process.
            let Ok(known) = ShipmentEvent::from_envelope(&event.envelope) else {
                continue;
            };
            match self.mode_of(known.order_id()) {
                Mode::Outbox => {}
                Mode::Shadow => shadow.push(event),
                Mode::Legacy => legacy.push(event),
            }
        }
        if !shadow.is_empty() {
            self.0.legacy.try_out(tx, &shadow).await?;
        }
        if !legacy.is_empty() {
            self.0.legacy.take_effect(tx, &legacy).await?;
        }
        Ok(())
    }

    pub(crate) fn asked(&self, failed: bool) {
        self.0.requests.fetch_add(1, Ordering::Relaxed);
        if failed {
            self.0.failures.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn legacy(&self) -> &Legacy {
        &self.0.legacy
    }

    /// Why this process cannot run `shadow` and `legacy`.
    pub fn unable(&self) -> Option<String> {
        self.0.now.borrow().unable.clone()
    }

    /// Whether it ended because the flag asked for what it cannot do.
    pub fn is_refused(&self) -> bool {
        self.0.refused.load(Ordering::Relaxed)
    }

    /// Follows the flag until told to stop, compares what shadow mode expected, and moves roll-outs on. `own` has one connection,
    /// so that nothing that is slow keeps the flag from being followed.
    ///
    /// # Errors
    /// At the start only: the flag asks for what this process cannot do.
    pub async fn run(&self, own: PgPool, pool: PgPool, stop: CancellationToken) -> anyhow::Result<()> {
        let first = CancellationToken::new();
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = self.repeat(Work::FirstLook, &own, &first) => {}
        }
        self.refuse_what_cannot_be()?;
        tokio::join!(
            self.repeat(Work::Follow, &own, &stop),
            self.repeat(Work::Compare, &pool, &stop),
            self.repeat(Work::RollOut, &pool, &stop),
            self.repeat(Work::Forget, &pool, &stop),
        );
        let leave = flag_instances::leave(&own, self.0.instance);
        if !matches!(tokio::time::timeout(BEAT_INTERVAL, leave).await, Ok(Ok(()))) {
            tracing::debug!("this process stays in the list of instances until it is missed");
        }
        Ok(())
    }

    /// Again and again until told to stop, or until it is done; a failure is logged when it begins.
    async fn repeat(&self, work: Work, pool: &PgPool, stop: &CancellationToken) {
        let (interval, failure) = work.rhythm();
        let mut due = tokio::time::interval(interval);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut following = Following {
            unable: Some(NOT_LOOKED.to_owned()),
            asked: None,
            beat: None,
        };
        let mut works = true;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = due.tick() => {}
            }
            let done = tokio::select! {
                () = stop.cancelled() => return,
                done = tokio::time::timeout(PATIENCE, self.once(work, pool, &mut following)) => done,
            };
            let done = done.unwrap_or(Err(sqlx::Error::PoolTimedOut));
            match &done {
                Ok(()) if work == Work::FirstLook => return,
                Err(error) if works => tracing::warn!(%error, "{failure}; it is tried again"),
                _ => {}
            }
            works = done.is_ok();
        }
    }

    async fn once(&self, work: Work, pool: &PgPool, following: &mut Following) -> Result<(), sqlx::Error> {
        match work {
            Work::FirstLook | Work::Follow => self.follow(pool, following).await,
            Work::Compare if self.unable().is_some() => Ok(()),
            Work::Compare => {
                // A page after the other; a long run of them is cut by the patience with one round, and goes on with the next.
                while self.0.legacy.compare(pool).await? {}
                Ok(())
            }
            Work::RollOut => rollout::advance(pool, self).await,
            Work::Forget => {
                shadow::forget_old(pool).await?;
                flag_instances::forget(pool).await
            }
        }
    }

    fn refuse_what_cannot_be(&self) -> anyhow::Result<()> {
        let InForce { flag, unable } = self.0.now.borrow().clone();
        let Some(unable) = unable else {
            return Ok(());
        };
        for mode in [Mode::Legacy, Mode::Shadow] {
            if flag.has(mode) {
                self.0.refused.store(true, Ordering::Relaxed);
                let mode = mode.name();
                anyhow::bail!("the flag is set to {mode}, and {unable}; set it to outbox, or repair that");
            }
        }
        Ok(())
    }

    async fn follow(&self, pool: &PgPool, last: &mut Following) -> Result<(), sqlx::Error> {
        let flag = flag_values::in_force(pool).await?;
        if last.asked.is_none_or(|asked| asked.elapsed() >= INABILITY_INTERVAL) {
            last.unable = self.0.legacy.inability(pool).await?;
            last.asked = Some(Instant::now());
        }
        let unable = last.unable.clone();
        let changed = self.0.now.send_if_modified(|now| {
            let new = InForce { flag, unable };
            let changed = *now != new;
            if changed {
                tracing::info!(
                    version = flag.version,
                    mode = flag.mode.name(),
                    percent = flag.share.percent(),
                    rest = flag.rest.name(),
                    unable = new.unable,
                    "the flag in force"
                );
                *now = new;
            }
            changed
        });
        if due(&mut last.beat, BEAT_INTERVAL) || changed {
            self.beat(pool).await?;
        }
        Ok(())
    }

    async fn beat(&self, pool: &PgPool) -> Result<(), sqlx::Error> {
        let InForce { flag, unable } = self.0.now.borrow().clone();
        let beat = Heartbeat {
            instance: self.0.instance,
            address: &self.0.address,
            version: flag.version,
            unable: unable.as_deref(),
            requests: self.0.requests.load(Ordering::Relaxed),
            failures: self.0.failures.load(Ordering::Relaxed),
        };
        flag_instances::beat(pool, &beat).await
    }
}

/// When what was last done, and what was found.
#[derive(Debug)]
struct Following {
    unable: Option<String>,
    asked: Option<Instant>,
    beat: Option<Instant>,
}

/// What is done beside the requests. Each by itself: commerce's tables may be locked, and the flag is followed all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    FirstLook,
    Follow,
    Compare,
    RollOut,
    Forget,
}

impl Work {
    /// How often, and what is said when it fails.
    fn rhythm(self) -> (Duration, &'static str) {
        match self {
            Self::FirstLook | Self::Follow => (LOOK_INTERVAL, "the flag cannot be read, the last value stays in force"),
            Self::Compare => (COMPARE_INTERVAL, "shadow mode cannot compare"),
            Self::RollOut => (ROLL_OUT_INTERVAL, "a roll-out cannot be moved on"),
            Self::Forget => (FORGET_INTERVAL, "what is old is not forgotten"),
        }
    }
}

/// Whether it is time again, and if so it counts as done.
fn due(last: &mut Option<Instant>, interval: Duration) -> bool {
    let due = last.is_none_or(|last| last.elapsed() >= interval);
    if due {
        *last = Some(Instant::now());
    }
    due
}
