use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    time::Instant,
};

use crate::{
    decode::History,
    handler::{Handler, IncomingEvent},
    in_hand::InHand,
    metrics::Metrics,
    ordering::Verdict,
    process::{Batch, Process},
    record::Record,
};

/// Events that must wait before a transaction joins those under way. A transaction costs a dozen messages to the database and
/// back, however few events share them, and it holds rows that the next one may want.
const ENOUGH: usize = 100;
/// The longest that fewer wait for the ones under way while there is room for another: one of those may be stuck.
const PATIENCE: Duration = Duration::from_millis(50);

/// A partition's batch on its way to a transaction, and who waits for it.
struct Waiting {
    in_hand: InHand,
    reply: oneshot::Sender<(InHand, Option<Vec<Verdict>>)>,
}

impl Waiting {
    fn events(&self) -> usize {
        self.in_hand.events.len()
    }
}

/// Batches of several partitions that wait at the same time take effect in one transaction.
///
/// A key lies in one partition, so what stands in different batches may take effect in any order. Nobody waits while nothing
/// is under way. A transaction that fails has done nothing for any of them, or they will find that it has: each goes alone
/// then, with its own pauses, and only the one at fault is halved.
#[derive(Clone)]
pub(crate) struct SharedTransactions {
    batches: mpsc::Sender<Waiting>,
}

/// How long those that have just been answered have to come with what has gathered behind them meanwhile. Without that pause they
/// miss the next transaction, and what gathers waits for two instead of one.
const REJOIN: Duration = Duration::from_millis(1);
/// The most that are taken in before the next look at what is under way.
const MOST_AT_ONCE: usize = 64;

/// What a shared transaction is made with.
pub(crate) struct Sharing<H> {
    pub(crate) process: Arc<Process<H>>,
    /// How many transactions may be open at once, also those of batches that go alone.
    pub(crate) transactions: Arc<Semaphore>,
    pub(crate) most_under_way: usize,
    /// Most events in one transaction; one batch never has more.
    pub(crate) batch_limit: usize,
    pub(crate) metrics: Arc<Metrics>,
}

/// The task that makes the transactions has ended by a defect, and the batch with it.
pub(crate) struct Gone;

impl SharedTransactions {
    /// Ends when its last handle is gone and the last transaction has ended.
    pub(crate) fn start<H: Handler>(sharing: Sharing<H>) -> Self {
        let (batches, arriving) = mpsc::channel(MOST_AT_ONCE);
        tokio::spawn(gather(Arc::new(sharing), arriving));
        Self { batches }
    }

    /// Gives every event its verdict in a transaction that others may share; false if the batch must go alone.
    pub(crate) async fn apply(&self, in_hand: &mut InHand) -> Result<bool, Gone> {
        let (reply, replied) = oneshot::channel();
        let waiting = Waiting {
            in_hand: std::mem::take(in_hand),
            reply,
        };
        self.batches.send(waiting).await.map_err(|_| Gone)?;
        let (back, verdicts) = replied.await.map_err(|_| Gone)?;
        *in_hand = back;
        let judged = verdicts.is_some();
        in_hand.judge(verdicts.into_iter().flatten());
        Ok(judged)
    }
}

/// Ends when nobody can send any more and the last transaction has ended.
async fn gather<H: Handler>(sharing: Arc<Sharing<H>>, mut arriving: mpsc::Receiver<Waiting>) {
    let mut under_way = FuturesUnordered::new();
    let mut waiting: Vec<Waiting> = Vec::new();
    let mut go_at = Instant::now();
    let mut join_until = Instant::now();
    let mut open = true;
    while open || !waiting.is_empty() || !under_way.is_empty() {
        let events: usize = waiting.iter().map(Waiting::events).sum();
        let room = under_way.len() < sharing.most_under_way;
        let no_later = if under_way.is_empty() { join_until } else { go_at };
        let may_go = room && (events >= ENOUGH || no_later <= Instant::now());
        if !waiting.is_empty() && may_go {
            let company = company(&mut waiting, sharing.batch_limit);
            under_way.push(tokio::spawn(transact(Arc::clone(&sharing), company)));
            continue;
        }
        let is_new = waiting.is_empty();
        tokio::select! {
            arrived = arriving.recv_many(&mut waiting, MOST_AT_ONCE), if open => {
                open = arrived > 0;
                if is_new {
                    go_at = Instant::now() + PATIENCE;
                }
            }
            Some(ended) = under_way.next() => {
                join_until = Instant::now() + REJOIN;
                if let Err(error) = ended {
                    tracing::error!(%error, "a shared transaction panicked");
                }
            }
            () = tokio::time::sleep_until(no_later), if !is_new && room => {}
        }
    }
}

/// Those that have waited the longest, as many as fit into one transaction.
fn company(waiting: &mut Vec<Waiting>, batch_limit: usize) -> Vec<Waiting> {
    let mut events = 0;
    let fits = |waiting: &&Waiting| {
        events += waiting.events();
        events <= batch_limit
    };
    let count = waiting.iter().take_while(fits).count();
    waiting.drain(..count.max(1)).collect()
}

async fn transact<H: Handler>(sharing: Arc<Sharing<H>>, mut company: Vec<Waiting>) {
    let counts: Vec<usize> = company.iter().map(Waiting::events).collect();
    // The batch of a transaction is one slice; each gets its part back.
    let mut events: Vec<IncomingEvent> = Vec::with_capacity(counts.iter().sum());
    for waiting in &mut company {
        events.append(&mut waiting.in_hand.events);
    }
    let records: Vec<&Record> = company.iter().flat_map(|waiting| waiting.in_hand.records_of_events()).collect();
    let histories: Vec<&History> = company.iter().flat_map(|waiting| waiting.in_hand.histories_of_events()).collect();
    let batch = Batch {
        events: &events,
        records: &records,
        histories: &histories,
    };
    let judged = match sharing.transactions.acquire().await {
        Ok(_slot) => {
            let start = Instant::now();
            let judged = sharing.process.process(batch, None).await;
            sharing.metrics.transaction(start.elapsed());
            judged
        }
        // Never closed.
        Err(_) => return,
    };
    drop((records, histories));
    if let Err(error) = &judged {
        tracing::debug!(%error, batches = counts.len(), events = events.len(), "a shared transaction failed, each batch goes alone");
    }
    let mut verdicts = judged.ok().map(Vec::into_iter);
    let mut events = events.into_iter();
    for (mut waiting, count) in company.into_iter().zip(counts) {
        waiting.in_hand.events.extend(events.by_ref().take(count));
        let verdicts = verdicts.as_mut().map(|verdicts| verdicts.take(count).collect());
        // Nobody waits any more only if its worker has ended by a defect.
        waiting.reply.send((waiting.in_hand, verdicts)).ok();
    }
}
