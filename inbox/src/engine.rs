use std::{
    sync::{Arc, Mutex, atomic::AtomicI64},
    time::Duration,
};

use rdkafka::{
    ClientConfig,
    consumer::{BaseConsumer, Consumer},
    error::{KafkaError, RDKafkaErrorCode},
};
use shared_events::topics::GroupTopics;
use sqlx::PgPool;
use tokio::{
    runtime::Handle,
    sync::{Notify, Semaphore, oneshot},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    assignment::Group,
    claim::Expectation,
    consumer::{GroupConsumer, consumer_config, poll_until},
    controls::{Controls, Watch},
    dry_run::DryRun,
    flood::{Flood, FloodLimit},
    handler::Handler,
    metrics::Metrics,
    operator::Operator,
    ordering::Ordering,
    pace::{Commits, Pace, Regulator},
    partition::Workers,
    pass::Pass,
    process::Process,
    rate_limit::{Budget, Rate, RateLimits},
    redirect::Redirector,
    release::Releaser,
    retry::{Backoff, Schedule, random_unit},
    shared_transaction::{SharedTransactions, Sharing},
    status::Status,
    table::Table,
};

/// How a group works through its topic.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The main topic, and the group whose retry and dead-letter topics stand around it.
    pub topics: GroupTopics,
    pub schedule: Schedule,
    /// Most events in one transaction, at least 1.
    pub batch_limit: usize,
    /// Longest time of one transaction as seen from here, above what the server's own timeouts end: for a server that
    /// is gone without a word. Afterwards the batch is tried again.
    pub transaction_limit: Duration,
    /// Most transactions open at once, over all partitions; keep it below the pool's connections. At least 1.
    pub max_transactions: usize,
    pub rate_limit: Rate,
    pub retry_rate_limit: Rate,
    pub redrive_rate_limit: Rate,
    /// Whether the limits follow the database's health.
    pub pace: Option<Pace>,
    pub membership: Membership,
    pub unknown_types: UnknownTypes,
    pub ordering: Ordering,
    pub flood_limit: FloodLimit,
    /// How long an archived dead letter is kept.
    pub letters_retention: Duration,
    /// Makes a span the child of the one a `traceparent` names.
    pub join_trace: fn(&tracing::Span, &str),
    /// Stands in the headers of redirected records.
    pub consumer_version: &'static str,
}

/// What becomes of an event that the handler does not take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownTypes {
    /// It may be meant for others: counted and passed over.
    Skip,
    DeadLetter,
}

/// How an instance belongs to its group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Membership {
    pub protocol: GroupProtocol,
    /// The same name after a restart gets the same partitions again without a rebalance, if it is back within the session
    /// timeout (KIP-345). No two instances may have the same.
    pub instance_id: Option<String>,
    /// A member that does not poll for so long loses its partitions; `None`: 5 minutes. The poll thread never waits for the
    /// work, so only a test has a reason to shorten it. At least the session timeout, 10 seconds.
    pub poll_interval: Option<Duration>,
}

/// Who decides about partitions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum GroupProtocol {
    /// The group's members, cooperatively (KIP-429).
    #[default]
    Classic,
    /// The brokers (KIP-848); needs Kafka 4.
    Consumer,
}

/// Why the engine ended, or could not begin.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("the Kafka client failed")]
    Client(#[source] KafkaError),
    #[error("topic {0} does not exist; create it with the partition count of the main topic")]
    TopicMissing(String),
    #[error("topic {topic} has {found} partitions, but {main} has {expected}; a key must keep its partition number")]
    UnequalPartitions {
        topic: String,
        found: usize,
        main: String,
        expected: usize,
    },
    #[error("partitions were added to {topic}, which had {expected}; start again so that limits and keys fit")]
    PartitionsAdded { topic: String, expected: i32 },
    #[error("the worker of {topic}[{partition}] ended by a defect")]
    WorkerDied { topic: String, partition: i32 },
    #[error("the poll thread ended by a defect")]
    PollThreadDied,
    #[error("the release of parked events ended by a defect")]
    ReleaserDied,
    #[error("the poll thread could not be started")]
    PollThread(#[source] std::io::Error),
    #[error(
        "the consumer did not end its work and leave its group within {0:?}; the broker will notice by its session timeout"
    )]
    LeaveTimeout(Duration),
    #[cfg(debug_assertions)]
    #[error(transparent)]
    CrashPoint(#[from] crate::crash_point::InvalidCrashPoint),
}

/// A consumer of one group, ready to run.
pub struct Engine<H> {
    settings: Settings,
    pool: PgPool,
    table: Table,
    client_config: ClientConfig,
    handler: H,
    limits: RateLimits,
    controls: Controls,
    commits: Arc<Commits>,
    status: Status,
}

