use std::{
    net::SocketAddr,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::Context;
use devstack::{
    connect::{Connect, ConnectPrograms, OutboxConnector, WorkerOptions},
    failure::{Exit, Failure},
    health,
    java::Java,
    kafka::Tuning,
    ports,
    process::{Lifetime, Process, ProcessIdentity},
    progress::Progress,
};
use nix::sys::signal::Signal;

use crate::{
    cli::{CommonArgs, Lifecycle, Mode, Peer, RelayKind, Through},
    debezium::{Debezium, PollInterval},
    place::Place,
    servers,
};

const READY_DEADLINE: Duration = Duration::from_secs(60);
const STOP_DEADLINE: Duration = Duration::from_secs(40);

/// Something that publishes what is appended.
#[derive(Debug, Clone)]
pub struct Contender {
    publisher: Publisher,
    /// What the load test sets on logistics-svc beyond addresses, mode and lifecycle.
    settings: Vec<(String, String)>,
}

#[derive(Debug, Clone)]
enum Publisher {
    Relay(RelayKind),
    /// Debezium with the product's own configuration publishes; our relay reads the topic back and keeps the lifecycle.
    External(RelayKind),
    /// Debezium alone, with the leanest configuration.
    Debezium(Debezium),
}

impl Contender {
    /// The contenders of a run, ours first, in the order given.
    ///
    /// # Errors
    /// A usage error that names the argument, found before anything is started.
    pub fn all(args: &CommonArgs) -> anyhow::Result<Vec<Self>> {
        check_known(args)?;
        let debezium = |interval| {
            let libs = args.debezium_libs.as_deref().ok_or_else(|| {
                let what = "Debezium needs --debezium-libs, the folder with its jars";
                Failure::new(Exit::Usage, what, "docs/PERFORMANCE.md says how to fill one")
            })?;
            Debezium::new(libs, interval)
        };
        let mut contenders = Vec::new();
        for kind in &args.relay {
            contenders.push(match kind.mode {
                Mode::External => Publisher::External(*kind),
                _ => Publisher::Relay(*kind),
            });
        }
        for peer in &args.peer {
            match peer {
                Peer::PgRecvlogical => {}
                Peer::Debezium => contenders.push(Publisher::Debezium(debezium(PollInterval::Tuned)?)),
                Peer::DebeziumDefaults => contenders.push(Publisher::Debezium(debezium(PollInterval::Default)?)),
            }
        }
        let settings = args.stack.settings.clone();
        let contender = |publisher| Self {
            publisher,
            settings: settings.clone(),
        };
        Ok(contenders.into_iter().map(contender).collect())
    }

    /// As it stands in the results: `relay wal:published`, `debezium`.
    pub fn name(&self) -> String {
        match &self.publisher {
            Publisher::Relay(kind) | Publisher::External(kind) => format!("relay {kind}"),
            Publisher::Debezium(debezium) => debezium.name().to_owned(),
        }
    }

    pub fn is_peer(&self) -> bool {
        matches!(self.publisher, Publisher::Debezium(_))
    }

    pub fn mode(&self) -> Option<Mode> {
        match &self.publisher {
            Publisher::Relay(kind) | Publisher::External(kind) => Some(kind.mode),
            Publisher::Debezium(_) => None,
        }
    }

    /// Which mark its rows have once it is through with them.
    pub fn last_mark(&self) -> Option<&'static str> {
        let (Publisher::Relay(kind) | Publisher::External(kind)) = &self.publisher else {
            return None;
        };
        match (kind.lifecycle, kind.mode) {
            (Lifecycle::Full, _) => Some("confirmed_at"),
            // Polling claims rows by their mark, whatever the lifecycle.
            (Lifecycle::Published, _) | (Lifecycle::Off, Mode::Poll) => Some("published_at"),
            (Lifecycle::Off, _) => None,
        }
    }

    /// Starts it and waits until it says that it is ready. Stopped and started again it goes on where it was.
    ///
    /// # Errors
    /// If a process ends or is not ready in time, with the end of its log.
    pub async fn start(&self, place: &Place, through: Through) -> anyhow::Result<Running> {
        let mut running = Running::none();
        let relay = if through == Through::Api { "all" } else { "relay" };
        match &self.publisher {
            Publisher::Relay(kind) => self.start_service(&mut running, place, relay, Some(*kind)).await?,
            Publisher::External(kind) => {
                running
                    .processes
                    .push(Started::Connect(Box::new(start_connect(place).await?)));
                self.start_service(&mut running, place, relay, Some(*kind)).await?;
            }
            Publisher::Debezium(debezium) => {
                running.processes.push(Started::Process(debezium.start(place).await?));
                if through == Through::Api {
                    self.start_service(&mut running, place, "api", None).await?;
                }
            }
        }
        Ok(running)
    }

    async fn start_service(
        &self,
        running: &mut Running,
        place: &Place,
        role: &str,
        kind: Option<RelayKind>,
    ) -> anyhow::Result<()> {
        let mut settings = Vec::new();
        if let Some(kind) = kind {
            settings.push(("RELAY_MODE".to_owned(), kind.mode.name().to_owned()));
            settings.push(("RELAY_LIFECYCLE".to_owned(), kind.lifecycle.name().to_owned()));
        }
        if role != "relay" {
            settings.push(("LOAD_TEST_ENDPOINT".to_owned(), "true".to_owned()));
        }
        settings.extend_from_slice(&self.settings);
        let (process, address) = spawn_logistics(place, role, &settings).await?;
        running.processes.push(Started::Process(process));
        running.api = Some(address);
        Ok(())
    }
}

