use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{self, AtomicI64},
    },
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use shared_events::Rejection;
use sqlx::{Connection, PgConnection, PgPool, PgTransaction};
use tokio::sync::Notify;
use uuid::Uuid;

use crate::{
    claim::{self, Expectation, Known},
    crash_point,
    decode::History,
    engine::UnknownTypes,
    handler::{Handler, HandlerError, IncomingEvent, Outcome, Reason},
    ordering::{HeldKeys, Ordering, OutOfOrder, Settlement, Turn, Verdict, settle, turns},
    pace::Commits,
    record::Record,
    retry::{Schedule, Step},
    table::{Failed, Hold, Parked, Table},
};

/// Why a batch as a whole had no effect, by the step that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BatchError {
    #[error("no transaction could begin: {0}")]
    Begin(#[source] sqlx::Error),
    #[error("the inbox rows could not be written: {0}")]
    Inbox(#[source] sqlx::Error),
    #[error("the handler failed: {0}")]
    Handler(#[source] HandlerError),
    #[error("the handler answered {answered} outcomes for {asked} events")]
    WrongCount { asked: usize, answered: usize },
    #[error("the handler panicked: {0}")]
    Panicked(String),
    /// It may have happened: the next try then finds the inbox rows.
    #[error("the commit failed: {0}")]
    Commit(#[source] sqlx::Error),
    /// Like a failed commit it may have happened.
    #[error("the transaction did not end within {0:?}, its connection was given up")]
    TimedOut(Duration),
    #[error(
        "{aggregate_type} {aggregate_id} is held and has {most} events parked behind it, which is the most; settle the \
         event that holds it"
    )]
    KeyFull {
        aggregate_type: String,
        aggregate_id: String,
        most: u32,
    },
    #[error("{0} events are parked, which is the most; settle the keys that are held")]
    TableFull(u32),
    #[error("{0}")]
    Undelivered(String),
}

/// Decoded events, and beside each the record it came in and the attempts behind it.
#[derive(Clone, Copy)]
pub(crate) struct Batch<'a> {
    pub(crate) events: &'a [IncomingEvent],
    pub(crate) records: &'a [&'a Record],
    pub(crate) histories: &'a [&'a History],
}

impl<'a> Batch<'a> {
    pub(crate) fn part(&self, range: Range<usize>) -> Batch<'a> {
        Batch {
            events: &self.events[range.clone()],
            records: &self.records[range.clone()],
            histories: &self.histories[range],
        }
    }
}

/// How long a transaction waits for rows that others have locked.
#[derive(Clone, Copy)]
pub(crate) enum Begin {
    /// As long as the server lets it.
    Patient,
    /// Several times what a transaction takes, and no longer.
    Brief,
}

impl Begin {
    fn statement(self) -> &'static str {
        match self {
            Self::Patient => "BEGIN",
            Self::Brief => "BEGIN; SET LOCAL lock_timeout = '250ms'",
        }
    }
}

/// What a transaction is made with.
pub(crate) struct Process<H> {
    pub(crate) pool: PgPool,
    pub(crate) table: Table,
    pub(crate) handler: H,
    pub(crate) unknown_types: UnknownTypes,
    pub(crate) ordering: Ordering,
    pub(crate) schedule: Schedule,
    pub(crate) transaction_limit: Duration,
    pub(crate) consumer_version: &'static str,
    pub(crate) commits: Arc<Commits>,
    pub(crate) expectation: Expectation,
    /// Events parked in all, as last counted.
    pub(crate) parked: AtomicI64,
    /// Something parked may go.
    pub(crate) releasing: Notify,
}

/// Why a transaction was rolled back that is to be made again at once.
enum Again {
    OutOfOrder(OutOfOrder),
    Known(Known),
}

impl<H> Process<H> {
    /// Commits, and notes how long the database took for it.
    pub(crate) async fn commit(&self, transaction: PgTransaction<'_>) -> Result<(), BatchError> {
        let start = Instant::now();
        transaction.commit().await.map_err(BatchError::Commit)?;
        self.commits.took(start.elapsed());
        Ok(())
    }
}

