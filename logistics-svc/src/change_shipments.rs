use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use opentelemetry::{
    KeyValue,
    metrics::{Counter, Histogram},
};
use outbox::{AppendError, Hints, NewEvent, Outbox};
use service_runtime::http::LATENCY_BUCKETS;
use shared_events::{envelope::truncate_to_micros, shipment::MAX_LINES};
use sqlx::{Connection, PgConnection, PgPool, PgTransaction};
use time::OffsetDateTime;
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use tracing::Instrument;
use uuid::Uuid;

use crate::{
    announce::{self, Occasion},
    fault::{self, Fault},
    idempotency::{Answer, IdempotencyKey},
    shipment::{Command, Decision, NewShipment, Refusal, Shipment},
    tables::{
        idempotency_keys::{self, Gate},
        shipments,
    },
};

/// A transaction that lost against another one is run this often before the client hears of it.
const MAX_ATTEMPTS: u32 = 4;

/// The longest a unit of work may take, several times its statements' own timeout.
const UNIT_DEADLINE: Duration = Duration::from_secs(60);

/// Units of work in progress. A client that hangs up frees its place in the HTTP limits while its work goes on, so the
/// work has a limit of its own.
const MAX_UNITS: usize = 1024;
/// Lines of all shipments of one call: what one call may hold in memory (G7).
const MAX_LINES_OF_A_CALL: usize = 100_000;

/// Several shipments for one transaction: all or nothing.
#[derive(Debug, Clone)]
pub enum Work {
    Create(Vec<NewShipment>),
    /// Carried out in this order; an id may occur again.
    Change(Vec<Change>),
}

#[derive(Debug, Clone)]
pub struct Change {
    pub id: i64,
    pub command: Command,
}

/// What became of one piece of work. Of a creation it is always `Changed`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Changed(Box<Shipment>),
    AlreadyCompleted(Box<Shipment>),
    Refused { id: i64, refusal: Refusal },
    NotFound { id: i64 },
}

/// A unit of work as the HTTP layer hands it over.
#[derive(Debug, Clone)]
pub struct Request {
    pub work: Work,
    pub key: Option<IdempotencyKey>,
    /// Makes the answer, before the commit, so that it can be kept with the change. An error rolls everything back.
    pub answer: fn(&[Outcome]) -> Result<Answer, ChangeError>,
    /// The request's trace, stored with its events.
    pub traceparent: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// The work is done and committed.
    Fresh(Answer),
    /// It was done before, under the same key.
    Replayed(Answer),
}

