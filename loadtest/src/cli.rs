use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;

use crate::{
    complete::Processes,
    threshold::Threshold,
    workload::{LARGEST_PAYLOAD, SMALLEST_PAYLOAD},
};

const EXAMPLES: &str = "\
Examples:
  loadtest drain --relay wal:off,wal:published,poll:published --peer pg-recvlogical
  loadtest latency --relay wal,poll --rate 1000 --duration 30s --peer debezium --debezium-libs ~/debezium-libs
  loadtest complete --connections 64,256 --pgbench 64";

const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 failed while running; 2 usage error, nothing was done; 3 a dependency is missing or cannot be
reached; 99 a check was not met: events lost, out of order or not marked, or the offered rate was not reached; 130 and
143 stopped by SIGINT and SIGTERM, everything removed.

The result goes to standard output, progress to standard error, and all figures to a JSON file.";

/// Measures the pair and its parts, and their peers beside them.
///
/// Each contender gets a fresh database with the product's migrations and a fresh topic. Run one measurement at a time,
/// and compare figures of one run only.
#[derive(Debug, Parser)]
#[command(name = "loadtest", version, before_help = EXAMPLES, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Fill the outbox while nobody publishes, then measure how fast the backlog reaches the topic.
    #[command(before_help = "\
Examples:
  loadtest drain                                            1,000,000 rows of 400 B through the WAL relay
  loadtest drain --rows 200000 --relay wal:off,poll:off     two modes, without lifecycle
  loadtest drain --relay wal:off --peer pg-recvlogical,debezium --debezium-libs ~/debezium-libs")]
    Drain(DrainArgs),
    /// Append on an open schedule and measure how long each event takes to the broker.
    #[command(before_help = "\
Examples:
  loadtest latency                                          1,000/s for 30 s through the WAL relay
  loadtest latency --relay wal,poll,after-commit --through api --rate 500
  loadtest latency --peer debezium --debezium-libs ~/debezium-libs")]
    Latency(LatencyArgs),
    /// Complete shipments over the REST interface, one in each request, while everything else runs; then account for every event.
    #[command(before_help = "\
Examples:
  loadtest complete                                         as many as 64 connections get answered, with the whole pair
  loadtest complete --with api --connections 64,256 --pgbench 64
  loadtest complete --rate 1000 --duration 60s --threshold p99<25 --threshold applied-p99<20")]
    Complete(PairArgs),
    /// Append events by the insert-only endpoint, and account for every one of them: append, broker, applied.
    #[command(before_help = "\
Examples:
  loadtest outbox --rate 2000 --duration 5m --shipments 700000
  loadtest outbox --rate 500 --threshold failed<1 --threshold broker-p99<13")]
    Outbox(PairArgs),
    /// Mixed changes for hours while relay and consumer are killed again and again: whether anything is lost, and whether latency or
    /// memory drifts.
    #[command(before_help = "\
Examples:
  loadtest soak                                             200/s for an hour, a process killed every minute
  loadtest soak --rate 500 --duration 4h --faults-every 5m")]
    Soak(SoakArgs),
    /// Publish a backlog of completions while commerce is stopped, then measure how fast commerce applies it.
    #[command(before_help = "\
Examples:
  loadtest consumer                                         200,000 events, one instance
  loadtest consumer --events 1000000 --instances 2 --skew 3")]
    Consumer(ConsumerArgs),
    /// Send calls while commerce fails for some of the orders, by each way that an event can take and by the synchronous path:
    /// failed calls and lost events side by side.
    #[command(before_help = "\
Examples:
  loadtest failure-rate                                     1,000 calls on 32 connections, commerce fails for 10 % of the orders
  loadtest failure-rate --path wal,legacy --share 50")]
    FailureRate(FailureArgs),
    /// Load test 2: straight to a topic, at rising rates until the latency bends, then as fast as it goes. What broker and machine
    /// carry without the product.
    #[command(before_help = "\
Examples:
  loadtest kafka --java                                     beside the broker's own load generator
  loadtest kafka --consume --bytes 400 --step 10s")]
    Kafka(KafkaArgs),
    /// What an event costs our processes in processor time, which is to be the same for small and large backlogs, few and many keys,
    /// one and several instances; and how large they become.
    #[command(before_help = "\
