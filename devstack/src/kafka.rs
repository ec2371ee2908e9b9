//! One Kafka broker in KRaft combined mode on 127.0.0.1.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::Signal;
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use uuid::Uuid;

use crate::process::{self, Lifetime, Process, Stop};
use crate::servers::Servers;

const LOG4J: &str = include_str!("log4j2.properties");
/// A killed broker cannot register again before its old session has timed out; the default makes every start after a
/// kill wait 9 s.
const SESSION_TIMEOUT_MS: u32 = 3000;

const FORMAT_DEADLINE: Duration = Duration::from_secs(180);
/// Generous, because the first start shares the processors with the build.
const READY_DEADLINE: Duration = Duration::from_secs(300);
const STOP_DEADLINE: Duration = Duration::from_secs(30);

/// How the Java virtual machine compiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tuning {
    /// First compiler tier only: starts sooner and leaves the processors to the tests.
    QuickStart,
    /// Every tier: the throughput and latency that a broker is known for.
    Throughput,
}

/// What a broker is started with; the same values start it again on the same data.
#[derive(Debug, Clone)]
pub struct KafkaOptions {
    /// Holds `data/` and the configuration; created when missing.
    pub dir: PathBuf,
    /// The `java` program, version 17 or newer.
    pub java: PathBuf,
    /// TCP port for clients on 127.0.0.1.
    pub port: u16,
    /// TCP port of the controller on 127.0.0.1.
    pub controller_port: u16,
    /// Standard output and error of the broker are appended here.
    pub log: PathBuf,
    pub tuning: Tuning,
    pub lifetime: Lifetime,
}

#[derive(Debug)]
pub struct Kafka {
    servers: Servers,
    options: KafkaOptions,
    process: Option<Process>,
}

impl Kafka {
    /// Formats the storage when there is none, starts the broker and waits until it answers with metadata.
    ///
    /// Errors when the broker ends or does not answer in time, with the end of its log.
    pub async fn start(servers: &Servers, options: KafkaOptions) -> anyhow::Result<Self> {
        let mut broker = Self {
            servers: servers.clone(),
            options,
            process: None,
        };
        broker.format_storage().await?;
        broker.start_again().await?;
        Ok(broker)
    }

    /// `127.0.0.1:<port>`, the bootstrap address.
    pub fn brokers(&self) -> String {
        format!("127.0.0.1:{}", self.options.port)
    }

    /// `None` while stopped.
    pub fn process(&mut self) -> Option<&mut Process> {
        self.process.as_mut()
    }

