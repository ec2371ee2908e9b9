use std::time::Duration;

use anyhow::{Context, bail};
use devstack::progress::Progress;
use hdrhistogram::Histogram;
use serde::Serialize;
use time::OffsetDateTime;
use tokio::time::Instant;

use crate::{
    append::{self, Appended, Appender, Schedule},
    cli::{LatencyArgs, Mode, Through},
    conditions,
    contender::{Contender, Running},
    place::Place,
    receive::{Received, Receiver},
    usage::{self, Usage, Watch},
    workload::Workload,
};

/// Longer than any latency that is worth a figure, in microseconds: an hour.
const LONGEST_MICROS: u64 = 3_600_000_000;
/// Time for every task to be waiting for its first event.
const LEAD: Duration = Duration::from_millis(200);
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// Below this share of the offered rate the figures are those of a smaller load.
const REACHED: f64 = 0.99;

/// One contender under the load.
#[derive(Debug, Serialize)]
pub struct Measured {
    pub contender: String,
    pub through: Through,
    pub load_before: Option<f64>,
    /// Events per second, offered and committed.
    pub offered: f64,
    pub achieved: f64,
    pub committed: u64,
    pub failed: u64,
    pub first_failure: Option<String>,
    /// Events that the figures are of: those after the warm-up that arrived.
    pub counted: u64,
    pub missing: u64,
    pub duplicates: u64,
    /// Events whose broker time lies before their append: clocks that disagree. They count as 0.
    pub negative: u64,
    pub append_to_broker: Quantiles,
    pub append_to_receiver: Quantiles,
    pub due_to_broker: Quantiles,
    /// From due time to the begin of the append: the load test's own delay.
    pub late_start: Quantiles,
    /// From the begin of the append to its commit.
    pub append: Quantiles,
    pub usage: Vec<Usage>,
    /// Processors that the load test itself kept busy meanwhile, on average.
    pub generator_cores: Option<f64>,
    /// Why the figures are not to be trusted; empty if they are.
    pub failures: Vec<String>,
}

/// In milliseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Quantiles {
    pub count: u64,
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p95: f64,
    pub p99: f64,
    pub p99_9: f64,
    pub max: f64,
}

/// Starts the contender, offers the load, and takes the times of what arrives.
///
/// # Errors
/// If a process ends, or nothing arrives within the patience.
pub async fn measure(
    contender: &Contender,
    place: &Place,
    args: &LatencyArgs,
    progress: &Progress,
) -> anyhow::Result<Measured> {
    let name = contender.name();
    let step = progress.step(format!("{name}: starting"));
    place.make().await?;
    let through = match contender.mode() {
        Some(Mode::AfterCommit) => Through::Api,
        _ => args.through,
    };
    let mut running = contender.start(place, through).await?;
    let appender = appender(place, args, through, &running).await?;
    prove(&appender, place, &mut running, args.common.stack.patience).await?;
    step.done(&format!("{name}: connected"));

    let step = progress.step(format!("{name}: {} events per second", args.rate));
    let load_before = conditions::load();
    let counted_from = events(args.rate, args.warm_up);
    let total = counted_from + events(args.rate, args.duration);
    let schedule = Schedule::new(args.rate, total, LEAD);
    let receiver = Receiver::start(place.topic.reader()?, schedule, total, counted_from)?;
    let watch = Watch::over(running.identities()?);
    let cpu_before = usage::own_cpu_seconds();
    let appended = append::run(&appender, schedule, counted_from, args.connections).await?;
    let arrived = await_arrivals(&receiver, &appended, &mut running, args.common.stack.patience).await;
    let used = usage::own_cpu_seconds()
        .zip(cpu_before)
        .map(|(after, before)| after - before);
    let usage = watch.finish().await;
    let received = receiver.finish()?;
    arrived?;
    running.stop().await?;
    let seconds = appended.seconds;
    let mut measured = Measured::new(contender, args.rate, total, load_before, usage, appended, received);
    measured.through = through;
    measured.generator_cores = used.map(|used| used / seconds);
    let line = format!("{name}: append → broker p50 {:.1} ms", measured.append_to_broker.p50);
    step.done(&line);
    Ok(measured)
}