Examples:
  loadtest cost                                             relay, engine and commerce, up to 1,000,000 events
  loadtest cost --stage relay --events 10000,100000,1000000,10000000")]
    Cost(CostArgs),
}

#[derive(Debug, Args)]
pub struct DrainArgs {
    /// Rows of the backlog.
    #[arg(long, value_name = "COUNT", default_value = "1000000", value_parser = clap::value_parser!(u64).range(1..=20_000_000))]
    pub rows: u64,
    /// Bytes of each envelope, the column `payload` and the Kafka value.
    #[arg(long, value_name = "BYTES", default_value = "400", value_parser = clap::value_parser!(u32).range(i64::from(SMALLEST_PAYLOAD)..=i64::from(LARGEST_PAYLOAD)))]
    pub payload_bytes: u32,
    /// Events of each key; the backlog has COUNT / EVENTS keys.
    #[arg(long, value_name = "EVENTS", default_value = "10", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub events_per_key: u64,
    /// Rows that one transaction commits while the backlog is made; a relay over the log meets them in these pieces.
    #[arg(long, value_name = "ROWS", default_value = "100", value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub rows_per_transaction: u64,
    #[command(flatten)]
    pub common: CommonArgs,
}

#[derive(Debug, Clone, Args)]
pub struct LatencyArgs {
    /// Events appended per second, one transaction each.
    #[arg(long, value_name = "PER-SECOND", default_value = "1000", value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub rate: u64,
    /// How long is measured, e.g. `30s`, `5m`; up to 1h.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration)]
    pub duration: Duration,
    /// How long the same load runs before it counts.
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = duration)]
    pub warm_up: Duration,
    /// How long the first contender runs once before all, without being counted. For about a minute the broker's Java machine compiles
    /// what just this load needs, and takes a third of a processor. `0s` for not at all, up to 1h.
    #[arg(long, value_name = "DURATION", default_value = "90s", value_parser = duration_or_none)]
    pub rehearsal: Duration,
    /// Where events are appended: into the table by the load test itself, or by requests to the product's API.
    /// `after-commit` publishes from the API's process, so it is always measured through the API.
    #[arg(long, value_enum, default_value_t = Through::Table)]
    pub through: Through,
    /// Appends under way at once. Too few make the schedule late, which shows as `late start`.
    #[arg(long, value_name = "COUNT", default_value = "16", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub connections: u32,
    /// Bytes of each envelope; events made by the API have their own size.
    #[arg(long, value_name = "BYTES", default_value = "400", value_parser = clap::value_parser!(u32).range(i64::from(SMALLEST_PAYLOAD)..=i64::from(LARGEST_PAYLOAD)))]
    pub payload_bytes: u32,
    #[command(flatten)]
    pub common: CommonArgs,
}

