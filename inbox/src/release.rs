use std::{
    sync::{Arc, atomic},
    time::Duration,
};

use shared_events::headers::Origin;
use sqlx::{Connection, PgConnection};
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
    ordering::{Key, KeyState, Ordering, Verdict, verdict},
    partition::failed,
    process::{BatchError, Process, apply},
    queue::Record,
    rate_limit::{Budget, RateLimits},
    redirect::{Outgoing, Redirector},
    retry::{Backoff, Step, random_unit},
    status::Status,
    table::{Failed, Hold, ParkedRow},
};

/// Most events of one key in one transaction.
const BATCH: u32 = 100;
/// How often the table is asked: for what other instances let go, or a crash left behind.
const LOOK: Duration = Duration::from_secs(1);

/// Lets parked events take effect, in order, once their key's event is settled. Each instance has one; a key is locked while
/// one of them works on it.
///
/// ```text
/// releasing ─ all took effect ──────────────► the key is free
///     ├─ one is early ──────────────────────► waiting
///     └─ one fails: it holds the key ► its record is acknowledged in its topic ► unparked, retrying or dead
/// ```
///
/// A crash between the last two steps repeats them: the event is tried again, and a second copy of its record is a
/// duplicate or, while the key is held by that very event, one more try.
pub(crate) struct Releaser<H> {
    pub(crate) process: Arc<Process<H>>,
    pub(crate) transactions: Arc<Semaphore>,
    pub(crate) limits: RateLimits,
    pub(crate) redirector: Arc<Redirector>,
    pub(crate) flood: Arc<Flood>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) status: Status,
}

/// A parked event, as far as it could be read again.
struct Unparked {
    id: Uuid,
    /// It shall not take effect.
    skip: bool,
    partition: i32,
    record: Record,
    history: History,
    event: Option<IncomingEvent>,
}

/// An event that failed on its way out, and what is to become of it.
struct Failure {
    parked: Unparked,
    event: IncomingEvent,
    step: Step,
    class: Class,
    reason: Reason,
}

/// A key that is worked on, and its first event once it is known.
type Taken = (Key, Option<Uuid>);

enum Pass {
    /// There is no key to let go.
    Nothing,
    Done,
    Failed(Box<Failure>, Key),
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

    /// Key after key until none is left that may go.
    async fn release_all(&self, stop: &CancellationToken) -> Result<(), BatchError> {
        let mut looked = Instant::now();
        let mut more = self.look().await?;
        while more && !stop.is_cancelled() {
            more = self.round(stop).await?;
            if looked.elapsed() >= LOOK {
                self.look().await?;
                looked = Instant::now();
            }
        }
        Ok(())
    }

