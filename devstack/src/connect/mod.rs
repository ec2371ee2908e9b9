//! One Kafka Connect worker on 127.0.0.1 that runs Debezium over the outbox: the relay of `RELAY_MODE=external`.

/// The properties files.
mod configuration;

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::Signal;
use serde::Deserialize;
use sqlx::{Connection, PgConnection};

pub use configuration::OutboxConnector;
use configuration::{CONNECTOR_NAME, HEARTBEAT_TOPIC, connector_properties, login_properties, properties};

use crate::cache::Entry;
use crate::kafka::Tuning;
use crate::prerequisites::{self, Tool};
use crate::process::{Lifetime, Process, Stop};
use crate::progress::Progress;
use crate::topics;

/// Names Kafka Connect and Debezium with their versions.
const POM: &str = include_str!("../../debezium/pom.xml");
const LOG4J: &str = include_str!("../../debezium/log4j2.properties");

/// Generous, because the virtual machine may share the processors with a build.
const READY_DEADLINE: Duration = Duration::from_secs(180);
const STOP_DEADLINE: Duration = Duration::from_secs(30);
const HTTP_TIMEOUT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(100);

/// Where the programs of Kafka Connect and Debezium are.
#[derive(Debug, Clone)]
pub struct ConnectPrograms {
    dir: PathBuf,
}

impl ConnectPrograms {
    /// The programs if they are in the cache, complete.
    pub fn cached() -> anyhow::Result<Option<Self>> {
        Ok(entry().cached()?.map(|dir| Self { dir }))
    }

    /// The programs, fetched through Maven first when the cache does not have them; what the fetch itself needs is
    /// found or installed, its messages in `log`.
    pub async fn ensure(log: &Path, progress: &Progress) -> anyhow::Result<Self> {
        if let Some(programs) = Self::cached()? {
            return Ok(programs);
        }
        prerequisites::ensure(&Tool::FOR_FETCH, log, progress).await?;
        let step = progress.step("fetching Kafka Connect and Debezium through Maven");
        let dir = entry()
            .fetch(&[], async |_: &Path| Ok(()))
            .await
            .context("fetch Kafka Connect and Debezium through Maven")?;
        step.done("Kafka Connect and Debezium are in the cache");
        Ok(Self { dir })
    }

    /// Holds `connect/`.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn classpath(&self) -> String {
        self.dir.join("connect/*").to_string_lossy().into_owned()
    }
}

fn entry() -> Entry {
    Entry::new("debezium", POM)
}

/// What a worker is started with; the same values start it again where it stood.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// Holds the offsets and the configuration; created when missing.
    pub dir: PathBuf,
    /// The `java` program, version 17 or newer.
    pub java: PathBuf,
    /// TCP port of the worker's REST interface on 127.0.0.1.
    pub port: u16,
    /// Standard output and error are appended here.
    pub log: PathBuf,
    pub tuning: Tuning,
    pub lifetime: Lifetime,
    pub connector: OutboxConnector,
}

#[derive(Debug)]
pub struct Connect {
    programs: ConnectPrograms,
    options: WorkerOptions,
    process: Option<Process>,
}

impl Connect {
    /// Starts the worker and waits until Debezium streams from its slot.
    ///
    /// Errors when the worker ends, the connector fails, or it does not stream in time, with the end of the log.
    pub async fn start(programs: &ConnectPrograms, options: WorkerOptions) -> anyhow::Result<Self> {
        let mut worker = Self {
            programs: programs.clone(),
            options,
            process: None,
        };
        topics::create_heartbeat(&worker.options.connector.brokers, HEARTBEAT_TOPIC).await?;
        worker.start_again().await?;
        Ok(worker)
    }

    /// `None` while stopped.
    pub fn process(&mut self) -> Option<&mut Process> {
        self.process.as_mut()
    }

