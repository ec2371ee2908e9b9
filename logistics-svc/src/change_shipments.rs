use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
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
use sqlx::{Connection, PgConnection, PgPool, PgTransaction, Postgres, pool::PoolConnection};
use time::OffsetDateTime;
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use tracing::Instrument;
use uuid::Uuid;

use crate::{
    announce::{self, Occasion},
    fault::{self, Fault},
    flag::Mode,
    group_commit::{self, Queue, Waiting},
    idempotency::{Answer, IdempotencyKey},
    shipment::{Command, Decision, NewShipment, Refusal, Shipment},
    switch::Switch,
    tables::{
        idempotency_keys::{self, Gate},
        shipments::{self, Locked},
    },
};

/// A transaction that lost against another one is run this often before the client hears of it.
const MAX_ATTEMPTS: u32 = 4;

/// The longest a unit of work may take, several times its statements' own timeout.
const UNIT_DEADLINE: Duration = Duration::from_secs(60);

/// Units of work in progress. A client that hangs up frees its place in the HTTP limits while its work goes on, so the
/// work has a limit of its own.
pub(crate) const MAX_UNITS: usize = 1024;
const GROUP_BUCKETS: [f64; 8] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0];
/// Lines of all shipments of one call: what one call may hold in memory (G7).
pub(crate) const MAX_LINES_OF_A_CALL: usize = 100_000;

/// Several shipments for one transaction: all or nothing.
#[derive(Debug, Clone)]
pub enum Work {
    Create(Vec<NewShipment>),
    /// The event of a creation without the shipment: of the load test only.
    AppendOnly(NewShipment),
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

impl ChangeError {
    /// Whether this service has failed; the rest is the client's.
    pub(crate) fn is_failure(&self) -> bool {
        matches!(
            self,
            Self::Fault(_) | Self::OutcomeUnknown(_) | Self::Encode(_) | Self::Broken(_)
        )
    }
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
    queue: Queue,
}

/// What the transactions are made with.
#[derive(Debug)]
pub(crate) struct Shared {
    pool: PgPool,
    outbox: Outbox,
    hints: Hints,
    pub(crate) switch: Switch,
    clock: fn() -> OffsetDateTime,
    pub(crate) units: TaskTracker,
    permits: Arc<Semaphore>,
    changed: Counter<u64>,
    commit_duration: Histogram<f64>,
    committed_together: Histogram<u64>,
}

impl ChangeShipments {
    /// To be called within the runtime that is to do the work.
    pub fn new(pool: PgPool, outbox: Outbox, hints: Hints, switch: Switch, clock: fn() -> OffsetDateTime) -> Self {
        let meter = opentelemetry::global::meter("logistics");
        let shared = Shared {
            pool,
            outbox,
            hints,
            switch,
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
            committed_together: meter
                .u64_histogram("shipments.committed_together")
                .with_unit("{request}")
                .with_description("Requests of one transaction")
                .with_boundaries(GROUP_BUCKETS.to_vec())
                .build(),
        };
        let shared = Arc::new(shared);
        let queue = group_commit::start(&shared);
        Self { shared, queue }
    }

    /// Does the work in another task, and waits for it. A client that hangs up, or a deadline, drops the waiting and never the
    /// work: a dropped transaction would leave the outcome, and with sqlx even the connection, in doubt (HAZARDS H2, H3).
    ///
    /// # Errors
    /// [`ChangeError`]; it has been logged if it is not the client's.
    pub async fn execute(&self, request: Request) -> Result<Reply, ChangeError> {
        let Ok(permit) = self.shared.permits.clone().try_acquire_owned() else {
            self.shared.switch.asked(true);
            return Err(ChangeError::Overloaded);
        };
        let (waiting, reply) = Waiting::new(request, permit, self.shared.switch.clone());
        // Nobody is to wait for commerce with somebody else's request.
        let switch = &self.shared.switch;
        let together = match waiting.request.single() {
            None => false,
            Some(Single::New(new, _)) => switch.mode_of(&new.order_id) == Mode::Outbox,
            // Whose order it is shows when the shipment is locked.
            Some(Single::Change(_)) => switch.of_all().is_none_or(|mode| mode == Mode::Outbox),
        };
        if together {
            self.queue.join(waiting);
        } else {
            self.shared.clone().alone(waiting);
        }
        // Without an answer it has panicked, which was logged there.
        reply
            .await
            .unwrap_or(Err(ChangeError::Broken("the unit of work panicked")))
    }

