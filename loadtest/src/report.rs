use std::{
    fmt::Write,
    fs, iter,
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use serde::Serialize;
use time::{OffsetDateTime, macros::format_description};

use crate::{
    complete::{Completed, pgbench::Pgbench},
    conditions::Conditions,
    consumer::Consumed,
    cost::{self, Cost},
    drain::Drained,
    failure_rate::Failed,
    kafka::{Carried, Step},
    latency::{Measured, Quantiles},
    usage::Usage,
};

/// The whole result: what is written to the JSON file. Fields may be added, never changed.
#[derive(Debug, Serialize)]
pub struct Report<T> {
    /// `drain`, `latency`, `complete`, `outbox`, `soak`, `consumer`, `failure-rate`, `kafka` or `cost`.
    pub kind: &'static str,
    pub conditions: Conditions,
    pub results: Vec<T>,
    /// Ours divided by the peer's, of the same run.
    pub ratios: Vec<Ratio>,
}

#[derive(Debug, Serialize)]
pub struct Ratio {
    pub contender: String,
    pub peer: String,
    pub figure: &'static str,
    pub ratio: f64,
}

impl<T: Serialize> Report<T> {
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        }
        let mut text = serde_json::to_string_pretty(self).context("write the result as JSON")?;
        text.push('\n');
        fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }
}

/// `drain-20261122T101500Z.json` in the folder, which is `target/loadtest` for a program in `target/release` if none is given.
///
/// # Errors
/// If this program's own path is not known.
pub fn default_path(kind: &str, folder: Option<&Path>) -> anyhow::Result<PathBuf> {
    let folder = match folder {
        Some(folder) => folder.to_owned(),
        None => {
            let program = std::env::current_exe().context("find this program")?;
            let target = program.parent().and_then(Path::parent);
            target.context("find the build's target folder")?.join("loadtest")
        }
    };
    let format = format_description!("[year][month][day]T[hour][minute][second]Z");
    let time = OffsetDateTime::now_utc().format(format).context("write the time")?;
    Ok(folder.join(format!("{kind}-{time}.json")))
}

/// Each contender's rate over each peer's.
pub fn drain_ratios(results: &[(bool, Drained)]) -> Vec<Ratio> {
    let mut ratios = Vec::new();
    for (is_peer, ours) in results {
        if *is_peer {
            continue;
        }
        if let (Some(ratio), Some(_)) = (ours.ratio_to_pg_recvlogical, &ours.pg_recvlogical) {
            ratios.push(Ratio {
                contender: ours.contender.clone(),
                peer: "pg_recvlogical".to_owned(),
                figure: "rows per second",
                ratio,
            });
        }
        for (_, peer) in results.iter().filter(|(is_peer, _)| *is_peer) {
            ratios.push(Ratio {
                contender: ours.contender.clone(),
                peer: peer.contender.clone(),
                figure: "rows per second",
                ratio: ours.rows_per_second / peer.rows_per_second,
            });
        }
    }
    ratios
}

/// Each contender's latencies over each peer's.
pub fn latency_ratios(results: &[(bool, Measured)]) -> Vec<Ratio> {
    let mut ratios = Vec::new();
    for (_, ours) in results.iter().filter(|(is_peer, _)| !is_peer) {
        for (_, peer) in results.iter().filter(|(is_peer, _)| *is_peer) {
            let (mine, theirs) = (&ours.append_to_broker, &peer.append_to_broker);
            for (figure, ratio) in [
                ("append → broker p50", mine.p50 / theirs.p50),
                ("append → broker p99", mine.p99 / theirs.p99),
            ] {
                let (contender, peer) = (ours.contender.clone(), peer.contender.clone());
                ratios.push(Ratio {
                    contender,
                    peer,
                    figure,
                    ratio,
                });
            }
        }
    }
    ratios
}