    /// Starts a stopped or killed worker with the offsets it has stored, and waits until it streams.
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        if let Some(mut old) = self.process.take() {
            old.kill()?;
        }
        let dir = &self.options.dir;
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        self.write_configuration()?;
        let process = Process::spawn(
            "debezium",
            self.command(),
            &self.options.log,
            self.options.lifetime.clone(),
        )?;
        self.process = Some(process);
        self.ready().await
    }

    /// Orderly: records on their way are delivered and offsets stored.
    pub async fn stop(&mut self) -> anyhow::Result<Stop> {
        match self.process.take() {
            Some(mut process) => process.stop(Signal::SIGTERM, STOP_DEADLINE).await,
            None => Ok(Stop::Clean),
        }
    }

    /// `kill -9` of the worker.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        match self.process.take() {
            Some(mut process) => process.kill(),
            None => Ok(()),
        }
    }

    /// Forgets how far it came, as when the offsets of a Connect installation are lost.
    pub fn forget_offsets(&self) -> anyhow::Result<()> {
        let path = self.offsets();
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
    }

    /// Waits until Debezium streams from its slot, as after a fault of a server.
    pub async fn ready(&mut self) -> anyhow::Result<()> {
        let address = format!("http://127.0.0.1:{}", self.options.port);
        let process = self.process.as_mut().context("Kafka Connect is stopped")?;
        let end = Instant::now() + READY_DEADLINE;
        loop {
            if let Some(status) = process.exited()? {
                bail!(
                    "Kafka Connect ended ({status}); end of {}:\n{}",
                    self.options.log.display(),
                    process.log_tail(20)
                );
            }
            let state = task_state(&address).await;
            match &state {
                Ok(TaskState::Running) if streams(&self.options.connector).await.unwrap_or(false) => return Ok(()),
                Ok(TaskState::Failed(trace)) => bail!("Debezium failed: {trace}"),
                _ => {}
            }
            if Instant::now() >= end {
                bail!(
                    "Debezium did not stream within {} s, its task: {state:?}; end of {}:\n{}",
                    READY_DEADLINE.as_secs(),
                    self.options.log.display(),
                    process.log_tail(20)
                );
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn offsets(&self) -> PathBuf {
        self.options.dir.join("offsets")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.options.dir.join(name)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.options.java);
        command
            .current_dir(&self.options.dir)
            .arg(format!(
                "-Dlog4j2.configurationFile={}",
                self.path("log4j2.properties").display()
            ))
            // No counters in a shared temporary directory: nothing is left behind after a kill.
            .args(["-XX:-UsePerfData", "-Djava.awt.headless=true"])
            .args(["-Xms64m", "-Xmx384m", "-XX:+UseG1GC", "-XX:+ExitOnOutOfMemoryError"]);
        if self.options.tuning == Tuning::QuickStart {
            command.arg("-XX:TieredStopAtLevel=1");
        }
        command
            .arg("-cp")
            .arg(self.programs.classpath())
            .arg("org.apache.kafka.connect.cli.ConnectStandalone")
            .arg(self.path("worker.properties"))
            .arg(self.path("outbox.properties"));
        command
    }

    fn write_configuration(&self) -> anyhow::Result<()> {
        let login = self.path("login.properties");
        let connector = connector_properties(&self.options.connector, &login)?;
        write(&login, &login_properties(&self.options.connector.database_url)?)?;
        write(&self.path("worker.properties"), &self.worker_properties())?;
        write(&self.path("outbox.properties"), &connector)?;
        write(&self.path("log4j2.properties"), LOG4J)
    }

    fn worker_properties(&self) -> String {
        let WorkerOptions {
            dir, port, connector, ..
        } = &self.options;
        properties(&[
            ("bootstrap.servers", &connector.brokers),
            ("listeners", &format!("http://127.0.0.1:{port}")),
            ("offset.storage.file.filename", &self.offsets().to_string_lossy()),
            ("offset.flush.interval.ms", "1000"),
            ("plugin.discovery", "service_load"),
            ("key.converter", "org.apache.kafka.connect.storage.StringConverter"),
            ("value.converter", "org.apache.kafka.connect.storage.StringConverter"),
            // The REST interface shows the connector's configuration to whoever asks: the password is not in it.
            ("config.providers", "file"),
            (
                "config.providers.file.class",
                "org.apache.kafka.common.config.provider.FileConfigProvider",
            ),
            ("config.providers.file.param.allowed.paths", &dir.to_string_lossy()),
        ])
    }
}

/// Readable for its owner alone.
fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    let write = || {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)?;
        file.write_all(text.as_bytes())
    };
    write().with_context(|| format!("write {}", path.display()))
}

/// Of the connector's only task, as the worker's REST interface tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TaskState {
    Running,
    /// With the stack trace. It stays so until somebody restarts it.
    Failed(String),
    /// Not assigned yet, paused, restarting.
    Other(String),
}

#[derive(Deserialize)]
struct ConnectorStatus {
    tasks: Vec<TaskStatus>,
}

#[derive(Deserialize)]
struct TaskStatus {
    state: String,
    trace: Option<String>,
}

/// Asks the worker whose REST interface is at `address`.
///
/// Errors when it does not answer, or does not know the connector (yet).
pub async fn task_state(address: &str) -> anyhow::Result<TaskState> {
    let url = format!("{address}/connectors/{CONNECTOR_NAME}/status");
    let client = reqwest::Client::builder().timeout(HTTP_TIMEOUT).no_proxy().build()?;
    let status: ConnectorStatus = client.get(url).send().await?.error_for_status()?.json().await?;
    Ok(match status.tasks.into_iter().next() {
        None => TaskState::Other("UNASSIGNED".to_owned()),
        Some(task) => match task.state.as_str() {
            "RUNNING" => TaskState::Running,
            "FAILED" => TaskState::Failed(task.trace.unwrap_or_default()),
            _ => TaskState::Other(task.state),
        },
    })
}

/// Whether somebody reads the slot now. A task says RUNNING before it does.
async fn streams(connector: &OutboxConnector) -> anyhow::Result<bool> {
    let mut connection = PgConnection::connect(&connector.database_url).await?;
    let active =
        sqlx::query_scalar("SELECT coalesce(bool_or(active), false) FROM pg_replication_slots WHERE slot_name = $1")
            .bind(&connector.slot)
            .fetch_one(&mut connection)
            .await?;
    connection.close().await?;
    Ok(active)
}
