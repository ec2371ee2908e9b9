use std::{
    collections::HashSet,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic},
    time::Duration,
};

use serde_json::value::RawValue;
use shared_events::{Envelope, headers::Origin};
use sqlx::{Connection, PgConnection};
use time::OffsetDateTime;
use tokio::{sync::Semaphore, time::Instant};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    crash_point,
    decode::{self, History},
    failure::{Class, classify},
    flood::{Flood, Sign},
    handler::{Handler, IncomingEvent, Outcome, Position, Reason},
    metrics::Metrics,
    operator::Operator,
    ordering::{Key, KeyState, Ordering, Verdict, key, verdict},
    partition::failed,
    process::{BatchError, Process},
    rate_limit::{Budget, RateLimits},
    record::Record,
    redirect::{Outgoing, Redirector, Undelivered},
    retry::{Backoff, Step, random_unit},
    status::Status,
    table::{Failed, Hold, ParkedRow},
};

/// Most events in one transaction.
const BATCH: u32 = 100;
/// Most dead letters of which it is remembered that they were counted; past it, some count twice.
const MOST_ADMITTED: usize = 10_000;
/// How often the table is asked: for what other instances let go, or a crash left behind.
const LOOK: Duration = Duration::from_secs(1);

/// Lets parked events take effect, in order, once their key's event is settled. Each instance has one; a key is locked while
/// one of them works on it.
///
/// ```text
/// releasing ─ all took effect ──────────────► the key is free
///     ├─ one is early ──────────────────────► waiting
///     └─ one fails: noted, it holds the key ► its record is acknowledged in its topic ► unparked, retrying or dead
/// ```
///
/// A crash between the last two steps leaves it parked, marked as noted: it is tried again, and if it still fails, only its
/// record is sent. A second copy of that is a duplicate or, while the key is held by that very event, one more try.
pub(crate) struct Releaser<H> {
    pub(crate) process: Arc<Process<H>>,
    pub(crate) transactions: Arc<Semaphore>,
    pub(crate) limits: RateLimits,
    pub(crate) redirector: Arc<Redirector>,
    pub(crate) flood: Arc<Flood>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) status: Status,
    /// Dead letters that the flood limit has let through and whose record has not left: each counts once.
    pub(crate) admitted: Mutex<HashSet<Uuid>>,
}

/// A parked event, as far as it could be read again.
struct Unparked {
    /// The place of its key in the transaction.
    key: usize,
    /// It shall not take effect.
    skip: bool,
    /// Its failure is noted, its record not sent yet.
    failed: bool,
    partition: i32,
    record: Record,
    history: History,
    /// Of one that cannot be read, only what its row tells.
    event: IncomingEvent,
    /// Why this version cannot read it: another one has parked it.
    unreadable: Option<Reason>,
}

/// An event that failed on its way out, and what is to become of it.
struct Failure {
    parked: Unparked,
    step: Step,
    class: Class,
    reason: Reason,
}

/// Keys that go in one transaction.
#[derive(Default)]
struct Part {
    /// Each with the number of its events; without any, those that wait the longest are taken.
    keys: Vec<(Key, u32)>,
    /// Most events of all keys together.
    most: u32,
    /// The only event to be tried, once the transaction has come so far.
    trying: Option<Uuid>,
    /// What became of it in a transaction before, which was rolled back.
    judged: Option<(Uuid, Outcome)>,
}

/// What cannot go in this pass, so that others can.
#[derive(Default)]
struct LeftOut {
    keys: HashSet<Key>,
    last: Option<BatchError>,
    /// The brokers are away: what fails cannot be sent.
    away: bool,
    /// A record that no topic takes.
    stuck: Option<String>,
}

enum Pass {
    /// There is no key to let go.
    Nothing,
    Done(Vec<Failure>),
    /// Of these keys something took effect behind a failure: all is taken back, and each is done again alone, up to it.
    Apart(Vec<(Key, u32)>),
}