/// Completions per second over pgbench's transactions per second.
pub fn complete_ratios(results: &[Completed], peer: Option<&Pgbench>) -> Vec<Ratio> {
    let ratio = |ours: &Completed, peer: &Pgbench| Ratio {
        contender: ours.contender.clone(),
        peer: format!("pgbench x {}", peer.clients),
        figure: "transactions per second",
        ratio: ours.achieved / peer.transactions_per_second,
    };
    let peers = peer.into_iter();
    peers
        .flat_map(|peer| results.iter().map(move |ours| ratio(ours, peer)))
        .collect()
}

/// An earlier result of `complete`, by contender: completions per second and p99 of the response.
pub struct Baseline {
    figures: Vec<(String, f64, f64)>,
}

impl Baseline {
    /// # Errors
    /// If the file is not the result of `complete`.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let read = || -> anyhow::Result<Vec<(String, f64, f64)>> {
            let earlier: serde_json::Value = serde_json::from_slice(&fs::read(path)?)?;
            ensure!(
                earlier["kind"] == "complete",
                "it is not a result of `loadtest complete`"
            );
            let results = earlier["results"].as_array().context("it has no results")?;
            let figures = results.iter().filter_map(|result| {
                let name = result["contender"].as_str()?.to_owned();
                Some((name, result["achieved"].as_f64()?, result["response"]["p99"].as_f64()?))
            });
            Ok(figures.collect())
        };
        let figures = read().with_context(|| format!("--baseline {}", path.display()))?;
        Ok(Self { figures })
    }

    fn text(&self, results: &[Completed]) -> String {
        let mut text = String::new();
        for result in results {
            let earlier = self.figures.iter().find(|(name, ..)| *name == result.contender);
            let line = match earlier {
                None => format!("{}: not in the baseline", result.contender),
                Some((name, rate, p99)) => format!(
                    "{name}: {:+.1} % completions per second, {:+.1} % p99, against the baseline; one run each: not enough to tell",
                    (result.achieved / rate - 1.0) * 100.0,
                    (result.response.p99 / p99 - 1.0) * 100.0
                ),
            };
            // A String takes everything that is written to it.
            writeln!(text, "{line}").ok();
        }
        text
    }
}

/// For people: verdict, tables, ratios, conditions.
pub fn complete_text(report: &Report<Completed>, peer: Option<&Pgbench>, baseline: Option<&Baseline>) -> String {
    let load = table(
        &[
            "contender",
            "offered/s",
            "achieved/s",
            "answered",
            "failed",
            "dropped",
            "peak memory",
            "cpu s",
            "generator cores",
        ],
        report.results.iter().map(|result| {
            vec![
                result.contender.clone(),
                result
                    .offered
                    .map_or("closed loop".to_owned(), |offered| count(offered as f64)),
                count(result.achieved),
                count(result.answered as f64),
                result.failed.to_string(),
                result.dropped.to_string(),
                memory(&result.usage),
                cpu(&result.usage),
                result
                    .generator_cores
                    .map_or("unknown".to_owned(), |cores| format!("{cores:.2}")),
            ]
        }),
    );
    let mut rows = Vec::new();
    for result in &report.results {
        let mut clocks = vec![
            ("response", &result.response),
            ("service", &result.service),
            ("late start", &result.late_start),
        ];
        clocks.extend(
            result
                .broker
                .as_ref()
                .map(|broker| ("append → broker", &broker.append_to_broker)),
        );
        clocks.extend(
            result
                .commit_to_applied
                .as_ref()
                .map(|times| ("commit → applied", times)),
        );
        for (number, (clock, times)) in clocks.into_iter().enumerate() {
            let name = if number == 0 {
                result.contender.clone()
            } else {
                String::new()
            };
            let mut row = vec![name, clock.to_owned()];
            let figures = [times.p50, times.p90, times.p95, times.p99, times.p99_9, times.max];
            row.extend(figures.map(|figure| format!("{figure:.1}")));
            row.push(times.count.to_string());
            rows.push(row);
        }
    }
    let head = [
        "contender",
        "clock, ms",
        "p50",
        "p90",
        "p95",
        "p99",
        "p99.9",
        "max",
        "count",
    ];
    let times = table(&head, rows.into_iter());
    let mut accounts = String::new();
    for result in report.results.iter().filter(|result| !result.checks.is_empty()) {
        let wrong: i64 = result.checks.iter().map(|(_, rows)| rows).sum();
        let line = format!(
            "{}: {} events, {} checks of every row, {wrong} rows that must not be; {} records in the topic, {} of them twice; drained {:.1} s after the last answer",
            result.contender,
            count(result.events as f64),
            result.checks.len(),
            result.broker.as_ref().map_or(0, |broker| broker.records),
            result.broker.as_ref().map_or(0, |broker| broker.duplicates),
            result.drain_seconds.unwrap_or_default()
        );
        writeln!(accounts, "{line}").ok();
        if result.kills > 0 {
            writeln!(
                accounts,
                "{}: a process was killed {} times meanwhile",
                result.contender, result.kills
            )
            .ok();
        }
    }
    let drift: String = report
        .results
        .iter()
        .filter(|_| report.kind == "soak")
        .map(drift)
        .collect();
    let peer = peer.map_or(String::new(), |peer| {
        format!(
            "{} with {} clients: {} transactions per second, {:.1} ms on average\n",
            peer.version,
            peer.clients,
            count(peer.transactions_per_second),
            peer.latency_ms
        )
    });
    let failures = failures(
        report
            .results
            .iter()
            .map(|result| (&result.contender, &result.failures)),
    );
    format!(
        "{load}\n{times}\n{drift}{accounts}{peer}{}{}{failures}{}",
        ratios(&report.ratios),
        baseline.map_or(String::new(), |baseline| baseline.text(&report.results)),
        conditions(&report.conditions)
    )
}

