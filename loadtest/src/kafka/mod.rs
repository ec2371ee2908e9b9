use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use devstack::progress::Progress;
use hdrhistogram::Histogram;
use rdkafka::{
    ClientConfig, ClientContext, Message,
    error::KafkaError,
    message::DeliveryResult,
    producer::{BaseRecord, Producer, ProducerContext, ThreadedProducer},
    types::RDKafkaErrorCode,
};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::{cli::KafkaArgs, conditions, latency::Quantiles, load::histogram, place::Place, topic::Topic};

/// The peer: the broker's own load generator.
pub mod java;

/// The rate at which both producers' latencies are compared.
pub const COMPARED_RATE: u64 = 50_000;
/// Each step is that much more than the last.
const RISE: [u64; 3] = [1, 2, 5];
/// Below this share of the offered rate a step is not carried.
const REACHED: f64 = 0.98;
const FLUSH: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);
/// Of the schedule: what is due within it goes in one go.
const TURN: Duration = Duration::from_micros(500);

/// What the broker and this machine carry.
#[derive(Debug, Serialize)]
pub struct Carried {
    pub load_before: Option<f64>,
    pub steps: Vec<Step>,
    /// The last step whose records all came in time; `None` if the first did not.
    pub knee: Option<u64>,
    /// As fast as one producer can.
    pub fastest: Step,
    /// At [`COMPARED_RATE`].
    pub compared: Step,
    pub java: Option<java::Java>,
    /// Why the figures are not to be trusted; empty if they are.
    pub failures: Vec<String>,
}

/// One rate for some seconds.
#[derive(Debug, Clone, Serialize)]
pub struct Step {
    /// Records per second; `None` for as fast as it goes.
    pub offered: Option<u64>,
    pub achieved: f64,
    pub failed: u64,
    /// From due time to the broker's acknowledgement.
    pub acknowledged: Quantiles,
    /// From due time to a consumer that reads meanwhile.
    pub received: Option<Quantiles>,
}

/// Raises the rate until the latency bends, then goes as fast as it can.
///
/// # Errors
/// If the broker does not answer.
pub async fn measure(args: &KafkaArgs, place: &Place, progress: &Progress) -> anyhow::Result<Carried> {
    place.topic.create().await?;
    let load_before = conditions::load();
    let mut steps: Vec<Step> = Vec::new();
    let mut knee = None;
    for rate in rates(args.from, args.to) {
        let step = run(args, &place.topic, Some(rate), progress).await?;
        let carried = step.carried(args.bend);
        steps.push(step);
        if !carried {
            break;
        }
        knee = Some(rate);
    }
    let fastest = run(args, &place.topic, None, progress).await?;
    let compared = run(args, &place.topic, Some(COMPARED_RATE), progress).await?;
    let java = if args.java {
        Some(java::measure(args, place, progress).await?)
    } else {
        None
    };
    let failed: u64 = steps.iter().chain([&fastest, &compared]).map(|step| step.failed).sum();
    let failures = (failed > 0).then(|| format!("{failed} records were not acknowledged"));
    Ok(Carried {
        load_before,
        steps,
        knee,
        fastest,
        compared,
        java,
        failures: failures.into_iter().collect(),
    })
}

/// 1, 2 and 5 times the powers of ten.
fn rates(from: u64, to: u64) -> Vec<u64> {
    let powers = (0..10).map(|power| 10_u64.pow(power));
    powers
        .flat_map(|power| RISE.map(|factor| factor * power))
        .filter(|rate| (from..=to).contains(rate))
        .collect()
}

async fn run(args: &KafkaArgs, topic: &Topic, rate: Option<u64>, progress: &Progress) -> anyhow::Result<Step> {
    let name = rate.map_or("as fast as it goes".to_owned(), |rate| {
        format!("{rate} records per second")
    });
    let step = progress.step(&name);
    let receiver = match args.consume {
        true => Some(Receiver::start(topic)?),
        false => None,
    };
    let (topic, bytes, duration) = (topic.clone(), args.bytes as usize, args.step);
    let begin = receiver.as_ref().map_or_else(Instant::now, |receiver| receiver.begin);
    let sent = tokio::task::spawn_blocking(move || send(&topic, begin, rate, bytes, duration));
    let mut result = sent.await.context("the sending thread panicked")??;
    if let Some(receiver) = receiver {
        result.received = Some(Quantiles::of(&receiver.finish().await?));
    }
    step.done(&format!(
        "{name}: {:.0}/s, p99 {:.1} ms",
        result.achieved, result.acknowledged.p99
    ));
    Ok(result)
}

impl Step {
    fn carried(&self, bend: Duration) -> bool {
        let reached = self
            .offered
            .is_none_or(|offered| self.achieved >= offered as f64 * REACHED);
        reached && self.failed == 0 && self.acknowledged.p99 <= bend.as_secs_f64() * 1e3
    }
}

/// Called on the producer's own thread.
struct Acknowledged {
    begin: Instant,
    state: Mutex<Deliveries>,
}

/// What the broker has acknowledged.
struct Deliveries {
    /// From due time, in microseconds.
    times: Histogram<u64>,
    failed: u64,
    /// Of the last one, since the begin.
    last: Duration,
}

impl Acknowledged {
    /// Nothing that is done under this lock can leave the state half changed.
    fn lock(&self) -> MutexGuard<'_, Deliveries> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientContext for Acknowledged {}

impl ProducerContext for Acknowledged {
    /// Microseconds from the begin to when the record was due; 0 does not count.
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, due: usize) {
        let now = self.begin.elapsed();
        let mut state = self.lock();
        match result {
            Err(_) => state.failed += 1,
            Ok(_) if due == 0 => {}
            Ok(_) => {
                let took = (now.as_micros() as u64).saturating_sub(due as u64);
                state.times.saturating_record(took);
                state.last = now;
            }
        }
    }
}

