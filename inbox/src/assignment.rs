use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rdkafka::{
    ClientContext, Message, Statistics, TopicPartitionList,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, Consumer, ConsumerContext},
    error::{KafkaError, KafkaResult, RDKafkaErrorCode},
    message::BorrowedMessage,
    topic_partition_list::Offset,
    types::RDKafkaRespErr,
};
use shared_events::topics::GroupTopics;
use tokio::{runtime::Handle, task::JoinHandle, time::Instant};

use crate::{
    consumer::{GroupConsumer, is_away, to_record},
    crash_point,
    engine::EngineError,
    lane::Lane,
    metrics::Metrics,
    rate_limit::{Budget, RateLimits},
    retry::Schedule,
    status::Status,
};

/// How long a rebalance or the stop waits for batches in flight. Far below `max.poll.interval.ms`.
const DRAIN: Duration = Duration::from_secs(5);
/// How long brokers are asked where partitions go on; the poll thread waits meanwhile, and a stop with it.
const FIND_OFFSETS: Duration = Duration::from_secs(5);
const ASK_OFFSETS: Duration = Duration::from_secs(3);
/// Remembered between two looks at the log's beginning.
const MOST_HOLES: usize = 100;
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// What the poll thread knows: which partitions are ours and who works on them. The client library calls it back
/// during a poll, hence the lock; nobody else takes it.
pub(crate) struct Group {
    pub(crate) runtime: Handle,
    pub(crate) topics: GroupTopics,
    pub(crate) schedule: Schedule,
    /// Of every topic, as checked at start.
    pub(crate) partitions: i32,
    pub(crate) limits: RateLimits,
    pub(crate) status: Status,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) start_worker: Box<dyn Fn(Arc<Lane>) -> JoinHandle<()> + Send + Sync>,
    pub(crate) state: Mutex<State>,
}

#[derive(Default)]
pub(crate) struct State {
    assigned: HashMap<Arc<str>, HashMap<i32, Assigned>>,
    /// Found inside a callback, returned by the poll thread.
    defect: Option<EngineError>,
}

struct Assigned {
    lane: Arc<Lane>,
    worker: JoinHandle<()>,
    paused: bool,
    stored: Option<i64>,
    /// Where it goes on from the owner before, who finished what lies before it; `None` if that is not known.
    began: Option<i64>,
    /// The offset that comes next; `None` while that is not known.
    next: Option<i64>,
    /// Offsets that did not come. Markers of transactions leave such holes too, so the log's beginning decides.
    holes: Vec<Range<i64>>,
}

impl Assigned {
    /// Notices offsets that were left out or came again.
    fn follow(&mut self, offset: i64) {
        match self.next {
            // Many holes in the few seconds between two looks are markers.
            Some(next) if offset > next && self.holes.len() < MOST_HOLES => self.holes.push(next..offset),
            Some(next) if offset < next => tracing::warn!(
                topic = &*self.lane.topic,
                partition = self.lane.partition,
                expected = next,
                offset,
                "the partition begins again: its offsets were reset, or the topic was made anew"
            ),
            _ => {}
        }
        self.next = Some(offset + 1);
    }

    /// Records that were deleted before this group had read them, now that the log is known to begin at `low`. `fetched` are
    /// on their way to us.
    fn lost(&mut self, low: i64, fetched: i64) -> u64 {
        if let Some(next) = self.next
            && low > next
            && fetched == 0
        {
            // Nothing has come since, so this hole has no end yet.
            self.follow(low);
            self.next = Some(low);
        }
        let lost = self.holes.drain(..).map(|hole| (low.min(hole.end) - hole.start).max(0));
        u64::try_from(lost.sum::<i64>()).unwrap_or_default()
    }
}

