use std::{
    fmt::Write,
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;
use serde::Serialize;
use time::{OffsetDateTime, macros::format_description};

use crate::{conditions::Conditions, drain::Drained, latency::Measured, usage::Usage};

/// The whole result: what is written to the JSON file. Fields may be added, never changed.
#[derive(Debug, Serialize)]
pub struct Report<T> {
    /// `drain` or `latency`.
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

/// `target/loadtest/drain-20261122T101500Z.json` for a program in `target/release`.
///
/// # Errors
/// If this program's own path is not known.
pub fn default_path(kind: &str) -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe().context("find this program")?;
    let target = program
        .parent()
        .and_then(Path::parent)
        .context("find the build's target folder")?;
    let format = format_description!("[year][month][day]T[hour][minute][second]Z");
    let time = OffsetDateTime::now_utc().format(format).context("write the time")?;
    Ok(target.join("loadtest").join(format!("{kind}-{time}.json")))
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
