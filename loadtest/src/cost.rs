use std::{fmt, iter};

use anyhow::ensure;
use devstack::progress::Progress;
use serde::Serialize;

use crate::{
    cli::{CommonArgs, Consumer, ConsumerArgs, CostArgs, DrainArgs, Lifecycle, Mode, RelayKind, Stage},
    consumer::{self, Consumed, same_work},
    contender::Contender,
    drain::{self, Drained},
    place::Place,
    servers::Servers,
    usage::Usage,
    workload::SMALLEST_PAYLOAD,
};

/// As many as `drain` and `consumer` have by default.
const RELAY_EVENTS_PER_KEY: u64 = 10;
const ENGINE_EVENTS_PER_KEY: u64 = 5;
const ROWS_PER_TRANSACTION: u64 = 100;
const THREADS: u32 = 6;
/// What a process takes to start is measured with so few events, so often.
const FEW: u64 = 200;
const STARTS: usize = 3;

/// A place on the curve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Point {
    pub stage: Stage,
    pub events: u64,
    /// Of the events; commerce's each have their own.
    pub keys: u64,
    pub instances: u32,
}

/// What an event costs there.
#[derive(Debug, Serialize)]
pub struct Cost {
    pub point: Point,
    /// Processor time of the stage's own processes, in µs for each event, without what they take to start.
    pub cpu_micros: Option<f64>,
    /// Time from the first to the last event, in µs for each.
    pub wall_micros: f64,
    /// Largest resident memory of any of them, in KiB.
    pub peak_kib: Option<u64>,
    /// Why the figures are not to be trusted; empty if they are.
    pub failures: Vec<String>,
}

impl fmt::Display for Point {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            stage,
            events,
            keys,
            instances,
        } = self;
        write!(
            formatter,
            "{}, {events} events, {keys} keys, {instances} instances",
            stage.name()
        )
    }
}

impl Stage {
    /// Backlogs of each size, of the middle size with each number of keys, and with each number of instances; each point once.
    fn points(self, args: &CostArgs) -> Vec<Point> {
        let mut sizes = args.events.clone();
        sizes.sort_unstable();
        let middle = sizes[sizes.len() / 2];
        let usual_keys = |events: u64| match self {
            Self::Relay => events.div_ceil(RELAY_EVENTS_PER_KEY),
            Self::Engine => events.div_ceil(ENGINE_EVENTS_PER_KEY),
            Self::Commerce => events,
        };
        let point = |events, keys, instances| Point {
            stage: self,
            events,
            keys,
            instances,
        };
        let mut points: Vec<Point> = sizes
            .iter()
            .map(|events| point(*events, usual_keys(*events), 1))
            .collect();
        if self != Self::Commerce {
            points.extend(args.keys.iter().map(|keys| point(middle, (*keys).min(middle), 1)));
        } else {
            points.extend(
                args.instances
                    .iter()
                    .map(|instances| point(middle, usual_keys(middle), *instances)),
            );
        }
        let mut once: Vec<Point> = Vec::new();
        for point in points {
            if !once.contains(&point) {
                once.push(point);
            }
        }
        once
    }
}

/// Every point of every stage, one after the other. Puts each place into `made`, and takes it out once it is removed.
///
/// # Errors
/// If a process ends, a server does not answer, or nothing moves within the patience.
pub async fn measure(
    args: &CostArgs,
    servers: &Servers,
    made: &mut Option<Place>,
    progress: &Progress,
) -> anyhow::Result<Vec<Cost>> {
    let mut costs = Vec::new();
    for stage in &args.stage {
        let points = stage.points(args);
        // To start takes as long with few events as with many.
        let few = Point {
            events: FEW,
            keys: FEW / 10,
            instances: 1,
            stage: *stage,
        };
        let mut starts = Vec::new();
        for _ in 0..STARTS {
            let start = run(few, args, servers, made, progress).await?;
            ensure!(start.failures.is_empty(), "{few}: {}", start.failures.join("; "));
            starts.extend(cpu_seconds(&start.usage));
        }
        let start = median(starts);
        for point in points {
            let Run {
                events,
                wall_seconds,
                usage,
                failures,
            } = run(point, args, servers, made, progress).await?;
            let instances = f64::from(point.instances);
            let cpu = cpu_seconds(&usage).zip(start);
            let beyond_start = events as f64 - FEW as f64 * instances;
            costs.push(Cost {
                point,
                cpu_micros: cpu.map(|(cpu, start)| (cpu - start * instances) * 1e6 / beyond_start),
                wall_micros: wall_seconds * 1e6 / events as f64,
                peak_kib: usage.iter().filter_map(|usage| usage.peak_kib).max(),
                failures,
            });
        }
    }
    judge(&mut costs, args);
    Ok(costs)
}

/// A cost that differs from the others of its stage in either direction, one that nobody knows, and a process that is too large.
fn judge(costs: &mut [Cost], args: &CostArgs) {
    let deviations = deviations(costs);
    for (cost, deviation) in iter::zip(costs, deviations) {
        let failures = &mut cost.failures;
        match deviation.map(|deviation| deviation * 100.0) {
            Some(percent) if percent.abs() <= f64::from(args.within) => {}
            Some(percent) => failures.push(format!(
                "its cost differs from the median by {percent:+.0} %, allowed are {} %",
                args.within
            )),
            None => failures.push("its processor time is not known".to_owned()),
        }
        match cost.peak_kib.map(|kib| kib as f64 / 1024.0) {
            Some(mib) if mib <= f64::from(args.memory) => {}
            Some(mib) => failures.push(format!("a process took {mib:.1} MiB, allowed are {}", args.memory)),
            None => failures.push("its memory is not known".to_owned()),
        }
    }
}