/// What became of latency and memory in the course of the load.
fn drift(result: &Completed) -> String {
    let mut head = vec!["seconds", "response p50", "p99 ms", "commit → applied p50", "p99 ms"];
    head.extend(result.usage.iter().map(|usage| usage.process.as_str()));
    let rows = result.stretches.iter().map(|stretch| {
        let applied = |of: fn(&Quantiles) -> f64| {
            let applied = stretch.applied.as_ref().filter(|times| times.count > 0);
            applied.map_or("-".to_owned(), |times| format!("{:.1}", of(times)))
        };
        let mut row = vec![
            format!("{} to {}", stretch.from, stretch.to),
            format!("{:.1}", stretch.response.p50),
            format!("{:.1}", stretch.response.p99),
            applied(|times| times.p50),
            applied(|times| times.p99),
        ];
        row.extend(result.usage.iter().map(|usage| {
            let known = stretch
                .resident_kib
                .iter()
                .find(|(process, _)| *process == usage.process);
            known.map_or("-".to_owned(), |(_, kib)| format!("{:.1} MiB", *kib as f64 / 1024.0))
        }));
        row
    });
    format!("{}\n", table(&head, rows))
}

/// For people: table, verdict, conditions.
pub fn consumer_text(report: &Report<Consumed>) -> String {
    let head = [
        "contender",
        "events",
        "events/s",
        "fastest second",
        "seconds",
        "peak memory",
        "cpu s",
        "cpu µs/event",
    ];
    let rows = report.results.iter().map(|result| {
        let cpu_seconds: Option<f64> = result.usage.iter().map(|usage| usage.cpu_seconds).sum();
        vec![
            result.contender.clone(),
            count(result.events as f64),
            count(result.events_per_second),
            count(result.fastest_second as f64),
            format!("{:.1}", result.seconds),
            memory(&result.usage),
            cpu(&result.usage),
            cpu_seconds.map_or("unknown".to_owned(), |seconds| {
                format!("{:.1}", seconds * 1e6 / result.events as f64)
            }),
        ]
    });
    let failures = failures(
        report
            .results
            .iter()
            .map(|result| (&result.contender, &result.failures)),
    );
    format!(
        "{}\n{}{failures}{}",
        table(&head, rows),
        ratios(&report.ratios),
        conditions(&report.conditions)
    )
}