impl Part {
    fn of(keys: Vec<(Key, u32)>) -> Self {
        let most = keys.iter().map(|(_, events)| events).sum::<u32>().max(1);
        Self {
            keys,
            most,
            ..Self::default()
        }
    }

    /// What to try instead after an error, the last one first. Nothing if there is nothing smaller, or no database.
    fn smaller(&self, error: &BatchError) -> Vec<Self> {
        if matches!(error, BatchError::Begin(_)) {
            return Vec::new();
        }
        match self.keys.as_slice() {
            [] => Vec::new(),
            [(key, events)] if classify(error) != Class::Platform => match self.trying {
                _ if *events > 1 => vec![Self::of(vec![(key.clone(), events / 2)])],
                Some(event_id) if self.judged.is_none() => {
                    tracing::debug!(aggregate_id = key.1, %event_id, %error, "a parked event fails alone");
                    vec![Self {
                        judged: Some((event_id, failed(error))),
                        ..Self::of(vec![(key.clone(), 1)])
                    }]
                }
                _ => Vec::new(),
            },
            [_] => Vec::new(),
            keys => {
                let (first, second) = keys.split_at(keys.len() / 2);
                vec![Self::of(second.to_vec()), Self::of(first.to_vec())]
            }
        }
    }
}

impl<H: Handler> Releaser<H> {
    /// Works until the stop.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let mut backoff = Backoff::new();
        while !stop.is_cancelled() {
            let pause = match self.release_all(&stop).await {
                Ok(()) => {
                    backoff = Backoff::new();
                    LOOK
                }
                Err(error) => {
                    tracing::debug!(%error, "parked events cannot go for now");
                    backoff.pause(random_unit())
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
                () = self.process.releasing.notified() => {}
            }
        }
    }

    /// Keys after keys until none is left that may go.
    async fn release_all(&self, stop: &CancellationToken) -> Result<(), BatchError> {
        let mut left_out = LeftOut::default();
        let mut looked = Instant::now();
        let mut more = self.look().await?;
        while more && !stop.is_cancelled() {
            more = self.round(stop, &mut left_out).await?;
            if looked.elapsed() >= LOOK {
                self.look().await?;
                looked = Instant::now();
                // They stand behind the others now.
                left_out.keys.clear();
                left_out.away = false;
            }
        }
        self.status.unsent(left_out.stuck);
        left_out.last.map_or(Ok(()), Err)
    }

    /// Counts what is held, and says whether any of it may go.
    async fn look(&self) -> Result<bool, BatchError> {
        let counts = self.process.table.held_counts(&self.process.pool);
        let counts = self.answered(counts).await?;
        let parked = counts.iter().map(|(_, _, parked)| *parked).sum();
        self.process.parked.store(parked, atomic::Ordering::Relaxed);
        let releasing = counts.iter().any(|(state, _, _)| *state == KeyState::Releasing);
        self.status.holds(counts);
        Ok(releasing | self.step_jobs().await)
    }