impl<H: Handler> Process<H> {
    /// One batch in one transaction. On success the verdicts stand in the order of the events, and exactly those that
    /// took effect, had done so before or are none of ours keep an inbox row. `judged` is what became of the only event
    /// in a transaction before, which was rolled back: then the handler is not asked again.
    ///
    /// A server that vanished without a word never answers, and its own timeouts do not reach us: the limit ends the
    /// wait. Do not cancel this from outside: a dropped `begin` can leave a connection inside a transaction that nobody
    /// ends (HAZARDS H3), and a dropped COPY leaves it one answer behind.
    pub(crate) async fn process(
        &self,
        batch: Batch<'_>,
        judged: Option<&Outcome>,
        begin: Begin,
    ) -> Result<Vec<Verdict>, BatchError> {
        let mut connection = self.pool.acquire().await.map_err(BatchError::Begin)?;
        let transacted = tokio::time::timeout(self.transaction_limit, async {
            let mut behind = HashSet::new();
            loop {
                match self.transact(&mut connection, batch, judged, begin, &behind).await? {
                    Ok(verdicts) => return Ok(verdicts),
                    Err(Again::OutOfOrder(OutOfOrder(ids))) => behind.extend(ids),
                    Err(Again::Known(Known)) => {
                        tracing::debug!(events = batch.events.len(), "some are known: claimed again")
                    }
                }
            }
        });
        let transacted = transacted.await;
        if !matches!(transacted, Ok(Ok(_))) {
            self.expectation.forget();
        }
        match transacted {
            Ok(result) => result,
            Err(_) => {
                // Cut in the middle of a transaction: it must not meet the next borrower. Dropped, it closes its socket.
                drop(connection.detach());
                Err(BatchError::TimedOut(self.transaction_limit))
            }
        }
    }

    async fn transact(
        &self,
        connection: &mut PgConnection,
        batch: Batch<'_>,
        judged: Option<&Outcome>,
        begin: Begin,
        behind: &HashSet<Uuid>,
    ) -> Result<Result<Vec<Verdict>, Again>, BatchError> {
        let events = batch.events;
        let begun = connection.begin_with(begin.statement()).await;
        let mut transaction = begun.map_err(BatchError::Begin)?;
        let claimed = claim::claim(&self.table, &mut transaction, events, &self.expectation).await;
        let Ok(is_new) = claimed.map_err(BatchError::Inbox)? else {
            transaction.rollback().await.map_err(BatchError::Inbox)?;
            return Ok(Err(Again::Known(Known)));
        };
        crash_point::CLAIM_AFTER.reached();
        // After the claim: whoever tried the same events before us has ended by now, and what he noted is seen.
        let held = self.table.lock_held(&mut transaction, events).await;
        let held = held.map_err(BatchError::Inbox)?;
        let mut turns = turns(events, &is_new, &held, behind, &self.ordering);
        let passed = self.passed_over(&mut transaction, events, &mut turns).await?;
        let answers = match judged {
            Some(outcome) if passed.is_empty() => vec![outcome.clone()],
            _ => self.ask(&mut transaction, events, &turns, &passed).await?,
        };
        crash_point::EFFECT_AFTER.reached();
        let settled = settle(
            events,
            &turns,
            answers,
            batch.histories,
            &held,
            &self.ordering,
            &self.schedule,
        );
        let settlement = match settled {
            Ok(settlement) => settlement,
            Err(out_of_order) => {
                transaction.rollback().await.map_err(BatchError::Inbox)?;
                return Ok(Err(Again::OutOfOrder(out_of_order)));
            }
        };
        self.write(&mut transaction, batch, &settlement, &held, &passed).await?;
        let releasing = self.table.settle(&mut transaction, &settlement.settled).await;
        let releasing = releasing.map_err(BatchError::Inbox)?;
        // The event that held a key may have been dead once.
        let held_by = |key| Some(held.get(key)?.event_id);
        let ids: Vec<Uuid> = settlement.settled.iter().filter_map(held_by).collect();
        self.resolve_applied(&mut transaction, batch, &settlement, &ids).await?;
        crash_point::COMMIT_BEFORE.reached();
        self.commit(transaction).await?;
        crash_point::COMMIT_AFTER.reached();
        if releasing {
            self.releasing.notify_one();
        }
        Ok(Ok(settlement.verdicts))
    }