/// Each consumer's rate over each peer's.
pub fn consumer_ratios(results: &[(bool, Consumed)]) -> Vec<Ratio> {
    let ours = results.iter().filter(|(peer, _)| !peer);
    ours.flat_map(|(_, ours)| {
        let peers = results.iter().filter(|(peer, _)| *peer);
        peers.map(|(_, peer)| Ratio {
            contender: ours.contender.clone(),
            peer: peer.contender.clone(),
            figure: "events per second",
            ratio: ours.events_per_second / peer.events_per_second,
        })
    })
    .collect()
}

/// Our producer over the broker's own load generator.
pub fn kafka_ratios(carried: &Carried) -> Vec<Ratio> {
    let Some(java) = &carried.java else { return Vec::new() };
    let ratio = |figure, ratio| Ratio {
        contender: "librdkafka".to_owned(),
        peer: "kafka-producer-perf-test".to_owned(),
        figure,
        ratio,
    };
    vec![
        ratio("records per second", carried.fastest.achieved / java.fastest.achieved),
        ratio("p99 at 50,000/s", carried.compared.acknowledged.p99 / java.compared.p99),
    ]
}

/// For people: table, knee, peer, conditions.
pub fn kafka_text(report: &Report<Carried>, bytes: u32) -> String {
    let mut text = String::new();
    for carried in &report.results {
        let steps = carried.steps.iter().chain([&carried.compared, &carried.fastest]);
        let cells = |step: &Step| {
            let times = &step.acknowledged;
            let received = |of: fn(&Quantiles) -> f64| {
                step.received
                    .as_ref()
                    .map_or("-".to_owned(), |times| format!("{:.1}", of(times)))
            };
            vec![
                step.offered
                    .map_or("unlimited".to_owned(), |offered| count(offered as f64)),
                count(step.achieved),
                step.failed.to_string(),
                format!("{:.1}", times.p50),
                format!("{:.1}", times.p99),
                format!("{:.1}", times.p99_9),
                format!("{:.1}", times.max),
                received(|times| times.p50),
                received(|times| times.p99),
            ]
        };
        let head = [
            "offered/s",
            "achieved/s",
            "failed",
            "p50 ms",
            "p99 ms",
            "p99.9 ms",
            "max ms",
            "received p50",
            "received p99",
        ];
        text.push_str(&table(&head, steps.map(cells)));
        text.push('\n');
        text.push_str(&crate::kafka::sizing(carried, bytes));
        if let Some(java) = &carried.java {
            let line = format!(
                "kafka-producer-perf-test: {}/s; at 50,000/s p50 {:.0} ms, p99 {:.0} ms",
                count(java.fastest.achieved),
                java.compared.p50,
                java.compared.p99
            );
            // A String takes everything that is written to it.
            writeln!(text, "{line}").ok();
        }
        for failure in &carried.failures {
            writeln!(text, "NOT MET: {failure}").ok();
        }
    }
    format!("{text}{}{}", ratios(&report.ratios), conditions(&report.conditions))
}

/// For people: table, verdict, conditions.
pub fn cost_text(report: &Report<Cost>) -> String {
    let head = [
        "stage",
        "events",
        "keys",
        "instances",
        "cpu µs/event",
        "from the median",
        "wall µs/event",
        "peak memory of one",
    ];
    let known = |value: Option<String>| value.unwrap_or_else(|| "unknown".to_owned());
    let rows = iter::zip(&report.results, cost::deviations(&report.results)).map(|(cost, deviation)| {
        vec![
            cost.point.stage.name().to_owned(),
            count(cost.point.events as f64),
            count(cost.point.keys as f64),
            cost.point.instances.to_string(),
            known(cost.cpu_micros.map(|micros| format!("{micros:.1}"))),
            known(deviation.map(|deviation| format!("{:+.0} %", deviation * 100.0))),
            format!("{:.1}", cost.wall_micros),
            known(cost.peak_kib.map(|kib| format!("{:.1} MiB", kib as f64 / 1024.0))),
        ]
    });
    let names: Vec<String> = report.results.iter().map(|cost| cost.point.to_string()).collect();
    let failures = failures(iter::zip(&names, report.results.iter().map(|cost| &cost.failures)));
    format!("{}\n{failures}{}", table(&head, rows), conditions(&report.conditions))
}