impl<H: Handler> Engine<H> {
    /// Nothing is contacted yet. `client_config` holds addresses and security; the rest is set here.
    pub fn new(settings: Settings, pool: PgPool, table: Table, client_config: ClientConfig, handler: H) -> Self {
        let limits = RateLimits::new(
            settings.rate_limit,
            settings.retry_rate_limit,
            settings.redrive_rate_limit,
        );
        let status = Status::default();
        let by_settings = [
            (Budget::Live, settings.rate_limit),
            (Budget::Retry, settings.retry_rate_limit),
            (Budget::Redrive, settings.redrive_rate_limit),
        ];
        let flood = Flood::new(settings.flood_limit);
        let controls = Controls::new(flood, limits.clone(), status.clone(), by_settings);
        Self {
            settings,
            pool,
            table,
            client_config,
            handler,
            limits,
            controls,
            commits: Arc::default(),
            status,
        }
    }

    /// Works without the engine too, on the same tables.
    pub fn operator(&self, pool: PgPool) -> Operator {
        Operator::of_handler::<H>(self.table.clone(), pool)
    }

    /// Works without the engine too, on the same tables.
    pub fn dry_run(&self, pool: PgPool) -> DryRun<H>
    where
        H: Clone,
    {
        DryRun {
            table: self.table.clone(),
            pool,
            handler: self.handler.clone(),
            transaction_limit: self.settings.transaction_limit,
        }
    }

    /// Works without the engine too, on the same tables.
    pub fn pass(&self, pool: PgPool) -> Pass<H>
    where
        H: Clone,
    {
        Pass {
            table: self.table.clone(),
            operator: self.operator(pool.clone()),
            pool,
            handler: self.handler.clone(),
        }
    }

    pub fn status(&self) -> Status {
        self.status.clone()
    }

    pub fn controls(&self) -> Controls {
        self.controls.clone()
    }

    pub fn limits(&self) -> RateLimits {
        self.limits.clone()
    }

    /// Works until `stop`, then finishes the batches in flight, commits their offsets and leaves the group. Brokers or
    /// database that are away are waited for.
    ///
    /// # Errors
    /// [`EngineError`]: topics that do not fit, or a defect after which this process must start again.
    pub async fn run(self, stop: CancellationToken) -> Result<(), EngineError> {
        #[cfg(debug_assertions)]
        crate::crash_point::arm()?;
        let Some(partitions) = self.wait_for_topics(&stop).await? else {
            return Ok(());
        };
        let watch = self.watch();
        watch.begin(&stop).await;
        let (consumer, releaser) = self.build(partitions)?;
        let (ended, end) = oneshot::channel();
        let stop_polling = stop.clone();
        std::thread::Builder::new()
            .name("kafka-poll".to_owned())
            .spawn(move || {
                let result = poll_until(consumer, &stop_polling);
                if ended.send(result).is_err() {
                    tracing::warn!("the consumer left its group after its deadline");
                }
            })
            .map_err(EngineError::PollThread)?;

        let stop_releasing = stop.child_token();
        let releasing = tokio::spawn(releaser.run(stop_releasing.clone()));
        let _ends_with_us = stop_releasing.clone().drop_guard();
        let polling = async {
            let result = end.await.unwrap_or(Err(EngineError::PollThreadDied));
            stop_releasing.cancel();
            Ok(result)
        };
        // The releaser owns transactions: the pool is not to be closed under it.
        let releasing = async { releasing.await.map_err(|_| EngineError::ReleaserDied) };
        let watching = watch.run();
        let deadline = async {
            stop.cancelled().await;
            tokio::time::sleep(LEAVE).await;
        };
        tokio::select! {
            ended = futures_util::future::try_join(polling, releasing) => ended.and_then(|(result, ())| result),
            () = deadline => Err(EngineError::LeaveTimeout(LEAVE)),
            never = watching => match never {},
        }
    }

    fn watch(&self) -> Watch {
        Watch {
            table: self.table.clone(),
            pool: self.pool.clone(),
            controls: self.controls.clone(),
            regulator: self.settings.pace.map(Regulator::new),
            commits: Arc::clone(&self.commits),
            letters_retention: self.settings.letters_retention,
        }
    }