/// Why nothing was changed; with `OutcomeUnknown`, why nobody knows.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    #[error("shipment {id} does not exist")]
    NotFound { id: i64 },
    #[error("shipment {id}: {refusal}")]
    Refused { id: i64, refusal: Refusal },
    #[error("a request with this Idempotency-Key is in progress")]
    KeyInProgress,
    #[error("this Idempotency-Key was used for another request")]
    KeyReused,
    #[error("the event would have {bytes} bytes, allowed are {limit}")]
    EventTooLarge { bytes: usize, limit: usize },
    #[error("the shipments of this call have {lines} lines together, allowed are {MAX_LINES_OF_A_CALL}")]
    TooManyLines { lines: i64 },
    #[error("too many changes are in progress")]
    Overloaded,
    #[error(transparent)]
    Fault(Fault),
    /// The connection was lost while COMMIT was under way (HAZARDS H1).
    #[error("it is not known whether the change was committed")]
    OutcomeUnknown(#[source] sqlx::Error),
    #[error("an event or answer could not be written as JSON")]
    Encode(#[from] serde_json::Error),
    /// A defect of this program.
    #[error("{0}")]
    Broken(&'static str),
}

impl From<sqlx::Error> for ChangeError {
    fn from(error: sqlx::Error) -> Self {
        Self::Fault(Fault::from(error))
    }
}

impl From<AppendError> for ChangeError {
    fn from(error: AppendError) -> Self {
        match error {
            AppendError::TooLarge { bytes, limit, .. } => Self::EventTooLarge { bytes, limit },
            AppendError::Database(error) => error.into(),
            AppendError::Encode(error) => error.into(),
            // A time this side of year 9999 always has a text; kept as a defect with its source.
            AppendError::Time(error) => Self::Fault(Fault::Defect(sqlx::Error::Encode(Box::new(error)))),
        }
    }
}

/// The use case. Cheap to clone; every clone works for the same process.
#[derive(Debug, Clone)]
pub struct ChangeShipments {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    pool: PgPool,
    outbox: Outbox,
    hints: Hints,
    clock: fn() -> OffsetDateTime,
    units: TaskTracker,
    permits: Arc<Semaphore>,
    changed: Counter<u64>,
    commit_duration: Histogram<f64>,
}

impl ChangeShipments {
    pub fn new(pool: PgPool, outbox: Outbox, hints: Hints, clock: fn() -> OffsetDateTime) -> Self {
        let meter = opentelemetry::global::meter("logistics");
        let shared = Shared {
            pool,
            outbox,
            hints,
            clock,
            units: TaskTracker::new(),
            permits: Arc::new(Semaphore::new(MAX_UNITS)),
            changed: meter
                .u64_counter("shipments.changed")
                .with_unit("{shipment}")
                .with_description("Committed changes by event type")
                .build(),
            commit_duration: meter
                .f64_histogram("flow.stage.duration")
                .with_unit("s")
                .with_description("Time of one stage of the flow")
                .with_boundaries(LATENCY_BUCKETS.to_vec())
                .build(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Does the work in a task of its own, and waits for it. A client that hangs up, or a deadline, drops the waiting and
    /// never the work: a dropped transaction would leave the outcome, and with sqlx even the connection, in doubt
    /// (HAZARDS H2, H3).
    ///
    /// # Errors
    /// [`ChangeError`]; it has been logged if it is not the client's.
    pub async fn execute(&self, request: Request) -> Result<Reply, ChangeError> {
        let Ok(permit) = self.shared.permits.clone().try_acquire_owned() else {
            return Err(ChangeError::Overloaded);
        };
        let shared = self.shared.clone();
        let unit = async move {
            let reply = shared.attempt_repeatedly(&request).await;
            if let Err(error) = &reply {
                log_failure(error, &request);
            }
            drop(permit);
            reply
        };
        match self.shared.units.spawn(unit.in_current_span()).await {
            Ok(reply) => reply,
            Err(error) => {
                tracing::error!(%error, "a unit of work panicked");
                Err(ChangeError::Broken("the unit of work panicked"))
            }
        }
    }

    /// Waits for the units in progress; no new ones may be started. The caller bounds the wait.
    pub async fn drain(&self) {
        self.shared.units.close();
        self.shared.units.wait().await;
    }
}

/// What the transaction is to end with.
enum Ending {
    Commit(Answer, Vec<NewEvent>),
    Replay(Answer),
}

impl Shared {
    async fn attempt_repeatedly(&self, request: &Request) -> Result<Reply, ChangeError> {
        let mut attempt = 1;
        loop {
            match self.transaction(request).await {
                Err(ChangeError::Fault(Fault::Conflict(error))) if attempt < MAX_ATTEMPTS => {
                    tracing::debug!(%error, attempt, "the transaction lost against another one, running it again");
                    tokio::time::sleep(pause(attempt)).await;
                    attempt += 1;
                }
                reply => return reply,
            }
        }
    }

    /// A server that vanished without a reset never answers, and its own statement timeout vanished with it.
    async fn transaction(&self, request: &Request) -> Result<Reply, ChangeError> {
        let mut connection = self.pool.acquire().await?;
        match tokio::time::timeout(UNIT_DEADLINE, self.transaction_on(&mut connection, request)).await {
            Ok(reply) => reply,
            Err(_) => {
                // It may be inside a transaction: nobody else may get it (HAZARDS H3).
                connection.close_on_drop();
                let silence = std::io::Error::new(std::io::ErrorKind::TimedOut, "the database did not answer");
                Err(ChangeError::OutcomeUnknown(silence.into()))
            }
        }
    }

    /// THE transaction: nothing else in this service opens one to change a shipment.
    async fn transaction_on(&self, connection: &mut PgConnection, request: &Request) -> Result<Reply, ChangeError> {
        let started = Instant::now();
        let mut tx = connection.begin().await?;
        let (answer, events) = match self.work(&mut tx, request).await {
            Ok(Ending::Commit(answer, events)) => (answer, events),
            Ok(Ending::Replay(answer)) => {
                roll_back(tx).await;
                return Ok(Reply::Replayed(answer));
            }
            Err(error) => {
                roll_back(tx).await;
                return Err(error);
            }
        };
        // While the shipments are locked: a key's places have the order of its commits.
        let place = self.hints.reserve(&events);
        if let Err(error) = tx.commit().await {
            return Err(if fault::commit_outcome_unknown(&error) {
                ChangeError::OutcomeUnknown(error)
            } else {
                error.into()
            });
        }
        place.committed();
        self.measure(&events, started.elapsed());
        Ok(Reply::Fresh(answer))
    }

    /// Everything between BEGIN and COMMIT.
    async fn work(&self, tx: &mut PgTransaction<'_>, request: &Request) -> Result<Ending, ChangeError> {
        if let Some(key) = &request.key {
            match idempotency_keys::try_key(tx, key).await? {
                Gate::Open => {}
                Gate::Answered(answer) => return Ok(Ending::Replay(answer)),
                Gate::InProgress => return Err(ChangeError::KeyInProgress),
                Gate::OtherRequest => return Err(ChangeError::KeyReused),
            }
        }
        let (outcomes, events) = match &request.work {
            Work::Create(new) => self.create(tx, new, request.traceparent.clone()).await?,
            Work::Change(changes) => self.change(tx, changes, request.traceparent.clone()).await?,
        };
        self.outbox.append(tx, &events).await?;
        let answer = (request.answer)(&outcomes)?;
        if let Some(key) = &request.key {
            idempotency_keys::keep(tx, key, &answer).await?;
        }
        Ok(Ending::Commit(answer, events))
    }

    async fn create(
        &self,
        tx: &mut PgTransaction<'_>,
        new: &[NewShipment],
        traceparent: Option<String>,
    ) -> Result<(Vec<Outcome>, Vec<NewEvent>), ChangeError> {
        let ids = shipments::next_ids(tx, new.len()).await?;
        let occasion = self.occasion(traceparent);
        let mut created = Vec::with_capacity(new.len());
        let mut events = Vec::with_capacity(new.len());
        for (id, new) in ids.into_iter().zip(new) {
            let changed = Shipment::create(id, new.clone(), occasion.now);
            events.push(announce::new_event(&changed, &occasion)?);
            created.push(changed.shipment);
        }
        shipments::insert(tx, &created).await?;
        let outcomes = created.into_iter().map(|shipment| Outcome::Changed(Box::new(shipment)));
        Ok((outcomes.collect(), events))
    }

    /// Lock, decide, update: set-based, so that one change costs what it must and 10,000 do not cost 10,000 times that.
    /// Each change is decided on what the one before it left, so that an id may occur again.
    async fn change(
        &self,
        tx: &mut PgTransaction<'_>,
        changes: &[Change],
        traceparent: Option<String>,
    ) -> Result<(Vec<Outcome>, Vec<NewEvent>), ChangeError> {
        let ids: BTreeSet<i64> = changes.iter().map(|change| change.id).collect();
        let ids: Vec<i64> = ids.into_iter().collect();
        if ids.len() > MAX_LINES_OF_A_CALL / MAX_LINES {
            let lines = shipments::count_lines(tx, &ids).await?;
            if lines > MAX_LINES_OF_A_CALL as i64 {
                return Err(ChangeError::TooManyLines { lines });
            }
        }
        let mut locked = shipments::lock(tx, &ids).await?;
        // After the locks: the wait for them is no part of the time of the decision.
        let occasion = self.occasion(traceparent);
        let mut outcomes = Vec::with_capacity(changes.len());
        let mut events = Vec::with_capacity(changes.len());
        let mut changed_ids = BTreeSet::new();
        let mut returned_ids = BTreeSet::new();
        for Change { id, command } in changes {
            let Some(shipment) = locked.get_mut(id) else {
                outcomes.push(Outcome::NotFound { id: *id });
                continue;
            };
            outcomes.push(match shipment.decide(command, occasion.now) {
                Ok(Decision::Changed(changed)) => {
                    events.push(announce::new_event(&changed, &occasion)?);
                    changed_ids.insert(*id);
                    if matches!(command, Command::Return { .. }) {
                        returned_ids.insert(*id);
                    }
                    *shipment = changed.shipment;
                    Outcome::Changed(Box::new(shipment.clone()))
                }
                Ok(Decision::AlreadyCompleted) => Outcome::AlreadyCompleted(Box::new(shipment.clone())),
                Err(refusal) => Outcome::Refused { id: *id, refusal },
            });
        }
        let of = |ids: &BTreeSet<i64>| ids.iter().filter_map(|id| locked.get(id)).collect::<Vec<&Shipment>>();
        shipments::update(tx, &of(&changed_ids)).await?;
        shipments::update_returned(tx, &of(&returned_ids)).await?;
        Ok((outcomes, events))
    }

    fn occasion(&self, traceparent: Option<String>) -> Occasion {
        Occasion {
            transaction_key: Uuid::now_v7(),
            // What the table and the wire can hold, so that all three agree.
            now: truncate_to_micros((self.clock)()),
            traceparent,
        }
    }

    fn measure(&self, events: &[NewEvent], elapsed: Duration) {
        self.commit_duration
            .record(elapsed.as_secs_f64(), &[KeyValue::new("stage", "commit")]);
        let mut counts = BTreeMap::<&str, u64>::new();
        for event in events {
            *counts.entry(&event.envelope.event_type).or_default() += 1;
        }
        for (event_type, count) in counts {
            self.changed
                .add(count, &[KeyValue::new("event.type", event_type.to_owned())]);
        }
    }
}

/// Lets locks go at once instead of when the connection is used again.
async fn roll_back(tx: PgTransaction<'_>) {
    if let Err(error) = tx.rollback().await {
        tracing::debug!(%error, "the rollback was not answered; the server rolls back by itself");
    }
}

/// Twice as long each time, and not the same for two that met.
fn pause(attempt: u32) -> Duration {
    let random = Uuid::new_v4().as_u128() % 10;
    Duration::from_millis((5 << attempt) + random as u64)
}

/// Here and not where the answer is made: the client, and with it the handler, may be gone.
fn log_failure(error: &ChangeError, request: &Request) {
    use std::error::Error;
    let cause = error.source().map(ToString::to_string);
    let trace_id = request.traceparent.as_deref().and_then(|text| text.get(3..35));
    let first_shipment = match &request.work {
        Work::Change(changes) => changes.first().map(|change| change.id),
        Work::Create(_) => None,
    };
    match error {
        ChangeError::Fault(Fault::Defect(_)) | ChangeError::Encode(_) | ChangeError::Broken(_) => {
            tracing::error!(%error, cause, trace_id, first_shipment, "a change failed");
        }
        ChangeError::Fault(_) | ChangeError::OutcomeUnknown(_) => {
            tracing::warn!(%error, cause, trace_id, first_shipment, "a change failed");
        }
        _ => tracing::debug!(%error, trace_id, first_shipment, "a change was refused"),
    }
}
