//! How fast a group may put events into its database.
//!
//! The hard rule: counted by commit time at the table, no window of one second holds more than 105 % of the limit, even
//! if transactions hang for a while and then commit together, and however many instances there are. Three shares of the
//! rate make that up: a bucket that lets at most `BURST` through at once, grants of `CHUNK` events (so that
//! transactions stay large under a backlog), and at most `IN_FLIGHT` granted but not yet committed. A window then
//! holds at most what the bucket grants in it, 1 + `BURST`, and what was in flight at its beginning, `IN_FLIGHT`.

use std::{
    fmt,
    num::NonZeroU32,
    str::FromStr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use governor::{DefaultDirectRateLimiter, Quota, clock::Clock, clock::DefaultClock};
use tokio::sync::Notify;

const BURST: f64 = 0.015;
const CHUNK: f64 = 0.010;
const IN_FLIGHT: f64 = 0.025;

/// Events per second of a whole group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rate {
    Unlimited,
    PerSecond(NonZeroU32),
}

/// `unlimited`, or a whole number from 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected events per second, a whole number from 1 to 4294967295, or `unlimited`")]
pub struct InvalidRate;

impl FromStr for Rate {
    type Err = InvalidRate;
    fn from_str(text: &str) -> Result<Self, InvalidRate> {
        if text == "unlimited" {
            return Ok(Self::Unlimited);
        }
        text.parse().map(Self::PerSecond).map_err(|_| InvalidRate)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unlimited => formatter.write_str("unlimited"),
            Self::PerSecond(rate) => rate.fmt(formatter),
        }
    }
}

/// Which limit an event counts against: its topic decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Budget {
    /// The main topic.
    Live,
    /// All retry tiers together.
    Retry,
    /// Parked events that are let go: redriven dead letters, and whatever waited behind a held key.
    Redrive,
}

impl Budget {
    pub const ALL: [Self; 3] = [Self::Live, Self::Retry, Self::Redrive];

    /// The value of metric labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Retry => "retry",
            Self::Redrive => "redrive",
        }
    }
}

/// The limits of a group as this instance sees them; a handle that may be cloned and kept.
#[derive(Debug, Clone)]
pub struct RateLimits {
    live: Arc<Limiter>,
    retry: Arc<Limiter>,
    redrive: Arc<Limiter>,
}

impl RateLimits {
    pub fn new(live: Rate, retry: Rate, redrive: Rate) -> Self {
        Self {
            live: Arc::new(Limiter::new(live)),
            retry: Arc::new(Limiter::new(retry)),
            redrive: Arc::new(Limiter::new(redrive)),
        }
    }

    /// Changes a group total; in force at once, also for those who wait. Every instance must be told.
    pub fn set(&self, budget: Budget, rate: Rate) {
        self.limiter(budget).change(|total| total.rate = rate);
    }

    /// Closed, nothing more is granted on any budget; what was granted goes on.
    pub(crate) fn close(&self, closed: bool) {
        for budget in Budget::ALL {
            let limiter = self.limiter(budget);
            if limiter.total().closed != closed {
                limiter.change(|total| total.closed = closed);
            }
        }
    }

    /// Takes this share of every limit, above 0 and at most 1.
    pub(crate) fn pace(&self, pace: f64) {
        for budget in Budget::ALL {
            let limiter = self.limiter(budget);
            if limiter.total().pace != pace {
                limiter.change(|total| total.pace = pace);
            }
        }
    }

    /// The group total as last set.
    pub fn total(&self, budget: Budget) -> Rate {
        self.limiter(budget).total().rate
    }

    /// This instance's share in events per second; `None` if unlimited.
    pub fn share(&self, budget: Budget) -> Option<f64> {
        self.limiter(budget).total().share()
    }

    /// The most events of one grant; `None` if there is no limit or nothing is granted.
    pub(crate) fn largest_grant(&self, budget: Budget) -> Option<u32> {
        match &**self.limiter(budget).regime.load() {
            Regime::Limited { chunk, .. } => Some(chunk.get()),
            Regime::Unlimited | Regime::Closed => None,
        }
    }

    /// Tells how many of the group's partitions of a budget this instance owns. To be called after the workers of
    /// revoked partitions have stopped and before those of new ones start, so that the shares of all instances never
    /// add up to more than the total.
    pub(crate) fn own(&self, budget: Budget, owned: usize, all: usize) {
        self.limiter(budget)
            .change(|total| (total.owned, total.all) = (owned, all));
    }

    /// See [`Limiter::acquire`].
    pub(crate) async fn acquire(&self, budget: Budget, wanted: u32) -> Permit {
        Arc::clone(self.limiter(budget)).acquire(wanted).await
    }

