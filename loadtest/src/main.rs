//! Every command of `loadtest`: measure, account, report, leave nothing behind.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use clap::Parser;
use devstack::{
    failure::{Exit, Failure},
    progress::Progress,
};
use loadtest::{
    cli::{
        Cli, Command, Consumer, ConsumerArgs, CostArgs, DrainArgs, FailureArgs, KafkaArgs, LatencyArgs, Mode, PairArgs,
        Peer, StackArgs,
    },
    complete::{self, Processes, Scenario, pgbench},
    conditions::Conditions,
    consumer::{self, Consumed, same_work},
    contender::Contender,
    cost,
    drain::{self, Drained},
    failure_rate, html, kafka,
    latency::{self, Measured},
    pg_recvlogical::PgRecvlogical,
    place::Place,
    report::{self, Baseline, Report},
    servers::Servers,
};
use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// A check was not met.
const NOT_MET: Exit = Exit::Passed(99);
/// Most events of one latency run: each leaves a mark in memory.
const MOST_EVENTS: u64 = 50_000_000;
/// For threads that wait for a broker.
const LAST_WAIT: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let cli = Cli::parse();
    let exit = run(&cli).unwrap_or_else(|error| explain(&error));
    ExitCode::from(exit.code())
}

fn run(cli: &Cli) -> anyhow::Result<Exit> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    let exit = runtime.block_on(measure_and_remove(cli));
    runtime.shutdown_timeout(LAST_WAIT);
    exit
}

/// What a run has made, to be removed however it ends.
#[derive(Default)]
struct Made {
    // In the order in which they go.
    place: Option<Place>,
    servers: Option<Servers>,
}

impl Made {
    async fn remove(&mut self) -> anyhow::Result<()> {
        match self.place.take() {
            Some(place) => place.remove().await.context("remove what the run has made"),
            None => Ok(()),
        }
    }
}

async fn measure_and_remove(cli: &Cli) -> anyhow::Result<Exit> {
    let mut signals = Signals::listen()?;
    let progress = Progress::on_stderr();
    let mut made = Made::default();
    let outcome = tokio::select! {
        outcome = measure(cli, &mut made, &progress) => outcome,
        // The processes of the contender are killed with their future.
        exit = signals.next() => Ok(exit),
    };
    let removed = tokio::select! {
        removed = made.remove() => removed,
        _ = signals.next() => Ok(()),
    };
    let exit = outcome?;
    removed?;
    Ok(exit)
}

async fn measure(cli: &Cli, made: &mut Made, progress: &Progress) -> anyhow::Result<Exit> {
    match &cli.command {
        Command::Drain(args) => measure_drain(args, made, progress).await,
        Command::Latency(args) => measure_latency(args, made, progress).await,
        Command::Complete(args) => measure_pair(Scenario::Complete, args, made, progress).await,
        Command::Outbox(args) => measure_pair(Scenario::Outbox, args, made, progress).await,
        Command::Soak(args) => measure_pair(Scenario::Soak, &args.pair(), made, progress).await,
        Command::Consumer(args) => measure_consumer(args, made, progress).await,
        Command::Kafka(args) => measure_kafka(args, made, progress).await,
        Command::FailureRate(args) => measure_failures(args, made, progress).await,
        Command::Cost(args) => measure_cost(args, made, progress).await,
    }
}

async fn measure_drain(args: &DrainArgs, made: &mut Made, progress: &Progress) -> anyhow::Result<Exit> {
    if args.common.relay.iter().any(|kind| kind.mode == Mode::AfterCommit) {
        return Err(usage(
            "--relay after-commit: it publishes what its own process commits, and drains no backlog",
        ));
    }
    let contenders = Contender::all(&args.common)?;
    let reader = if args.common.peer.contains(&Peer::PgRecvlogical) {
        Some(PgRecvlogical::find()?)
    } else {
        None
    };
    let servers = made
        .servers
        .insert(Servers::open(args.common.stack.servers, progress).await?);
    let conditions = Conditions::gather(
        servers,
        args.common.stack.partitions,
        &args.common.stack.settings,
        reader.as_ref(),
    )
    .await?;
    let mut results = Vec::new();
    for contender in &contenders {
        let place = made.place.insert(Place::new(servers, args.common.stack.partitions)?);
        let drained = drain::measure(contender, place, reader.as_ref(), args, progress).await?;
        results.push((contender.is_peer(), drained));
        if let Some(place) = made.place.take() {
            place.remove().await?;
        }
    }
    let ratios = report::drain_ratios(&results);
    let results: Vec<&Drained> = results.iter().map(|(_, drained)| drained).collect();
    let met = results.iter().all(|drained| drained.failures.is_empty());
    let report = Report {
        kind: "drain",
        conditions,
        results,
        ratios,
    };
    publish(&report, &report::drain_text(&report), &args.common.stack)?;
    Ok(if met { Exit::Done } else { NOT_MET })
}

