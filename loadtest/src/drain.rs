use std::time::Duration;

use anyhow::{Context, bail};
use devstack::progress::{Progress, Step};
use serde::Serialize;
use sqlx::{AssertSqlSafe, PgConnection};
use time::OffsetDateTime;
use tokio::time::Instant;

use crate::{
    append::Appender,
    cli::{DrainArgs, Through},
    conditions,
    contender::{Contender, Running},
    fill::{self, Filled, LANES},
    latency::{micros, prove},
    pg_recvlogical::{PgRecvlogical, Read},
    place::Place,
    topic::Reader,
    usage::{Usage, Watch},
    verify::{self, Account, Verdict},
    workload::Workload,
};

const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// A topic that has all records and stays as it is for this long has no repetition under way.
const QUIET: Duration = Duration::from_secs(2);
/// For the reader of the log, which says nothing on its way.
const READ_DEADLINE: Duration = Duration::from_secs(15 * 60);

/// One contender's drain of its backlog.
#[derive(Debug, Serialize)]
pub struct Drained {
    pub contender: String,
    pub load_before: Option<f64>,
    pub filled: Filled,
    pub account: Account,
    /// From the first to the last event in the topic, by the broker's clock.
    pub seconds: f64,
    pub rows_per_second: f64,
    pub fastest_second: u64,
    /// From the start of its process to the first event in the topic.
    pub seconds_to_first: f64,
    /// From the last event in the topic until every row bore its last mark; absent when it sets none.
    pub seconds_to_marks: Option<f64>,
    pub usage: Vec<Usage>,
    /// `pg_recvlogical` over the same rows, before the drain.
    pub pg_recvlogical: Option<Read>,
    /// Our figure divided by that of `pg_recvlogical`.
    pub ratio_to_pg_recvlogical: Option<f64>,
    /// Why the figures are not to be trusted; empty if they are.
    pub failures: Vec<String>,
}

/// Connects the contender once, stops it, fills the outbox, starts it again and watches the topic.
///
/// # Errors
/// If a process ends, or nothing moves within the patience.
pub async fn measure(
    contender: &Contender,
    place: &Place,
    reader_of_log: Option<&PgRecvlogical>,
    args: &DrainArgs,
    progress: &Progress,
) -> anyhow::Result<Drained> {
    let name = contender.name();
    let workload = Workload::new(args.rows, args.events_per_key, args.payload_bytes, LANES);
    connect_once(contender, place, &workload, args, progress).await?;
    if let Some(reader) = reader_of_log {
        reader.prepare(place).await?;
    }
    let filled = fill::fill(place, &workload, args.rows_per_transaction, progress).await?;
    let mut read = None;
    if let Some(reader) = reader_of_log {
        let step = progress.step("pg_recvlogical over the same rows");
        let done = reader.read(place, filled.rows, &filled.end_lsn, READ_DEADLINE).await?;
        step.done(&format!("pg_recvlogical: {:.0} rows/s", done.rows_per_second));
        read = Some(done);
    }

    let step = progress.step(format!("{name}: draining"));
    let load_before = conditions::load();
    let started = micros(OffsetDateTime::now_utc());
    let mut running = contender.start(place, Through::Table).await?;
    let watch = Watch::over(running.identities()?);
    let topic = place.topic.reader()?;
    drain(&topic, &mut running, &step, args).await?;
    let marked = match contender.last_mark() {
        Some(mark) => Some(await_marks(place, mark, &mut running, args.common.stack.patience).await?),
        None => None,
    };
    await_quiet(&topic, &mut running).await?;
    let usage = watch.finish().await;
    running.stop().await?;

    let patience = args.common.stack.patience;
    let verdict = tokio::task::spawn_blocking(move || verify::verify(&topic, &workload, patience)).await;
    let verdict = verdict.context("read the topic back")??;
    let drained = Drained::new(contender, (filled, read, usage), started, load_before, &verdict, marked);
    step.done(&format!("{name}: {:.0} rows/s", drained.rows_per_second));
    Ok(drained)
}

/// The first life of the contender: it takes its slot, and an event proves that it is connected. Then it leaves, and
/// what is appended waits for it.
async fn connect_once(
    contender: &Contender,
    place: &Place,
    workload: &Workload,
    args: &DrainArgs,
    progress: &Progress,
) -> anyhow::Result<()> {
    let step = progress.step(format!("{}: connecting", contender.name()));
    place.make().await?;
    let mut running = contender.start(place, Through::Table).await?;
    let pool = place.appenders(1).await?;
    let appender = Appender::table(pool.clone(), workload.clone());
    prove(&appender, place, &mut running, args.common.stack.patience).await?;
    if let Some(mark) = contender.last_mark()
        && let Marked::Not(left) = await_marks(place, mark, &mut running, args.common.stack.patience).await?
    {
        bail!(
            "the first event was published and not marked: {left} rows\n{}",
            running.log_tails()
        );
    }
    running.stop().await?;
    pool.close().await;
    step.done(&format!("{}: connected", contender.name()));
    Ok(())
}