    /// Requests that have come and are not answered yet.
    pub fn in_progress(&self) -> usize {
        MAX_UNITS - self.shared.permits.available_permits()
    }

    /// Waits for the units in progress; no new ones may be started. The caller bounds the wait.
    pub async fn drain(&self) {
        self.queue.close();
        self.shared.units.close();
        self.shared.units.wait().await;
    }
}

impl Request {
    /// What a request for just one shipment asks for.
    fn single(&self) -> Option<Single<'_>> {
        match &self.work {
            Work::Create(new) => match new.as_slice() {
                [new] => Some(Single::New(new, Creation::Shipment)),
                _ => None,
            },
            Work::AppendOnly(new) => Some(Single::New(new, Creation::EventOnly)),
            Work::Change(changes) => match changes.as_slice() {
                [change] => Some(Single::Change(change)),
                _ => None,
            },
        }
    }
}

/// [`Work`] on one shipment: what can share a transaction.
enum Single<'a> {
    New(&'a NewShipment, Creation),
    Change(&'a Change),
}

/// What a creation writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Creation {
    Shipment,
    /// Nothing beside the event: of the load test only.
    EventOnly,
}

/// What the transaction is to end with.
enum Ending {
    Commit(Answer, Vec<NewEvent>),
    Replay(Answer),
}

/// At the places of their requests; `None` for those that are to go alone.
pub(crate) type Replies = Vec<Option<Result<Reply, ChangeError>>>;

/// What the decisions of one transaction come to.
struct Decisions {
    locked: HashMap<i64, Shipment>,
    created: Vec<Shipment>,
    events: Vec<NewEvent>,
    changed: BTreeSet<i64>,
    returned: BTreeSet<i64>,
}

impl Decisions {
    fn on(locked: HashMap<i64, Shipment>) -> Self {
        Self {
            locked,
            created: Vec::new(),
            events: Vec::new(),
            changed: BTreeSet::new(),
            returned: BTreeSet::new(),
        }
    }

    fn create(
        &mut self,
        id: i64,
        new: &NewShipment,
        creation: Creation,
        occasion: &Occasion,
    ) -> Result<Outcome, serde_json::Error> {
        let created = Shipment::create(id, new.clone(), occasion.now);
        self.events.push(announce::new_event(&created, occasion)?);
        if creation == Creation::Shipment {
            self.created.push(created.shipment.clone());
        }
        Ok(Outcome::Changed(Box::new(created.shipment)))
    }

    /// Decides on what the changes before it left, so that an id may occur again.
    fn decide(&mut self, Change { id, command }: &Change, occasion: &Occasion) -> Result<Outcome, serde_json::Error> {
        let Some(shipment) = self.locked.get_mut(id) else {
            return Ok(Outcome::NotFound { id: *id });
        };
        Ok(match shipment.decide(command, occasion.now) {
            Ok(Decision::Changed(changed)) => {
                self.events.push(announce::new_event(&changed, occasion)?);
                self.changed.insert(*id);
                if matches!(command, Command::Return { .. }) {
                    self.returned.insert(*id);
                }
                *shipment = changed.shipment;
                Outcome::Changed(Box::new(shipment.clone()))
            }
            Ok(Decision::AlreadyCompleted) => Outcome::AlreadyCompleted(Box::new(shipment.clone())),
            Err(refusal) => Outcome::Refused { id: *id, refusal },
        })
    }