async fn measure_latency(args: &LatencyArgs, made: &mut Made, progress: &Progress) -> anyhow::Result<Exit> {
    if args.common.peer.contains(&Peer::PgRecvlogical) {
        return Err(usage(
            "--peer pg-recvlogical: it reads a backlog, and has no part in latency",
        ));
    }
    if latency::events(args.rate, args.warm_up + args.duration.max(args.rehearsal)) > MOST_EVENTS {
        return Err(usage(
            "--rate times --duration or --rehearsal: at most 50,000,000 events in one run",
        ));
    }
    let contenders = Contender::all(&args.common)?;
    let servers = made
        .servers
        .insert(Servers::open(args.common.stack.servers, progress).await?);
    let conditions =
        Conditions::gather(servers, args.common.stack.partitions, &args.common.stack.settings, None).await?;
    if let Some(first) = contenders.first().filter(|_| !args.rehearsal.is_zero()) {
        let place = made.place.insert(Place::new(servers, args.common.stack.partitions)?);
        let rehearsal = LatencyArgs {
            duration: args.rehearsal,
            ..args.clone()
        };
        progress.note("a rehearsal, which is not counted:");
        latency::measure(first, place, &rehearsal, progress).await?;
        if let Some(place) = made.place.take() {
            place.remove().await?;
        }
    }
    let mut results = Vec::new();
    for contender in &contenders {
        let place = made.place.insert(Place::new(servers, args.common.stack.partitions)?);
        let measured = latency::measure(contender, place, args, progress).await?;
        results.push((contender.is_peer(), measured));
        if let Some(place) = made.place.take() {
            place.remove().await?;
        }
    }
    let ratios = report::latency_ratios(&results);
    let results: Vec<&Measured> = results.iter().map(|(_, measured)| measured).collect();
    let met = results.iter().all(|measured| measured.failures.is_empty());
    let report = Report {
        kind: "latency",
        conditions,
        results,
        ratios,
    };
    publish(&report, &report::latency_text(&report), &args.common.stack)?;
    Ok(if met { Exit::Done } else { NOT_MET })
}

async fn measure_pair(
    scenario: Scenario,
    args: &PairArgs,
    made: &mut Made,
    progress: &Progress,
) -> anyhow::Result<Exit> {
    if args.pgbench.is_some() {
        pgbench::find()?;
    }
    if args.faults_every.is_some() && args.with == Processes::Api {
        return Err(usage(
            "--faults-every: only relay and consumer are killed, and --with api has neither",
        ));
    }
    let baseline = args.baseline.as_deref().map(Baseline::read).transpose()?;
    let servers = made.servers.insert(Servers::open(args.stack.servers, progress).await?);
    let conditions = Conditions::gather(servers, args.stack.partitions, &args.stack.settings, None).await?;
    let mut results = Vec::new();
    let mut peer = None;
    for (number, connections) in args.connections.iter().enumerate() {
        let place = made.place.insert(Place::new(servers, args.stack.partitions)?);
        results.push(complete::measure(scenario, args, *connections, place, progress).await?);
        let last = number + 1 == args.connections.len();
        if let Some(clients) = args.pgbench.filter(|_| last) {
            let step = progress.step(format!("pgbench with {clients} clients"));
            let measured = pgbench::measure(place, clients, args.duration.as_secs()).await?;
            step.done(&format!(
                "pgbench: {:.0} transactions per second",
                measured.transactions_per_second
            ));
            peer = Some(measured);
        }
        if let Some(place) = made.place.take() {
            place.remove().await?;
        }
    }
    let ratios = report::complete_ratios(&results, peer.as_ref());
    let met = results.iter().all(|completed| completed.failures.is_empty());
    let report = Report {
        kind: scenario.name(),
        conditions,
        results,
        ratios,
    };
    let text = report::complete_text(&report, peer.as_ref(), baseline.as_ref());
    let path = publish(&report, &text, &args.stack)?;
    let page = path.with_extension("html");
    html::write(&page, &report, &text, met)?;
    io::stdout().write_all(format!("the report: {}\n", page.display()).as_bytes())?;
    Ok(if met { Exit::Done } else { NOT_MET })
}

