use std::{
    fs,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, bail};
use devstack::{
    failure::{Exit, Failure},
    java::Java,
    ports,
    process::{Lifetime, Process},
};
use tokio::time::Instant;

use crate::place::Place;

/// A Java machine that starts on a busy machine takes a while.
const READY_DEADLINE: Duration = Duration::from_secs(180);

/// How often Debezium's task looks at its own queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PollInterval {
    /// 10 ms.
    Tuned,
    /// 500 ms.
    Default,
}

/// Kafka Connect in one process with Debezium's PostgreSQL connector and its outbox router, on the product's own table
/// and publication.
#[derive(Debug, Clone)]
pub struct Debezium {
    libs: PathBuf,
    java: PathBuf,
    poll_interval: PollInterval,
}

impl Debezium {
    /// # Errors
    /// If the folder does not hold the connector, or there is no Java.
    pub fn new(libs: &Path, poll_interval: PollInterval) -> anyhow::Result<Self> {
        let jars = |prefix: &str| {
            let entries = fs::read_dir(libs).into_iter().flatten().filter_map(Result::ok);
            entries
                .into_iter()
                .any(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        };
        if !jars("debezium-connector-postgres") || !jars("connect-runtime") {
            let what = format!(
                "--debezium-libs {}: no jars of Debezium and Kafka Connect there",
                libs.display()
            );
            return Err(Failure::new(Exit::Usage, what, "docs/PERFORMANCE.md says how to fill one").into());
        }
        Ok(Self {
            libs: std::path::absolute(libs).context("make --debezium-libs absolute")?,
            java: Java::find()?.path,
            poll_interval,
        })
    }

    pub fn name(&self) -> &'static str {
        match self.poll_interval {
            PollInterval::Tuned => "debezium",
            PollInterval::Default => "debezium defaults",
        }
    }

    /// Starts it and waits until it reads its slot. Its offsets stay in the place, so that a second start goes on.
    ///
    /// # Errors
    /// If it ends or does not take its slot in time, with the end of its log.
    pub async fn start(&self, place: &Place) -> anyhow::Result<Process> {
        let dir = place.dir.path();
        let worker = dir.join("worker.properties");
        let connector = dir.join("connector.properties");
        write(&worker, &self.worker(place)?)?;
        write(&connector, &self.connector(place)?)?;
        let mut command = Command::new(&self.java);
        command
            .current_dir(dir)
            .args(["-Xmx1g", "-XX:-UsePerfData", "-Dlog4j2.level=warn", "-cp"])
            .arg(self.libs.join("*"))
            .arg("org.apache.kafka.connect.cli.ConnectStandalone")
            .args([&worker, &connector]);
        let mut process = Process::spawn("debezium", command, &place.log("debezium"), Lifetime::Bound)?;
        wait_until_it_reads(&mut process, place).await?;
        Ok(process)
    }

    fn worker(&self, place: &Place) -> anyhow::Result<String> {
        Ok(format!(
            "bootstrap.servers={}\n\
             key.converter=org.apache.kafka.connect.storage.StringConverter\n\
             value.converter=org.apache.kafka.connect.storage.StringConverter\n\
             offset.storage.file.filename={}\n\
             offset.flush.interval.ms=5000\n\
             listeners=http://127.0.0.1:{}\n\
             plugin.discovery=only_scan\n\
             producer.linger.ms=0\n\
             producer.acks=all\n",
            place.brokers,
            place.dir.path().join("offsets").display(),
            ports::reserve()?,
        ))
    }

    fn connector(&self, place: &Place) -> anyhow::Result<String> {
        let url = &place.relay_url;
        let poll_interval_ms = match self.poll_interval {
            PollInterval::Tuned => 10,
            PollInterval::Default => 500,
        };
        Ok(format!(
            "name=outbox\n\
             connector.class=io.debezium.connector.postgresql.PostgresConnector\n\
             tasks.max=1\n\
             database.hostname={}\n\
             database.port={}\n\
             database.user={}\n\
             database.password={}\n\
             database.dbname={}\n\
             topic.prefix=loadtest\n\
             plugin.name=pgoutput\n\
             slot.name={}\n\
             publication.name=logistics_outbox\n\
             publication.autocreate.mode=disabled\n\
             table.include.list=logistics.outbox\n\
             snapshot.mode=no_data\n\
             tombstones.on.delete=false\n\
             poll.interval.ms={poll_interval_ms}\n\
             max.batch.size=8192\n\
             max.queue.size=32768\n\
             transforms=outbox\n\
             transforms.outbox.type=io.debezium.transforms.outbox.EventRouter\n\
             transforms.outbox.table.field.event.id=id\n\
             transforms.outbox.table.field.event.key=aggregateid\n\
             transforms.outbox.table.fields.additional.placement=type:header:eventType\n\
             transforms.outbox.route.topic.replacement={}\n",
            url.host_str().context("the URL of PostgreSQL names no host")?,
            url.port().unwrap_or(5432),
            url.username(),
            url.password().unwrap_or_default(),
            url.path().trim_start_matches('/'),
            place.slot,
            place.topic.name(),
        ))
    }
}

/// It holds a password.
fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options
        .open(path)
        .with_context(|| format!("create {}", path.display()))?;
    file.write_all(text.as_bytes())
        .with_context(|| format!("write {}", path.display()))
}

async fn wait_until_it_reads(process: &mut Process, place: &Place) -> anyhow::Result<()> {
    let end = Instant::now() + READY_DEADLINE;
    let mut connection = place.owner().await?;
    loop {
        if let Some(status) = process.exited()? {
            bail!("Debezium ended ({status}); end of its log:\n{}", process.log_tail(20));
        }
        let active: Option<bool> = sqlx::query_scalar("SELECT active FROM pg_replication_slots WHERE slot_name = $1")
            .bind(&place.slot)
            .fetch_optional(&mut connection)
            .await
            .context("look for Debezium's slot")?;
        if active == Some(true) {
            return Ok(());
        }
        if Instant::now() >= end {
            bail!(
                "Debezium took no slot within {READY_DEADLINE:?}; end of its log:\n{}",
                process.log_tail(20)
            );
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