    async fn write(&self, tx: &mut PgTransaction<'_>) -> Result<(), sqlx::Error> {
        let of = |ids: &BTreeSet<i64>| {
            ids.iter()
                .filter_map(|id| self.locked.get(id))
                .collect::<Vec<&Shipment>>()
        };
        shipments::insert(tx, &self.created).await?;
        shipments::update(tx, &of(&self.changed)).await?;
        shipments::update_returned(tx, &of(&self.returned)).await
    }
}

impl Shared {
    /// One request in a transaction of its own, in a task of its own.
    pub(crate) fn alone(self: Arc<Self>, waiting: Waiting) {
        let span = waiting.span.clone();
        let units = self.units.clone();
        let unit = async move {
            let reply = self.in_its_place(&waiting.request).await;
            waiting.answer(reply);
        };
        units.spawn(unit.instrument(span));
    }

    /// While some orders may wait for commerce and others must not, those that may do not take all connections.
    async fn in_its_place(&self, request: &Request) -> Result<Reply, ChangeError> {
        let _place = if self.switch.of_all().is_none() && self.may_wait_for_commerce(request).await? {
            let place = self.switch.place().await;
            Some(place.ok_or(ChangeError::Fault(Fault::Unavailable(sqlx::Error::PoolTimedOut)))?)
        } else {
            None
        };
        self.attempt_repeatedly(request).await
    }

    async fn may_wait_for_commerce(&self, request: &Request) -> Result<bool, ChangeError> {
        let by_outbox = |order_id: &str| self.switch.mode_of(order_id) == Mode::Outbox;
        Ok(match &request.work {
            Work::Create(new) => !new.iter().all(|new| by_outbox(&new.order_id)),
            Work::AppendOnly(new) => !by_outbox(&new.order_id),
            Work::Change(changes) => {
                let ids: Vec<i64> = changes.iter().map(|change| change.id).collect();
                let orders = shipments::order_ids(&self.pool, &ids).await?;
                !orders.iter().all(|order_id| by_outbox(order_id))
            }
        })
    }

    /// Requests for one shipment each in one transaction, whose replies stand at their places. `None` for those that cannot go
    /// with the others. Waits for no other transaction.
    ///
    /// # Errors
    /// Nothing was changed, or with `OutcomeUnknown` nobody knows.
    pub(crate) async fn together(&self, requests: &[&Request]) -> Result<Replies, ChangeError> {
        let mut connection = self.pool.acquire().await?;
        let replied = tokio::time::timeout(UNIT_DEADLINE, self.together_on(&mut connection, requests)).await;
        replied.unwrap_or_else(|_| Err(give_up(&mut connection)))
    }

    async fn together_on(&self, connection: &mut PgConnection, requests: &[&Request]) -> Result<Replies, ChangeError> {
        let started = Instant::now();
        let mut tx = connection.begin().await?;
        let (replies, events) = match self.work_together(&mut tx, requests).await {
            Ok(worked) => worked,
            Err(error) => {
                roll_back(tx).await;
                return Err(error);
            }
        };
        self.commit(tx, &events, started).await?;
        let committed = replies.iter().flatten().filter(|reply| reply.is_ok()).count();
        self.committed_together.record(committed as u64, &[]);
        Ok(replies)
    }