/// Sends on schedule, and waits until everything is acknowledged. Blocks.
fn send(topic: &Topic, begin: Instant, rate: Option<u64>, bytes: usize, duration: Duration) -> anyhow::Result<Step> {
    let context = Acknowledged {
        begin,
        state: Mutex::new(Deliveries {
            times: histogram()?,
            failed: 0,
            last: Duration::ZERO,
        }),
    };
    let producer: ThreadedProducer<Acknowledged> = ClientConfig::new()
        .set("bootstrap.servers", topic.brokers())
        .set("acks", "all")
        .set("enable.idempotence", "true")
        .set("allow.auto.create.topics", "false")
        // As the relay has it: a batch waits for company no longer than a millisecond.
        .set("linger.ms", "1")
        .set("compression.type", "lz4")
        .set("batch.num.messages", "10000")
        .set("queue.buffering.max.messages", "500000")
        .create_with_context(context)
        .context("create a Kafka client")?;
    warm_up(&producer, topic)?;
    let start = begin.elapsed();
    let mut value = vec![b'x'; bytes];
    let (mut number, mut refused) = (0_u64, 0_u64);
    loop {
        let now = begin.elapsed().saturating_sub(start);
        if now >= duration {
            break;
        }
        let until = rate.map_or(number + 1_000, |rate| {
            (now.as_micros() as u64 * rate).div_ceil(1_000_000)
        });
        while number < until {
            let due = start + rate.map_or(now, |rate| Duration::from_nanos(number * 1_000_000_000 / rate));
            value[..16].copy_from_slice(format!("{:016}", due.as_micros()).as_bytes());
            let key = number.to_string();
            let mut record = BaseRecord::with_opaque_to(topic.name(), due.as_micros() as usize)
                .key(&key)
                .payload(&value);
            loop {
                match producer.send(record) {
                    Ok(()) => break,
                    Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), again)) => {
                        record = again;
                        std::thread::sleep(TURN);
                    }
                    Err((_, _)) => {
                        refused += 1;
                        break;
                    }
                }
            }
            number += 1;
        }
        if rate.is_some() {
            std::thread::sleep(TURN);
        }
    }
    producer.flush(FLUSH).context("wait for the last acknowledgements")?;
    let state = producer.context().lock();
    let took = state.last.saturating_sub(start).max(duration).as_secs_f64();
    Ok(Step {
        offered: rate,
        achieved: state.times.len() as f64 / took,
        failed: state.failed + refused,
        acknowledged: Quantiles::of(&state.times),
        received: None,
    })
}

/// Connections, a producer's number, and the first batch of each partition cost up to half a second, once: before anything is due.
fn warm_up(producer: &ThreadedProducer<Acknowledged>, topic: &Topic) -> anyhow::Result<()> {
    for partition in 0..topic.partitions() {
        let value = format!("{:016}", 0);
        let record = BaseRecord::<str, str, usize>::with_opaque_to(topic.name(), 0)
            .partition(partition)
            .payload(&value);
        if let Err((error, _)) = producer.send(record) {
            return Err(error).context("send the first records");
        }
    }
    producer.flush(FLUSH).context("send the first records")
}

/// Reads what comes, from the ends that the topic has at the begin.
struct Receiver {
    begin: Instant,
    stop: CancellationToken,
    thread: tokio::task::JoinHandle<anyhow::Result<Histogram<u64>>>,
}

impl Receiver {
    fn start(topic: &Topic) -> anyhow::Result<Self> {
        let reader = topic.reader()?;
        let (begin, stop) = (Instant::now(), CancellationToken::new());
        let stopped = stop.clone();
        let thread = tokio::task::spawn_blocking(move || {
            let ends = reader.ends()?;
            let consumer = reader.assign(ends.partitions.iter().map(|(_, high)| *high))?;
            let mut times = histogram()?;
            loop {
                match consumer.poll(POLL) {
                    Some(message) => {
                        let message = message.context("read the topic")?;
                        let due = message
                            .payload()
                            .and_then(|value| std::str::from_utf8(value.get(..16)?).ok());
                        let Some(due) = due.and_then(|due| due.parse::<u64>().ok()) else {
                            bail!("a record is none of this run's");
                        };
                        if due == 0 {
                            continue;
                        }
                        times.saturating_record((begin.elapsed().as_micros() as u64).saturating_sub(due));
                    }
                    // Everything is acknowledged when it is told to stop, and nothing has come for a while.
                    None if stopped.is_cancelled() => return Ok(times),
                    None => {}
                }
            }
        });
        Ok(Self { begin, stop, thread })
    }

    async fn finish(self) -> anyhow::Result<Histogram<u64>> {
        self.stop.cancel();
        self.thread.await.context("the reading thread panicked")?
    }
}

/// What a person who sizes a deployment wants to know.
pub fn sizing(carried: &Carried, bytes: u32) -> String {
    let Some(knee) = carried.knee else {
        return "Not even the lowest rate was carried in time: look for what else this machine does.\n".to_owned();
    };
    let half = knee / 2;
    format!(
        "The latency bends above {knee} records of {bytes} bytes per second. Plan for half of it, {half}/s: the rest is for a broker that \
         is down and for catching up. A shipment that is created and completed is two events, so that is {} shipments per second.\n",
        half / 2
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_rise_by_one_two_five() {
        assert_eq!(rates(1_000, 20_000), [1_000, 2_000, 5_000, 10_000, 20_000]);
        assert_eq!(rates(7, 9), Vec::<u64>::new());
    }
}