#[derive(Debug, Args)]
pub struct PairArgs {
    /// Requests per second, each due at its time whatever became of those before it. Without it each connection sends its next
    /// request when the last one is answered: as many as it can.
    #[arg(long, value_name = "PER-SECOND", value_parser = clap::value_parser!(u64).range(1..=200_000))]
    pub rate: Option<u64>,
    /// Connections, each with one request at a time; several values are measured one after the other.
    #[arg(long, value_name = "COUNT", value_delimiter = ',', default_value = "64", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub connections: Vec<u32>,
    /// How long is measured, e.g. `30s`, `5m`; up to 1h.
    #[arg(long, value_name = "DURATION", default_value = "20s", value_parser = duration)]
    pub duration: Duration,
    /// How long the same load runs before it counts.
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = duration)]
    pub warm_up: Duration,
    /// Open shipments to begin with, and most requests: at least rate times time, or the load ends early.
    #[arg(long, value_name = "COUNT", default_value = "500000", value_parser = clap::value_parser!(u64).range(1..=20_000_000))]
    pub shipments: u64,
    /// How unevenly shipments fall to orders: 1 gives each order five, 3 makes a tenth of the orders have nearly half of them.
    #[arg(long, value_name = "EXPONENT", default_value = "1", value_parser = skew)]
    pub skew: f64,
    /// What runs during the load.
    #[arg(long = "with", value_enum, default_value_t = Processes::Pair)]
    pub with: Processes,
    /// Measure pgbench with so many clients afterwards, on the same server, for as long.
    #[arg(long, value_name = "CLIENTS", value_parser = clap::value_parser!(u32).range(1..=200))]
    pub pgbench: Option<u32>,
    /// Kill consumer and relay in turn, one after each interval, and start it again at once. The API, then in a process of its own, is
    /// to answer every request meanwhile.
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub faults_every: Option<Duration>,
    /// A bound that the figures must meet, else the exit code is 99; repeatable. Figures: p50, p99, max (response time, ms), rate, failed,
    /// broker-p50, broker-p99 (from append to broker, ms), applied-p50, applied-p99 (from commit to applied in commerce, ms).
    #[arg(long = "threshold", value_name = "FIGURE<BOUND")]
    pub thresholds: Vec<Threshold>,
    #[command(flatten)]
    pub stack: StackArgs,
    /// The JSON file of an earlier run to compare with.
    #[arg(long, value_name = "FILE")]
    pub baseline: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct SoakArgs {
    /// Requests per second, each due at its time whatever became of those before it.
    #[arg(long, value_name = "PER-SECOND", default_value = "200", value_parser = clap::value_parser!(u64).range(1..=5_000))]
    pub rate: u64,
    /// How long is measured, e.g. `30m`, `4h`; up to 4h.
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = long_duration)]
    pub duration: Duration,
    /// Connections, each with one request at a time.
    #[arg(long, value_name = "COUNT", default_value = "32", value_parser = clap::value_parser!(u32).range(1..=128))]
    pub connections: u32,
    /// Kill consumer and relay in turn, one after each interval, and start it again at once. `0s` for not at all: then their memory is
    /// judged as well.
    #[arg(long, value_name = "DURATION", default_value = "1m", value_parser = duration_or_none)]
    pub faults_every: Duration,
    /// How unevenly shipments fall to orders: 1 gives each order five, 3 makes a tenth of the orders have nearly half of them.
    #[arg(long, value_name = "EXPONENT", default_value = "3", value_parser = skew)]
    pub skew: f64,
    /// As of `loadtest complete`. Beside them no process may grow by more than a fifth from the third tenth of the time to the last,
    /// unless it was killed.
    #[arg(long = "threshold", value_name = "FIGURE<BOUND")]
    pub thresholds: Vec<Threshold>,
    #[command(flatten)]
    pub stack: StackArgs,
}

impl SoakArgs {
    /// The load as one on the whole pair.
    pub fn pair(&self) -> PairArgs {
        let warm_up = Duration::from_secs(10);
        PairArgs {
            rate: Some(self.rate),
            connections: vec![self.connections],
            duration: self.duration,
            warm_up,
            // Each request has a shipment's number, and one is left.
            shipments: self.rate * (warm_up + self.duration).as_secs() + self.rate + 1,
            skew: self.skew,
            with: Processes::Pair,
            pgbench: None,
            faults_every: Some(self.faults_every).filter(|every| !every.is_zero()),
            thresholds: self.thresholds.clone(),
            stack: self.stack.clone(),
            baseline: None,
        }
    }
}

#[derive(Debug, Args)]
pub struct ConsumerArgs {
    /// Events of the backlog, each the completion of a shipment of its own.
    #[arg(long, value_name = "COUNT", default_value = "200000", value_parser = clap::value_parser!(u64).range(1..=20_000_000))]
    pub events: u64,
    /// Events of each key, for all but `commerce`; the backlog has COUNT / EVENTS keys.
    #[arg(long, value_name = "EVENTS", default_value = "5", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub events_per_key: u64,
    /// What is measured, several separated by commas. All but `commerce` do the least work there is, an inbox row and the update of
    /// one order for each event; `spring-record` gets 20,000 events at most.
    #[arg(
        long,
        value_enum,
        value_name = "CONSUMER",
        value_delimiter = ',',
        default_value = "commerce"
    )]
    pub consumer: Vec<Consumer>,
    /// Transactions at once of the engine, threads of Spring Kafka; commerce-consumer has a setting for it.
    #[arg(long, value_name = "COUNT", default_value = "6", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub threads: u32,
    /// Folder with Spring Kafka's jars.
    #[arg(long, value_name = "DIR")]
    pub spring_libs: Option<PathBuf>,
    /// Instances of commerce-consumer that share the backlog.
    #[arg(long, value_name = "COUNT", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=16))]
    pub instances: u32,
    /// How unevenly shipments fall to orders: 1 gives each order five, 3 makes a tenth of the orders have nearly half of them.
    #[arg(long, value_name = "EXPONENT", default_value = "1", value_parser = skew)]
    pub skew: f64,
    #[command(flatten)]
    pub stack: StackArgs,
}