impl Group {
    /// Puts a record into its partition's queue; a queue that is full by it pauses the partition.
    pub(crate) fn accept(&self, consumer: &GroupConsumer, message: &BorrowedMessage<'_>) -> KafkaResult<()> {
        self.status.broker_reached();
        let mut state = self.lock();
        let partitions = state.assigned.get_mut(message.topic());
        let Some(assigned) = partitions.and_then(|partitions| partitions.get_mut(&message.partition())) else {
            // Revoked a moment ago; its next owner reads it.
            return Ok(());
        };
        assigned.follow(message.offset());
        let delay = assigned.lane.tier.and_then(|tier| self.schedule.delay(tier));
        if assigned.lane.queue.push(to_record(message, delay)) && !assigned.paused {
            consumer.pause(&one(&assigned.lane))?;
            assigned.paused = true;
        }
        Ok(())
    }

    /// Stores the offsets of finished work, resumes partitions whose queue has room, and looks after the workers.
    pub(crate) fn round(&self, consumer: &GroupConsumer) -> Result<(), EngineError> {
        let mut state = self.lock();
        if let Some(defect) = state.defect.take() {
            return Err(defect);
        }
        let mut finished = TopicPartitionList::new();
        let mut roomy = TopicPartitionList::new();
        let mut died = None;
        for assigned in all_mut(&mut state.assigned) {
            add_finished(assigned, &mut finished)?;
            if assigned.paused && assigned.lane.queue.has_room() {
                roomy.add_partition(&assigned.lane.topic, assigned.lane.partition);
                assigned.paused = false;
            }
            if assigned.worker.is_finished() && !assigned.lane.cancel.is_cancelled() {
                died = Some(EngineError::WorkerDied {
                    topic: assigned.lane.topic.to_string(),
                    partition: assigned.lane.partition,
                });
            }
        }
        drop(state);
        store(consumer, &finished);
        if roomy.count() > 0 {
            consumer.resume(&roomy).map_err(EngineError::Client)?;
        }
        died.map_or(Ok(()), Err)
    }

    /// Starts a worker for each partition. The limits first: by now every former owner has stopped.
    fn assign(&self, consumer: &GroupConsumer, list: &TopicPartitionList) {
        self.metrics.rebalance("assign");
        let mut state = self.lock();
        let mut lanes = Vec::with_capacity(list.count());
        for element in list.elements() {
            let (topic, partition) = (element.topic(), element.partition());
            if partition >= self.partitions {
                state.defect = Some(EngineError::PartitionsAdded {
                    topic: topic.to_owned(),
                    expected: self.partitions,
                });
                continue;
            }
            let tier = (1..=self.schedule.tiers()).find(|tier| self.topics.retry(*tier) == topic);
            lanes.push(Arc::new(Lane::new(topic.into(), partition, tier)));
        }
        let owned = lanes
            .iter()
            .chain(all_mut(&mut state.assigned).map(|assigned| &assigned.lane));
        self.share_limits(owned);
        for lane in lanes {
            // A partition that comes back is not to stay paused from its last time here.
            if let Err(error) = consumer.resume(&one(&lane)) {
                tracing::debug!(%error, topic = &*lane.topic, partition = lane.partition, "not paused");
            }
            let began = list
                .find_partition(&lane.topic, lane.partition)
                .and_then(|element| element.offset().to_raw())
                .filter(|offset| *offset >= 0);
            let assigned = Assigned {
                worker: (self.start_worker)(Arc::clone(&lane)),
                paused: false,
                stored: None,
                began,
                next: began,
                holes: Vec::new(),
                lane: Arc::clone(&lane),
            };
            state
                .assigned
                .entry(Arc::clone(&lane.topic))
                .or_default()
                .insert(lane.partition, assigned);
        }
        self.announce(&mut state, "assigned");
    }