async fn appender(place: &Place, args: &LatencyArgs, through: Through, running: &Running) -> anyhow::Result<Appender> {
    match through {
        Through::Table => {
            let total = events(args.rate, args.warm_up + args.duration);
            let workload = Workload::new(total, 1, args.payload_bytes, 1);
            Ok(Appender::table(place.appenders(args.connections).await?, workload))
        }
        Through::Api => Appender::api(running.api.as_deref().context("no API runs")?),
    }
}

/// Appends one event and waits until it stands in the topic: connected, subscribed, warm.
///
/// # Errors
/// If it does not arrive.
pub async fn prove(
    appender: &Appender,
    place: &Place,
    running: &mut Running,
    patience: Duration,
) -> anyhow::Result<()> {
    appender.append_proof().await.context("append the first event")?;
    let reader = place.topic.reader()?;
    let end = Instant::now() + patience;
    while reader.count().await? == 0 {
        running.check()?;
        if Instant::now() > end {
            bail!(
                "the first event did not arrive within {patience:?}\n{}",
                running.log_tails()
            );
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    Ok(())
}

/// Waits until every committed event has arrived, as long as some still do.
async fn await_arrivals(
    receiver: &Receiver,
    appended: &Appended,
    running: &mut Running,
    patience: Duration,
) -> anyhow::Result<()> {
    let mut seen = receiver.distinct();
    let mut moved = Instant::now();
    while receiver.distinct() < appended.committed && !receiver.has_failed() {
        running.check()?;
        if receiver.distinct() > seen {
            seen = receiver.distinct();
            moved = Instant::now();
        }
        if moved.elapsed() > patience {
            // What is missing is counted; nothing at all is a failure of the run.
            if seen == 0 {
                bail!("no event arrived within {patience:?}\n{}", running.log_tails());
            }
            break;
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    Ok(())
}

impl Measured {
    fn new(
        contender: &Contender,
        rate: u64,
        total: u64,
        load_before: Option<f64>,
        usage: Vec<Usage>,
        appended: Appended,
        received: Received,
    ) -> Self {
        let distinct = received.records - received.duplicates;
        let mut measured = Self {
            contender: contender.name(),
            through: Through::Table,
            load_before,
            offered: rate as f64,
            achieved: appended.committed as f64 / appended.seconds,
            committed: appended.committed,
            failed: appended.failed,
            first_failure: appended.first_failure,
            counted: received.append_to_broker.len(),
            missing: appended.committed.saturating_sub(distinct),
            duplicates: received.duplicates,
            negative: received.negative,
            append_to_broker: Quantiles::of(&received.append_to_broker),
            append_to_receiver: Quantiles::of(&received.append_to_receiver),
            due_to_broker: Quantiles::of(&received.due_to_broker),
            late_start: Quantiles::of(&appended.late),
            append: Quantiles::of(&appended.took),
            usage,
            generator_cores: None,
            failures: Vec::new(),
        };
        measured.judge(total);
        measured
    }

    fn judge(&mut self, total: u64) {
        if self.missing > 0 {
            self.failures
                .push(format!("{} committed events did not arrive", self.missing));
        }
        if self.failed > 0 {
            self.failures.push(format!("{} of {total} appends failed", self.failed));
        }
        if self.achieved < self.offered * REACHED {
            let reason = format!(
                "generator limited: {:.0} of {:.0} events per second",
                self.achieved, self.offered
            );
            self.failures.push(reason);
        }
    }
}

impl Quantiles {
    /// Of microseconds.
    pub fn of(micros: &Histogram<u64>) -> Self {
        let at = |quantile: f64| micros.value_at_quantile(quantile) as f64 / 1e3;
        Self {
            count: micros.len(),
            mean: micros.mean() / 1e3,
            p50: at(0.5),
            p90: at(0.9),
            p95: at(0.95),
            p99: at(0.99),
            p99_9: at(0.999),
            max: micros.max() as f64 / 1e3,
        }
    }
}

/// Of microseconds, to three digits.
///
/// # Errors
/// Never, with these bounds.
pub fn new_histogram() -> anyhow::Result<Histogram<u64>> {
    Histogram::new_with_bounds(1, LONGEST_MICROS, 3).context("make a histogram")
}

/// Since 1970.
pub fn micros(time: OffsetDateTime) -> i64 {
    (time.unix_timestamp_nanos() / 1_000) as i64
}

/// Events of this rate within this time.
pub fn events(rate: u64, time: Duration) -> u64 {
    (rate as f64 * time.as_secs_f64()).round() as u64
}