    /// A server that vanished without a reset never answers.
    async fn answered<T>(&self, asked: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, BatchError> {
        let limit = self.process.transaction_limit;
        match tokio::time::timeout(limit, asked).await {
            Ok(answer) => answer.map_err(BatchError::Inbox),
            Err(_) => Err(BatchError::TimedOut(limit)),
        }
    }

    /// Lets redrives go on, except while nothing would be applied. True if there may be more to release. What fails here
    /// must not hold up the keys.
    async fn step_jobs(&self) -> bool {
        if self.flood.stopped().is_some() || self.status.snapshot().paused_by_operator.is_some() {
            return false;
        }
        let operator = Operator::new(self.process.table.clone(), self.process.pool.clone());
        match tokio::time::timeout(self.process.transaction_limit, operator.step_jobs()).await {
            Ok(Ok(sent)) => return sent > 0,
            Ok(Err(error)) => tracing::warn!(%error, "a redrive cannot go on for now"),
            Err(_) => tracing::warn!("a redrive cannot go on for now: the database does not answer"),
        }
        false
    }

    /// The first events of as many keys as the limit grants; false if there is nothing to do.
    async fn round(&self, stop: &CancellationToken, left_out: &mut LeftOut) -> Result<bool, BatchError> {
        let leave = async {
            self.flood.open().await;
            let permit = self.limits.acquire(Budget::Redrive, BATCH).await;
            self.transactions.acquire().await.map(|slot| (permit, slot))
        };
        tokio::pin!(leave);
        let (permit, slot) = loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(false),
                leave = &mut leave => match leave {
                    Ok(leave) => break leave,
                    Err(_) => return Ok(false),
                },
                // What is held is counted meanwhile. The place among those who wait for the limit is kept: given up each
                // time, it would never come to the front of a long row.
                () = tokio::time::sleep(LOOK) => {
                    self.look().await?;
                }
            }
        };
        let mut parts = vec![Part {
            most: permit.count(),
            ..Part::default()
        }];
        let mut failures = Vec::new();
        let mut found = false;
        while !stop.is_cancelled()
            && let Some(mut part) = parts.pop()
        {
            match self.pass(&mut part, &left_out.keys).await {
                Ok(Pass::Nothing) => continue,
                Ok(Pass::Done(failed)) => failures.extend(failed),
                Ok(Pass::Apart(apart)) => {
                    part.keys.retain(|(key, _)| apart.iter().all(|(other, _)| other != key));
                    if !part.keys.is_empty() {
                        parts.push(Part::of(part.keys));
                    }
                    parts.extend(apart.into_iter().map(|key| Part::of(vec![key])));
                }
                Err(error) => match (part.smaller(&error), part.keys.as_slice()) {
                    (smaller, _) if !smaller.is_empty() => parts.extend(smaller),
                    (_, [(key, _)]) => self.leave_out(key, error, left_out).await?,
                    _ => return Err(error),
                },
            }
            found = true;
        }
        drop((permit, slot));
        for failure in failures {
            if stop.is_cancelled() {
                break;
            }
            let key = key(&failure.parked.event);
            crash_point::RELEASE_FAILED.reached();
            if let Err(error) = self.send_on(failure, &key, stop, left_out).await {
                self.leave_out(&key, error, left_out).await?;
            }
        }
        Ok(found)
    }

    /// Others first: a key that cannot go, by whatever fault, holds nobody else up. It goes behind those that wait now.
    async fn leave_out(&self, key: &Key, error: BatchError, left_out: &mut LeftOut) -> Result<(), BatchError> {
        if matches!(error, BatchError::Begin(_)) {
            return Err(error);
        }
        tracing::warn!(aggregate_id = key.1, %error, "what is parked behind a key cannot go for now");
        let put_back = self.process.table.put_back(&self.process.pool, key);
        self.answered(put_back).await?;
        left_out.keys.insert(key.clone());
        left_out.last = Some(error);
        Ok(())
    }

    async fn pass(&self, part: &mut Part, left_out: &HashSet<Key>) -> Result<Pass, BatchError> {
        let mut connection = self.process.pool.acquire().await.map_err(BatchError::Begin)?;
        let limit = self.process.transaction_limit;
        match tokio::time::timeout(limit, self.transact(&mut connection, part, left_out)).await {
            Ok(result) => result,
            Err(_) => {
                // As in `Process::process`.
                drop(connection.detach());
                Err(BatchError::TimedOut(limit))
            }
        }
    }

    /// The first events of keys that are let go.
    async fn transact(
        &self,
        connection: &mut PgConnection,
        part: &mut Part,
        left_out: &HashSet<Key>,
    ) -> Result<Pass, BatchError> {
        let table = &self.process.table;
        let mut transaction = connection.begin().await.map_err(BatchError::Begin)?;
        let chosen = part.keys.iter().map(|(key, _)| key);
        let locked = table
            .lock_releasing(&mut transaction, chosen, left_out, part.most)
            .await;
        let keys = locked.map_err(BatchError::Inbox)?;
        if keys.is_empty() {
            // Nothing to do, or another instance was faster with these.
            return Ok(Pass::Nothing);
        }
        crash_point::RELEASE_LOCKED.reached();
        part.keys = keys.iter().map(|key| (key.clone(), 0)).collect();
        let rows = table.first_parked(&mut transaction, &keys, part.most).await;
        let rows = rows.map_err(BatchError::Inbox)?;
        let cut = rows.len() >= part.most as usize;
        let mut parked = those_that_go_together(rows.into_iter().map(|row| unparked(row, &keys)));
        for unparked in &parked {
            part.keys[unparked.key].1 += 1;
        }
        let events: Vec<IncomingEvent> = parked.iter().map(|parked| parked.event.clone()).collect();
        let mut claimed = table
            .claim(&mut transaction, &events)
            .await
            .map_err(BatchError::Inbox)?;
        crash_point::RELEASE_CLAIMED.reached();
        let is_new: Vec<bool> = events.iter().map(|event| claimed.remove(&event.envelope.id)).collect();
        let asked: Vec<bool> = is_new
            .iter()
            .zip(&parked)
            .map(|(new, parked)| *new && !parked.skip && parked.unreadable.is_none())
            .collect();
        let new: Vec<IncomingEvent> = events
            .iter()
            .zip(&asked)
            .filter(|(_, asked)| **asked)
            .map(|(event, _)| event.clone())
            .collect();
        part.trying = new.first().map(|event| event.envelope.id);
        let answers = match &part.judged {
            // If it is still the one: another instance may have let it go meanwhile.
            Some((id, outcome)) if new.len() == 1 && new[0].envelope.id == *id => vec![outcome.clone()],
            _ if new.is_empty() => Vec::new(),
            _ => self.process.apply(&mut transaction, &new).await?,
        };
        let mut answers = answers.into_iter();
        let outcome = |(asked, parked): (&bool, &Unparked)| match &parked.unreadable {
            Some(reason) => Outcome::DeadLetter(reason.clone()),
            None => if *asked { answers.next() } else { None }.unwrap_or(Outcome::Duplicate),
        };
        let outcomes: Vec<Outcome> = asked.iter().zip(&parked).map(outcome).collect();
        for parked in parked.iter().filter(|parked| parked.skip) {
            let passed = self.process.handler.pass_over(&mut transaction, &parked.event).await;
            passed.map_err(BatchError::Handler)?;
        }

        let (mut done, mut left, mut failing, mut apart) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for of_key in by_key(&parked) {
            let first_failure = of_key.clone().find(|place| fails(&outcomes[*place]));
            let end = first_failure.unwrap_or(of_key.end);
            let went_past = |outcome: &Outcome| matches!(outcome, Outcome::Applied | Outcome::Skipped);
            if outcomes[end..of_key.end].iter().any(went_past) {
                let until = u32::try_from(end + 1 - of_key.start).unwrap_or(1);
                apart.push((keys[parked[of_key.start].key].clone(), until));
            }
            done.extend(of_key.start..end);
            left.extend(end..of_key.end);
            failing.extend(first_failure);
        }
        if !apart.is_empty() {
            transaction.rollback().await.map_err(BatchError::Inbox)?;
            return Ok(Pass::Apart(apart));
        }

        let id = |place: &usize| events[*place].envelope.id;
        let done_ids: Vec<Uuid> = done.iter().map(id).collect();
        // Those that took effect elsewhere keep their inbox rows, which are not of this transaction.
        let left_ids: Vec<Uuid> = left.iter().filter(|place| is_new[**place]).map(id).collect();
        table
            .release(&mut transaction, &left_ids)
            .await
            .map_err(BatchError::Inbox)?;
        table
            .unpark(&mut transaction, &done_ids, false)
            .await
            .map_err(BatchError::Inbox)?;
        table
            .resolve(&mut transaction, &done_ids)
            .await
            .map_err(BatchError::Inbox)?;
        let mut failed = Vec::new();
        for place in failing.iter().copied() {
            let attempt = parked[place].history.attempts.saturating_add(1);
            let early = matches!(outcomes[place], Outcome::Early(_)) && self.process.ordering != Ordering::None;
            let verdict = verdict(outcomes[place].clone(), attempt, &self.process.schedule);
            if let Verdict::Failed { step, class, reason } = verdict {
                let state = if early { KeyState::Waiting } else { KeyState::Releasing };
                failed.push((place, state, step, class, reason));
            }
        }
        // From here on a key is held by the one that failed, so that a copy of it that comes out of a retry topic may try.
        let holds: Vec<Hold<'_>> = failed
            .iter()
            .map(|(place, state, _, _, reason)| Hold {
                event: &events[*place],
                state: *state,
                reason,
                partition: parked[*place].partition,
            })
            .collect();
        table.hold(&mut transaction, &holds).await.map_err(BatchError::Inbox)?;
        failed.retain(|(_, state, ..)| *state == KeyState::Releasing);
        let noted: Vec<Failed<'_>> = failed
            .iter()
            .filter(|(place, ..)| !parked[*place].failed)
            .map(|(place, _, step, class, reason)| Failed {
                event: Some(&events[*place]),
                record: &parked[*place].record,
                history: &parked[*place].history,
                topic: &events[*place].position.topic,
                partition: parked[*place].partition,
                class: *class,
                reason,
                dead: (*step == Step::DeadLetter)
                    .then(|| self.process.ordering.holds(&events[*place].envelope.event_type)),
            })
            .collect();
        table
            .note_failures(&mut transaction, &noted, self.process.consumer_version)
            .await
            .map_err(BatchError::Inbox)?;
        let noted_ids: Vec<Uuid> = failed.iter().map(|(place, ..)| id(place)).collect();
        table
            .mark_failed(&mut transaction, &noted_ids)
            .await
            .map_err(BatchError::Inbox)?;

        let at_work = |place: &usize| {
            let fails = failing.iter().any(|failing| parked[*failing].key == *place);
            // Beyond a full batch nothing is known of a key.
            !fails && (part.keys[*place].1 > 0 || !cut)
        };
        let mut settled: HashSet<Key> = (0..keys.len())
            .filter(at_work)
            .map(|place| keys[place].clone())
            .collect();
        // Behind a dead letter that nobody has settled, the rest stays.
        for dead in table
            .hold_by_next_dead(&mut transaction, &settled)
            .await
            .map_err(BatchError::Inbox)?
        {
            settled.remove(&dead);
        }
        table
            .settle(&mut transaction, &settled)
            .await
            .map_err(BatchError::Inbox)?;
        crash_point::RELEASE_COMMIT_BEFORE.reached();
        self.process.commit(transaction).await?;
        crash_point::RELEASE_COMMIT_AFTER.reached();

        for place in &done {
            match outcomes[*place] {
                Outcome::Applied => self.metrics.applied(events[*place].envelope.timestamp),
                _ => self.metrics.duplicate(),
            }
        }
        let effects = done
            .iter()
            .filter(|place| outcomes[**place] == Outcome::Applied)
            .count();
        if self
            .flood
            .admit(std::iter::repeat_n(Sign::TookEffect, effects))
            .is_err()
        {
            tracing::debug!("parked events took effect while the flood limit stops the rest");
        }
        // From the last one on, so that the places before it stay.
        let failures = failed.into_iter().rev().map(|(place, _, step, class, reason)| Failure {
            parked: parked.swap_remove(place),
            step,
            class,
            reason,
        });
        Ok(Pass::Done(failures.collect()))
    }

    /// Sends a failed event to its topic; then it is no longer parked, and its key is held for it.
    async fn send_on(
        &self,
        failure: Failure,
        key: &Key,
        stop: &CancellationToken,
        left_out: &mut LeftOut,
    ) -> Result<(), BatchError> {
        let Failure {
            parked,
            step,
            class,
            reason,
        } = &failure;
        let sign = Sign::of(&Verdict::Failed {
            step: *step,
            class: *class,
            reason: reason.clone(),
        });
        let id = parked.event.envelope.id;
        let counted = self.admitted().contains(&id);
        let sign = if counted { Sign::None } else { sign };
        if self.flood.admit(std::iter::once(sign)).is_err() {
            // It stays where it is, and is tried again when the stop is over.
            return Ok(());
        }
        if sign == Sign::Died {
            let mut admitted = self.admitted();
            // Of letters that a person has settled meanwhile, nobody comes to take theirs out.
            if admitted.len() >= MOST_ADMITTED {
                admitted.clear();
            }
            admitted.insert(id);
        }
        if left_out.away {
            return Err(BatchError::Undelivered("the brokers are away".to_owned()));
        }
        let outgoing = Outgoing {
            record: &parked.record,
            topic: &parked.event.position.topic,
            partition: parked.partition,
            event: Some(&parked.event),
            history: &parked.history,
        };
        let mut letters = vec![self.redirector.letter(outgoing, *step, *class, reason)];
        let delivered = tokio::select! {
            // It stays parked: whether the record arrives or not, it is sent again.
            () = stop.cancelled() => return Ok(()),
            delivered = self.redirector.deliver(&mut letters) => delivered,
        };
        if let Err(error) = delivered {
            match error {
                Undelivered::Away { .. } => left_out.away = true,
                Undelivered::TooLarge { .. } => {
                    left_out.stuck = Some(error.to_string());
                    self.status.unsent(left_out.stuck.clone());
                }
            }
            return Err(BatchError::Undelivered(error.to_string()));
        }
        self.admitted().remove(&id);
        crash_point::RELEASE_ACKNOWLEDGED.reached();
        let mut connection = self.process.pool.acquire().await.map_err(BatchError::Begin)?;
        let limit = self.process.transaction_limit;
        match tokio::time::timeout(limit, self.note_sent(&mut connection, &failure, key)).await {
            Ok(result) => result,
            Err(_) => {
                drop(connection.detach());
                Err(BatchError::TimedOut(limit))
            }
        }
    }

    fn admitted(&self) -> MutexGuard<'_, HashSet<Uuid>> {
        self.admitted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn note_sent(&self, connection: &mut PgConnection, failure: &Failure, key: &Key) -> Result<(), BatchError> {
        let table = &self.process.table;
        let event = &failure.parked.event;
        let id = event.envelope.id;
        let mut transaction = connection.begin().await.map_err(BatchError::Begin)?;
        let one = std::slice::from_ref(event);
        let claimed = table.claim(&mut transaction, one).await.map_err(BatchError::Inbox)?;
        let held = table.lock_held(&mut transaction, one).await;
        let held = held.map_err(BatchError::Inbox)?;
        let holder = held.get(key).filter(|held| held.event_id == id);
        let settled: HashSet<Key> = [key.clone()].into();
        if claimed.is_empty() {
            // The copy in its topic has taken effect before we came here: what it noted stands.
            table
                .unpark(&mut transaction, &[id], false)
                .await
                .map_err(BatchError::Inbox)?;
            if holder.is_some() {
                table
                    .settle(&mut transaction, &settled)
                    .await
                    .map_err(BatchError::Inbox)?;
            }
            return transaction.commit().await.map_err(BatchError::Commit);
        }
        table
            .release(&mut transaction, &[id])
            .await
            .map_err(BatchError::Inbox)?;
        // Unless a person has decided about it meanwhile: then it is on its way again.
        let unparked = table.unpark(&mut transaction, &[id], true).await;
        let unparked = unparked.map_err(BatchError::Inbox)?;
        // Otherwise the copy in its topic was faster than we are, and what it noted stands.
        if unparked > 0 && holder.is_some_and(|held| held.state == KeyState::Releasing) {
            let state = match failure.step {
                Step::Retry { .. } => KeyState::Retrying,
                Step::DeadLetter if !self.process.ordering.holds(&event.envelope.event_type) => {
                    let passed = self.process.handler.pass_over(&mut transaction, event).await;
                    passed.map_err(BatchError::Handler)?;
                    KeyState::Releasing
                }
                Step::DeadLetter => KeyState::Dead,
            };
            let hold = Hold {
                event,
                state,
                reason: &failure.reason,
                partition: failure.parked.partition,
            };
            table.hold(&mut transaction, &[hold]).await.map_err(BatchError::Inbox)?;
            if self.process.ordering == Ordering::None {
                // Nobody waits for its copy.
                table
                    .settle(&mut transaction, &settled)
                    .await
                    .map_err(BatchError::Inbox)?;
            }
        }
        crash_point::RELEASE_UNPARK_BEFORE.reached();
        transaction.commit().await.map_err(BatchError::Commit)?;
        crash_point::RELEASE_UNPARK_AFTER.reached();
        Ok(())
    }
}