/// For people: table, verdict, conditions.
pub fn failure_text(report: &Report<Failed>) -> String {
    let head = [
        "path",
        "calls",
        "failed",
        "failed %",
        "p50 ms",
        "p99 ms",
        "committed",
        "applied",
        "kept",
        "lost",
    ];
    let rows = report.results.iter().map(|result| {
        vec![
            result.contender.clone(),
            result.calls.to_string(),
            result.failed.to_string(),
            format!("{:.1}", result.failed as f64 * 100.0 / result.calls as f64),
            format!("{:.1}", result.response.p50),
            format!("{:.1}", result.response.p99),
            result.committed.to_string(),
            result.applied.to_string(),
            result.kept.to_string(),
            result.lost.to_string(),
        ]
    });
    let failures = failures(
        report
            .results
            .iter()
            .map(|result| (&result.contender, &result.failures)),
    );
    format!(
        "{}\nfailed: calls without success; kept: dead letters and what waits behind them, to be redriven; lost: neither\n{failures}{}",
        table(&head, rows),
        conditions(&report.conditions)
    )
}

/// For people: verdict, table, ratios, conditions.
pub fn drain_text(report: &Report<&Drained>) -> String {
    let head = [
        "contender",
        "rows/s",
        "fastest second",
        "seconds",
        "to first",
        "to marks",
        "duplicates",
        "missing",
        "peak memory",
        "cpu s",
        "pg_recvlogical rows/s",
    ];
    let rows = report.results.iter().map(|drained| {
        vec![
            drained.contender.clone(),
            count(drained.rows_per_second),
            count(drained.fastest_second as f64),
            format!("{:.2}", drained.seconds),
            format!("{:.2} s", drained.seconds_to_first),
            drained
                .seconds_to_marks
                .map_or("-".to_owned(), |seconds| format!("{seconds:.1} s")),
            drained.account.duplicates.to_string(),
            drained.account.missing.to_string(),
            memory(&drained.usage),
            cpu(&drained.usage),
            drained
                .pg_recvlogical
                .as_ref()
                .map_or("-".to_owned(), |read| count(read.rows_per_second)),
        ]
    });
    let failures = failures(
        report
            .results
            .iter()
            .map(|drained| (&drained.contender, &drained.failures)),
    );
    let table = table(&head, rows);
    format!(
        "{table}\n{}{failures}{}",
        ratios(&report.ratios),
        conditions(&report.conditions)
    )
}

/// For people: verdict, table, ratios, conditions.
pub fn latency_text(report: &Report<&Measured>) -> String {
    let head = [
        "contender",
        "clock, ms",
        "p50",
        "p95",
        "p99",
        "p99.9",
        "max",
        "mean",
        "events",
    ];
    let mut rows = Vec::new();
    for measured in &report.results {
        let clocks = [
            ("append → broker", &measured.append_to_broker),
            ("append → received", &measured.append_to_receiver),
            ("due → broker", &measured.due_to_broker),
            ("append → committed", &measured.append),
            ("late start", &measured.late_start),
        ];
        for (number, (clock, times)) in clocks.into_iter().enumerate() {
            let name = if number == 0 {
                measured.contender.clone()
            } else {
                String::new()
            };
            let mut row = vec![name, clock.to_owned()];
            let figures = [times.p50, times.p95, times.p99, times.p99_9, times.max, times.mean];
            row.extend(figures.map(|figure| format!("{figure:.1}")));
            row.push(times.count.to_string());
            rows.push(row);
        }
    }
    let load = table(
        &[
            "contender",
            "through",
            "offered/s",
            "achieved/s",
            "missing",
            "duplicates",
            "peak memory",
            "cpu s",
            "generator cores",
        ],
        report.results.iter().map(|measured| {
            vec![
                measured.contender.clone(),
                format!("{:?}", measured.through).to_lowercase(),
                count(measured.offered),
                count(measured.achieved),
                measured.missing.to_string(),
                measured.duplicates.to_string(),
                memory(&measured.usage),
                cpu(&measured.usage),
                measured
                    .generator_cores
                    .map_or("unknown".to_owned(), |cores| format!("{cores:.2}")),
            ]
        }),
    );
    let failures = failures(
        report
            .results
            .iter()
            .map(|measured| (&measured.contender, &measured.failures)),
    );
    let times = table(&head, rows.into_iter());
    format!(
        "{times}\n{load}\n{}{failures}{}",
        ratios(&report.ratios),
        conditions(&report.conditions)
    )
}