/// Waits until the topic holds the proof and as many records as there are rows.
async fn drain(topic: &Reader, running: &mut Running, step: &Step, args: &DrainArgs) -> anyhow::Result<()> {
    let expected = args.rows + 1;
    let mut count = topic.count().await?;
    let mut moved = Instant::now();
    loop {
        running.check()?;
        let now = topic.count().await?;
        if now > count {
            count = now;
            moved = Instant::now();
        }
        step.detail(format!("{} of {} records", count.saturating_sub(1), args.rows));
        if count >= expected {
            return Ok(());
        }
        if moved.elapsed() > args.common.stack.patience {
            let patience = args.common.stack.patience;
            bail!(
                "{count} of {expected} records came, none for {patience:?}\n{}",
                running.log_tails()
            );
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Waits until nothing more comes: records may have been repetitions, with first ones still to follow.
async fn await_quiet(topic: &Reader, running: &mut Running) -> anyhow::Result<()> {
    let mut count = topic.count().await?;
    let mut moved = Instant::now();
    while moved.elapsed() < QUIET {
        running.check()?;
        tokio::time::sleep(LOOK_INTERVAL).await;
        let now = topic.count().await?;
        if now > count {
            count = now;
            moved = Instant::now();
        }
    }
    Ok(())
}

enum Marked {
    /// When it was seen, in microseconds since 1970.
    At(i64),
    /// So many rows were not, and none followed within the patience.
    Not(i64),
}

/// Waits until every row bears the mark, as long as some still get it.
async fn await_marks(place: &Place, mark: &str, running: &mut Running, patience: Duration) -> anyhow::Result<Marked> {
    let mut owner = place.owner().await?;
    let mut left = i64::MAX;
    let mut moved = Instant::now();
    loop {
        running.check()?;
        if !any_without(&mut owner, mark).await? {
            return Ok(Marked::At(micros(OffsetDateTime::now_utc())));
        }
        if moved.elapsed() > patience {
            let now = count_without(&mut owner, mark).await?;
            if now >= left {
                return Ok(Marked::Not(now));
            }
            left = now;
            moved = Instant::now();
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

async fn any_without(owner: &mut PgConnection, mark: &str) -> anyhow::Result<bool> {
    let query = format!("SELECT EXISTS (SELECT FROM logistics.outbox WHERE {mark} IS NULL)");
    let any = sqlx::query_scalar(AssertSqlSafe(query)).fetch_one(owner).await;
    any.context("look for rows without their mark")
}

async fn count_without(owner: &mut PgConnection, mark: &str) -> anyhow::Result<i64> {
    let query = format!("SELECT count(*) FROM logistics.outbox WHERE {mark} IS NULL");
    let count = sqlx::query_scalar(AssertSqlSafe(query)).fetch_one(owner).await;
    count.context("count rows without their mark")
}

impl Drained {
    fn new(
        contender: &Contender,
        (filled, read, usage): (Filled, Option<Read>, Vec<Usage>),
        started_micros: i64,
        load_before: Option<f64>,
        verdict: &Verdict,
        marked: Option<Marked>,
    ) -> Self {
        let Verdict {
            account,
            first_ms,
            last_ms,
            fastest_second,
        } = verdict;
        // Both ends lie within a millisecond of the broker's clock.
        let seconds = (last_ms - first_ms).max(1) as f64 / 1e3;
        let rows_per_second = account.distinct as f64 / seconds;
        let mut failures = Vec::new();
        if account.missing > 0 {
            failures.push(format!("{} rows are not in the topic", account.missing));
        }
        if account.inversions > 0 {
            failures.push(format!(
                "{} events came after a later one of their key",
                account.inversions
            ));
        }
        let seconds_to_marks = match marked {
            Some(Marked::At(at)) => Some(((at - last_ms * 1_000) as f64 / 1e6).max(0.0)),
            Some(Marked::Not(left)) => {
                failures.push(format!("{left} rows never got their mark"));
                None
            }
            None => None,
        };
        Self {
            contender: contender.name(),
            load_before,
            account: account.clone(),
            seconds,
            rows_per_second,
            fastest_second: *fastest_second,
            seconds_to_first: (first_ms * 1_000 - started_micros) as f64 / 1e6,
            seconds_to_marks,
            usage,
            ratio_to_pg_recvlogical: read.as_ref().map(|read| rows_per_second / read.rows_per_second),
            pg_recvlogical: read,
            filled,
            failures,
        }
    }
}
