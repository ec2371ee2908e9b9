use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use crate::{ordering::Verdict, retry::Step};

/// When dead letters are so many that something else than the events must be at fault. Reaching it stops the consumer
/// before the next one leaves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FloodLimit {
    /// Most dead letters one after another, with no event that takes effect between them.
    pub run: u32,
    /// Largest share of dead letters, from 0 to 1, among the last [`FloodLimit::window`] events that took effect or died.
    pub ratio: f64,
    /// Events that the share is taken of; fewer say nothing.
    pub window: u32,
    /// After this time one more try is made; `None` waits for an operator.
    pub resume_after: Option<Duration>,
}

/// What an event's verdict says about the consumer's health.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sign {
    TookEffect,
    Died,
    /// Duplicates, retries and whatever waits.
    None,
}

impl Sign {
    pub(crate) fn of(verdict: &Verdict) -> Self {
        match verdict {
            Verdict::Applied => Self::TookEffect,
            Verdict::Failed {
                step: Step::DeadLetter, ..
            } => Self::Died,
            Verdict::Failed { .. } | Verdict::Duplicate | Verdict::Skipped | Verdict::Parked => Self::None,
        }
    }
}

/// The guard of the dead-letter topic, of one instance.
#[derive(Debug)]
pub(crate) struct Flood {
    limit: FloodLimit,
    seen: Mutex<Seen>,
    /// Why it is stopped and since when.
    stopped: watch::Sender<Option<(String, Instant)>>,
}

#[derive(Debug, Default, Clone)]
struct Seen {
    run: u32,
    recent: VecDeque<bool>,
    died: u32,
    /// Resumed by itself: a batch of nothing but dead letters stops it again, whatever the limits say.
    on_trial: bool,
}

impl Flood {
    pub(crate) fn new(limit: FloodLimit) -> Self {
        Self {
            limit,
            seen: Mutex::default(),
            stopped: watch::Sender::new(None),
        }
    }

    /// Counts a batch in, unless its dead letters are too many: then everything stops, and nothing of it is counted.
    ///
    /// # Errors
    /// Why it is stopped.
    pub(crate) fn admit(&self, signs: impl Iterator<Item = Sign>) -> Result<(), String> {
        if let Some((reason, _)) = &*self.stopped.borrow() {
            return Err(reason.clone());
        }
        let mut current = self.lock();
        let mut seen = current.clone();
        let (mut applied, mut died) = (false, false);
        for sign in signs {
            match sign {
                Sign::None => continue,
                Sign::TookEffect => {
                    applied = true;
                    seen.run = 0;
                }
                Sign::Died => {
                    died = true;
                    seen.run += 1;
                    if seen.run > self.limit.run {
                        return Err(self.stop(format!(
                            "{} dead letters one after another: the limit is reached, the next one stays",
                            self.limit.run
                        )));
                    }
                }
            }
            seen.note(sign == Sign::Died, self.limit.window);
            if seen.recent.len() == self.limit.window as usize
                && f64::from(seen.died) > self.limit.ratio * f64::from(self.limit.window)
            {
                return Err(self.stop(format!(
                    "{} of the last {} events would be dead letters: the limit is {}",
                    seen.died, self.limit.window, self.limit.ratio
                )));
            }
        }
        if seen.on_trial && died && !applied {
            return Err(self.stop("the events still fail".to_owned()));
        }
        seen.on_trial &= !applied;
        *current = seen;
        Ok(())
    }