    /// Everything between BEGIN and COMMIT of a group.
    async fn work_together(
        &self,
        tx: &mut PgTransaction<'_>,
        requests: &[&Request],
    ) -> Result<(Replies, Vec<NewEvent>), ChangeError> {
        let mut replies: Replies = requests.iter().map(|_| None).collect();
        let open = self.open_gates(tx, requests, &mut replies).await?;
        let (mut ids, mut new) = (BTreeSet::new(), 0);
        for single in open.iter().filter_map(|place| requests[*place].single()) {
            match single {
                Single::Change(change) => drop(ids.insert(change.id)),
                Single::New(..) => new += 1,
            }
        }
        let ids: Vec<i64> = ids.into_iter().collect();
        let mut new_ids = shipments::next_ids(tx, new).await?.into_iter();
        let mut decisions = Decisions::on(shipments::lock(tx, &ids, Locked::LeaveOut).await?);
        let by_outbox = |order_id: &str| self.switch.mode_of(order_id) == Mode::Outbox;
        let mut answers = Vec::with_capacity(open.len());
        for place in open {
            let request = requests[place];
            let occasion = self.occasion(request.traceparent.clone());
            let outcome = match request.single() {
                Some(Single::New(new, creation)) if by_outbox(&new.order_id) => match new_ids.next() {
                    Some(id) => decisions.create(id, new, creation, &occasion)?,
                    None => continue,
                },
                Some(Single::Change(change)) => match decisions.locked.get(&change.id) {
                    Some(shipment) if by_outbox(&shipment.order_id) => decisions.decide(change, &occasion)?,
                    _ => continue,
                },
                _ => continue,
            };
            let changed = matches!(outcome, Outcome::Changed(_));
            match (request.answer)(&[outcome]) {
                Ok(answer) => answers.push((place, answer)),
                // Its event is among the others': nobody can go on.
                Err(error) if changed => return Err(error),
                Err(refused) => replies[place] = Some(Err(refused)),
            }
        }
        decisions.write(tx).await?;
        self.outbox.append(tx, &decisions.events).await?;
        let kept: Vec<(&IdempotencyKey, &Answer)> = answers
            .iter()
            .filter_map(|(place, answer)| Some((requests[*place].key.as_ref()?, answer)))
            .collect();
        idempotency_keys::keep(tx, &kept).await?;
        for (place, answer) in answers {
            replies[place] = Some(Ok(Reply::Fresh(answer)));
        }
        Ok((replies, decisions.events))
    }

    /// The places of requests that may change something; others get their reply, but for a key that occurs again: what the first
    /// one does answers it.
    async fn open_gates(
        &self,
        tx: &mut PgTransaction<'_>,
        requests: &[&Request],
        replies: &mut Replies,
    ) -> Result<Vec<usize>, ChangeError> {
        let (mut open, mut keyed, mut keys, mut seen) = (Vec::new(), Vec::new(), Vec::new(), HashSet::new());
        for (place, request) in requests.iter().enumerate() {
            match &request.key {
                None => open.push(place),
                Some(key) if seen.insert((key.route, key.value.as_str())) => {
                    keyed.push(place);
                    keys.push(key);
                }
                Some(_) => {}
            }
        }
        if keys.is_empty() {
            return Ok(open);
        }
        let gates = idempotency_keys::try_keys(tx, &keys).await?;
        for (place, gate) in keyed.into_iter().zip(gates) {
            match gate.into_reply() {
                None => open.push(place),
                reply => replies[place] = reply,
            }
        }
        // As they came.
        open.sort_unstable();
        Ok(open)
    }

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

    async fn transaction(&self, request: &Request) -> Result<Reply, ChangeError> {
        let mut connection = self.pool.acquire().await?;
        let reply = tokio::time::timeout(UNIT_DEADLINE, self.transaction_on(&mut connection, request)).await;
        reply.unwrap_or_else(|_| Err(give_up(&mut connection)))
    }