    /// Lets the workers of these partitions (all without a list) finish the batch in their hands, stores what they
    /// finished, and lowers this instance's share of the limits. The library commits stored offsets of a partition
    /// that it gives up, unless the assignment is already lost; a commit of ours could block for a session timeout.
    pub(crate) fn revoke(&self, consumer: &GroupConsumer, list: Option<&TopicPartitionList>) {
        let mut state = self.lock();
        let mut leaving = Vec::new();
        match list {
            None => leaving.extend(
                state
                    .assigned
                    .drain()
                    .flat_map(|(_, partitions)| partitions.into_values()),
            ),
            Some(list) => {
                for element in list.elements() {
                    let partitions = state.assigned.get_mut(element.topic());
                    leaving.extend(partitions.and_then(|partitions| partitions.remove(&element.partition())));
                }
            }
        }
        if leaving.is_empty() {
            return;
        }
        self.metrics.rebalance("revoke");
        crash_point::REVOKE_ENTER.reached();
        for assigned in &leaving {
            assigned.lane.cancel.cancel();
        }
        let deadline = Instant::now() + DRAIN;
        let mut finished = TopicPartitionList::new();
        for mut assigned in leaving {
            let worker = &mut assigned.worker;
            let drained = self
                .runtime
                .block_on(async { tokio::time::timeout_at(deadline, worker).await });
            let lane = Arc::clone(&assigned.lane);
            let (topic, partition) = (&*lane.topic, lane.partition);
            match drained {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!(topic, partition, %error, "a worker panicked"),
                // It goes on alone and can store nothing any more; the inbox makes what it still commits harmless.
                Err(_) => tracing::warn!(topic, partition, "revoked with a batch in flight after {DRAIN:?}"),
            }
            if let Err(error) = add_finished(&mut assigned, &mut finished) {
                tracing::error!(topic, partition, %error, "the last offset could not be noted");
            }
        }
        crash_point::REVOKE_DRAINED.reached();
        if !consumer.assignment_lost() {
            store(consumer, &finished);
        }
        crash_point::REVOKE_STORED.reached();
        let owned: Vec<Arc<Lane>> = all_mut(&mut state.assigned)
            .map(|assigned| Arc::clone(&assigned.lane))
            .collect();
        self.share_limits(owned.iter());
        self.announce(&mut state, "revoked");
    }