/// One to skip goes alone of its key, so that those behind it are judged after the handler has moved past it; so does one
/// that cannot be read.
fn those_that_go_together(parked: impl Iterator<Item = Unparked>) -> Vec<Unparked> {
    let mut together: Vec<Unparked> = Vec::new();
    let mut full = None;
    for parked in parked.into_iter() {
        let is_first = together.last().is_none_or(|last| last.key != parked.key);
        let alone = parked.skip || parked.unreadable.is_some();
        if full == Some(parked.key) {
            continue;
        }
        if alone {
            full = Some(parked.key);
        }
        if !alone || is_first {
            together.push(parked);
        }
    }
    together
}

/// The places of each key's events.
fn by_key(parked: &[Unparked]) -> Vec<Range<usize>> {
    let mut start = 0;
    parked
        .chunk_by(|one, next| one.key == next.key)
        .map(|of_key| {
            let places = start..start + of_key.len();
            start = places.end;
            places
        })
        .collect()
}

fn fails(outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Retry(_) | Outcome::Early(_) | Outcome::DeadLetter(_) => true,
        Outcome::Applied | Outcome::Duplicate | Outcome::Skipped => false,
    }
}

fn unparked(row: ParkedRow, keys: &[Key]) -> Unparked {
    let ParkedRow {
        place,
        event_id,
        event_type,
        sequence,
        skip,
        failed,
        record: stored,
    } = row;
    let names = stored.header_names.iter().map(String::as_str);
    let record = Record::new(
        stored.origin_offset,
        stored.origin_timestamp_ms,
        stored.record_key.as_deref(),
        stored.record_value.as_deref(),
        names.zip(stored.header_values.iter().map(Vec::as_slice)),
    );
    let origin = Origin {
        topic: stored.origin_topic.into(),
        partition: stored.origin_partition,
        offset: stored.origin_offset,
        timestamp_ms: stored.origin_timestamp_ms,
    };
    let key = usize::try_from(place - 1).unwrap_or_default();
    let (envelope, unreadable) = match decode::decode(record.value()) {
        Ok(envelope) => (envelope, None),
        Err(rejection) => {
            let (aggregate_type, aggregate_id) = keys[key].clone();
            let envelope = Envelope {
                id: event_id,
                event_type,
                version: 0,
                timestamp: OffsetDateTime::UNIX_EPOCH,
                aggregate_type,
                aggregate_id,
                sequence,
                transaction_key: Uuid::nil(),
                payload: RawValue::NULL.to_owned(),
            };
            (envelope, Some(Reason::new("unreadable_parked", rejection.to_string())))
        }
    };
    Unparked {
        key,
        skip,
        failed,
        partition: stored.partition,
        history: History {
            attempts: u32::try_from(stored.attempts).unwrap_or_default(),
            origin: origin.clone(),
        },
        event: IncomingEvent {
            traceparent: decode::traceparent(&record),
            position: Position {
                topic: Arc::clone(&origin.topic),
                partition: origin.partition,
                offset: origin.offset,
            },
            envelope,
        },
        record,
        unreadable: unreadable.filter(|_| !skip),
    }
}
