use std::time::Duration;

/// The delays of the retry tiers, in order: tier 1 has the first one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Schedule {
    delays: Vec<Duration>,
}

/// Where an event goes after a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Into the retry topic of `tier` (counted from 1), to be tried again after `delay`.
    Retry {
        tier: usize,
        delay: Duration,
    },
    DeadLetter,
}

impl Schedule {
    /// An empty list means no retries: the first failure is a dead letter.
    pub fn new(delays: Vec<Duration>) -> Self {
        Self { delays }
    }

    /// How many retry topics there are.
    pub fn tiers(&self) -> usize {
        self.delays.len()
    }

    /// The delay of `tier`, counted from 1; `None` if there is no such tier.
    pub fn delay(&self, tier: usize) -> Option<Duration> {
        self.delays.get(tier.checked_sub(1)?).copied()
    }

    /// What follows the failure of attempt number `attempt`, counted from 1.
    pub fn after(&self, attempt: u32) -> Step {
        let tier = usize::try_from(attempt.max(1)).unwrap_or(usize::MAX);
        match self.delay(tier) {
            Some(delay) => Step::Retry { tier, delay },
            None => Step::DeadLetter,
        }
    }
}

/// Pauses between tries while the platform is away: doubling, capped, with jitter, so that the workers of many
/// instances do not knock at the same moment. Made anew for each batch, so that it starts over after a success.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(100);
    const CAP: Duration = Duration::from_secs(3);

    pub(crate) fn new() -> Self {
        Self { next: Self::FIRST }
    }

    /// `unit` is a random number from 0 to 1; the pause is between half and all of the current step.
    pub(crate) fn pause(&mut self, unit: f64) -> Duration {
        let pause = self.next.mul_f64(0.5 + 0.5 * unit.clamp(0.0, 1.0));
        self.next = (self.next * 2).min(Self::CAP);
        pause
    }
}

/// A random number from 0 to 1, for jitter only.
pub(crate) fn random_unit() -> f64 {
    use std::hash::{BuildHasher, Hasher};
    let bits = std::hash::RandomState::new().build_hasher().finish();
    bits as f64 / u64::MAX as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever the attempt, forged ones included: a tier that exists, or the dead letters; and from any tier the
        /// dead letters are at most the remaining tiers away.
        #[test]
        fn every_event_ends_after_a_bounded_number_of_tiers(
            delays in prop::collection::vec(1u64..1_000, 0..6),
            start in any::<u32>(),
        ) {
            let schedule = Schedule::new(delays.iter().copied().map(Duration::from_secs).collect());
            let mut attempt = start;
            let mut steps = 0;
            while let Step::Retry { tier, delay } = schedule.after(attempt) {
                prop_assert!((1..=schedule.tiers()).contains(&tier));
                prop_assert_eq!(Some(delay), schedule.delay(tier));
                attempt = attempt.max(1) + 1;
                steps += 1;
                prop_assert!(steps <= schedule.tiers());
            }
        }

        #[test]
        fn a_first_failure_walks_through_every_tier_in_order(tiers in 0usize..8) {
            let schedule = Schedule::new((1..=tiers as u64).map(Duration::from_secs).collect());
            let walked: Vec<Step> = (1..).map(|attempt| schedule.after(attempt)).take_while(|step| *step != Step::DeadLetter).collect();
            let expected: Vec<Step> =
                (1..=tiers).map(|tier| Step::Retry { tier, delay: Duration::from_secs(tier as u64) }).collect();
            prop_assert_eq!(walked, expected);
        }

        #[test]
        fn a_pause_is_capped_and_never_zero(units in prop::collection::vec(-1.0f64..2.0, 1..40)) {
            let mut backoff = Backoff::new();
            for unit in units {
                let pause = backoff.pause(unit);
                prop_assert!(pause >= Backoff::FIRST / 2 && pause <= Backoff::CAP);
            }
        }
    }
}
