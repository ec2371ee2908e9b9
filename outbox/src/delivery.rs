use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use rdkafka::error::KafkaError;
use sqlx::types::Uuid;
use time::OffsetDateTime;
use tokio::{task::JoinHandle, time::Instant};

use crate::{
    ended::without_answer,
    limited_pool::LimitedPool,
    publisher::{Outgoing, PublishError, Publisher, is_refusal},
    status::Metrics,
    table::{self, Aside, Position, SlotIdentity, Table},
    watermark::{Lsn, TransactionEnd},
};

/// Marks are gathered for this long, so that a busy relay costs the database ten small transactions a second.
const MARK_INTERVAL: Duration = Duration::from_millis(100);
/// How often a position is recorded that only moved because others wrote log.
const IDLE_INTERVAL: Duration = Duration::from_secs(5);
/// Between two looks for rows that are published and not yet visible.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// Far above what a healthy broker takes, far below what an operator would want to wait for the news.
const STALLED_AFTER: Duration = Duration::from_secs(10);
const LAGGING_AFTER: Duration = Duration::from_secs(1);
/// Acknowledged rows that wait for their mark; past it nothing more is published.
const MAX_UNMARKED: usize = 50_000;
/// Most rows of one statement: on a busy server it has to end before the statement timeout, and little is lost with it when it
/// loses against another transaction.
const MARKED_AT_ONCE: usize = 5_000;
/// For how long marks that fail for a reason that passes are begun again. Not longer: a refused row waits for the marks before it,
/// and the server ends a stream that says nothing for a minute.
const MARK_PATIENCE: Duration = Duration::from_secs(30);
/// Longer than a transaction lives between deciding on its events and its commit.
pub(crate) const UNMARKED_MARGIN: time::Duration = time::Duration::hours(1);

#[derive(Debug, thiserror::Error)]
pub(crate) enum DeliveryError {
    #[error(transparent)]
    Publish(#[from] PublishError),
    #[error("published rows could not be marked")]
    Mark(#[source] sqlx::Error),
    #[error("a row that the broker refuses could not be set aside")]
    SetAside(#[source] sqlx::Error),
    /// Either the brokers are away, and the next session says so; or this client has lost its way to them, as librdkafka has
    /// been seen to do after a broker's restart, and a new one finds it.
    #[error("the broker has acknowledged nothing for {0:.0?}; a new producer is tried")]
    Silent(Duration),
    /// A producer whose batch was refused cannot go on.
    #[error("a row was refused; the producer begins anew")]
    Renew,
}

/// What became of an event that was to be published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Handed {
    /// It is on its way.
    Over,
    /// Its key waits behind a row that was set aside.
    Withheld,
    /// The broker had it once, and refuses to take it again.
    Published,
}

/// What one delivery leaves to the next.
#[derive(Debug, Default)]
pub(crate) struct Refused {
    /// Rows to be sent alone, because a batch with them was refused.
    suspects: HashSet<Uuid>,
    /// Published rows that the broker refuses to take again.
    published: HashSet<Uuid>,
}

impl Refused {
    pub(crate) fn extend(&mut self, other: Self) {
        self.suspects.extend(other.suspects);
        self.published.extend(other.published);
    }
}

/// What a delivery writes down about published events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Records {
    /// Whether each row gets its mark.
    pub(crate) marks: bool,
    /// The slot whose position is recorded, if the source is one.
    pub(crate) slot: Option<SlotIdentity>,
    /// Whether the source reads the table again while rows are on their way, and so must know them.
    pub(crate) rereads: bool,
    /// How long the oldest event may wait for the broker.
    pub(crate) silent_after: Duration,
}

/// Publishes events and, once the broker has acknowledged them without a gap, marks their rows.
///
/// A position is handed out only when everything below it is acknowledged, marked and recorded. Each crash window then
/// ends in a repetition, never in a gap: before the acknowledgement the source sends again; between acknowledgement and
/// mark, and between mark and position, it sends again too, and the consumer's inbox absorbs it.
///
/// A row that the broker refuses for itself is set aside, durably, before anything after it is acknowledged. Later rows of
/// its key are withheld: they stay unsent in the table until the row is repaired (HAZARDS H29).
pub(crate) struct Delivery {
    publisher: Publisher,
    table: Table,
    pool: LimitedPool,
    records: Records,
    metrics: Metrics,
    unmarked: Vec<Uuid>,
    /// Safe once `unmarked` is marked.
    position: Option<Position>,
    /// The last position that is safe.
    recorded: Lsn,
    writing: Option<Write>,
    last_write: Instant,
    /// Sent and not yet marked, if the source rereads.
    pending: HashSet<Uuid>,
    /// Those of them whose mark is committed.
    marked: Vec<Uuid>,
    /// Keys with a row that was set aside, and the last row of each that was withheld.
    blocked: HashMap<String, Option<Uuid>>,
    refused: Refused,
    /// Rows whose mark is set by whoever sent them, see [`Self::hold_mark`].
    held_marks: HashSet<Uuid>,
}

/// Marks on their way to the table, and the position that they make safe.
struct Write {
    task: JoinHandle<Result<(), sqlx::Error>>,
    ids: Vec<Uuid>,
    position: Option<Lsn>,
}

impl Delivery {
    /// `refused` comes from the delivery before, see [`Self::close`].
    pub(crate) async fn new(
        publisher: Publisher,
        table: Table,
        pool: LimitedPool,
        records: Records,
        metrics: Metrics,
        refused: Refused,
    ) -> Result<Self, sqlx::Error> {
        let failed = table::failed_keys(&table, &pool).await?;
        Ok(Self {
            publisher,
            table,
            pool,
            records,
            metrics,
            unmarked: Vec::new(),
            position: None,
            recorded: Lsn::default(),
            writing: None,
            last_write: Instant::now(),
            pending: HashSet::new(),
            marked: Vec::new(),
            blocked: failed.into_iter().map(|key| (key, None)).collect(),
            refused,
            held_marks: HashSet::new(),
        })
    }