    /// Counts what is held, and says whether any of it may go.
    async fn look(&self) -> Result<bool, BatchError> {
        let counts = self.process.table.held_counts(&self.process.pool).await;
        let counts = counts.map_err(BatchError::Inbox)?;
        let parked = counts.iter().map(|(_, _, parked)| *parked).sum();
        self.process.parked.store(parked, atomic::Ordering::Relaxed);
        let releasing = counts.iter().any(|(state, _, _)| *state == KeyState::Releasing);
        self.status.holds(counts);
        Ok(releasing | self.step_jobs().await)
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

    /// One key's first events; false if there is nothing to do.
    async fn round(&self, stop: &CancellationToken) -> Result<bool, BatchError> {
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
        let mut most = permit.count();
        let mut judged = None;
        // Once taken, the same key is tried again: a judgement is about its event and about no other.
        let mut key = None;
        let mut judgements = 0;
        let pass = loop {
            match self.pass(&mut key, most, judged.take()).await {
                Ok(Ok(pass)) => break pass,
                // What took effect behind a failure is taken back; up to the failure it is done again.
                Ok(Err(fewer)) => most = fewer,
                Err(error) if classify(&error) == Class::Platform => return Err(error),
                Err(_) if most > 1 => most = (most / 2).max(1),
                // Without a handler to blame, or after it has been judged: somebody else's turn first.
                Err(error) => match key.clone() {
                    Some((key, Some(event_id))) if judgements == 0 => {
                        judgements += 1;
                        judged = Some((event_id, failed(&error)));
                        tracing::debug!(aggregate_id = key.1, %event_id, %error, "a parked event fails alone");
                    }
                    _ => return Err(error),
                },
            }
        };
        drop((permit, slot));
        match pass {
            Pass::Nothing => Ok(false),
            Pass::Done => Ok(true),
            Pass::Failed(failure, key) => {
                crash_point::RELEASE_FAILED.reached();
                self.send_on(*failure, &key).await?;
                Ok(true)
            }
        }
    }

    async fn pass(
        &self,
        taken: &mut Option<Taken>,
        most: u32,
        judged: Option<(Uuid, Outcome)>,
    ) -> Result<Result<Pass, u32>, BatchError> {
        let mut connection = self.process.pool.acquire().await.map_err(BatchError::Begin)?;
        let limit = self.process.transaction_limit;
        match tokio::time::timeout(limit, self.transact(&mut connection, taken, most, judged)).await {
            Ok(result) => result,
            Err(_) => {
                // As in `Process::process`.
                drop(connection.detach());
                Err(BatchError::TimedOut(limit))
            }
        }
    }

    /// The first `most` events of a key that is let go. `Err(fewer)` if only so many may be tried together. `judged` is
    /// what became of the only one in a transaction before.
    async fn transact(
        &self,
        connection: &mut PgConnection,
        taken: &mut Option<Taken>,
        most: u32,
        judged: Option<(Uuid, Outcome)>,
    ) -> Result<Result<Pass, u32>, BatchError> {
        let table = &self.process.table;
        let mut transaction = connection.begin().await.map_err(BatchError::Begin)?;
        let locked = table
            .lock_releasing(&mut transaction, taken.as_ref().map(|(key, _)| key))
            .await;
        let Some(key) = locked.map_err(BatchError::Inbox)? else {
            // Nothing to do, or another instance was faster with this one.
            return Ok(Ok(if taken.is_some() { Pass::Done } else { Pass::Nothing }));
        };
        crash_point::RELEASE_LOCKED.reached();
        *taken = Some((key.clone(), None));
        let rows = table.first_parked(&mut transaction, &key, i64::from(most)).await;
        let mut parked: Vec<Unparked> = rows.map_err(BatchError::Inbox)?.into_iter().map(unparked).collect();
        // One to skip goes alone, so that those behind it are judged after the handler has moved past it.
        let alone = parked.iter().position(|parked| parked.skip).map(|place| place.max(1));
        parked.truncate(alone.unwrap_or(parked.len()));
        // What cannot be read any more (by another version than the one that parked it) ends what goes together.
        let readable = parked.iter().take_while(|parked| parked.event.is_some()).count();
        let events: Vec<IncomingEvent> = parked[..readable]
            .iter()
            .filter_map(|parked| parked.event.clone())
            .collect();

        if readable == 0
            && let Some(first) = parked.first()
        {
            table
                .give_up(&mut transaction, &key, first.id)
                .await
                .map_err(BatchError::Inbox)?;
            transaction.commit().await.map_err(BatchError::Commit)?;
            tracing::error!(event_id = %first.id, aggregate_id = key.1, "a parked event cannot be read by this version");
            return Ok(Ok(Pass::Done));
        }
        let mut claimed = table
            .claim(&mut transaction, &events)
            .await
            .map_err(BatchError::Inbox)?;
        crash_point::RELEASE_CLAIMED.reached();
        let is_new: Vec<bool> = events.iter().map(|event| claimed.remove(&event.envelope.id)).collect();
        let asked: Vec<bool> = is_new
            .iter()
            .zip(&parked)
            .map(|(new, parked)| *new && !parked.skip)
            .collect();
        let new: Vec<IncomingEvent> = events
            .iter()
            .zip(&asked)
            .filter(|(_, asked)| **asked)
            .map(|(event, _)| event.clone())
            .collect();
        *taken = Some((key.clone(), new.first().map(|event| event.envelope.id)));
        let answers = match judged {
            // If it is still the one: another instance may have let it go meanwhile.
            Some((id, outcome)) if new.len() == 1 && new[0].envelope.id == id => vec![outcome],
            _ if new.is_empty() => Vec::new(),
            _ => apply(&mut transaction, &self.process.handler, &new).await?,
        };
        let mut answers = answers.into_iter();
        let outcomes: Vec<Outcome> = asked
            .iter()
            .map(|asked| if *asked { answers.next() } else { None }.unwrap_or(Outcome::Duplicate))
            .collect();
        if let [Unparked { skip: true, .. }] = parked.as_slice()
            && let [event] = events.as_slice()
        {
            let passed = self.process.handler.pass_over(&mut transaction, event).await;
            passed.map_err(BatchError::Handler)?;
        }
        let first_failure = outcomes.iter().position(fails);
        let done = first_failure.unwrap_or(events.len());
        let went_past = |outcome: &Outcome| matches!(outcome, Outcome::Applied | Outcome::Skipped);
        if outcomes.iter().skip(done + 1).any(went_past) {
            transaction.rollback().await.map_err(BatchError::Inbox)?;
            return Ok(Err(u32::try_from(done + 1).unwrap_or(1)));
        }

        let done_ids: Vec<Uuid> = events[..done].iter().map(|event| event.envelope.id).collect();
        // Those that took effect elsewhere keep their inbox rows, which are not of this transaction.
        let left = events[done..].iter().zip(&is_new[done..]).filter(|(_, new)| **new);
        let left_ids: Vec<Uuid> = left.map(|(event, _)| event.envelope.id).collect();
        table
            .release(&mut transaction, &left_ids)
            .await
            .map_err(BatchError::Inbox)?;
        table
            .unpark(&mut transaction, &key, &done_ids)
            .await
            .map_err(BatchError::Inbox)?;
        table
            .resolve(&mut transaction, &done_ids)
            .await
            .map_err(BatchError::Inbox)?;
        let pass = match first_failure {
            None => {
                // Behind a dead letter that nobody has settled, the rest stays.
                let dead_again = table.hold_by_next_dead(&mut transaction, &key).await;
                if !dead_again.map_err(BatchError::Inbox)? {
                    let settled = [key].into_iter().collect();
                    table
                        .settle(&mut transaction, &settled)
                        .await
                        .map_err(BatchError::Inbox)?;
                }
                Pass::Done
            }
            Some(place) => {
                let parked = parked.swap_remove(place);
                let event = events[place].clone();
                let outcome = outcomes[place].clone();
                let attempt = parked.history.attempts.saturating_add(1);
                let (state, reason) = match &outcome {
                    Outcome::Early(reason) if self.process.ordering != Ordering::None => {
                        (KeyState::Waiting, reason.clone())
                    }
                    Outcome::Early(reason) | Outcome::Retry(reason) | Outcome::DeadLetter(reason) => {
                        (KeyState::Releasing, reason.clone())
                    }
                    Outcome::Applied | Outcome::Duplicate | Outcome::Skipped => {
                        (KeyState::Releasing, Reason::new("none", "no failure"))
                    }
                };
                // From here on the key is held by this one, so that a copy of it that comes out of a retry topic may try.
                let hold = Hold {
                    event: &event,
                    state,
                    reason: &reason,
                    partition: parked.partition,
                };
                table.hold(&mut transaction, &[hold]).await.map_err(BatchError::Inbox)?;
                match verdict(outcome, attempt, &self.process.schedule) {
                    Verdict::Failed { step, class, reason } if state == KeyState::Releasing => {
                        let failure = Failure {
                            parked,
                            event,
                            step,
                            class,
                            reason,
                        };
                        Pass::Failed(Box::new(failure), key)
                    }
                    _ => Pass::Done,
                }
            }
        };
        crash_point::RELEASE_COMMIT_BEFORE.reached();
        self.process.commit(transaction).await?;
        crash_point::RELEASE_COMMIT_AFTER.reached();
        for (event, outcome) in events.iter().zip(&outcomes).take(done) {
            match outcome {
                Outcome::Applied => self.metrics.applied(event.envelope.timestamp),
                _ => self.metrics.duplicate(),
            }
        }
        let effects = outcomes[..done]
            .iter()
            .filter(|outcome| **outcome == Outcome::Applied)
            .count();
        if self
            .flood
            .admit(std::iter::repeat_n(Sign::TookEffect, effects))
            .is_err()
        {
            tracing::debug!("parked events took effect while the flood limit stops the rest");
        }
        Ok(Ok(pass))
    }

    /// Sends a failed event to its topic; then it is no longer parked, and its key is held for it.
    async fn send_on(&self, failure: Failure, key: &Key) -> Result<(), BatchError> {
        let Failure {
            parked,
            event,
            step,
            class,
            reason,
        } = failure;
        let sign = Sign::of(&Verdict::Failed {
            step,
            class,
            reason: reason.clone(),
        });
        if self.flood.admit(std::iter::once(sign)).is_err() {
            // It stays where it is, and is tried again when the stop is over.
            return Ok(());
        }
        let outgoing = Outgoing {
            record: &parked.record,
            topic: &event.position.topic,
            partition: parked.partition,
            event: Some(&event),
            history: &parked.history,
        };
        let mut letters = vec![self.redirector.letter(outgoing, step, class, &reason)];
        if let Err(error) = self.redirector.deliver(&mut letters).await {
            // It stays parked and is tried again; other keys come first.
            let event_id = event.envelope.id;
            tracing::warn!(%event_id, aggregate_id = key.1, %error, "a parked event that fails cannot be redirected for now");
            return Err(BatchError::Undelivered(error.to_string()));
        }
        crash_point::RELEASE_ACKNOWLEDGED.reached();
        let mut connection = self.process.pool.acquire().await.map_err(BatchError::Begin)?;
        let limit = self.process.transaction_limit;
        let noted = self.note_sent(&mut connection, &parked, &event, (step, class, &reason), key);
        match tokio::time::timeout(limit, noted).await {
            Ok(result) => result,
            Err(_) => {
                drop(connection.detach());
                Err(BatchError::TimedOut(limit))
            }
        }
    }

    async fn note_sent(
        &self,
        connection: &mut PgConnection,
        parked: &Unparked,
        event: &IncomingEvent,
        (step, class, reason): (Step, Class, &Reason),
        key: &Key,
    ) -> Result<(), BatchError> {
        let table = &self.process.table;
        let mut transaction = connection.begin().await.map_err(BatchError::Begin)?;
        let one = std::slice::from_ref(event);
        let claimed = table.claim(&mut transaction, one).await.map_err(BatchError::Inbox)?;
        let held = table.lock_held(&mut transaction, one).await;
        let held = held.map_err(BatchError::Inbox)?;
        if claimed.is_empty() {
            // The copy in its topic has taken effect before we came here: what it noted stands.
            table
                .unpark(&mut transaction, key, &[parked.id])
                .await
                .map_err(BatchError::Inbox)?;
            if held.get(key).is_some_and(|held| held.event_id == parked.id) {
                let settled = [key.clone()].into_iter().collect();
                table
                    .settle(&mut transaction, &settled)
                    .await
                    .map_err(BatchError::Inbox)?;
            }
            return transaction.commit().await.map_err(BatchError::Commit);
        }
        table
            .release(&mut transaction, &[parked.id])
            .await
            .map_err(BatchError::Inbox)?;
        table
            .unpark(&mut transaction, key, &[parked.id])
            .await
            .map_err(BatchError::Inbox)?;
        // Otherwise the copy in its topic was faster than we are, and what it noted stands.
        let still_ours = held
            .get(key)
            .is_some_and(|held| held.event_id == parked.id && held.state == KeyState::Releasing);
        if still_ours {
            let failed = Failed {
                event: Some(event),
                record: &parked.record,
                history: &parked.history,
                topic: &event.position.topic,
                partition: parked.partition,
                class,
                reason,
                dead: (step == Step::DeadLetter).then(|| self.process.ordering.holds(&event.envelope.event_type)),
            };
            let version = self.process.consumer_version;
            let noted = table.note_failures(&mut transaction, &[failed], version).await;
            noted.map_err(BatchError::Inbox)?;
            let state = match step {
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
                reason,
                partition: parked.partition,
            };
            table.hold(&mut transaction, &[hold]).await.map_err(BatchError::Inbox)?;
            if self.process.ordering == Ordering::None {
                // Nobody waits for its copy.
                let settled = [key.clone()].into_iter().collect();
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

fn fails(outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Retry(_) | Outcome::Early(_) | Outcome::DeadLetter(_) => true,
        Outcome::Applied | Outcome::Duplicate | Outcome::Skipped => false,
    }
}

fn unparked(row: ParkedRow) -> Unparked {
    let ParkedRow {
        event_id,
        skip,
        record: stored,
    } = row;
    let record = Record {
        offset: stored.origin_offset,
        timestamp_ms: stored.origin_timestamp_ms,
        key: stored.record_key,
        value: stored.record_value,
        headers: stored.header_names.into_iter().zip(stored.header_values).collect(),
        unreadable_headers: None,
        due: Instant::now(),
    };
    let origin = Origin {
        topic: stored.origin_topic,
        partition: stored.origin_partition,
        offset: stored.origin_offset,
        timestamp_ms: stored.origin_timestamp_ms,
    };
    let event = decode::decode(record.value.as_deref())
        .ok()
        .map(|envelope| IncomingEvent {
            traceparent: decode::traceparent(&record),
            position: Position {
                topic: origin.topic.as_str().into(),
                partition: origin.partition,
                offset: origin.offset,
            },
            envelope,
        });
    Unparked {
        id: event_id,
        skip,
        partition: stored.partition,
        record,
        history: History {
            attempts: u32::try_from(stored.attempts).unwrap_or_default(),
            origin,
        },
        event,
    }
}
