use std::{
    borrow::Cow,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use hdrhistogram::Histogram;
use tokio::{task::JoinSet, time::Instant};

use crate::http::Client;

/// Longer than any answer that is worth a figure, in microseconds.
const LONGEST_MICROS: u64 = 120_000_000;
/// A request that could not be sent this long after its time is dropped: the schedule cannot be caught up with any more.
const DROPPED_AFTER: Duration = Duration::from_secs(5);
/// Connections that share a lock for their records.
const CONNECTIONS_PER_RECORDER: u32 = 32;
const REQUEST_DEADLINE: Duration = Duration::from_secs(60);

/// How fast requests come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// Each is due at its time, whatever became of those before it: so many per second.
    Open(u64),
    /// Each connection sends its next request when the last one is answered.
    Closed,
}

/// What is offered.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub pace: Pace,
    pub connections: u32,
    /// Not counted.
    pub warm_up: Duration,
    pub duration: Duration,
    /// No more requests than this, the warm-up's among them.
    pub most: u64,
}

/// A request by its number: path and body of a POST.
pub type Request = fn(u64) -> (Cow<'static, str>, Cow<'static, str>);

/// What became of it, after the warm-up.
pub struct Answers {
    /// From its due time, or in a closed loop from when it was sent, to its answer, in microseconds.
    pub response: Histogram<u64>,
    /// From when it was sent to its answer.
    pub service: Histogram<u64>,
    /// From its due time to when it was sent.
    pub late: Histogram<u64>,
    pub seconds: Vec<Second>,
    pub dropped: u64,
    pub failed: u64,
    pub first_failure: Option<String>,
    /// Requests answered with 200 or 201, the warm-up's among them.
    pub answered_in_all: u64,
    /// Sent or dropped.
    pub offered: u64,
}

/// Requests that were due within one second of the measurement.
#[derive(Clone)]
pub struct Second {
    pub offered: u64,
    pub answered: u64,
    pub failed: u64,
    pub response: Histogram<u64>,
}

/// Sends requests until the time is over or there are no more, and waits for the last answer.
///
/// # Errors
/// Only if a task panics; a request that fails is counted.
pub async fn run(address: SocketAddr, plan: Plan, request: Request) -> anyhow::Result<Answers> {
    let next = Arc::new(AtomicU64::new(0));
    let start = Instant::now() + Duration::from_millis(100);
    let recorders = (0..plan.connections.div_ceil(CONNECTIONS_PER_RECORDER))
        .map(|_| Ok(Arc::new(Mutex::new(Answers::none(plan.duration)?))))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut tasks = JoinSet::new();
    for connection in 0..plan.connections {
        let recorder = &recorders[(connection / CONNECTIONS_PER_RECORDER) as usize];
        let pacer = Pacer {
            plan,
            start,
            next: Arc::clone(&next),
            recorder: Arc::clone(recorder),
            request,
        };
        tasks.spawn(pacer.send_all(Client::new(address)));
    }
    while let Some(ended) = tasks.join_next().await {
        ended.context("a sending task panicked")?;
    }
    let mut total = Answers::none(plan.duration)?;
    for recorder in recorders {
        total.add(&recorder.lock().unwrap_or_else(PoisonError::into_inner))?;
    }
    Ok(total)
}

/// One connection's share of the plan.
struct Pacer {
    plan: Plan,
    start: Instant,
    next: Arc<AtomicU64>,
    recorder: Arc<Mutex<Answers>>,
    request: Request,
}

impl Pacer {
    async fn send_all(self, mut client: Client) {
        tokio::time::sleep_until(self.start).await;
        let end = self.plan.warm_up + self.plan.duration;
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let due = match self.plan.pace {
                Pace::Open(per_second) => Duration::from_nanos(number.saturating_mul(1_000_000_000) / per_second),
                Pace::Closed => self.start.elapsed(),
            };
            if due >= end || number >= self.plan.most {
                return;
            }
            if let Pace::Open(_) = self.plan.pace {
                tokio::time::sleep_until(self.start + due).await;
            }
            let sent = self.start.elapsed();
            if sent > due + DROPPED_AFTER {
                self.record(due, |answers, second| {
                    answers.dropped += 1;
                    answers.offered += 1;
                    second.offered += 1;
                });
                continue;
            }
            let (path, body) = (self.request)(number);
            let answer = tokio::time::timeout(REQUEST_DEADLINE, client.post(&path, &body)).await;
            let answered = self.start.elapsed();
            let failure = match answer {
                Ok(Ok(200 | 201)) => None,
                Ok(Ok(status)) => Some(format!("{path}: {status}")),
                Ok(Err(error)) => Some(format!("{path}: {error:#}")),
                Err(_) => Some(format!("{path}: no answer within {REQUEST_DEADLINE:?}")),
            };
            if failure.is_none() {
                self.lock().answered_in_all += 1;
            }
            self.record(due, |answers, second| {
                answers.offered += 1;
                second.offered += 1;
                if let Some(failure) = failure {
                    answers.failed += 1;
                    second.failed += 1;
                    answers.first_failure.get_or_insert(failure);
                    return;
                }
                second.answered += 1;
                let response = (answered - due).as_micros() as u64;
                second.response.saturating_record(response);
                answers.response.saturating_record(response);
                answers.service.saturating_record((answered - sent).as_micros() as u64);
                answers.late.saturating_record((sent - due).as_micros() as u64);
            });
        }
    }

    /// Nothing of the warm-up.
    fn record(&self, due: Duration, note: impl FnOnce(&mut Answers, &mut Second)) {
        let Some(counted) = due.checked_sub(self.plan.warm_up) else {
            return;
        };
        let mut answers = self.lock();
        let mut seconds = std::mem::take(&mut answers.seconds);
        if let Some(second) = seconds.get_mut(counted.as_secs() as usize) {
            note(&mut answers, second);
        }
        answers.seconds = seconds;
    }

    /// Nothing that is done under this lock can leave the record half changed.
    fn lock(&self) -> std::sync::MutexGuard<'_, Answers> {
        self.recorder.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Answers {
    fn none(duration: Duration) -> anyhow::Result<Self> {
        let second = Second {
            offered: 0,
            answered: 0,
            failed: 0,
            response: histogram()?,
        };
        Ok(Self {
            response: histogram()?,
            service: histogram()?,
            late: histogram()?,
            seconds: vec![second; duration.as_secs_f64().ceil() as usize],
            dropped: 0,
            failed: 0,
            first_failure: None,
            answered_in_all: 0,
            offered: 0,
        })
    }

    fn add(&mut self, other: &Self) -> anyhow::Result<()> {
        self.response.add(&other.response)?;
        self.service.add(&other.service)?;
        self.late.add(&other.late)?;
        for (mine, theirs) in self.seconds.iter_mut().zip(&other.seconds) {
            mine.offered += theirs.offered;
            mine.answered += theirs.answered;
            mine.failed += theirs.failed;
            mine.response.add(&theirs.response)?;
        }
        self.dropped += other.dropped;
        self.failed += other.failed;
        if self.first_failure.is_none() {
            self.first_failure.clone_from(&other.first_failure);
        }
        self.answered_in_all += other.answered_in_all;
        self.offered += other.offered;
        Ok(())
    }
}

/// Of microseconds, to two digits.
pub(crate) fn histogram() -> anyhow::Result<Histogram<u64>> {
    Histogram::new_with_bounds(1, LONGEST_MICROS, 2).context("make a histogram")
}
