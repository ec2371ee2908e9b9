//! Consumers on the same work: for each event an inbox row and the update of one order, in one transaction, and nothing else.

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context, ensure};
use devstack::{
    failure::{Exit, Failure},
    java::Java,
    process::{Lifetime, Process},
    progress::{Progress, Step},
};
use sqlx::{AssertSqlSafe, PgConnection};
use tokio::time::Instant;

use super::{Consumed, LOOK_INTERVAL};
use crate::{
    cli::{Consumer, ConsumerArgs},
    conditions,
    contender::{self, Running},
    fill,
    place::Place,
    servers,
    usage::Watch,
    workload::{SMALLEST_PAYLOAD, Workload},
};

const ROWS_PER_TRANSACTION: u64 = 100;
/// A transaction per record takes minutes for what the others do in a second.
const MOST_RECORDS: u64 = 20_000;

/// The backlog in the topic, and what the consumers write to.
///
/// # Errors
/// If a server does not answer, or the relay ends.
pub async fn prepare(args: &ConsumerArgs, place: &Place, progress: &Progress) -> anyhow::Result<()> {
    place.make().await?;
    place.make_commerce().await?;
    let workload = workload(args);
    fill::fill(place, &workload, ROWS_PER_TRANSACTION, progress).await?;
    let step = progress.step("publishing the backlog");
    // By polling: without a slot there is nothing to be read of the log.
    let settings = [("RELAY_MODE".to_owned(), "poll".to_owned())];
    let mut relay = contender::start_logistics(place, "relay", &settings).await?;
    let topic = place.topic.reader()?;
    let (mut published, mut moved) = (0, Instant::now());
    while published < args.events {
        let now = topic.count().await?;
        if now > published {
            (published, moved) = (now, Instant::now());
            step.detail(format!("{now} of {}", args.events));
        }
        relay.check()?;
        ensure!(
            moved.elapsed() < args.stack.patience,
            "{published} of {} events are published\n{}",
            args.events,
            relay.log_tails()
        );
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    relay.stop().await?;
    step.done(&format!("{published} events published"));
    Ok(())
}

/// Starts the consumer on the whole topic, waits until it is through, and looks at what it has written.
///
/// # Errors
/// If it ends, or nothing moves.
pub async fn measure(
    consumer: Consumer,
    args: &ConsumerArgs,
    place: &Place,
    progress: &Progress,
) -> anyhow::Result<Consumed> {
    let name = consumer.name();
    let events = match consumer {
        Consumer::SpringRecord => args.events.min(MOST_RECORDS),
        _ => args.events,
    };
    let step = progress.step(format!("{name}: {events} events"));
    let mut owner = place.owner().await?;
    make_tables(&mut owner, workload(args).keys()).await?;
    // One before this one may have read the topic to its end, in the same group.
    place.topic.forget_group(&group(consumer, place)).await?;
    let load_before = conditions::load();
    let inbox = if consumer.is_peer() {
        "same_work.inbox"
    } else {
        "commerce.inbox"
    };
    let command = command(consumer, args, place, events)?;
    let log = place.log(name);
    // Nothing that one before this one has said.
    fs::write(&log, "").context("begin its log")?;
    let process = Process::spawn(name, command, &log, Lifetime::Bound)?;
    let mut running = Running::none();
    running.add(process);
    let watch = Watch::over(running.identities()?);
    wait(&mut owner, &mut running, &log, (inbox, events), args, &step).await?;
    let usage = watch.finish().await;
    running.stop().await?;
    let checks = checks(&mut owner, args.events, events).await?;
    let consumed = Consumed::new(name.to_owned(), load_before, usage, &mut owner, inbox, checks).await?;
    step.done(&format!("{name}: {:.0} events per second", consumed.events_per_second));
    Ok(consumed)
}

/// Each key is an order of its own.
fn workload(args: &ConsumerArgs) -> Workload {
    Workload::new(args.events, args.events_per_key, SMALLEST_PAYLOAD, fill::LANES)
}

async fn make_tables(owner: &mut PgConnection, orders: u64) -> anyhow::Result<()> {
    let statements = format!(
        "TRUNCATE commerce.inbox;
         DROP SCHEMA IF EXISTS same_work CASCADE;
         CREATE SCHEMA same_work;
         CREATE TABLE same_work.inbox (consumer text, event_id uuid, processed_at timestamptz DEFAULT now(),
                                       PRIMARY KEY (consumer, event_id));
         CREATE TABLE same_work.orders (id bigint PRIMARY KEY, status text, shipped_at timestamptz);
         INSERT INTO same_work.orders SELECT id, 'PAID' FROM generate_series(1, {orders}) AS id;"
    );
    sqlx::raw_sql(AssertSqlSafe(statements))
        .execute(&mut *owner)
        .await
        .context("make the tables")?;
    for statement in ["VACUUM ANALYZE", "CHECKPOINT"] {
        sqlx::query(statement).execute(&mut *owner).await.context(statement)?;
    }
    Ok(())
}

/// The engine's bears the name of its retry topics.
fn group(consumer: Consumer, place: &Place) -> String {
    let group = place.group_topics.group();
    match consumer {
        Consumer::SpringRecord => format!("{group}.record"),
        Consumer::SpringBatch => format!("{group}.batch"),
        Consumer::Commerce | Consumer::Engine | Consumer::EngineUnordered => group.to_owned(),
    }
}

fn command(consumer: Consumer, args: &ConsumerArgs, place: &Place, events: u64) -> anyhow::Result<Command> {
    let url = &place.owner_url;
    let mut command = if consumer.is_peer() {
        let jdbc = format!(
            "jdbc:postgresql://{}:{}{}",
            url.host_str().context("the URL of PostgreSQL names no host")?,
            url.port().unwrap_or(5432),
            url.path()
        );
        let listener = if consumer == Consumer::SpringRecord {
            "record"
        } else {
            "batch"
        };
        let mut java = Command::new(Java::find()?.path);
        java.args(["-Xmx1g", "-XX:-UsePerfData", "-cp"])
            .arg(libs(args)?.join("*"))
            .arg("ShipOrders")
            .env("JDBC_URL", jdbc)
            .env("DATABASE_USER", url.username())
            .env("DATABASE_PASSWORD", url.password().unwrap_or_default())
            .env("SCHEMA", "same_work")
            .env("LISTENER", listener);
        java
    } else {
        let ordering = if consumer == Consumer::EngineUnordered {
            "none"
        } else {
            "per-key"
        };
        let mut engine = Command::new(servers::program("ship-orders")?);
        engine.env("DATABASE_URL", url.as_str()).env("ORDERING", ordering);
        engine
    };
    command
        .env("KAFKA_BROKERS", &place.brokers)
        .env("TOPIC", place.topic.name())
        .env("GROUP", group(consumer, place))
        .env("THREADS", args.threads.to_string())
        .env("EVENTS", events.to_string());
    Ok(command)
}

fn libs(args: &ConsumerArgs) -> anyhow::Result<&Path> {
    let usage = |what: String| Failure::new(Exit::Usage, what, "docs/PERFORMANCE.md says how to fill one");
    let libs = args
        .spring_libs
        .as_deref()
        .ok_or_else(|| usage("Spring Kafka needs --spring-libs, the folder with its jars".to_owned()))?;
    if !libs.join("spring-peer-1.jar").is_file() {
        return Err(usage(format!(
            "--spring-libs {}: spring-peer-1.jar is not there",
            libs.display()
        ))
        .into());
    }
    Ok(libs)
}

/// # Errors
/// A usage error, found before anything is started.
pub fn check(args: &ConsumerArgs) -> anyhow::Result<()> {
    if args.consumer.iter().any(|consumer| consumer.is_peer()) {
        libs(args)?;
        Java::find()?;
    }
    Ok(())
}

/// Asks the process and not the database, until it says that it is through: counting rows would slow down what is measured.
async fn wait(
    owner: &mut PgConnection,
    running: &mut Running,
    log: &Path,
    (inbox, events): (&str, u64),
    args: &ConsumerArgs,
    step: &Step,
) -> anyhow::Result<()> {
    let rows = format!("SELECT count(*) FROM {inbox}");
    let begin = Instant::now();
    let deadline = args.stack.patience + Duration::from_secs(events / 50);
    let mut said = false;
    loop {
        running.check()?;
        ensure!(
            begin.elapsed() < deadline,
            "not through with {events} events after {deadline:?}\n{}",
            running.log_tails()
        );
        if !said {
            let text = fs::read_to_string(log).context("read what it says")?;
            said = text.lines().any(|line| line == "done");
            step.detail(format!("{:.0} s", begin.elapsed().as_secs_f64()));
        } else {
            let applied: i64 = sqlx::query_scalar(AssertSqlSafe(rows.clone()))
                .fetch_one(&mut *owner)
                .await
                .context("count what is applied")?;
            if applied.cast_unsigned() >= events {
                return Ok(());
            }
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// What is wrong with what it has written, by rows.
async fn checks(owner: &mut PgConnection, all: u64, events: u64) -> anyhow::Result<Vec<(String, i64)>> {
    if events < all {
        return Ok(Vec::new());
    }
    let untouched: i64 = sqlx::query_scalar("SELECT count(*) FROM same_work.orders WHERE status <> 'SHIPPED'")
        .fetch_one(owner)
        .await
        .context("look at the orders")?;
    Ok(vec![("orders that no event has reached".to_owned(), untouched)])
}