/// Columns as wide as their widest cell; the first to the left, the others to the right.
fn table(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut lines = vec![head.iter().map(|cell| (*cell).to_owned()).collect::<Vec<_>>()];
    lines.extend(rows);
    let width = |column: usize| {
        lines
            .iter()
            .map(|line| line[column].chars().count())
            .max()
            .unwrap_or_default()
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut text = String::new();
    for line in &lines {
        for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
            let gap = " ".repeat(width - cell.chars().count());
            match column {
                0 => text.extend([cell.as_str(), &gap]),
                _ => text.extend(["  ", &gap, cell.as_str()]),
            }
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

fn ratios(ratios: &[Ratio]) -> String {
    let mut text = String::new();
    for Ratio {
        contender,
        peer,
        figure,
        ratio,
    } in ratios
    {
        // A String takes everything that is written to it.
        writeln!(text, "{contender} / {peer}, {figure}: {ratio:.2}").ok();
    }
    text
}

fn failures<'a>(results: impl Iterator<Item = (&'a String, &'a Vec<String>)>) -> String {
    let mut text = String::new();
    for (contender, failures) in results {
        for failure in failures {
            writeln!(text, "NOT MET {contender}: {failure}").ok();
        }
    }
    text
}

fn conditions(conditions: &Conditions) -> String {
    let known = |value: Option<String>| value.unwrap_or_else(|| "unknown".to_owned());
    let postgres: Vec<String> = conditions
        .postgres
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    let mut text = format!(
        "\n{} cores, {} GiB, {}; {} build; {} servers; everything on one machine\nPostgreSQL: {}\ntopic: {}\n",
        known(conditions.cores.map(|cores| cores.to_string())),
        known(conditions.memory_gib.map(|memory| memory.to_string())),
        conditions.system,
        conditions.build,
        conditions.servers,
        postgres.join(", "),
        conditions.topic,
    );
    if conditions.build == "debug" {
        text.push_str("A debug build: its figures say nothing about the product.\n");
    }
    text
}

/// Of all processes of the contender; unknown if one of them is.
fn memory(usage: &[Usage]) -> String {
    let total: Option<u64> = usage.iter().map(|usage| usage.peak_kib).sum();
    total.map_or("unknown".to_owned(), |kib| format!("{:.1} MiB", kib as f64 / 1024.0))
}

fn cpu(usage: &[Usage]) -> String {
    let total: Option<f64> = usage.iter().map(|usage| usage.cpu_seconds).sum();
    total.map_or("unknown".to_owned(), |seconds| format!("{seconds:.1}"))
}

/// With a comma between thousands.
fn count(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_separated() {
        assert_eq!(
            [0.0, 999.4, 1_000.0, 1_234_567.0].map(count),
            ["0", "999", "1,000", "1,234,567"]
        );
    }

    #[test]
    fn columns_are_aligned() {
        let rows = [
            vec!["relay".to_owned(), "5".to_owned()],
            vec!["x".to_owned(), "10,000".to_owned()],
        ];
        assert_eq!(
            table(&["name", "rows"], rows.into_iter()),
            "name     rows\nrelay       5\nx      10,000\n"
        );
    }
}