/// logistics-svc alone, in a role of its command line, with everything on its default but addresses, names and `settings`.
///
/// # Errors
/// If it ends or is not ready in time, with the end of its log.
pub async fn start_logistics(place: &Place, role: &str, settings: &[(String, String)]) -> anyhow::Result<Running> {
    let (process, address) = spawn_logistics(place, role, settings).await?;
    Ok(Running {
        processes: vec![Started::Process(process)],
        api: Some(address),
    })
}

/// The same as a process that is not yet among those of a contender, and its base URL.
///
/// # Errors
/// If it ends or is not ready in time, with the end of its log.
pub async fn spawn_logistics(
    place: &Place,
    role: &str,
    settings: &[(String, String)],
) -> anyhow::Result<(Process, String)> {
    let address = format!("127.0.0.1:{}", ports::reserve()?);
    let mut command = service(&servers::program("logistics-svc")?);
    command
        .arg(role)
        .env("LOGISTICS_DATABASE_URL", place.logistics_url.as_str())
        .env("LOGISTICS_RELAY_DATABASE_URL", place.relay_url.as_str())
        .env("LOGISTICS_LISTEN", &address)
        .env("KAFKA_BROKERS", &place.brokers)
        .env("SHIPMENTS_TOPIC", place.topic.name())
        .env("RELAY_SLOT", &place.slot)
        .env("RELAY_CONFIRM_GROUP", &place.slot)
        .env("LOG_FORMAT", "json")
        .envs(settings.iter().map(|(name, value)| (name, value)));
    let process = spawn(
        &format!("logistics-svc {role}"),
        command,
        place,
        "logistics-svc",
        &address,
    )
    .await?;
    Ok((process, format!("http://{address}")))
}

/// commerce-consumer, in the place's group.
///
/// # Errors
/// If it ends or is not ready in time, with the end of its log.
pub async fn start_commerce(place: &Place, settings: &[(String, String)]) -> anyhow::Result<Process> {
    let address = format!("127.0.0.1:{}", ports::reserve()?);
    let mut command = service(&servers::program("commerce-consumer")?);
    command
        .arg("consume")
        .env("COMMERCE_DATABASE_URL", place.commerce_url.as_str())
        .env("COMMERCE_LISTEN", &address)
        .env("COMMERCE_GROUP", place.group_topics.group())
        .env("KAFKA_BROKERS", &place.brokers)
        .env("SHIPMENTS_TOPIC", place.topic.name())
        .env("LOG_FORMAT", "json")
        .envs(settings.iter().map(|(name, value)| (name, value)));
    spawn("commerce-consumer", command, place, "commerce-consumer", &address).await
}

async fn spawn(name: &str, command: Command, place: &Place, log: &str, address: &str) -> anyhow::Result<Process> {
    let mut process = Process::spawn(name, command, &place.log(log), Lifetime::Bound)?;
    let ready = format!("http://{address}/health/ready");
    health::wait_until_ready(&mut process, &ready, READY_DEADLINE).await?;
    Ok(process)
}

/// Kafka Connect as `./dev up --relay external` runs it, on the place's slot and topic.
async fn start_connect(place: &Place) -> anyhow::Result<Connect> {
    let log = place.log("debezium");
    let programs = ConnectPrograms::ensure(&log, &Progress::on_stderr()).await?;
    let options = WorkerOptions {
        dir: place.dir.path().join("connect"),
        java: Java::find()?.path,
        port: ports::reserve()?,
        log,
        tuning: Tuning::Throughput,
        lifetime: Lifetime::Bound,
        connector: OutboxConnector {
            brokers: place.brokers.clone(),
            database_url: place.relay_url.to_string(),
            slot: place.slot.clone(),
            publication: "logistics_outbox".to_owned(),
            topic: place.topic.name().to_owned(),
        },
    };
    Connect::start(&programs, options).await
}