    /// Those of `ids` that took effect here are no dead letters any more, nor are those that were tried before: one that
    /// is redriven may come out of a retry topic with no key held for it.
    async fn resolve_applied(
        &self,
        transaction: &mut PgTransaction<'_>,
        batch: Batch<'_>,
        settlement: &Settlement,
        ids: &[Uuid],
    ) -> Result<(), BatchError> {
        let settled: Vec<Uuid> = batch
            .events
            .iter()
            .zip(&settlement.verdicts)
            .zip(batch.histories)
            .filter(|((_, verdict), _)| !matches!(verdict, Verdict::Failed { .. } | Verdict::Parked))
            .filter(|((event, _), history)| history.attempts > 0 || ids.contains(&event.envelope.id))
            .map(|((event, _), _)| event.envelope.id)
            .collect();
        self.table
            .resolve(transaction, &settled)
            .await
            .map_err(BatchError::Inbox)
    }

    /// Keeps the records that could not be read, before they leave.
    pub(crate) async fn bury(&self, failed: &[Failed<'_>]) -> Result<(), BatchError> {
        let mut connection = self.pool.acquire().await.map_err(BatchError::Begin)?;
        let buried = tokio::time::timeout(self.transaction_limit, async {
            let mut transaction = connection.begin().await.map_err(BatchError::Begin)?;
            let noted = self
                .table
                .note_failures(&mut transaction, failed, self.consumer_version)
                .await;
            noted.map_err(BatchError::Inbox)?;
            crash_point::BURY_COMMIT_BEFORE.reached();
            transaction.commit().await.map_err(BatchError::Commit)?;
            crash_point::BURY_COMMIT_AFTER.reached();
            Ok(())
        });
        match buried.await {
            Ok(result) => result,
            Err(_) => {
                drop(connection.detach());
                Err(BatchError::TimedOut(self.transaction_limit))
            }
        }
    }

    /// Events that would try and were passed over by a transaction before, whose record may never have reached the dead letters:
    /// the process died, lost the partition or was stopped by the flood limit. It is not their turn any more. A handler that
    /// counts sequences would call them duplicates; another one would let them take effect behind those that follow them.
    async fn passed_over(
        &self,
        transaction: &mut PgTransaction<'_>,
        events: &[IncomingEvent],
        turns: &mut [Turn],
    ) -> Result<HashMap<Uuid, Reason>, BatchError> {
        if !self.ordering.releases() {
            return Ok(HashMap::new());
        }
        let tries = || (0..events.len()).filter(|place| turns[*place] == Turn::Try);
        let ids: Vec<Uuid> = tries().map(|place| events[place].envelope.id).collect();
        let passed = self.table.let_go_on(transaction, &ids).await;
        let passed = passed.map_err(BatchError::Inbox)?;
        let places: Vec<usize> = tries()
            .filter(|place| passed.contains_key(&events[*place].envelope.id))
            .collect();
        for place in places {
            turns[place] = Turn::PassedOver;
        }
        Ok(passed)
    }

    /// The handler's answers to the events whose turn it is, and for those that were `passed` over why they died.
    async fn ask(
        &self,
        transaction: &mut PgTransaction<'_>,
        events: &[IncomingEvent],
        turns: &[Turn],
        passed: &HashMap<Uuid, Reason>,
    ) -> Result<Vec<Outcome>, BatchError> {
        if passed.is_empty() && turns.iter().all(|turn| *turn == Turn::Try) {
            return self.apply(transaction, events).await;
        }
        let tries = events.iter().zip(turns).filter(|(_, turn)| **turn == Turn::Try);
        let tries: Vec<IncomingEvent> = tries.map(|(event, _)| event.clone()).collect();
        let mut answers = match tries.as_slice() {
            [] => Vec::new(),
            tries => self.apply(transaction, tries).await?,
        }
        .into_iter();
        let answer = |(event, turn): (&IncomingEvent, &Turn)| match turn {
            Turn::Try => answers.next(),
            Turn::PassedOver => Some(Outcome::DeadLetter(passed.get(&event.envelope.id)?.clone())),
            Turn::Done | Turn::Park => None,
        };
        Ok(events.iter().zip(turns).filter_map(answer).collect())
    }

    /// What becomes of events: the handler's answers, and the policy's for those that it does not take.
    pub(crate) async fn apply(
        &self,
        transaction: &mut PgTransaction<'_>,
        events: &[IncomingEvent],
    ) -> Result<Vec<Outcome>, BatchError> {
        let mut outcomes = self.answers(transaction, events).await?;
        keep_dead(&self.table, transaction, events, &mut outcomes).await?;
        Ok(outcomes)
    }

    async fn answers(
        &self,
        transaction: &mut PgTransaction<'_>,
        events: &[IncomingEvent],
    ) -> Result<Vec<Outcome>, BatchError> {
        let takes: Vec<bool> = events.iter().map(|event| self.handler.takes(&event.envelope)).collect();
        if takes.iter().all(|takes| *takes) {
            return ask_handler(&self.handler, transaction, events).await;
        }
        let taken = events.iter().zip(&takes).filter(|(_, takes)| **takes);
        let taken: Vec<IncomingEvent> = taken.map(|(event, _)| event.clone()).collect();
        let mut answers = ask_handler(&self.handler, transaction, &taken).await?.into_iter();
        let outcome = |(event, takes): (&IncomingEvent, &bool)| {
            let answer = if *takes { answers.next() } else { None };
            answer.unwrap_or_else(|| match self.unknown_types {
                UnknownTypes::Skip => Outcome::Skipped,
                UnknownTypes::DeadLetter => {
                    Outcome::DeadLetter(Rejection::UnknownType(event.envelope.event_type.clone()).into())
                }
            })
        };
        Ok(events.iter().zip(&takes).map(outcome).collect())
    }

    /// What has to stand in the table for what did not take effect; of events that were `passed` over it stands there already.
    async fn write(
        &self,
        transaction: &mut PgTransaction<'_>,
        batch: Batch<'_>,
        settlement: &Settlement,
        held: &HeldKeys,
        passed: &HashMap<Uuid, Reason>,
    ) -> Result<(), BatchError> {
        let without_effect = batch
            .events
            .iter()
            .zip(&settlement.verdicts)
            .filter(|(_, verdict)| matches!(verdict, Verdict::Failed { .. } | Verdict::Parked))
            .map(|(event, _)| event.envelope.id);
        let without_effect: Vec<Uuid> = without_effect.collect();
        if without_effect.is_empty() {
            return Ok(());
        }
        let table = &self.table;
        table
            .release(transaction, &without_effect)
            .await
            .map_err(BatchError::Inbox)?;
        let is_passed = |place: &usize| passed.contains_key(&batch.events[*place].envelope.id);
        let failed: Vec<Failed<'_>> = (0..batch.events.len())
            .filter(|place| !is_passed(place))
            .filter_map(|place| match &settlement.verdicts[place] {
                Verdict::Failed { step, class, reason } => Some(Failed {
                    event: Some(&batch.events[place]),
                    record: batch.records[place],
                    history: batch.histories[place],
                    topic: &batch.events[place].position.topic,
                    partition: batch.events[place].position.partition,
                    class: *class,
                    reason,
                    dead: (*step == Step::DeadLetter)
                        .then(|| self.ordering.holds(&batch.events[place].envelope.event_type)),
                }),
                _ => None,
            })
            .collect();
        table
            .note_failures(transaction, &failed, self.consumer_version)
            .await
            .map_err(BatchError::Inbox)?;
        for place in &settlement.pass_over {
            let passed = self.handler.pass_over(transaction, &batch.events[*place]).await;
            passed.map_err(BatchError::Handler)?;
        }
        let holds: Vec<Hold<'_>> = settlement
            .hold
            .iter()
            .map(|(place, state, reason)| Hold {
                event: &batch.events[*place],
                state: *state,
                reason,
                partition: batch.events[*place].position.partition,
            })
            .collect();
        table.hold(transaction, &holds).await.map_err(BatchError::Inbox)?;
        self.park(transaction, batch, &settlement.park, held).await
    }

    async fn park(
        &self,
        transaction: &mut PgTransaction<'_>,
        batch: Batch<'_>,
        places: &[usize],
        held: &HeldKeys,
    ) -> Result<(), BatchError> {
        let Some(limits) = self.ordering.parking() else {
            return Ok(());
        };
        let parked: Vec<Parked<'_>> = places
            .iter()
            .map(|place| Parked {
                event: &batch.events[*place],
                record: batch.records[*place],
                history: batch.histories[*place],
            })
            .collect();
        let counts = self.table.park(transaction, &parked).await.map_err(BatchError::Inbox)?;
        let in_all = self.parked.load(atomic::Ordering::Relaxed);
        if !parked.is_empty() && in_all >= i64::from(limits.most_in_all) {
            return Err(BatchError::TableFull(limits.most_in_all));
        }
        // A key that is only just held may pass the bound by this batch: refused, it could never be seen and settled.
        let held_before = counts.into_iter().filter(|(key, _)| held.contains_key(key));
        let fullest = held_before.max_by_key(|(_, parked)| *parked);
        if let Some(((aggregate_type, aggregate_id), parked)) = fullest
            && parked > i64::from(limits.most_per_key)
        {
            return Err(BatchError::KeyFull {
                aggregate_type,
                aggregate_id,
                most: limits.most_per_key,
            });
        }
        Ok(())
    }
}

/// A dead letter that let its key go on has not taken effect, though a handler that has passed over it calls it a duplicate
/// when it comes again, redriven for example: it stays dead.
pub(crate) async fn keep_dead(
    table: &Table,
    transaction: &mut PgTransaction<'_>,
    events: &[IncomingEvent],
    outcomes: &mut [Outcome],
) -> Result<(), BatchError> {
    let duplicates = events.iter().zip(outcomes);
    let duplicates: Vec<(Uuid, &mut Outcome)> = duplicates
        .filter(|(_, outcome)| **outcome == Outcome::Duplicate)
        .map(|(event, outcome)| (event.envelope.id, outcome))
        .collect();
    if duplicates.is_empty() {
        return Ok(());
    }
    let ids: Vec<Uuid> = duplicates.iter().map(|(id, _)| *id).collect();
    let dead = table.without_effect(transaction, &ids).await;
    let dead = dead.map_err(BatchError::Inbox)?;
    for (_, outcome) in duplicates.into_iter().filter(|(id, _)| dead.contains(id)) {
        let reason = "its key has gone on without it, so it can only be skipped";
        *outcome = Outcome::DeadLetter(Reason::new("passed_over", reason));
    }
    Ok(())
}

/// The handler's answers, one for each event.
pub(crate) async fn ask_handler<H: Handler>(
    handler: &H,
    transaction: &mut PgTransaction<'_>,
    events: &[IncomingEvent],
) -> Result<Vec<Outcome>, BatchError> {
    if events.is_empty() {
        return Ok(Vec::new());
    }
    // After a panic nothing of the transaction is used: it is dropped and rolled back.
    let outcomes = AssertUnwindSafe(handler.apply(transaction, events))
        .catch_unwind()
        .await
        .map_err(|panic| BatchError::Panicked(panic_text(&*panic)))?
        .map_err(BatchError::Handler)?;
    if outcomes.len() != events.len() {
        return Err(BatchError::WrongCount {
            asked: events.len(),
            answered: outcomes.len(),
        });
    }
    Ok(outcomes)
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}