    fn limiter(&self, budget: Budget) -> &Arc<Limiter> {
        match budget {
            Budget::Live => &self.live,
            Budget::Retry => &self.retry,
            Budget::Redrive => &self.redrive,
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Total {
    rate: Rate,
    owned: usize,
    all: usize,
    closed: bool,
    /// Of the rate, what the database bears at the moment: above 0, at most 1.
    pace: f64,
}

impl Total {
    fn share(&self) -> Option<f64> {
        match self.rate {
            Rate::Unlimited => None,
            Rate::PerSecond(_) if self.all == 0 => Some(0.0),
            Rate::PerSecond(rate) => {
                Some(f64::from(rate.get()) * self.pace * self.owned.min(self.all) as f64 / self.all as f64)
            }
        }
    }
}

/// What is in force between two changes.
#[derive(Debug)]
enum Regime {
    Unlimited,
    /// No partition is owned, or an operator has paused the group.
    Closed,
    Limited {
        bucket: DefaultDirectRateLimiter,
        chunk: NonZeroU32,
        in_flight: u32,
    },
}

impl Regime {
    fn of(total: &Total) -> Self {
        if total.closed {
            return Self::Closed;
        }
        let Some(share) = total.share() else {
            return Self::Unlimited;
        };
        if share <= 0.0 {
            return Self::Closed;
        }
        let at_least_one = |part: f64| NonZeroU32::new((share * part) as u32).unwrap_or(NonZeroU32::MIN);
        let burst = at_least_one(BURST);
        let chunk = at_least_one(CHUNK);
        // Rounded up: rather a hair slower than a hair too fast.
        let period = Duration::from_nanos((1e9 / share).ceil() as u64).max(Duration::from_nanos(1));
        let Some(quota) = Quota::with_period(period) else {
            return Self::Closed;
        };
        let bucket = DefaultDirectRateLimiter::direct(quota.allow_burst(burst));
        // A new bucket is full (governor#39). Emptied, so that changes in quick succession do not add bursts up. That it
        // refuses cannot be: burst is its capacity and nobody else has it yet.
        if !matches!(bucket.check_n(burst), Ok(Ok(()))) {
            tracing::warn!("a new rate limit starts with a full burst");
        }
        Self::Limited {
            bucket,
            chunk,
            in_flight: at_least_one(IN_FLIGHT).get().max(chunk.get()),
        }
    }
}

#[derive(Debug)]
struct Limiter {
    total: Mutex<Total>,
    regime: ArcSwap<Regime>,
    /// One worker at a time waits for its grant, the others wait here in order: nobody overtakes a large grant.
    turnstile: tokio::sync::Mutex<()>,
    in_flight: AtomicU32,
    /// A grant was given back, or the regime changed. Only the one inside the turnstile waits for it.
    changed: Notify,
}

impl Limiter {
    fn new(rate: Rate) -> Self {
        let total = Total {
            rate,
            owned: 0,
            all: 0,
            closed: false,
            pace: 1.0,
        };
        Self {
            total: Mutex::new(total),
            regime: ArcSwap::from_pointee(Regime::of(&total)),
            turnstile: tokio::sync::Mutex::new(()),
            in_flight: AtomicU32::new(0),
            changed: Notify::new(),
        }
    }

    fn total(&self) -> Total {
        *self.total.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Total)) {
        let mut total = self.total.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut total);
        self.regime.store(Arc::new(Regime::of(&total)));
        drop(total);
        self.changed.notify_one();
    }

    /// Waits for a grant of `wanted` events or of the regime's chunk, whichever is smaller. May be cancelled.
    async fn acquire(self: Arc<Self>, wanted: u32) -> Permit {
        let turn = self.turnstile.lock().await;
        let wanted = NonZeroU32::new(wanted).unwrap_or(NonZeroU32::MIN);
        let granted = loop {
            let regime = self.regime.load_full();
            let wait = match &*regime {
                Regime::Unlimited => break wanted,
                Regime::Closed => None,
                Regime::Limited {
                    bucket,
                    chunk,
                    in_flight,
                } => {
                    let count = wanted.min(*chunk);
                    if self.in_flight.load(Ordering::Acquire) + count.get() > *in_flight {
                        None
                    } else {
                        match bucket.check_n(count) {
                            Ok(Ok(())) => break count,
                            Ok(Err(until)) => Some(until.wait_time_from(DefaultClock::default().now())),
                            // Cannot be: a chunk is never larger than the burst. Waiting for a change is safe.
                            Err(_) => None,
                        }
                    }
                }
            };
            match wait {
                // The regime is read again afterwards, so that a new rate is in force at once.
                Some(wait) => tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = self.changed.notified() => {}
                },
                None => self.changed.notified().await,
            }
        };
        self.in_flight.fetch_add(granted.get(), Ordering::AcqRel);
        drop(turn);
        Permit {
            limiter: self,
            count: granted.get(),
        }
    }
}