    /// THE transaction: nothing else in this service opens one to change a shipment, but for [`Shared::together`], which does the
    /// same for several requests.
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
        self.commit(tx, &events, started).await?;
        Ok(Reply::Fresh(answer))
    }

    async fn commit(&self, tx: PgTransaction<'_>, events: &[NewEvent], started: Instant) -> Result<(), ChangeError> {
        // While the shipments are locked: a key's places have the order of its commits.
        let place = self.hints.reserve(events);
        if let Err(error) = tx.commit().await {
            return Err(if fault::commit_outcome_unknown(&error) {
                ChangeError::OutcomeUnknown(error)
            } else {
                error.into()
            });
        }
        place.committed();
        self.measure(events, started.elapsed());
        Ok(())
    }

    /// Everything between BEGIN and COMMIT.
    async fn work(&self, tx: &mut PgTransaction<'_>, request: &Request) -> Result<Ending, ChangeError> {
        if let Some(key) = &request.key {
            for gate in idempotency_keys::try_keys(tx, &[key]).await? {
                match gate.into_reply() {
                    None => {}
                    Some(Ok(Reply::Replayed(answer) | Reply::Fresh(answer))) => return Ok(Ending::Replay(answer)),
                    Some(Err(error)) => return Err(error),
                }
            }
        }
        let (outcomes, events) = match &request.work {
            Work::Create(new) => {
                self.create(tx, new, Creation::Shipment, request.traceparent.clone())
                    .await?
            }
            Work::AppendOnly(new) => {
                let new = std::slice::from_ref(new);
                self.create(tx, new, Creation::EventOnly, request.traceparent.clone())
                    .await?
            }
            Work::Change(changes) => self.change(tx, changes, request.traceparent.clone()).await?,
        };
        self.outbox.append(tx, &events).await?;
        let answer = (request.answer)(&outcomes)?;
        if let Some(key) = &request.key {
            idempotency_keys::keep(tx, &[(key, &answer)]).await?;
        }
        // Last: commerce's rows are locked for the shortest time.
        self.switch.take_effect(tx, &events).await?;
        Ok(Ending::Commit(answer, events))
    }

    async fn create(
        &self,
        tx: &mut PgTransaction<'_>,
        new: &[NewShipment],
        creation: Creation,
        traceparent: Option<String>,
    ) -> Result<(Vec<Outcome>, Vec<NewEvent>), ChangeError> {
        let ids = shipments::next_ids(tx, new.len()).await?;
        let occasion = self.occasion(traceparent);
        let mut decisions = Decisions::on(HashMap::new());
        let outcomes = ids
            .into_iter()
            .zip(new)
            .map(|(id, new)| decisions.create(id, new, creation, &occasion))
            .collect::<Result<_, _>>()?;
        decisions.write(tx).await?;
        Ok((outcomes, decisions.events))
    }

    /// Lock, decide, update: set-based, so that one change costs what it must and 10,000 do not cost 10,000 times that.
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
        let mut decisions = Decisions::on(shipments::lock(tx, &ids, Locked::WaitFor).await?);
        // After the locks: the wait for them is no part of the time of the decision.
        let occasion = self.occasion(traceparent);
        let outcomes = changes
            .iter()
            .map(|change| decisions.decide(change, &occasion))
            .collect::<Result<_, _>>()?;
        decisions.write(tx).await?;
        Ok((outcomes, decisions.events))
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

/// A server that vanished without a reset never answers, and its own statement timeout vanished with it. The connection may be
/// inside a transaction: nobody else may get it (HAZARDS H3).
fn give_up(connection: &mut PoolConnection<Postgres>) -> ChangeError {
    connection.close_on_drop();
    let silence = std::io::Error::new(std::io::ErrorKind::TimedOut, "the database did not answer");
    ChangeError::OutcomeUnknown(silence.into())
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

impl Gate {
    /// `None` if it is open.
    fn into_reply(self) -> Option<Result<Reply, ChangeError>> {
        match self {
            Self::Open => None,
            Self::Answered(answer) => Some(Ok(Reply::Replayed(answer))),
            Self::InProgress => Some(Err(ChangeError::KeyInProgress)),
            Self::OtherRequest => Some(Err(ChangeError::KeyReused)),
        }
    }
}

/// Here and not where the answer is made: the client, and with it the handler, may be gone.
pub(crate) fn log_failure(error: &ChangeError, request: &Request) {
    use std::error::Error;
    let cause = error.source().map(ToString::to_string);
    let trace_id = request.traceparent.as_deref().and_then(|text| text.get(3..35));
    let first_shipment = match &request.work {
        Work::Change(changes) => changes.first().map(|change| change.id),
        Work::Create(_) | Work::AppendOnly(_) => None,
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