async fn measure_consumer(args: &ConsumerArgs, made: &mut Made, progress: &Progress) -> anyhow::Result<Exit> {
    same_work::check(args)?;
    let servers = made.servers.insert(Servers::open(args.stack.servers, progress).await?);
    let conditions = Conditions::gather(servers, args.stack.partitions, &args.stack.settings, None).await?;
    let mut results = Vec::new();
    if args.consumer.contains(&Consumer::Commerce) {
        let place = made.place.insert(Place::new(servers, args.stack.partitions)?);
        results.push((false, consumer::measure(args, place, progress).await?));
        if let Some(place) = made.place.take() {
            place.remove().await?;
        }
    }
    let others = args.consumer.iter().filter(|consumer| **consumer != Consumer::Commerce);
    for (number, consumer) in others.enumerate() {
        if number == 0 {
            let place = made.place.insert(Place::new(servers, args.stack.partitions)?);
            same_work::prepare(args, place, progress).await?;
        }
        let place = made.place.as_ref().context("the place is gone")?;
        results.push((
            consumer.is_peer(),
            same_work::measure(*consumer, args, place, progress).await?,
        ));
    }
    let ratios = report::consumer_ratios(&results);
    let results: Vec<Consumed> = results.into_iter().map(|(_, consumed)| consumed).collect();
    let met = results.iter().all(|consumed| consumed.failures.is_empty());
    let report = Report {
        kind: "consumer",
        conditions,
        results,
        ratios,
    };
    publish(&report, &report::consumer_text(&report), &args.stack)?;
    Ok(if met { Exit::Done } else { NOT_MET })
}

async fn measure_failures(args: &FailureArgs, made: &mut Made, progress: &Progress) -> anyhow::Result<Exit> {
    let servers = made.servers.insert(Servers::open(args.stack.servers, progress).await?);
    let conditions = Conditions::gather(servers, args.stack.partitions, &args.stack.settings, None).await?;
    let mut results = Vec::new();
    for path in &args.path {
        let place = made.place.insert(Place::new(servers, args.stack.partitions)?);
        results.push(failure_rate::measure(*path, args, place, progress).await?);
        if let Some(place) = made.place.take() {
            place.remove().await?;
        }
    }
    let met = results.iter().all(|failed| failed.failures.is_empty());
    let report = Report {
        kind: "failure-rate",
        conditions,
        results,
        ratios: Vec::new(),
    };
    publish(&report, &report::failure_text(&report), &args.stack)?;
    Ok(if met { Exit::Done } else { NOT_MET })
}

async fn measure_kafka(args: &KafkaArgs, made: &mut Made, progress: &Progress) -> anyhow::Result<Exit> {
    let servers = made.servers.insert(Servers::open(args.stack.servers, progress).await?);
    let conditions = Conditions::gather(servers, args.stack.partitions, &args.stack.settings, None).await?;
    let place = made.place.insert(Place::new(servers, args.stack.partitions)?);
    let carried = kafka::measure(args, place, progress).await?;
    let met = carried.failures.is_empty();
    let report = Report {
        kind: "kafka",
        conditions,
        ratios: report::kafka_ratios(&carried),
        results: vec![carried],
    };
    publish(&report, &report::kafka_text(&report, args.bytes), &args.stack)?;
    Ok(if met { Exit::Done } else { NOT_MET })
}

async fn measure_cost(args: &CostArgs, made: &mut Made, progress: &Progress) -> anyhow::Result<Exit> {
    let Made { place, servers } = made;
    let servers = servers.insert(Servers::open(args.stack.servers, progress).await?);
    let conditions = Conditions::gather(servers, args.stack.partitions, &args.stack.settings, None).await?;
    let results = cost::measure(args, servers, place, progress).await?;
    let met = results.iter().all(|cost| cost.failures.is_empty());
    let report = Report {
        kind: "cost",
        conditions,
        results,
        ratios: Vec::new(),
    };
    publish(&report, &report::cost_text(&report), &args.stack)?;
    Ok(if met { Exit::Done } else { NOT_MET })
}

/// Says where the figures are.
fn publish<T: Serialize>(report: &Report<T>, text: &str, args: &StackArgs) -> anyhow::Result<PathBuf> {
    let path = match &args.output {
        Some(path) => path.clone(),
        None => report::default_path(report.kind, args.results.as_deref())?,
    };
    report.write(&path)?;
    io::stdout().write_all(format!("{text}all figures: {}\n", path.display()).as_bytes())?;
    Ok(path)
}

fn usage(what: &str) -> anyhow::Error {
    Failure::new(Exit::Usage, what, "loadtest --help").into()
}

/// One line what failed, why, what to try; returns the exit code it stands for.
fn explain(error: &anyhow::Error) -> Exit {
    let closed = error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe);
    if closed {
        return Exit::Done;
    }
    let failure = error.downcast_ref::<Failure>();
    let mut text = format!("error: {error}\n");
    for cause in error.chain().skip(1) {
        text.push_str(&format!("  because: {cause}\n"));
    }
    if let Some(failure) = failure {
        text.push_str(&format!("  try: {}\n", failure.hint));
    }
    // With standard error closed as well there is nobody to tell.
    io::stderr().write_all(text.as_bytes()).ok();
    failure.map_or(Exit::Failed, |failure| failure.exit)
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).context("listen for SIGINT")?,
            terminate: signal(SignalKind::terminate()).context("listen for SIGTERM")?,
        })
    }

    /// The next one, as the exit code it leads to.
    async fn next(&mut self) -> Exit {
        tokio::select! {
            _ = self.interrupt.recv() => Exit::Interrupted,
            _ = self.terminate.recv() => Exit::Terminated,
        }
    }
}