    /// Waits while it is stopped. True if it was stopped and a person has let it go on. May be cancelled.
    pub(crate) async fn open(&self) -> bool {
        let mut waited = false;
        let mut changes = self.stopped.subscribe();
        loop {
            let since = changes.borrow_and_update().as_ref().map(|(_, since)| *since);
            let Some(since) = since else {
                return waited && !self.lock().on_trial;
            };
            waited = true;
            let trial = async {
                match self.limit.resume_after {
                    Some(after) => tokio::time::sleep_until(since + after).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // The sender lives as long as this.
                _ = changes.changed() => {}
                () = trial => self.resume(true),
            }
        }
    }

    /// Goes on. By an operator with fresh counts; by itself (`on_trial`) only until the next batch has nothing but dead
    /// letters.
    pub(crate) fn resume(&self, on_trial: bool) {
        *self.lock() = Seen {
            on_trial,
            ..Seen::default()
        };
        if self.stopped.send_replace(None).is_some() {
            tracing::info!(on_trial, "the flood of dead letters is over or tried again");
        }
    }

    /// Why it is stopped, if it is.
    pub(crate) fn stopped(&self) -> Option<String> {
        self.stopped.borrow().as_ref().map(|(reason, _)| reason.clone())
    }

    fn stop(&self, reason: String) -> String {
        tracing::error!(
            reason,
            "stopped before the dead letters become a flood; nothing is lost"
        );
        self.stopped.send_replace(Some((reason.clone(), Instant::now())));
        reason
    }

    /// Nothing that is done under this lock can leave the state half changed.
    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seen {
    fn note(&mut self, died: bool, window: u32) {
        self.recent.push_back(died);
        self.died += u32::from(died);
        if self.recent.len() > window as usize {
            let left = self.recent.pop_front().unwrap_or_default();
            self.died -= u32::from(left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: FloodLimit = FloodLimit {
        run: 3,
        ratio: 0.5,
        window: 10,
        resume_after: None,
    };

    fn signs(text: &str) -> impl Iterator<Item = Sign> {
        text.chars().map(|sign| match sign {
            '+' => Sign::TookEffect,
            'x' => Sign::Died,
            _ => Sign::None,
        })
    }

    #[test]
    fn a_run_longer_than_the_limit_stops_it_before_the_batch_leaves() {
        let flood = Flood::new(LIMIT);
        assert_eq!(flood.admit(signs("x.x.x")), Ok(()));
        assert!(flood.admit(signs("x")).is_err());
        assert!(flood.admit(signs("+")).is_err(), "stopped is stopped");
        flood.resume(false);
        assert_eq!(flood.admit(signs("xxx+xxx")), Ok(()), "what took effect ends a run");
    }

    #[test]
    fn a_share_above_the_limit_stops_it_once_enough_is_known() {
        let flood = Flood::new(LIMIT);
        assert_eq!(flood.admit(signs("xx+xx+xx+")), Ok(()), "nine events say nothing");
        assert!(flood.admit(signs("x")).is_err());
        flood.resume(false);
        assert_eq!(
            flood.admit(signs("x+x+x+x+x+x+x+")),
            Ok(()),
            "half is not more than half"
        );
    }

    #[test]
    fn resumed_by_itself_it_stops_at_once_if_nothing_has_changed() {
        let flood = Flood::new(LIMIT);
        flood.resume(true);
        assert!(flood.admit(signs("x")).is_err());
        flood.resume(true);
        assert_eq!(flood.admit(signs("x+")), Ok(()));
        assert_eq!(flood.admit(signs("xx")), Ok(()), "the trial is over");
    }

    #[tokio::test]
    async fn it_opens_by_time_or_by_an_operator() {
        let flood = Flood::new(FloodLimit {
            resume_after: Some(Duration::from_millis(20)),
            ..LIMIT
        });
        assert!(flood.admit(signs("xxxx")).is_err());
        let start = Instant::now();
        flood.open().await;
        assert!(start.elapsed() >= Duration::from_millis(20));

        let patient = Flood::new(LIMIT);
        assert!(patient.admit(signs("xxxx")).is_err());
        let (opened, ()) = tokio::join!(tokio::time::timeout(Duration::from_secs(1), patient.open()), async {
            patient.resume(false);
        });
        assert!(opened.is_ok() && patient.stopped().is_none());
    }
}
