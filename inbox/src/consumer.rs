use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, SystemTime},
};

use rdkafka::{
    ClientConfig, Message,
    consumer::{BaseConsumer, Consumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedHeaders, BorrowedMessage, Headers},
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    assignment::Group,
    decode::not_before_ms,
    engine::{EngineError, GroupProtocol, Membership},
    queue::due,
    record::Record,
};

/// How long one poll waits for a record.
const POLL: Duration = Duration::from_millis(20);
/// Between two rounds of storing offsets and resuming partitions.
const ROUND: Duration = Duration::from_millis(10);
const POLL_INTERVAL: Duration = Duration::from_secs(300);

pub(crate) type GroupConsumer = BaseConsumer<Group>;

/// Everything is set, so that no default of a library version decides.
pub(crate) fn consumer_config(client_config: &ClientConfig, group: &str, membership: &Membership) -> ClientConfig {
    let mut config = client_config.clone();
    match membership.protocol {
        GroupProtocol::Classic => config
            .set("group.protocol", "classic")
            .set("partition.assignment.strategy", "cooperative-sticky")
            .set("session.timeout.ms", "10000")
            .set("heartbeat.interval.ms", "2000"),
        // Sessions and heartbeats are the broker's to set (KIP-848).
        GroupProtocol::Consumer => config.set("group.protocol", "consumer"),
    };
    if let Some(id) = &membership.instance_id {
        config.set("group.instance.id", id);
    }
    let poll_interval = membership.poll_interval.unwrap_or(POLL_INTERVAL);
    config
        .set("group.id", group)
        .set("max.poll.interval.ms", poll_interval.as_millis().to_string())
        // Offsets are stored by hand after their work is durable; the library only carries them to the broker.
        .set("enable.auto.commit", "true")
        .set("auto.commit.interval.ms", "1000")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "earliest")
        .set("isolation.level", "read_committed")
        .set("check.crcs", "true")
        .set("allow.auto.create.topics", "false")
        .set("enable.partition.eof", "false")
        // Small prefetch: the queues behind it are bounded too, and a pause throws it away (HAZARDS H36, H37).
        .set("queued.min.messages", "1000")
        .set("queued.max.messages.kbytes", "4096")
        .set("fetch.max.bytes", "4194304")
        .set("max.partition.fetch.bytes", "262144")
        .set("message.max.bytes", "1100000")
        .set("fetch.min.bytes", "1")
        // A partition that is resumed must wait out the request that is on its way, which is then the one for the empty partitions
        // alone. If that takes longer than a full queue lasts, a backlog is worked off in bursts. The price: an idle consumer
        // asks each broker 40 times a second.
        .set("fetch.wait.max.ms", "25")
        .set("fetch.error.backoff.ms", "200")
        // The default of one second stalls a consumer whose small buffers are full now and then (CRATES §3.3).
        .set("fetch.queue.backoff.ms", "5")
        .set("statistics.interval.ms", "5000");
    config
}

/// Polls until the stop, whatever the workers, the limiter or the database do; then drains and leaves the group.
pub(crate) fn poll_until(consumer: GroupConsumer, stop: &CancellationToken) -> Result<(), EngineError> {
    let group = Arc::clone(consumer.context());
    let ended = poll_loop(&consumer, &group, stop);
    group.revoke(&consumer, None);
    // Commits what is stored and leaves the group.
    drop(consumer);
    ended
}

fn poll_loop(consumer: &GroupConsumer, group: &Group, stop: &CancellationToken) -> Result<(), EngineError> {
    let mut next_round = Instant::now();
    while !stop.is_cancelled() {
        match consumer.poll(POLL) {
            Some(Ok(message)) => group.accept(consumer, &message).map_err(EngineError::Client)?,
            Some(Err(error @ KafkaError::MessageConsumptionFatal(_))) => return Err(EngineError::Client(error)),
            // The library repairs the rest by itself.
            Some(Err(error)) if is_away(&error) => group.status.broker_fault(error.to_string()),
            Some(Err(error)) => tracing::warn!(%error, "the broker refused a request"),
            None => {}
        }
        if Instant::now() >= next_round {
            group.round(consumer)?;
            next_round = Instant::now() + ROUND;
        }
    }
    Ok(())
}

/// Whether a broker is away or changing its role, which passes by itself.
pub(crate) fn is_away(error: &KafkaError) -> bool {
    use RDKafkaErrorCode::{
        AllBrokersDown, Authentication, BrokerTransportFailure, CoordinatorLoadInProgress, CoordinatorNotAvailable,
        NotCoordinator, OperationTimedOut, RequestTimedOut, Resolve, SSL, WaitingForCoordinator,
    };
    matches!(
        error.rdkafka_error_code(),
        Some(
            AllBrokersDown
                | Authentication
                | BrokerTransportFailure
                | CoordinatorLoadInProgress
                | CoordinatorNotAvailable
                | NotCoordinator
                | OperationTimedOut
                | RequestTimedOut
                | Resolve
                | SSL
                | WaitingForCoordinator
        )
    )
}

/// `delay` is that of the retry tier whose topic it stands in.
pub(crate) fn to_record(message: &BorrowedMessage<'_>, delay: Option<Duration>) -> Record {
    let timestamp_ms = message.timestamp().to_millis();
    let headers = message.headers();
    let read = || {
        let headers = headers.iter().flat_map(|headers| headers.iter());
        let headers = headers.map(|header| (header.key, header.value.unwrap_or_default()));
        Record::new(
            message.offset(),
            timestamp_ms,
            message.key(),
            message.payload(),
            headers,
        )
    };
    // rdkafka panics on a header name that is not UTF-8, which anyone may send.
    let mut record = catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| {
        let mut record = Record::new(message.offset(), timestamp_ms, message.key(), message.payload(), []);
        record.unreadable_headers = headers.map(BorrowedHeaders::detach);
        record
    });
    if let Some(delay) = delay {
        let not_before_ms = not_before_ms(&record);
        record.due = due(record.due, SystemTime::now(), timestamp_ms, not_before_ms, delay);
    }
    record
}