    fn share_limits<'a>(&self, owned: impl Iterator<Item = &'a Arc<Lane>>) {
        let (live, retry): (Vec<_>, Vec<_>) = owned.partition(|lane| lane.budget() == Budget::Live);
        let all = usize::try_from(self.partitions).unwrap_or_default();
        self.limits.own(Budget::Live, live.len(), all);
        self.limits.own(Budget::Retry, retry.len(), all * self.schedule.tiers());
        // What is parked is in the database, not in partitions: whoever has partitions takes part.
        self.limits.own(Budget::Redrive, live.len(), all);
    }

    fn announce(&self, state: &mut State, change: &'static str) {
        let lanes: Vec<_> = all_mut(&mut state.assigned)
            .map(|assigned| Arc::clone(&assigned.lane))
            .collect();
        tracing::info!(partitions = lanes.len(), change, "the partitions owned have changed");
        self.status.owns(lanes);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn all_mut(assigned: &mut HashMap<Arc<str>, HashMap<i32, Assigned>>) -> impl Iterator<Item = &mut Assigned> {
    assigned.values_mut().flat_map(HashMap::values_mut)
}

fn one(lane: &Lane) -> TopicPartitionList {
    let mut list = TopicPartitionList::with_capacity(1);
    list.add_partition(&lane.topic, lane.partition);
    list
}

/// Notes the offset to store, if there is a new one.
fn add_finished(assigned: &mut Assigned, list: &mut TopicPartitionList) -> Result<(), EngineError> {
    if let Some(finished) = assigned.lane.finished()
        && assigned.stored != Some(finished)
    {
        list.add_partition_offset(&assigned.lane.topic, assigned.lane.partition, Offset::Offset(finished))
            .map_err(EngineError::Client)?;
        assigned.stored = Some(finished);
    }
    Ok(())
}

fn store(consumer: &GroupConsumer, finished: &TopicPartitionList) {
    // A partition that was lost in between keeps its old offset: its next owner repeats some work, nothing more.
    if finished.count() > 0 {
        match consumer.store_offsets(finished) {
            Ok(()) => crash_point::OFFSET_STORED.reached(),
            Err(error) => tracing::debug!(%error, "offsets were not stored"),
        }
    }
}

/// Writes into the list where each partition goes on, so that a hole before its first record is noticed, and so that the
/// library need not ask: some of its failures at that end the process (confluentinc/librdkafka#4789). A list left without
/// answers is asked for by the library.
fn find_offsets(consumer: &BaseConsumer<Group>, list: &mut TopicPartitionList) {
    let give_up = Instant::now() + FIND_OFFSETS;
    while Instant::now() < give_up {
        match consumer.committed_offsets(list.clone(), ASK_OFFSETS) {
            Ok(committed) if committed.elements().iter().all(|element| element.error().is_ok()) => {
                for mut element in list.elements() {
                    let found = committed.find_partition(element.topic(), element.partition());
                    let offset = match found.map(|found| found.offset()) {
                        Some(Offset::Offset(offset)) => Offset::Offset(offset),
                        _ => Offset::Beginning,
                    };
                    if let Err(error) = element.set_offset(offset) {
                        tracing::warn!(%error, topic = element.topic(), partition = element.partition(), "no offset set");
                    }
                }
                return;
            }
            Ok(_) => tracing::debug!("the brokers do not know all offsets yet"),
            Err(error) => tracing::debug!(%error, "the brokers do not say the offsets yet"),
        }
        std::thread::sleep(ASK_AGAIN);
    }
}

impl ConsumerContext for Group {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, code: RDKafkaRespErr, list: &mut TopicPartitionList) {
        let done = if code == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS {
            find_offsets(consumer, list);
            self.assign(consumer, list);
            consumer.incremental_assign(list)
        } else {
            if code != RDKafkaRespErr::RD_KAFKA_RESP_ERR__REVOKE_PARTITIONS {
                tracing::warn!(error = %RDKafkaErrorCode::from(code), "a rebalance failed");
            }
            self.revoke(consumer, Some(list));
            // Whatever the state of the group, the library waits until they are given up.
            consumer.incremental_unassign(list).or_else(|_| consumer.unassign())
        };
        if let Err(error) = done {
            self.lock().defect.get_or_insert(EngineError::Client(error));
        }
    }

    fn commit_callback(&self, result: KafkaResult<()>, _offsets: &TopicPartitionList) {
        // The next round commits again; after a rebalance the new owner repeats what was not committed.
        match result {
            Ok(()) => crash_point::OFFSET_COMMITTED.reached(),
            Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset)) => {}
            // Repeated every second while the brokers are away, which the status says once.
            Err(error) if is_away(&error) => tracing::debug!(%error, "offsets are not committed yet"),
            Err(error) => tracing::warn!(%error, "offsets could not be committed"),
        }
    }
}

impl ClientContext for Group {
    fn log(&self, _level: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(facility, message, "librdkafka");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "librdkafka");
    }

    fn stats(&self, statistics: Statistics) {
        if statistics
            .brokers
            .values()
            .any(|broker| broker.nodeid >= 0 && broker.state == "UP")
        {
            self.status.broker_reached();
        }
        let mut state = self.lock();
        for assigned in all_mut(&mut state.assigned) {
            let seen = statistics.topics.get(&*assigned.lane.topic);
            if let Some(seen) = seen.and_then(|topic| topic.partitions.get(&assigned.lane.partition))
                && seen.hi_offset >= 0
            {
                let (topic, partition) = (Arc::clone(&assigned.lane.topic), assigned.lane.partition);
                let lost = assigned.lost(seen.lo_offset, seen.fetchq_cnt);
                if lost > 0 {
                    tracing::error!(
                        topic = &*topic,
                        partition,
                        records = lost,
                        "records were deleted from the topic before they were read; raise its retention, and have them sent again"
                    );
                    self.metrics.lost(&topic, partition, lost);
                    self.status.lost(lost);
                }
                // The library knows no committed offset of a partition that we told it where to begin.
                let finished = assigned
                    .lane
                    .finished()
                    .or(assigned.began)
                    .or(Some(seen.committed_offset).filter(|offset| *offset >= 0));
                let from = finished.unwrap_or(seen.lo_offset.max(0));
                assigned.lane.set_lag((seen.hi_offset - from).max(0));
            }
        }
    }
}