    fn build(self, partitions: i32) -> Result<(GroupConsumer, Releaser<H>), EngineError> {
        let Self {
            settings,
            pool,
            table,
            client_config,
            handler,
            limits,
            controls,
            commits,
            status,
        } = self;
        let flood = controls.flood;
        let metrics = Arc::new(Metrics::new(&status, &limits));
        let mut subscription = vec![settings.topics.main().to_owned()];
        subscription.extend((1..=settings.schedule.tiers()).map(|tier| settings.topics.retry(tier)));

        let redirector = Redirector::new(
            &client_config,
            settings.topics.clone(),
            settings.consumer_version,
            Arc::clone(&metrics),
        );
        let redirector = Arc::new(redirector.map_err(EngineError::Client)?);
        let process = Arc::new(Process {
            pool,
            table,
            handler,
            unknown_types: settings.unknown_types,
            ordering: settings.ordering,
            schedule: settings.schedule.clone(),
            transaction_limit: settings.transaction_limit,
            consumer_version: settings.consumer_version,
            commits,
            expectation: Expectation::default(),
            parked: AtomicI64::default(),
            releasing: Notify::new(),
        });
        let transactions = Arc::new(Semaphore::new(settings.max_transactions.max(1)));
        let releaser = Releaser {
            process: Arc::clone(&process),
            transactions: Arc::clone(&transactions),
            limits: limits.clone(),
            redirector: Arc::clone(&redirector),
            flood: Arc::clone(&flood),
            metrics: Arc::clone(&metrics),
            status: status.clone(),
            admitted: Mutex::default(),
        };
        let sharing = Sharing {
            process: Arc::clone(&process),
            transactions: Arc::clone(&transactions),
            batch_limit: settings.batch_limit.max(1),
            limits: limits.clone(),
            metrics: Arc::clone(&metrics),
        };
        let workers = Arc::new(Workers {
            process,
            shared: SharedTransactions::start(sharing),
            group: settings.topics.group().to_owned(),
            batch_limit: settings.batch_limit.max(1),
            join_trace: settings.join_trace,
            transactions,
            limits: limits.clone(),
            redirector,
            flood,
            metrics: Arc::clone(&metrics),
            status: status.clone(),
        });
        let runtime = Handle::current();
        let spawner = runtime.clone();
        let config = consumer_config(&client_config, settings.topics.group(), &settings.membership);
        let group = Group {
            runtime,
            topics: settings.topics,
            schedule: settings.schedule,
            partitions,
            limits,
            status,
            metrics,
            start_worker: Box::new(move |lane| spawner.spawn(Arc::clone(&workers).work(lane))),
            state: Mutex::default(),
        };
        let consumer: GroupConsumer = config.create_with_context(group).map_err(EngineError::Client)?;
        let topics: Vec<&str> = subscription.iter().map(String::as_str).collect();
        consumer.subscribe(&topics).map_err(EngineError::Client)?;
        Ok((consumer, releaser))
    }

    /// Waits until the brokers answer and all topics are there with equal partition counts, which is returned; `None`
    /// if the stop comes first. Topics that are missing get a short grace, because they may just be being created.
    async fn wait_for_topics(&self, stop: &CancellationToken) -> Result<Option<i32>, EngineError> {
        let names = self.settings.topics.all(self.settings.schedule.tiers());
        let refuse_at = Instant::now() + TOPIC_GRACE;
        let mut backoff = Backoff::new();
        loop {
            let (config, names) = (self.client_config.clone(), names.clone());
            let checked = tokio::task::spawn_blocking(move || check_topics(&config, &names)).await;
            match checked.unwrap_or(Err(EngineError::PollThreadDied)) {
                Ok(partitions) => {
                    self.status.broker_reached();
                    return Ok(Some(partitions));
                }
                Err(EngineError::Client(error)) => self.status.broker_fault(error.to_string()),
                Err(error) if Instant::now() >= refuse_at => return Err(error),
                Err(error) => tracing::debug!(%error, "topics are not complete yet"),
            }
            tokio::select! {
                () = stop.cancelled() => return Ok(None),
                () = tokio::time::sleep(backoff.pause(random_unit())) => {}
            }
        }
    }
}

/// The poll thread's drain (5 s), the farewell to the broker and the releaser's last transaction together.
const LEAVE: Duration = Duration::from_secs(15);
const TOPIC_GRACE: Duration = Duration::from_secs(5);
const METADATA_TIMEOUT: Duration = Duration::from_secs(5);

fn check_topics(client_config: &ClientConfig, names: &[String]) -> Result<i32, EngineError> {
    let client: BaseConsumer = client_config.create().map_err(EngineError::Client)?;
    let mut expected = None;
    for name in names {
        let metadata = client
            .fetch_metadata(Some(name), METADATA_TIMEOUT)
            .map_err(EngineError::Client)?;
        let topic = metadata.topics().iter().find(|topic| topic.name() == name);
        let missing = || EngineError::TopicMissing(name.clone());
        let topic = topic.ok_or_else(missing)?;
        match topic.error().map(RDKafkaErrorCode::from) {
            None => {}
            Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => return Err(missing()),
            Some(code) => return Err(EngineError::Client(KafkaError::MetadataFetch(code))),
        }
        let found = topic.partitions().len();
        let expected = *expected.get_or_insert(found);
        if found != expected {
            let main = names.first().cloned().unwrap_or_default();
            return Err(EngineError::UnequalPartitions {
                topic: name.clone(),
                found,
                main,
                expected,
            });
        }
    }
    Ok(expected.and_then(|count| i32::try_from(count).ok()).unwrap_or_default())
}