    /// Starts a stopped or killed broker on the same ports and data, and waits until it answers.
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        if let Some(mut old) = self.process.take() {
            old.kill()?;
        }
        let properties = self.options.dir.join("server.properties");
        fs::write(&properties, self.properties(&self.data())).context("write server.properties")?;
        fs::write(self.log4j(), LOG4J).context("write log4j2.properties")?;
        let mut command = self.java();
        match self.options.tuning {
            Tuning::QuickStart => command.arg("-XX:TieredStopAtLevel=1"),
            Tuning::Throughput => command.arg("-XX:MaxGCPauseMillis=20"),
        };
        command
            .args(["-Xms256m", "-Xmx512m", "-XX:+UseG1GC", "-XX:+ExitOnOutOfMemoryError"])
            .arg("kafka.Kafka")
            .arg(&properties);
        let mut process = Process::spawn("kafka", command, &self.options.log, self.options.lifetime.clone())?;
        self.wait_until_ready(&mut process).await?;
        self.process = Some(process);
        Ok(())
    }

    /// Controlled shutdown.
    pub async fn stop(&mut self) -> anyhow::Result<Stop> {
        match self.process.take() {
            Some(mut process) => process.stop(Signal::SIGTERM, STOP_DEADLINE).await,
            None => Ok(Stop::Clean),
        }
    }

    /// `kill -9` of the broker.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        match self.process.take() {
            Some(mut process) => process.kill(),
            None => Ok(()),
        }
    }

    fn data(&self) -> PathBuf {
        self.options.dir.join("data")
    }

    fn log4j(&self) -> PathBuf {
        self.options.dir.join("log4j2.properties")
    }

    fn java(&self) -> Command {
        let mut command = Command::new(&self.options.java);
        command
            .current_dir(&self.options.dir)
            .arg(format!("-Dlog4j2.configurationFile={}", self.log4j().display()))
            // No counters in a shared temporary directory: nothing is left behind after a kill.
            .arg("-XX:-UsePerfData")
            .arg("-Djava.awt.headless=true")
            .arg("-cp")
            .arg(self.servers.kafka_classpath());
        command
    }

    /// Formatted under another name and renamed, so that an interrupted format leaves no half directory in use.
    async fn format_storage(&self) -> anyhow::Result<()> {
        if self.data().exists() {
            return Ok(());
        }
        let dir = &self.options.dir;
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let unfinished = dir.join("data.unfinished");
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished).context("remove unfinished storage")?;
        }
        let properties = dir.join("format.properties");
        fs::write(&properties, self.properties(&unfinished)).context("write format.properties")?;
        fs::write(self.log4j(), LOG4J).context("write log4j2.properties")?;
        let cluster_id = Uuid::new_v4().simple().to_string();
        let mut format = self.java();
        format
            .args(["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx128m"])
            .args(["kafka.tools.StorageTool", "format", "--cluster-id", &cluster_id[..22]])
            .arg("--config")
            .arg(&properties);
        process::run("kafka format", format, &self.options.log, FORMAT_DEADLINE).await?;
        fs::remove_file(&properties).context("remove format.properties")?;
        fs::rename(&unfinished, self.data()).context("put the storage in place")
    }

    fn properties(&self, data: &Path) -> String {
        let KafkaOptions {
            port, controller_port, ..
        } = self.options;
        format!(
            "process.roles=broker,controller\n\
             node.id=1\n\
             controller.quorum.voters=1@127.0.0.1:{controller_port}\n\
             listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}\n\
             advertised.listeners=PLAINTEXT://127.0.0.1:{port}\n\
             controller.listener.names=CONTROLLER\n\
             inter.broker.listener.name=PLAINTEXT\n\
             log.dirs={}\n\
             broker.heartbeat.interval.ms=500\n\
             broker.session.timeout.ms={SESSION_TIMEOUT_MS}\n\
             auto.create.topics.enable=false\n\
             group.initial.rebalance.delay.ms=0\n\
             default.replication.factor=1\n\
             offsets.topic.replication.factor=1\n\
             offsets.topic.num.partitions=6\n\
             transaction.state.log.replication.factor=1\n\
             transaction.state.log.min.isr=1\n\
             transaction.state.log.num.partitions=6\n\
             share.coordinator.state.topic.replication.factor=1\n\
             share.coordinator.state.topic.min.isr=1\n\
             share.coordinator.state.topic.num.partitions=6\n",
            data.display(),
        )
    }

    async fn wait_until_ready(&self, process: &mut Process) -> anyhow::Result<()> {
        let end = Instant::now() + READY_DEADLINE;
        loop {
            if let Some(status) = process.exited()? {
                let tail = process.log_tail(20);
                process.kill()?;
                bail!(
                    "Kafka ended while starting ({status}); end of {}:\n{tail}",
                    self.options.log.display()
                );
            }
            // librdkafka retries a refused connection only after a pause, so knock on the port first.
            if tokio::net::TcpStream::connect(("127.0.0.1", self.options.port))
                .await
                .is_ok()
                && answers(self.brokers(), Duration::from_secs(5)).await?
            {
                return Ok(());
            }
            if Instant::now() >= end {
                let tail = process.log_tail(20);
                process.kill()?;
                bail!(
                    "Kafka did not answer within {} s; end of {}:\n{tail}",
                    READY_DEADLINE.as_secs(),
                    self.options.log.display(),
                );
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Whether a broker at `brokers` answers a metadata request within `timeout`.
pub async fn answers(brokers: String, timeout: Duration) -> anyhow::Result<bool> {
    tokio::task::spawn_blocking(move || {
        let client: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &brokers)
            .create()
            .context("create a Kafka client")?;
        Ok(client
            .fetch_metadata(None, timeout)
            .is_ok_and(|metadata| !metadata.brokers().is_empty()))
    })
    .await
    .context("ask the broker for metadata")?
}