/// Leave for `count` events, held until their transaction has ended.
#[derive(Debug)]
pub(crate) struct Permit {
    limiter: Arc<Limiter>,
    count: u32,
}

impl Permit {
    pub(crate) fn count(&self) -> u32 {
        self.count
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.limiter.in_flight.fetch_sub(self.count, Ordering::AcqRel);
        self.limiter.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn per_second(rate: u32) -> Rate {
        Rate::PerSecond(NonZeroU32::new(rate).expect("not zero"))
    }

    proptest! {
        /// However the partitions are spread, what all instances may do together is the limit: in rate, and (as long
        /// as shares are large enough to be divided) in what may be in flight beyond it.
        #[test]
        fn shares_never_add_up_to_more_than_the_limit(
            rate in 1u32..1_000_000,
            owned in prop::collection::vec(0usize..12, 1..8),
        ) {
            let all: usize = owned.iter().sum();
            prop_assume!(all > 0);
            let mut sum = 0.0;
            let mut slack = 0.0;
            for owned in owned {
                let total = Total { rate: per_second(rate), owned, all, closed: false, pace: 1.0 };
                let share = total.share().expect("limited");
                sum += share;
                if let Regime::Limited { in_flight, chunk, .. } = Regime::of(&total) {
                    prop_assert!(chunk.get() <= in_flight);
                    if share >= 100.0 {
                        slack += share.mul_add(BURST, f64::from(in_flight));
                    }
                }
            }
            prop_assert!(sum <= f64::from(rate) * (1.0 + 1e-9));
            prop_assert!(slack <= f64::from(rate) * 0.05);
        }
    }

    #[test]
    fn a_rate_is_a_number_or_the_word_unlimited() {
        assert_eq!("unlimited".parse(), Ok(Rate::Unlimited));
        assert_eq!("2000".parse(), Ok(per_second(2_000)));
        for wrong in ["0", "", "-1", "1.5", "Unlimited", "4294967296"] {
            assert_eq!(wrong.parse::<Rate>(), Err(InvalidRate), "{wrong:?}");
        }
    }

    #[tokio::test]
    async fn what_is_in_flight_is_bounded_until_it_is_given_back() {
        let limits = RateLimits::new(per_second(100_000), Rate::Unlimited, Rate::Unlimited);
        limits.own(Budget::Live, 12, 12);
        let mut held = Vec::new();
        let mut granted = 0;
        while let Ok(permit) =
            tokio::time::timeout(Duration::from_millis(200), limits.acquire(Budget::Live, 1_000_000)).await
        {
            granted += permit.count();
            held.push(permit);
        }
        assert_eq!(granted, 2_000, "two chunks of 1 % fit into 2.5 %");
        held.pop();
        let permit = tokio::time::timeout(Duration::from_secs(5), limits.acquire(Budget::Live, 10)).await;
        assert_eq!(permit.expect("a grant").count(), 10);
    }

    #[tokio::test]
    async fn a_change_of_rate_frees_those_who_wait() {
        let limits = RateLimits::new(per_second(1), Rate::Unlimited, Rate::Unlimited);
        let waiting = tokio::spawn({
            let limits = limits.clone();
            async move { limits.acquire(Budget::Live, 700).await.count() }
        });
        tokio::task::yield_now().await;
        limits.set(Budget::Live, Rate::Unlimited);
        let granted = tokio::time::timeout(Duration::from_secs(5), waiting)
            .await
            .expect("in time");
        assert_eq!(granted.expect("no panic"), 700);
    }

    #[tokio::test]
    async fn closed_nothing_is_granted_until_it_is_opened_again() {
        let limits = RateLimits::new(Rate::Unlimited, Rate::Unlimited, Rate::Unlimited);
        limits.close(true);
        for budget in Budget::ALL {
            let granted = tokio::time::timeout(Duration::from_millis(50), limits.acquire(budget, 1)).await;
            assert!(granted.is_err(), "{budget:?}");
        }
        limits.close(false);
        for budget in Budget::ALL {
            assert_eq!(limits.acquire(budget, 7).await.count(), 7);
        }
    }

    #[tokio::test]
    async fn over_a_second_the_bucket_grants_its_rate() {
        let limits = RateLimits::new(per_second(20_000), Rate::Unlimited, Rate::Unlimited);
        limits.own(Budget::Live, 1, 2);
        let start = std::time::Instant::now();
        let mut granted = 0;
        while start.elapsed() < Duration::from_secs(1) {
            granted += limits.acquire(Budget::Live, 500).await.count();
        }
        let seconds = start.elapsed().as_secs_f64();
        assert!(
            granted as f64 <= 10_000.0 * (seconds + BURST) + 1.0,
            "{granted} in {seconds} s"
        );
        assert!(granted as f64 >= 10_000.0 * seconds * 0.8, "{granted} in {seconds} s");
    }
}
