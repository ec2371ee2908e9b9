use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, stream::FuturesUnordered};
use shared_events::shipment::MAX_LINES;
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::Span;

use crate::{
    change_shipments::{ChangeError, MAX_LINES_OF_A_CALL, MAX_UNITS, Reply, Request, Shared, log_failure},
    fault::Fault,
    switch::Switch,
};

/// Groups under way at once: while one waits for the disk, the others lock and decide.
const MOST_UNDER_WAY: usize = 3;
/// Requests that must wait before a group joins one that is under way. Each group costs a processor some two milliseconds
/// however few requests share them, and the group under way ends soon enough.
const ENOUGH: usize = 32;
/// The longest that fewer wait for the ones under way while there is room for another: those may be of large shipments, or stuck.
const PATIENCE: Duration = Duration::from_millis(50);
/// Most requests of a group: together they hold no more in memory than one call may.
const LARGEST: usize = MAX_LINES_OF_A_CALL / MAX_LINES;

/// A request, and who waits for its reply.
#[derive(Debug)]
pub(crate) struct Waiting {
    pub(crate) request: Request,
    pub(crate) span: Span,
    reply: oneshot::Sender<Result<Reply, ChangeError>>,
    switch: Switch,
    _permit: OwnedSemaphorePermit,
}

/// Where requests wait for the next group.
#[derive(Debug, Clone)]
pub(crate) struct Queue {
    requests: mpsc::Sender<Waiting>,
    closed: CancellationToken,
}

impl Waiting {
    /// In the span of the caller.
    pub(crate) fn new(
        request: Request,
        permit: OwnedSemaphorePermit,
        switch: Switch,
    ) -> (Self, oneshot::Receiver<Result<Reply, ChangeError>>) {
        let (reply, replied) = oneshot::channel();
        let waiting = Self {
            request,
            span: Span::current(),
            reply,
            switch,
            _permit: permit,
        };
        (waiting, replied)
    }

    pub(crate) fn answer(self, reply: Result<Reply, ChangeError>) {
        // Here and not where the client waits: it may have given up, and that is when it counts.
        self.switch.asked(reply.as_ref().is_err_and(ChangeError::is_failure));
        if let Err(error) = &reply {
            self.span.in_scope(|| log_failure(error, &self.request));
        }
        // The client may have hung up.
        self.reply.send(reply).ok();
    }
}

impl Queue {
    pub(crate) fn join(&self, waiting: Waiting) {
        // There is a place for every permit. Closed, it drops the request, and who waits for it hears of that.
        self.requests.try_send(waiting).ok();
    }

    /// Nothing comes any more; what waits is still done.
    pub(crate) fn close(&self) {
        self.closed.cancel();
    }
}

/// Requests for one shipment each that wait at the same time share one transaction, and so one flush of the log.
///
/// Nobody waits for company while nothing is under way. A group waits for no other transaction either, since one shipment
/// locked elsewhere would hold up strangers: what is locked, or makes the group fail, goes alone, as if there were no groups.
pub(crate) fn start(shared: &Arc<Shared>) -> Queue {
    let (requests, waiting) = mpsc::channel(MAX_UNITS);
    let closed = CancellationToken::new();
    shared.units.spawn(gather(shared.clone(), waiting, closed.clone()));
    Queue { requests, closed }
}

/// Ends when the queue is closed and the last group has its replies.
async fn gather(shared: Arc<Shared>, mut waiting: mpsc::Receiver<Waiting>, closed: CancellationToken) {
    let mut under_way = FuturesUnordered::new();
    let mut group = Vec::new();
    let mut go_at = Instant::now();
    let mut open = true;
    while open || !group.is_empty() || !under_way.is_empty() {
        let may_join = under_way.len() < MOST_UNDER_WAY && (group.len() >= ENOUGH || go_at <= Instant::now());
        if !group.is_empty() && (under_way.is_empty() || may_join) {
            let group = std::mem::take(&mut group);
            under_way.push(shared.units.spawn(commit(shared.clone(), group)));
        }
        let room = LARGEST - group.len();
        let is_new = group.is_empty();
        tokio::select! {
            taken = waiting.recv_many(&mut group, room), if open && room > 0 => {
                open = taken > 0;
                if is_new {
                    go_at = Instant::now() + PATIENCE;
                }
            }
            Some(ended) = under_way.next() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "a group of requests panicked");
                }
            }
            () = tokio::time::sleep_until(go_at), if !is_new && under_way.len() < MOST_UNDER_WAY => {}
            () = closed.cancelled(), if !waiting.is_closed() => waiting.close(),
        }
    }
}

async fn commit(shared: Arc<Shared>, group: Vec<Waiting>) {
    let requests: Vec<&Request> = group.iter().map(|waiting| &waiting.request).collect();
    match shared.together(&requests).await {
        Ok(replies) => {
            for (waiting, reply) in group.into_iter().zip(replies) {
                match reply {
                    Some(reply) => waiting.answer(reply),
                    None => shared.clone().alone(waiting),
                }
            }
        }
        // Trying again could do it twice.
        Err(ChangeError::OutcomeUnknown(error)) => fail_all(group, &error, ChangeError::OutcomeUnknown),
        // It is away for each of them.
        Err(ChangeError::Fault(Fault::Unavailable(error))) => {
            fail_all(group, &error, |error| ChangeError::Fault(Fault::Unavailable(error)));
        }
        // Whose fault it was shows when each goes alone.
        Err(error) => {
            tracing::debug!(%error, requests = group.len(), "a group of requests failed, each goes alone");
            for waiting in group {
                shared.clone().alone(waiting);
            }
        }
    }
}

fn fail_all(group: Vec<Waiting>, error: &sqlx::Error, cause: fn(sqlx::Error) -> ChangeError) {
    for waiting in group {
        let copy = sqlx::Error::Io(std::io::Error::other(error.to_string()));
        waiting.answer(Err(cause(copy)));
    }
}