    /// The row's mark is left to the caller: while it is set aside, its key is known to wait, whatever happens to us.
    pub(crate) fn hold_mark(&mut self, id: Uuid) {
        self.held_marks.insert(id);
    }

    /// Whether another event may be published now.
    pub(crate) fn has_room(&self) -> bool {
        self.unmarked.len() < MAX_UNMARKED && self.publisher.has_room()
    }

    /// The same for an event of this key: a producer's first events wait for each other.
    pub(crate) fn has_room_for(&self, key: &str) -> bool {
        self.has_room() && self.publisher.may_follow(key)
    }

    /// Publishes the event, unless its key waits behind a row that was set aside.
    ///
    /// # Errors
    /// [`DeliveryError::Renew`] after this event was refused for itself.
    pub(crate) async fn publish(&mut self, event: Outgoing<'_>) -> Result<Handed, DeliveryError> {
        if self.refused.published.contains(&event.id) {
            return Ok(Handed::Published);
        }
        if let Some(last_withheld) = self.blocked.get_mut(event.key) {
            *last_withheld = Some(event.id);
            return Ok(Handed::Withheld);
        }
        if self.refused.suspects.contains(&event.id) {
            return match self.publish_alone(event).await? {
                Some(error) => {
                    self.set_aside(event, &error).await?;
                    Err(DeliveryError::Renew)
                }
                None => Ok(Handed::Over),
            };
        }
        match self.publisher.publish(event).await {
            Ok(()) => {}
            Err(PublishError::Refused(error)) if is_refusal(&error) => {
                // What was sent before it is still on its way: the next session sends it alone.
                self.refused.suspects.insert(event.id);
                return Err(DeliveryError::Renew);
            }
            Err(error) => return Err(error.into()),
        }
        if self.records.rereads {
            self.pending.insert(event.id);
        }
        Ok(Handed::Over)
    }

