//! `./dev compose-check`: builds the image, runs `docker-compose.yml`, sends requests through it, kills its containers and
//! holds the tables against each other; also where no image can be pulled and no container engine runs.

/// The command line.
mod cli;

/// Docker's command line, and an engine of the check's own where none runs.
mod docker;

/// Images under the official names, for a machine that cannot pull them.
mod stand_ins;

/// The product's image.
mod image;

/// The containers of the compose file.
mod project;

/// What a user sends first, and what must come back.
mod requests;

use std::{
    fs,
    io::{self, Write},
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::Parser;
use cli::Cli;
use devstack::{
    failure::{Exit, Failure},
    place::{Place, StackLock, repository_root},
    progress::{Progress, seconds},
    sample::grouped,
};
use docker::{Docker, Engine};
use e2e::{client::Client, ledger, workload};
use project::Project;
use shared_events::topics::{COMMERCE_GROUP, GroupTopics, SHIPMENTS};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// A check was not met.
const NOT_MET: Exit = Exit::Passed(99);
/// Orders that clients ship one request after the other, and then as many that are shipped in bulk.
const ORDERS: i64 = 20_000;
const CLIENTS: usize = 2;
/// Orders in a bulk call, and in a second.
const BULK: i64 = 10;
const BULK_RATE: i64 = 20;
/// How long a client repeats a request while containers are down.
const PATIENCE: Duration = Duration::from_secs(180);
/// Until the last event has arrived.
const QUIET: Duration = Duration::from_secs(180);
/// Traffic between two kills.
const PAUSE: Duration = Duration::from_secs(2);

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
    runtime.block_on(check_and_remove(cli))
}

/// What the check has made, to be removed however it ends.
struct Made {
    place: Place,
    _lock: StackLock,
    engine: Option<Engine>,
    docker: Option<Docker>,
    project: Option<Project>,
}

async fn check_and_remove(cli: &Cli) -> anyhow::Result<Exit> {
    let mut signals = Signals::listen()?;
    let progress = Progress::on_stderr();
    let root = repository_root()?;
    let place = Place::new(&root, "compose-check")?;
    place.create()?;
    let lock = place.try_lock()?.ok_or_else(|| {
        Failure::new(
            Exit::Usage,
            "another compose-check runs in this checkout",
            "wait for it",
        )
    })?;
    let mut made = Made {
        place,
        _lock: lock,
        engine: None,
        docker: None,
        project: None,
    };
    let outcome = tokio::select! {
        outcome = check(cli, &root, &mut made, &progress) => outcome,
        exit = signals.next() => Ok(exit),
    };
    if let (true, Some(project)) = (cli.keep && !matches!(outcome, Ok(Exit::Interrupted)), &made.project) {
        if let Err(error) = &outcome {
            progress.note(&format!("failed: {error:#}"));
        }
        progress.note(&format!("{}\nCtrl-C takes it down", project.addresses()));
        signals.next().await;
    }
    let removed = tokio::select! {
        removed = remove(cli, made, outcome.is_err(), &progress) => removed,
        // What was started dies with the future; containers and images may stay.
        exit = signals.next() => return Ok(exit),
    };
    // What went wrong first matters more.
    let exit = outcome?;
    removed.map(|()| exit)
}

