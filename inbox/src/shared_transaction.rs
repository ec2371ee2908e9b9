use std::{future::poll_fn, io, sync::Arc, time::Duration};

use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::Instant,
};
use tokio_util::sync::PollSemaphore;

use crate::{
    decode::History,
    handler::{Handler, IncomingEvent},
    in_hand::InHand,
    metrics::Metrics,
    process::{Batch, BatchError, Begin, Process},
    rate_limit::{Budget, RateLimits},
    record::Record,
};

/// Records that must wait before a transaction joins those under way, or fewer if the rate limit grants fewer at once. A
/// transaction costs a dozen messages to the database and back, however few share them, and it holds rows that the
/// next one may want.
const ENOUGH: usize = 100;
/// The longest that fewer wait for those under way while there is room for another: one of them may be stuck.
const PATIENCE: Duration = Duration::from_millis(50);
/// How long those that have just been answered have to come with what has gathered behind them meanwhile. Without that pause they
/// miss the next transaction, and what gathers waits for two instead of one.
const REJOIN: Duration = Duration::from_millis(1);
/// Batches on their way to the task, and the most that it takes in before its next look at what is under way.
const MOST_AT_ONCE: usize = 64;

/// Batches of several partitions that wait at the same time take effect in one transaction.
///
/// A key lies in one partition, so what stands in different batches may take effect in any order. A transaction that fails has
/// done nothing for any of them, or they will find that it has: each goes alone then, with its own pauses, and only the one
/// at fault is halved. It waits for a row only briefly: one that somebody else has locked must not hold up strangers.
pub(crate) struct SharedTransactions {
    batches: mpsc::Sender<Waiting>,
}

/// What a shared transaction is made with.
pub(crate) struct Sharing<H> {
    pub(crate) process: Arc<Process<H>>,
    /// How many transactions may be open at once, also those of batches that go alone.
    pub(crate) transactions: Arc<Semaphore>,
    /// Most events in one transaction; one batch never has more.
    pub(crate) batch_limit: usize,
    pub(crate) limits: RateLimits,
    pub(crate) metrics: Arc<Metrics>,
}

/// What became of a batch.
pub(crate) enum Shared {
    /// Each of its events has its verdict.
    Judged,
    /// Nothing, and it must go alone; this is what its own first try came to, if it was one.
    Alone(Option<BatchError>),
}

/// The task that makes the transactions has ended by a defect, and the batch with it.
pub(crate) struct Gone;

/// A partition's batch on its way to a transaction, and who waits for it.
struct Waiting {
    in_hand: InHand,
    reply: oneshot::Sender<(InHand, Shared)>,
}

impl Waiting {
    fn events(&self) -> usize {
        self.in_hand.events.len()
    }
}

impl SharedTransactions {
    /// Ends when its last handle is gone and the last transaction has ended.
    pub(crate) fn start<H: Handler>(sharing: Sharing<H>) -> Self {
        let (batches, arriving) = mpsc::channel(MOST_AT_ONCE);
        tokio::spawn(gather(Arc::new(sharing), arriving));
        Self { batches }
    }

    /// Waits until the batch has been in a transaction that others may share. Not to be cancelled: the batch would be lost.
    pub(crate) async fn apply(&self, in_hand: &mut InHand) -> Result<Shared, Gone> {
        let (reply, replied) = oneshot::channel();
        let waiting = Waiting {
            in_hand: std::mem::take(in_hand),
            reply,
        };
        self.batches.send(waiting).await.map_err(|_| Gone)?;
        let (back, shared) = replied.await.map_err(|_| Gone)?;
        *in_hand = back;
        Ok(shared)
    }
}

/// Ends when nobody can send any more and the last transaction has ended.
async fn gather<H: Handler>(sharing: Arc<Sharing<H>>, mut arriving: mpsc::Receiver<Waiting>) {
    let mut slots = PollSemaphore::new(Arc::clone(&sharing.transactions));
    let mut slot = None;
    let mut under_way = FuturesUnordered::new();
    let mut waiting: Vec<Waiting> = Vec::new();
    let (mut patient_until, mut rejoin_until) = (Instant::now(), Instant::now());
    let mut open = true;
    while open || !waiting.is_empty() || !under_way.is_empty() {
        let nobody_waits = waiting.is_empty();
        let no_later = if under_way.is_empty() {
            rejoin_until
        } else {
            patient_until
        };
        // Grants count records, whatever becomes of them.
        let records: usize = waiting.iter().map(|waiting| waiting.in_hand.records.len()).sum();
        let goes = !nobody_waits && (records >= sharing.enough() || no_later <= Instant::now());
        // A slot first: what arrives while all are taken goes with the others.
        if goes && let Some(slot) = slot.take() {
            let together = fitting(&mut waiting, sharing.batch_limit);
            under_way.push(tokio::spawn(transact(Arc::clone(&sharing), slot, together)));
            patient_until = Instant::now() + PATIENCE;
            continue;
        }
        tokio::select! {
            arrived = arriving.recv_many(&mut waiting, MOST_AT_ONCE), if open => {
                open = arrived > 0;
                if nobody_waits {
                    patient_until = Instant::now() + PATIENCE;
                }
            }
            Some(ended) = under_way.next() => {
                rejoin_until = Instant::now() + REJOIN;
                if let Err(error) = ended {
                    tracing::error!(%error, "a shared transaction panicked");
                }
            }
            granted = poll_fn(|context| slots.poll_acquire(context)), if goes => slot = granted,
            () = tokio::time::sleep_until(no_later), if !nobody_waits && !goes => {}
        }
    }
}

