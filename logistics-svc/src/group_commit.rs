use std::sync::Arc;

use shared_events::shipment::MAX_LINES;
use tokio::sync::{Mutex, OwnedSemaphorePermit, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span};

use crate::{
    change_shipments::{ChangeError, MAX_LINES_OF_A_CALL, MAX_UNITS, Reply, Request, Shared, log_failure},
    fault::Fault,
    switch::Switch,
};

/// Groups under way at once: while one waits for the disk, the others lock and decide. More would only make them smaller.
const WRITERS: usize = 3;
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

/// Where requests wait for the next writer.
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

    pub(crate) fn waiting(&self) -> usize {
        self.requests.max_capacity() - self.requests.capacity()
    }

    /// The writers end when nothing waits any more.
    pub(crate) fn close(&self) {
        self.closed.cancel();
    }
}

/// Requests for one shipment each that wait at the same time share one transaction, and so one flush of the log.
///
/// Nobody waits for company: an idle writer takes a request at once, and while the writers are busy those that come wait
/// together. A group waits for no other transaction either, since one shipment locked elsewhere would hold up strangers: what
/// is locked, or makes the group fail, goes alone, as if there were no groups.
pub(crate) fn start(shared: &Arc<Shared>) -> Queue {
    let (requests, waiting) = mpsc::channel(MAX_UNITS);
    let waiting = Arc::new(Mutex::new(waiting));
    let closed = CancellationToken::new();
    for _ in 0..WRITERS {
        let write = write_groups(shared.clone(), waiting.clone(), closed.clone());
        shared.units.spawn(write);
    }
    Queue { requests, closed }
}

async fn write_groups(shared: Arc<Shared>, waiting: Arc<Mutex<mpsc::Receiver<Waiting>>>, closed: CancellationToken) {
    loop {
        let Some(group) = next_group(&waiting, &closed).await else {
            return;
        };
        let unit = shared.units.spawn(commit(shared.clone(), group).in_current_span());
        if let Err(error) = unit.await {
            tracing::error!(%error, "a group of requests panicked");
        }
    }
}

/// `None` once there will be none.
async fn next_group(waiting: &Mutex<mpsc::Receiver<Waiting>>, closed: &CancellationToken) -> Option<Vec<Waiting>> {
    let mut waiting = waiting.lock().await;
    let mut group = Vec::new();
    tokio::select! {
        taken = waiting.recv_many(&mut group, LARGEST) => return (taken > 0).then_some(group),
        () = closed.cancelled() => waiting.close(),
    }
    let taken = waiting.recv_many(&mut group, LARGEST).await;
    (taken > 0).then_some(group)
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