/// What is left of a measurement of `drain` or `consumer`.
struct Run {
    events: u64,
    wall_seconds: f64,
    usage: Vec<Usage>,
    failures: Vec<String>,
}

impl From<Drained> for Run {
    fn from(drained: Drained) -> Self {
        Self {
            events: drained.account.distinct,
            wall_seconds: drained.seconds,
            usage: drained.usage,
            failures: drained.failures,
        }
    }
}

impl From<Consumed> for Run {
    fn from(consumed: Consumed) -> Self {
        Self {
            events: consumed.events.cast_unsigned(),
            wall_seconds: consumed.seconds,
            usage: consumed.usage,
            failures: consumed.failures,
        }
    }
}

async fn run(
    point: Point,
    args: &CostArgs,
    servers: &Servers,
    made: &mut Option<Place>,
    progress: &Progress,
) -> anyhow::Result<Run> {
    let place = made.insert(Place::new(servers, args.stack.partitions)?);
    let consumer_args = |consumer| ConsumerArgs {
        events: point.events,
        events_per_key: point.events.div_ceil(point.keys),
        consumer: vec![consumer],
        threads: THREADS,
        spring_libs: None,
        instances: point.instances,
        skew: 1.0,
        stack: args.stack.clone(),
    };
    let run = match point.stage {
        Stage::Relay => {
            let args = DrainArgs {
                rows: point.events,
                payload_bytes: SMALLEST_PAYLOAD,
                events_per_key: point.events.div_ceil(point.keys),
                rows_per_transaction: ROWS_PER_TRANSACTION,
                common: CommonArgs {
                    relay: vec![RelayKind {
                        mode: Mode::Wal,
                        lifecycle: Lifecycle::Off,
                    }],
                    peer: Vec::new(),
                    debezium_libs: None,
                    stack: args.stack.clone(),
                },
            };
            let contenders = Contender::all(&args.common)?;
            drain::measure(&contenders[0], place, None, &args, progress)
                .await?
                .into()
        }
        Stage::Engine => {
            let args = consumer_args(Consumer::Engine);
            same_work::prepare(&args, place, progress).await?;
            same_work::measure(Consumer::Engine, &args, place, progress)
                .await?
                .into()
        }
        Stage::Commerce => consumer::measure(&consumer_args(Consumer::Commerce), place, progress)
            .await?
            .into(),
    };
    if let Some(place) = made.take() {
        place.remove().await?;
    }
    Ok(run)
}

fn cpu_seconds(usage: &[Usage]) -> Option<f64> {
    usage.iter().map(|usage| usage.cpu_seconds).sum()
}

/// By how much each cost differs from the median of its stage, as a share of it; `None` where it is not known.
pub fn deviations(costs: &[Cost]) -> Vec<Option<f64>> {
    let of_stage = |stage: Stage| {
        let of_stage = costs.iter().filter(|cost| cost.point.stage == stage);
        median(of_stage.filter_map(|cost| cost.cpu_micros).collect())
    };
    let deviation = |cost: &Cost| Some(cost.cpu_micros? / of_stage(cost.point.stage)? - 1.0);
    costs.iter().map(deviation).collect()
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn args(arguments: &[&str]) -> CostArgs {
        let arguments = [&["loadtest", "cost"], arguments].concat();
        match Cli::try_parse_from(arguments).unwrap().command {
            Command::Cost(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn each_point_is_measured_once() {
        let args = args(&[
            "--events",
            "100000,1000",
            "--keys",
            "1,10000,500000",
            "--instances",
            "1,2",
        ]);
        let points = |stage: Stage| -> Vec<(u64, u64, u32)> {
            let points = stage.points(&args).into_iter();
            points
                .map(|point| (point.events, point.keys, point.instances))
                .collect()
        };
        // 10,000 keys are what a backlog of 100,000 has anyway, and none has more keys than events.
        let relay = [
            (1_000, 100, 1),
            (100_000, 10_000, 1),
            (100_000, 1, 1),
            (100_000, 100_000, 1),
        ];
        assert_eq!(points(Stage::Relay), relay);
        let commerce = [(1_000, 1_000, 1), (100_000, 100_000, 1), (100_000, 100_000, 2)];
        assert_eq!(points(Stage::Commerce), commerce);
    }

    #[test]
    fn a_cost_is_compared_with_the_median_of_its_stage() {
        let cost = |stage, cpu_micros| Cost {
            point: Point {
                stage,
                events: 1,
                keys: 1,
                instances: 1,
            },
            cpu_micros,
            wall_micros: 1.0,
            peak_kib: None,
            failures: Vec::new(),
        };
        let costs = [
            cost(Stage::Relay, Some(10.0)),
            cost(Stage::Relay, Some(8.0)),
            cost(Stage::Relay, Some(15.0)),
            cost(Stage::Engine, Some(99.0)),
            cost(Stage::Engine, None),
        ];
        let deviations: Vec<Option<i64>> = deviations(&costs)
            .into_iter()
            .map(|deviation| deviation.map(|deviation| (deviation * 100.0).round() as i64))
            .collect();
        assert_eq!(deviations, [Some(0), Some(-20), Some(50), Some(0), None]);
    }
}