/// Takes those that have waited the longest, as many as fit into one transaction.
fn fitting(waiting: &mut Vec<Waiting>, batch_limit: usize) -> Vec<Waiting> {
    let mut events = 0;
    let mut count = 0;
    for waiting in &*waiting {
        events += waiting.events();
        if events > batch_limit && count > 0 {
            break;
        }
        count += 1;
    }
    waiting.drain(..count).collect()
}

async fn transact<H: Handler>(sharing: Arc<Sharing<H>>, slot: OwnedSemaphorePermit, mut together: Vec<Waiting>) {
    let counts: Vec<usize> = together.iter().map(Waiting::events).collect();
    // The events of a transaction are one slice; each batch gets its own back.
    let mut events: Vec<IncomingEvent> = Vec::with_capacity(counts.iter().sum());
    for waiting in &mut together {
        events.append(&mut waiting.in_hand.events);
    }
    let in_hands = || together.iter().map(|waiting| &waiting.in_hand);
    let records: Vec<&Record> = in_hands().flat_map(InHand::records_of_events).collect();
    let histories: Vec<&History> = in_hands().flat_map(InHand::histories_of_events).collect();
    let batch = Batch {
        events: &events,
        records: &records,
        histories: &histories,
    };
    let alone = together.len() == 1;
    let begin = if alone { Begin::Patient } else { Begin::Brief };
    let start = Instant::now();
    let judged = sharing.process.process(batch, None, begin).await;
    sharing.metrics.transaction(start.elapsed());
    drop(slot);
    let batches = together.len();
    let (mut verdicts, mut error) = match judged {
        Ok(verdicts) => (Some(verdicts.into_iter()), None),
        Err(error) => {
            tracing::debug!(%error, batches, events = events.len(), "a shared transaction failed, each batch goes alone");
            (None, Some(error))
        }
    };
    let mut events = events.into_iter();
    for (mut waiting, count) in together.into_iter().zip(counts) {
        waiting.in_hand.events.extend(events.by_ref().take(count));
        let shared = match &mut verdicts {
            Some(verdicts) => {
                waiting.in_hand.judge(verdicts.take(count).map(Some));
                Shared::Judged
            }
            None if alone => Shared::Alone(error.take()),
            None => Shared::Alone(error.as_ref().and_then(everybodys)),
        };
        // Nobody waits any more only if its worker has ended by a defect.
        waiting.reply.send((waiting.in_hand, shared)).ok();
    }
}

/// An error that each batch would have met alone: the database is away.
fn everybodys(error: &BatchError) -> Option<BatchError> {
    match error {
        BatchError::Begin(error) => Some(BatchError::Begin(sqlx::Error::Io(io::Error::other(error.to_string())))),
        BatchError::TimedOut(limit) => Some(BatchError::TimedOut(*limit)),
        _ => None,
    }
}

impl<H> Sharing<H> {
    fn enough(&self) -> usize {
        let granted = self
            .limits
            .largest_grant(Budget::Live)
            .map_or(ENOUGH, |grant| grant as usize);
        ENOUGH.min(granted).min(self.batch_limit)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::value::RawValue;
    use shared_events::Envelope;
    use time::OffsetDateTime;
    use uuid::Uuid;

    use super::*;
    use crate::handler::Position;

    fn waiting(events: usize) -> Waiting {
        let event = |offset| IncomingEvent {
            envelope: Envelope {
                id: Uuid::now_v7(),
                event_type: "Effect".to_owned(),
                version: 1,
                timestamp: OffsetDateTime::UNIX_EPOCH,
                aggregate_type: "thing".to_owned(),
                aggregate_id: "a".to_owned(),
                sequence: 1,
                transaction_key: Uuid::now_v7(),
                payload: RawValue::NULL.to_owned(),
            },
            position: Position {
                topic: "topic".into(),
                partition: 0,
                offset,
            },
            traceparent: None,
        };
        let in_hand = InHand {
            events: (0..events as i64).map(event).collect(),
            ..InHand::default()
        };
        Waiting {
            in_hand,
            reply: oneshot::channel().0,
        }
    }

    #[test]
    fn no_transaction_has_more_events_than_the_limit_and_each_has_a_batch() {
        let mut queue: Vec<Waiting> = [4, 6, 1, 10, 3].map(waiting).into();
        let mut taken = Vec::new();
        while !queue.is_empty() {
            taken.push(
                fitting(&mut queue, 10)
                    .iter()
                    .map(Waiting::events)
                    .collect::<Vec<usize>>(),
            );
        }
        assert_eq!(taken, [vec![4, 6], vec![1], vec![10], vec![3]]);
    }
}