async fn check(cli: &Cli, root: &Path, made: &mut Made, progress: &Progress) -> anyhow::Result<Exit> {
    let start = Instant::now();
    let log = made.place.log("check");
    let docker = Docker::find_or_start(&made.place, &mut made.engine, progress).await?;
    let docker = made.docker.insert(docker);
    let contexts = made.place.dir().join("contexts");
    stand_ins::ensure(docker, root, &contexts, &log, cli, progress).await?;
    let step = progress.step("testing the alert rules");
    docker
        .test_rules(stand_ins::PROMETHEUS, &root.join("compose/prometheus"))
        .await?;
    step.done("each alert fires when it should");
    image::build(docker, root, &contexts, cli, progress).await?;

    let project = made
        .project
        .insert(Project::new(docker, root, cli.debezium, &made.place)?);
    // Of a check that was killed.
    project.down().await?;
    project.up(progress).await?;

    let owner = project.owner()?;
    workload::prepare_orders(&owner, 2 * ORDERS + requests::ORDERS).await?;
    let logistics = Client::new(&project.logistics(), PATIENCE)?;
    let commerce = Client::new(&project.commerce(), PATIENCE)?;
    let mut promises = requests::send(&logistics, &commerce, 2 * ORDERS + 1, progress).await?;

    let stop = Arc::new(AtomicBool::new(false));
    let traffic = async {
        tokio::try_join!(
            workload::run(&logistics, ORDERS, CLIENTS, stop.clone()),
            workload::run_in_bulk_from(&logistics, ORDERS + 1..=2 * ORDERS, BULK, BULK_RATE, stop.clone()),
        )
    };
    let faults = async {
        let killed = kill_in_turn(project, cli.rounds, progress).await;
        stop.store(true, Ordering::Release);
        killed
    };
    let ((one_by_one, in_bulk), kills) = tokio::try_join!(traffic, faults)?;
    progress.note(&format!(
        "✓ {} shipments by single requests and {} in bulk, while containers were killed {kills} times",
        grouped(one_by_one.len() as u64),
        grouped(in_bulk.len() as u64)
    ));
    promises.extend(one_by_one);
    promises.extend(in_bulk);

    project.healthy(&project.services()).await?;
    let step = progress.step("waiting for the last event");
    ledger::quiet(&owner, QUIET).await?;
    step.done("every event has arrived");
    if cli.load {
        project.load(progress).await?;
    }
    let topics = GroupTopics::new(SHIPMENTS, COMMERCE_GROUP);
    let ledger = ledger::check_at(&project.brokers(), &topics, &owner, &promises).await?;
    let verdict = if ledger.is_clean() {
        format!("compose-check: all is well after {}", seconds(start.elapsed()))
    } else {
        "compose-check: the tables differ".to_owned()
    };
    io::stdout().write_all(format!("{ledger}{verdict}\n").as_bytes())?;
    Ok(if ledger.is_clean() { Exit::Done } else { NOT_MET })
}

/// Every service once in each round, while requests go on. Returns how many were killed.
async fn kill_in_turn(project: &Project, rounds: u32, progress: &Progress) -> anyhow::Result<usize> {
    let mut kills = 0;
    for _ in 0..rounds {
        for service in project.services() {
            tokio::time::sleep(PAUSE).await;
            let took = project.kill(service).await?;
            progress.note(&format!("  {service} killed, healthy again after {}", seconds(took)));
            kills += 1;
        }
    }
    tokio::time::sleep(PAUSE).await;
    Ok(kills)
}

async fn remove(cli: &Cli, made: Made, failed: bool, progress: &Progress) -> anyhow::Result<()> {
    let step = progress.step("taking everything down");
    let Made {
        place,
        engine,
        docker,
        project,
        ..
    } = made;
    if let Some(project) = &project {
        if failed {
            project.save_logs().await?;
        }
        project.down().await?;
    }
    if let (None, Some(docker), false) = (&engine, &docker, cli.cache) {
        docker.remove_made().await?;
    }
    if let Some(engine) = engine {
        engine.stop(cli.cache).await?;
    }
    step.done("taken down");
    let contexts = place.dir().join("contexts");
    if contexts.exists() {
        fs::remove_dir_all(&contexts).with_context(|| format!("remove {}", contexts.display()))?;
    }
    if failed {
        progress.note(&format!("the logs are in {}", place.dir().join("logs").display()));
    } else if !cli.cache {
        fs::remove_dir_all(place.dir()).with_context(|| format!("remove {}", place.dir().display()))?;
    }
    Ok(())
}

/// SIGINT and SIGTERM, caught from here on.
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

    async fn next(&mut self) -> Exit {
        tokio::select! {
            _ = self.interrupt.recv() => Exit::Interrupted,
            _ = self.terminate.recv() => Exit::Terminated,
        }
    }
}

/// One line what failed, why, what to try; returns the exit code it stands for.
fn explain(error: &anyhow::Error) -> Exit {
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