#[derive(Debug, Args)]
pub struct FailureArgs {
    /// Calls, each the completion of a shipment.
    #[arg(long, value_name = "COUNT", default_value = "1000", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub calls: u64,
    /// Connections, each with one call at a time.
    #[arg(long, value_name = "COUNT", default_value = "32", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub connections: u32,
    /// Of the orders, for how many commerce fails, in percent.
    #[arg(long, value_name = "PERCENT", default_value = "10", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub share: u8,
    /// Several separated by commas; the relay modes, and `legacy`, the synchronous path.
    #[arg(
        long,
        value_enum,
        value_name = "PATH",
        value_delimiter = ',',
        default_value = "wal,poll,after-commit,auto,legacy"
    )]
    pub path: Vec<Path>,
    #[command(flatten)]
    pub stack: StackArgs,
}

#[derive(Debug, Args)]
pub struct KafkaArgs {
    /// The lowest rate, in records per second; the next ones are 1, 2 and 5 times the powers of ten.
    #[arg(long, value_name = "PER-SECOND", default_value = "1000", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub from: u64,
    /// The highest rate.
    #[arg(long, value_name = "PER-SECOND", default_value = "500000", value_parser = clap::value_parser!(u64).range(1..=5_000_000))]
    pub to: u64,
    /// How long each rate is held.
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = duration)]
    pub step: Duration,
    /// The latency has bent when the p99 of a rate is above this.
    #[arg(long, value_name = "DURATION", default_value = "100ms", value_parser = humantime::parse_duration)]
    pub bend: Duration,
    /// Bytes of each record.
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = clap::value_parser!(u32).range(16..=1_000_000))]
    pub bytes: u32,
    /// Let a consumer read meanwhile, and take the times of what it gets.
    #[arg(long)]
    pub consume: bool,
    /// Measure kafka-producer-perf-test afterwards, at 50,000/s and as fast as it goes.
    #[arg(long)]
    pub java: bool,
    #[command(flatten)]
    pub stack: StackArgs,
}

#[derive(Debug, Args)]
pub struct CostArgs {
    /// What is measured, several separated by commas.
    #[arg(
        long,
        value_enum,
        value_name = "STAGE",
        value_delimiter = ',',
        default_value = "relay,engine,commerce"
    )]
    pub stage: Vec<Stage>,
    /// Sizes of the backlog; keys and instances are varied at the middle one.
    #[arg(long, value_name = "COUNT", value_delimiter = ',', default_value = "10000,100000,1000000", value_parser = clap::value_parser!(u64).range(1_000..=20_000_000))]
    pub events: Vec<u64>,
    /// Numbers of keys, for the relay and the engine; each event of commerce has its own.
    #[arg(long, value_name = "COUNT", value_delimiter = ',', default_value = "1,100,10000", value_parser = clap::value_parser!(u64).range(1..=20_000_000))]
    pub keys: Vec<u64>,
    /// Numbers of instances of commerce-consumer that share the backlog.
    #[arg(long, value_name = "COUNT", value_delimiter = ',', default_value = "1,2,4", value_parser = clap::value_parser!(u32).range(1..=16))]
    pub instances: Vec<u32>,
    /// By how much a cost may differ from the median of its stage, else the exit code is 99.
    #[arg(long, value_name = "PERCENT", default_value = "10", value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub within: u32,
    /// Resident memory that a process may have at any point, in MiB.
    #[arg(long, value_name = "MIB", default_value = "64", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub memory: u32,
    #[command(flatten)]
    pub stack: StackArgs,
}

