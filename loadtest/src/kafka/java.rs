use std::{fs, process::Command, time::Duration};

use anyhow::Context;
use devstack::{java::Java as Program, process, progress::Progress, servers::Servers as Programs};
use serde::Serialize;

use super::COMPARED_RATE;
use crate::{cli::KafkaArgs, place::Place};

const DEADLINE: Duration = Duration::from_secs(600);
/// Records of the run without a limit: some ten seconds.
const FASTEST_RECORDS: u64 = 1_500_000;

/// `kafka-producer-perf-test` with `acks=all`, as the broker's makers run it.
#[derive(Debug, Serialize)]
pub struct Java {
    pub fastest: Run,
    /// At [`COMPARED_RATE`].
    pub compared: Run,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    pub achieved: f64,
    pub p50: f64,
    pub p99: f64,
}

/// # Errors
/// If there is no Java machine, or the program fails.
pub async fn measure(args: &KafkaArgs, place: &Place, progress: &Progress) -> anyhow::Result<Java> {
    let step = progress.step("kafka-producer-perf-test");
    let programs = Programs::ensure(&place.log("fetch"), progress).await?;
    let compared_records = COMPARED_RATE * args.step.as_secs().max(1);
    let java = Java {
        fastest: run(args, place, &programs, FASTEST_RECORDS, -1).await?,
        compared: run(args, place, &programs, compared_records, COMPARED_RATE.cast_signed()).await?,
    };
    step.done(&format!("kafka-producer-perf-test: {:.0}/s", java.fastest.achieved));
    Ok(java)
}

async fn run(args: &KafkaArgs, place: &Place, programs: &Programs, records: u64, rate: i64) -> anyhow::Result<Run> {
    let mut command = Command::new(Program::find()?.path);
    command
        .args(["-Xmx512m", "-XX:-UsePerfData", "-cp"])
        .arg(programs.kafka_classpath())
        .args([
            "org.apache.kafka.tools.ProducerPerformance",
            "--topic",
            place.topic.name(),
        ])
        .args([
            "--num-records",
            &records.to_string(),
            "--record-size",
            &args.bytes.to_string(),
        ])
        .args(["--throughput", &rate.to_string(), "--producer-props"])
        .arg(format!("bootstrap.servers={}", place.brokers))
        .args(["acks=all", "linger.ms=5", "batch.size=131072"]);
    let log = place.log(&format!("producer-perf-{rate}"));
    process::run("kafka-producer-perf-test", command, &log, DEADLINE).await?;
    let text = fs::read_to_string(&log).context("read what it says")?;
    Run::read(&text).context("kafka-producer-perf-test says no figures")
}

impl Run {
    /// From the last line: `1500000 records sent, 168000.0 records/sec (…), 7.1 ms avg latency, 90 ms max latency, 3 ms 50th, …`.
    fn read(text: &str) -> Option<Self> {
        let line = text.lines().rev().find(|line| line.contains(" ms 99th"))?;
        let figure = |behind: &str| -> Option<f64> {
            let before = line.split(behind).next()?;
            before.split([' ', ',']).rfind(|word| !word.is_empty())?.parse().ok()
        };
        Some(Self {
            achieved: figure(" records/sec")?,
            p50: figure(" ms 50th")?,
            p99: figure(" ms 99th")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_last_line_is_read() {
        let text = "250 records sent, 50.0 records/sec (0.02 MB/sec), 9.0 ms avg latency, 9.0 ms max latency.\n\
                    1500000 records sent, 168123.5 records/sec (82.09 MB/sec), 7.10 ms avg latency, 90.00 ms max latency, \
                    3 ms 50th, 20 ms 95th, 43 ms 99th, 80 ms 99.9th.\n";
        let run = Run {
            achieved: 168_123.5,
            p50: 3.0,
            p99: 43.0,
        };
        assert_eq!(Run::read(text), Some(run));
        assert_eq!(Run::read("nothing"), None);
    }
}