/// The processes of one contender.
#[derive(Debug)]
pub struct Running {
    processes: Vec<Started>,
    /// Base URL of logistics-svc, when it runs.
    pub api: Option<String>,
}

#[derive(Debug)]
enum Started {
    Process(Process),
    Connect(Box<Connect>),
}

impl Started {
    fn process(&mut self) -> anyhow::Result<&mut Process> {
        match self {
            Self::Process(process) => Ok(process),
            Self::Connect(connect) => connect.process().context("Kafka Connect is stopped"),
        }
    }
}

impl Running {
    /// Nothing yet.
    pub fn none() -> Self {
        Self {
            processes: Vec::new(),
            api: None,
        }
    }

    /// Of logistics-svc.
    ///
    /// # Errors
    /// If it does not run.
    pub fn address(&self) -> anyhow::Result<SocketAddr> {
        let api = self.api.as_deref().context("no API runs")?;
        api.trim_start_matches("http://").parse().context("the API's address")
    }

    /// One more, which is stopped before those that run already.
    pub fn add(&mut self, process: Process) {
        self.processes.push(Started::Process(process));
    }

    /// SIGKILL to the process of that name, which is forgotten.
    ///
    /// # Errors
    /// If none of that name runs, or it cannot be killed.
    pub fn kill(&mut self, name: &str) -> anyhow::Result<()> {
        let named = |started: &Started| matches!(started, Started::Process(process) if process.name() == name);
        let place = self.processes.iter().position(named);
        let place = place.with_context(|| format!("no {name} runs"))?;
        self.processes.remove(place).process()?.kill()
    }

    /// Names and identities of what runs.
    ///
    /// # Errors
    /// If one of them is stopped.
    pub fn identities(&mut self) -> anyhow::Result<Vec<(String, ProcessIdentity)>> {
        let identity = |started: &mut Started| {
            let process = started.process()?;
            Ok((process.name().to_owned(), process.identity().clone()))
        };
        self.processes.iter_mut().map(identity).collect()
    }

    /// # Errors
    /// If one of them has ended, with the end of its log.
    pub fn check(&mut self) -> anyhow::Result<()> {
        for started in &mut self.processes {
            let process = started.process()?;
            if let Some(status) = process.exited()? {
                anyhow::bail!(
                    "{} ended ({status}); end of its log:\n{}",
                    process.name(),
                    process.log_tail(20)
                );
            }
        }
        Ok(())
    }

    /// The last lines of each log, for the message of a failure.
    pub fn log_tails(&mut self) -> String {
        let mut text = String::new();
        for started in &mut self.processes {
            if let Ok(process) = started.process() {
                text.push_str(&format!(
                    "end of the log of {}:\n{}\n",
                    process.name(),
                    process.log_tail(20)
                ));
            }
        }
        text
    }

    /// SIGTERM to each, the last started first; killed when it does not drain in time.
    ///
    /// # Errors
    /// If a process cannot be signalled.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        while let Some(started) = self.processes.pop() {
            match started {
                Started::Process(mut process) => process.stop(Signal::SIGTERM, STOP_DEADLINE).await?,
                Started::Connect(mut connect) => connect.stop().await?,
            };
        }
        Ok(())
    }
}

/// Without the caller's settings: what runs is what the command line of the load test says.
fn service(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear();
    for name in ["PATH", "HOME", "TMPDIR"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command
}

/// An unknown variable is ignored by the service: the figures would bear the name of a mode that never ran.
fn check_known(args: &CommonArgs) -> anyhow::Result<()> {
    let known = service(&servers::program("logistics-svc")?)
        .args(["config", "docs"])
        .stdin(Stdio::null())
        .output()
        .context("ask logistics-svc for its settings")?;
    let known = String::from_utf8_lossy(&known.stdout);
    let knows = |name: &str| known.contains(&format!("| `{name}` |"));
    let unknown = |what: String| {
        let hint = "cargo build --workspace --bins, then `logistics-svc config docs` lists what it takes";
        anyhow::Error::from(Failure::new(Exit::Usage, what, hint))
    };
    for kind in &args.relay {
        let default = *kind
            == RelayKind {
                mode: Mode::Wal,
                lifecycle: Lifecycle::Published,
            };
        if !default && !["RELAY_MODE", "RELAY_LIFECYCLE"].into_iter().all(knows) {
            return Err(unknown(format!(
                "--relay {kind}: this build of logistics-svc only has wal:published"
            )));
        }
    }
    for (name, _) in &args.stack.settings {
        if !knows(name) {
            return Err(unknown(format!("--set {name}: logistics-svc has no such setting")));
        }
    }
    Ok(())
}