/// A part of the way of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Over the write-ahead log, without marks.
    Relay,
    /// That of crate inbox, with the least work there is.
    Engine,
    /// commerce-consumer with the product's own handler.
    Commerce,
}

impl Stage {
    pub fn name(self) -> &'static str {
        match self {
            Self::Relay => "relay wal:off",
            Self::Engine => "engine",
            Self::Commerce => "commerce-consumer",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Consumer {
    /// commerce-consumer with the product's own handler.
    Commerce,
    /// The engine of crate inbox with order per key.
    Engine,
    /// The engine without order per key.
    EngineUnordered,
    /// Spring Kafka, one transaction for each batch that a poll brings, without isolation of an event that fails.
    SpringBatch,
    /// Spring Kafka, one transaction for each record.
    SpringRecord,
}

impl Consumer {
    pub fn name(self) -> &'static str {
        match self {
            Self::Commerce => "commerce-consumer",
            Self::Engine => "engine",
            Self::EngineUnordered => "engine, unordered",
            Self::SpringBatch => "spring-batch",
            Self::SpringRecord => "spring-record",
        }
    }

    pub fn is_peer(self) -> bool {
        matches!(self, Self::SpringBatch | Self::SpringRecord)
    }
}

/// How commerce gets to know of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Path {
    Wal,
    Poll,
    AfterCommit,
    Auto,
    /// In the same transaction.
    Legacy,
}

/// Where it runs, and what it writes.
#[derive(Debug, Clone, Args)]
pub struct StackArgs {
    /// `own` starts PostgreSQL and Kafka for this run; `environment` uses those of TEST_DATABASE_URL, KAFKA_BROKERS and
    /// TEST_ROLE_PASSWORD, as `./dev env` prints them. Where the roles have different passwords: LOGISTICS_PASSWORD, RELAY_PASSWORD
    /// and COMMERCE_PASSWORD.
    #[arg(long, value_enum, env = "LOADTEST_SERVERS", default_value_t = Where::Own)]
    pub servers: Where,
    /// Partitions of each topic.
    #[arg(long, value_name = "COUNT", default_value = "12", value_parser = clap::value_parser!(i32).range(1..=1_000))]
    pub partitions: i32,
    /// A setting of the services, e.g. `RELAY_LINGER=0ms`; repeatable. The environment's own settings are not passed on.
    #[arg(long = "set", value_name = "NAME=VALUE", value_parser = setting)]
    pub settings: Vec<(String, String)>,
    /// Give up when nothing has moved for this long.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration)]
    pub patience: Duration,
    /// The JSON file; by default `<command>-<time>.json` in the folder of the results. A report with pictures stands beside it, as
    /// `.html`.
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// The folder of the results; by default `loadtest` in the build's target folder.
    #[arg(long, value_name = "DIR", env = "LOADTEST_RESULTS")]
    pub results: Option<PathBuf>,
}

#[derive(Debug, Clone, Args)]
pub struct CommonArgs {
    /// Our relay as MODE or MODE:LIFECYCLE, several separated by commas. Modes: wal, poll, after-commit, external, auto;
    /// lifecycles: off, published (when not given), full.
    #[arg(long, value_name = "MODE[:LIFECYCLE]", value_delimiter = ',', default_value = "wal")]
    pub relay: Vec<RelayKind>,
    /// Peers measured in the same run, several separated by commas.
    #[arg(long, value_enum, value_name = "PEER", value_delimiter = ',')]
    pub peer: Vec<Peer>,
    /// Folder with the jars of Kafka Connect and Debezium, for the peers of Debezium.
    #[arg(long, value_name = "DIR")]
    pub debezium_libs: Option<PathBuf>,
    #[command(flatten)]
    pub stack: StackArgs,
}

/// `RELAY_MODE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    Wal,
    Poll,
    AfterCommit,
    External,
    Auto,
}

/// `RELAY_LIFECYCLE`: which marks a row gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lifecycle {
    Off,
    Published,
    Full,
}