    /// Publishes an event with nothing beside it, whatever its key waits for; `Some` if the broker refuses it.
    pub(crate) async fn publish_alone(&mut self, event: Outgoing<'_>) -> Result<Option<KafkaError>, DeliveryError> {
        // Everything before is acknowledged first. What waits here for the broker is dropped with the session at a stop.
        while !self.publisher.is_settled() {
            self.progress().await?;
        }
        let refused = self.publisher.publish_alone(event).await?;
        self.refused.suspects.remove(&event.id);
        if refused.is_none() && self.records.rereads {
            self.pending.insert(event.id);
        }
        Ok(refused)
    }

    /// Somebody asks for the row again: the broker may take it by now.
    pub(crate) fn try_again(&mut self, id: Uuid) {
        self.refused.published.remove(&id);
    }

    /// Sets the row aside with the broker's reason; its key waits from now on. One that was published before is left alone
    /// instead, and whoever asked for it is told.
    pub(crate) async fn set_aside(&mut self, event: Outgoing<'_>, error: &KafkaError) -> Result<(), DeliveryError> {
        // Marked first: what was sent before it must not wait behind it. Everything before it is acknowledged.
        self.write_out().await?;
        let failure = error.to_string();
        let mut horizon = None;
        let mut pause = FIRST_PAUSE;
        loop {
            // The horizon first: what is unseen after it was reached is gone.
            let (oldest_running, next) = table::snapshot(&self.pool).await.map_err(DeliveryError::SetAside)?;
            match table::set_aside(&self.table, &self.pool, event.id, &failure).await {
                Ok(Aside::Done) => break,
                Ok(Aside::Published) => {
                    tracing::warn!(event_id = %event.id, key = event.key, failure, "the broker refuses a repetition");
                    self.refused.published.insert(event.id);
                    return table::resend_done(&self.table, &self.pool, &[event.id], Some(&failure))
                        .await
                        .map_err(DeliveryError::SetAside);
                }
                Ok(Aside::Unseen) if oldest_running >= *horizon.get_or_insert(next) => {
                    tracing::warn!(event_id = %event.id, key = event.key, failure, "a refused row is gone");
                    return Ok(());
                }
                Ok(Aside::Unseen) => {}
                Err(error) => return Err(DeliveryError::SetAside(error)),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        self.metrics.set_aside();
        tracing::error!(
            event_id = %event.id,
            event_type = event.event_type,
            key = event.key,
            failure,
            "the broker refuses this event; it is set aside, and the later events of its key wait behind it"
        );
        self.blocked.entry(event.key.to_owned()).or_default();
        Ok(())
    }

    /// Keys that wait, with the last row of each that was withheld by this delivery.
    pub(crate) fn blocked(&self) -> &HashMap<String, Option<Uuid>> {
        &self.blocked
    }

    /// Keys that wait now; rows set aside by others count too.
    pub(crate) fn block(&mut self, keys: Vec<String>) {
        for key in keys {
            self.blocked.entry(key).or_default();
        }
    }

    pub(crate) fn unblock(&mut self, key: &str) -> Option<Uuid> {
        self.blocked.remove(key).flatten()
    }

    /// The key waits on after all.
    pub(crate) fn withhold_again(&mut self, key: &str, last_withheld: Option<Uuid>) {
        self.blocked.insert(key.to_owned(), last_withheld);
    }

    /// Whether the row was sent, and a read that began before [`Self::forget_marked`] may find it unsent.
    pub(crate) fn is_pending(&self, id: Uuid) -> bool {
        self.pending.contains(&id)
    }

    /// To be called before a read of the table begins: what is marked by now, it will not find.
    pub(crate) fn forget_marked(&mut self) {
        for id in self.marked.drain(..) {
            self.pending.remove(&id);
        }
    }

    /// Whether the broker has left the oldest event unacknowledged for longer than [`STALLED_AFTER`].
    pub(crate) fn is_stalled(&self) -> bool {
        self.publisher.waiting() > STALLED_AFTER
    }

    /// Whether the broker takes longer than a healthy one does.
    pub(crate) fn is_lagging(&self) -> bool {
        self.publisher.waiting() > LAGGING_AFTER
    }

    /// Whether rows get their mark.
    pub(crate) fn marks(&self) -> bool {
        self.records.marks
    }

    /// A transaction whose events were published has ended.
    pub(crate) fn committed(&self, end: TransactionEnd) {
        self.publisher.committed(end);
    }

    /// Up to where everything is acknowledged, marked and recorded; zero if nothing was by this delivery.
    pub(crate) fn recorded(&self) -> Lsn {
        self.recorded
    }

    /// Whether everything published is acknowledged and marked.
    pub(crate) fn is_idle(&self) -> bool {
        self.publisher.is_idle() && self.unmarked.is_empty() && self.writing.is_none()
    }

    /// The log up to `end` holds nothing for us beyond what is already done. Only true while [`Self::is_idle`].
    pub(crate) fn skipped_to(&mut self, end: Lsn) {
        self.moved_to(end, None);
    }

    /// Waits until a position has become safe, or something else has changed that is worth a look. Safe to cancel.
    pub(crate) async fn progress(&mut self) -> Result<(), DeliveryError> {
        self.collect()?;
        let waiting = self.publisher.waiting();
        let patience = self.records.silent_after.saturating_sub(waiting);
        if patience.is_zero() {
            return Err(DeliveryError::Silent(waiting));
        }
        let due = match (self.unmarked.is_empty(), self.position) {
            (false, _) => Some(self.last_write + MARK_INTERVAL),
            (true, Some(_)) if self.publisher.is_idle() => Some(self.last_write + IDLE_INTERVAL),
            (true, Some(_)) => Some(self.last_write + MARK_INTERVAL),
            (true, None) => None,
        };
        if let Some(write) = &mut self.writing {
            tokio::select! {
                written = &mut write.task => {
                    let position = write.position;
                    if self.records.rereads {
                        self.marked.append(&mut write.ids);
                    }
                    self.writing = None;
                    self.last_write = Instant::now();
                    match written {
                        Ok(result) => result.map_err(DeliveryError::Mark)?,
                        Err(error) => without_answer(error).await,
                    }
                    self.recorded = self.recorded.max(position.unwrap_or_default());
                }
                () = self.publisher.changed() => {}
            }
        } else if let Some(due) = due {
            tokio::select! {
                () = tokio::time::sleep_until(due) => self.write(),
                () = self.publisher.changed() => {}
            }
        } else {
            tokio::select! {
                () = tokio::time::sleep(patience) => {}
                () = self.publisher.changed() => {}
            }
        }
        Ok(())
    }

    /// Takes what has become known, and lets marks that are due begin, without waiting.
    pub(crate) async fn nudge(&mut self) -> Result<(), DeliveryError> {
        tokio::select! {
            biased;
            progress = self.progress() => progress,
            () = std::future::ready(()) => Ok(()),
        }
    }

    /// Waits until everything published is acknowledged, marked and recorded.
    pub(crate) async fn finish(&mut self) -> Result<(), DeliveryError> {
        self.collect()?;
        while !self.is_idle() || self.position.is_some() {
            if self.is_idle() {
                // With nothing to mark, a position would be recorded some seconds later.
                self.write();
            }
            self.progress().await?;
        }
        Ok(())
    }

    /// The same, for at most `patience`; false if something is still on its way then.
    pub(crate) async fn finish_within(&mut self, patience: Duration) -> Result<bool, DeliveryError> {
        match tokio::time::timeout(patience, self.finish()).await {
            Ok(finished) => finished.map(|()| true),
            Err(_) => Ok(false),
        }
    }

    /// Marks what is acknowledged by now, whatever has become of the producer.
    async fn write_out(&mut self) -> Result<(), DeliveryError> {
        if let Some(write) = self.writing.take() {
            match write.task.await {
                Ok(result) => result.map_err(DeliveryError::Mark)?,
                Err(error) => without_answer(error).await,
            }
        }
        let acknowledged = self.publisher.take_settled();
        self.metrics.published(&acknowledged.events);
        if self.records.marks {
            self.unmarked.extend(acknowledged.events.iter().map(|event| event.id));
        }
        mark(&self.table, &self.pool, std::mem::take(&mut self.unmarked))
            .await
            .map_err(DeliveryError::Mark)
    }

    /// Ends the producer; what is unacknowledged comes again from its source. Returns what the next delivery is to know.
    pub(crate) async fn close(self) -> Refused {
        let mut refused = self.refused;
        refused.suspects.extend(self.publisher.take_refused());
        self.publisher.close().await;
        refused
    }

    fn collect(&mut self) -> Result<(), DeliveryError> {
        let acknowledged = self.publisher.take_acknowledged()?;
        self.metrics.published(&acknowledged.events);
        if self.records.marks {
            let ids = acknowledged.events.iter().map(|event| event.id);
            self.unmarked.extend(ids.filter(|id| !self.held_marks.contains(id)));
        }
        if let Some(TransactionEnd { lsn, committed_micros }) = acknowledged.end {
            self.moved_to(lsn, Some(committed_micros));
        }
        Ok(())
    }

    fn moved_to(&mut self, lsn: Lsn, committed_micros: Option<i64>) {
        let unmarked_before = committed_micros
            .filter(|_| !self.records.marks)
            .and_then(|micros| OffsetDateTime::from_unix_timestamp_nanos(i128::from(micros) * 1_000).ok())
            .map(|committed| committed - UNMARKED_MARGIN);
        let before = self.position;
        self.position = Some(Position {
            lsn: before.map_or(lsn, |before| before.lsn.max(lsn)),
            unmarked_before: unmarked_before.max(before.and_then(|before| before.unmarked_before)),
        });
    }

    /// Runs beside publishing: the next events do not wait for the marks of the last.
    fn write(&mut self) {
        let ids = std::mem::take(&mut self.unmarked);
        let position = self.position.take();
        let (table, pool, slot) = (self.table.clone(), self.pool.clone(), self.records.slot.clone());
        let marked = ids.clone();
        let task = tokio::spawn(async move {
            mark(&table, &pool, marked).await?;
            match slot.zip(position) {
                Some((slot, position)) => table::record_position(&table, &pool, &slot, position).await,
                None => Ok(()),
            }
        });
        self.writing = Some(Write {
            task,
            ids,
            position: position.map(|position| position.lsn),
        });
    }
}

/// Marks the rows, waiting for those that cannot be seen yet: the log brings a commit a moment before other sessions see
/// its rows, and while a synchronous standby is away long before. An update that finds nothing then is not an error, so
/// the mark would be lost in silence.
async fn mark(table: &Table, pool: &LimitedPool, ids: Vec<Uuid>) -> Result<(), sqlx::Error> {
    let give_up = Instant::now() + MARK_PATIENCE;
    let mut left = mark_visible(table, pool, ids, give_up).await?;
    let mut horizon = None;
    let mut pause = FIRST_PAUSE;
    while !left.is_empty() {
        let (oldest_running, next) = table::snapshot(pool).await?;
        left = mark_visible(table, pool, left, give_up).await?;
        let Some(first) = left.first() else { break };
        // Every transaction that could still bring them has ended: deleted by hand, or by a retention that did not wait
        // for the mark. They are published.
        if oldest_running >= *horizon.get_or_insert(next) {
            tracing::warn!(rows = left.len(), %first, "published rows are gone and cannot be marked");
            break;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    Ok(())
}

/// Marks the rows that can be seen, and returns the others. What writes to the same rows, as confirmations do, locks them in its own
/// order, and one of the two is refused then; to end the session for it would send tens of thousands of events again.
async fn mark_visible(
    table: &Table,
    pool: &LimitedPool,
    mut ids: Vec<Uuid>,
    give_up: Instant,
) -> Result<Vec<Uuid>, sqlx::Error> {
    // Rows of one time stand together in the table and in its partitions.
    ids.sort_unstable();
    let mut unseen = Vec::new();
    for ids in ids.chunks(MARKED_AT_ONCE) {
        let mut pause = FIRST_PAUSE;
        loop {
            match table::mark_published(table, pool, ids).await {
                Ok(left) => break unseen.extend(left),
                Err(error) if table::may_pass(&error) && Instant::now() < give_up => {
                    tracing::info!(%error, rows = ids.len(), "rows could not be marked, trying again");
                }
                Err(error) => return Err(error),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
    Ok(unseen)
}