/// A mode of our relay with its lifecycle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelayKind {
    pub mode: Mode,
    pub lifecycle: Lifecycle,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Peer {
    /// Over the very rows of each contender, before it drains them; drain only.
    PgRecvlogical,
    /// Debezium with its poll interval at 10 ms.
    Debezium,
    /// Debezium with its poll interval at the default of 500 ms.
    DebeziumDefaults,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Through {
    Table,
    Api,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Where {
    Own,
    Environment,
}

impl Mode {
    /// As the setting spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Wal => "wal",
            Self::Poll => "poll",
            Self::AfterCommit => "after-commit",
            Self::External => "external",
            Self::Auto => "auto",
        }
    }
}

impl Lifecycle {
    /// As the setting spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Published => "published",
            Self::Full => "full",
        }
    }
}

impl fmt::Display for RelayKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}", self.mode.name(), self.lifecycle.name())
    }
}

impl FromStr for RelayKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mode, lifecycle) = text.split_once(':').unwrap_or((text, "published"));
        Ok(Self {
            mode: one_of(mode)?,
            lifecycle: one_of(lifecycle)?,
        })
    }
}

fn one_of<T: ValueEnum>(text: &str) -> Result<T, String> {
    T::from_str(text, false).map_err(|_| {
        let names: Vec<String> = T::value_variants()
            .iter()
            .filter_map(|variant| Some(variant.to_possible_value()?.get_name().to_owned()))
            .collect();
        format!("`{text}` is not one of {}", names.join(", "))
    })
}

/// From a second to an hour: shorter says nothing, longer is a mistake.
fn duration(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if duration < Duration::from_secs(1) || duration > Duration::from_secs(3600) {
        return Err("allowed are 1s to 1h".to_owned());
    }
    Ok(duration)
}

fn duration_or_none(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => Ok(Duration::ZERO),
        _ => duration(text).map_err(|error| format!("{error}, or 0s")),
    }
}

/// For runs that nobody watches. Longer ones would have the load test keep too many seconds in memory.
fn long_duration(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if duration < Duration::from_secs(10) || duration > Duration::from_secs(4 * 3600) {
        return Err("allowed are 10s to 4h".to_owned());
    }
    Ok(duration)
}

fn skew(text: &str) -> Result<f64, String> {
    let skew: f64 = text.parse().map_err(|_| "write a number, e.g. 3".to_owned())?;
    if !(1.0..=10.0).contains(&skew) {
        return Err("allowed are 1 to 10".to_owned());
    }
    Ok(skew)
}

fn setting(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE")?;
    let plain = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_';
    if name.is_empty() || !name.bytes().all(plain) {
        return Err(format!("`{name}` is not the name of a setting, e.g. RELAY_LINGER"));
    }
    Ok((name.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_relay_is_a_mode_with_a_lifecycle() {
        let parse = |text: &str| text.parse::<RelayKind>().map(|kind| kind.to_string());
        assert_eq!(parse("poll").unwrap(), "poll:published");
        assert_eq!(parse("after-commit:full").unwrap(), "after-commit:full");
        assert_eq!(
            parse("wall").unwrap_err(),
            "`wall` is not one of wal, poll, after-commit, external, auto"
        );
        assert_eq!(parse("wal:").unwrap_err(), "`` is not one of off, published, full");
    }

    #[test]
    fn nonsense_is_refused_by_the_name_of_its_argument() {
        for (argument, value) in [
            ("--rows", "0"),
            ("--payload-bytes", "10"),
            ("--events-per-key", "-1"),
            ("--rows-per-transaction", "many"),
            ("--relay", "wal:all"),
            ("--peer", "sequin"),
            ("--set", "linger"),
            ("--patience", "0s"),
        ] {
            let error = Cli::try_parse_from(["loadtest", "drain", &format!("{argument}={value}")]).unwrap_err();
            assert!(error.to_string().contains(argument), "{error}");
        }
        for (argument, value) in [
            ("--rate", "0"),
            ("--duration", "2h"),
            ("--warm-up", "x"),
            ("--connections", "0"),
        ] {
            let error = Cli::try_parse_from(["loadtest", "latency", &format!("{argument}={value}")]).unwrap_err();
            assert!(error.to_string().contains(argument), "{error}");
        }
    }
}
