use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    str::FromStr,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use devstack::{
    place::Place,
    ports, process,
    progress::{Progress, seconds},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sqlx::{
    PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use uuid::Uuid;

use crate::{
    docker::{self, Docker},
    image,
};

const NAME: &str = "compose-check";
/// What must be healthy, and is killed in this order.
const SERVICES: [&str; 5] = ["relay", "commerce", "api", "kafka", "postgres"];
const DEBEZIUM: &str = "debezium";

/// Enough to see that everything in the container finds everything it needs.
const LOAD: [&str; 7] = [
    "outbox",
    "--rate=50",
    "--duration=10s",
    "--warm-up=5s",
    "--connections=8",
    "--shipments=2000",
    "--partitions=3",
];

const UP_DEADLINE: Duration = Duration::from_secs(5 * 60);
const HEALTHY_DEADLINE: Duration = Duration::from_secs(3 * 60);
const LOAD_DEADLINE: Duration = Duration::from_secs(5 * 60);
const DOWN_DEADLINE: Duration = Duration::from_secs(5 * 60);
const POLL: Duration = Duration::from_millis(100);

/// The containers of docker-compose.yml, on ports and with a password of their own.
pub(crate) struct Project {
    docker: Docker,
    file: PathBuf,
    log: PathBuf,
    /// Of the load test.
    reports: PathBuf,
    debezium: bool,
    ports: Ports,
    password: String,
}

struct Ports {
    logistics: u16,
    commerce: u16,
    postgres: u16,
    kafka: u16,
}

/// A container at one moment.
#[derive(Debug, PartialEq, Eq)]
struct State {
    id: String,
    /// 0 while it does not run.
    pid: i32,
    started: String,
    health: String,
}

impl Project {
    pub(crate) fn new(docker: &Docker, root: &Path, debezium: bool, place: &Place) -> anyhow::Result<Self> {
        Ok(Self {
            docker: docker.clone(),
            file: root.join("docker-compose.yml"),
            log: place.log("compose"),
            reports: place.dir().join("load-results"),
            debezium,
            ports: Ports {
                logistics: ports::reserve()?,
                commerce: ports::reserve()?,
                postgres: ports::reserve()?,
                kafka: ports::reserve()?,
            },
            password: Uuid::new_v4().simple().to_string(),
        })
    }

    /// In the order in which they are killed.
    pub(crate) fn services(&self) -> Vec<&'static str> {
        let debezium = self.debezium.then_some(DEBEZIUM);
        SERVICES.into_iter().chain(debezium).collect()
    }

    pub(crate) fn logistics(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports.logistics)
    }

    pub(crate) fn commerce(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports.commerce)
    }

    pub(crate) fn brokers(&self) -> String {
        format!("127.0.0.1:{}", self.ports.kafka)
    }

    /// The checker's own connections, as the owner of both schemas.
    pub(crate) fn owner(&self) -> anyhow::Result<PgPool> {
        let pool = PgPoolOptions::new()
            .max_connections(3)
            .acquire_timeout(Duration::from_secs(30));
        Ok(pool.connect_lazy_with(PgConnectOptions::from_str(&self.owner_url())?))
    }

    fn owner_url(&self) -> String {
        format!(
            "postgres://postgres:{}@127.0.0.1:{}/shop",
            self.password, self.ports.postgres
        )
    }

    /// For a person who looks at what was left running.
    pub(crate) fn addresses(&self) -> String {
        let docker = self.docker.host().map(|host| format!("\n  DOCKER_HOST={host}"));
        format!(
            "  logistics-svc      {}\n  commerce-consumer  {}\n  PostgreSQL         {}\n  Kafka              {}{}",
            self.logistics(),
            self.commerce(),
            self.owner_url(),
            self.brokers(),
            docker.unwrap_or_default()
        )
    }

    /// Starts everything on empty volumes, and waits until it is healthy.
    ///
    /// # Errors
    /// If a container ends, or is not healthy in time.
    pub(crate) async fn up(&self, progress: &Progress) -> anyhow::Result<()> {
        let step = progress.step("starting the containers");
        let start = Instant::now();
        let mut up = self.compose();
        up.args(["up", "--detach", "--no-build"]);
        if self.docker.compose_waits() {
            up.arg("--wait");
        }
        self.run("docker compose up", up, UP_DEADLINE).await?;
        self.healthy(&self.services()).await?;
        let took = seconds(start.elapsed());
        step.done(&format!("ready {took} after `up`, with empty volumes"));
        Ok(())
    }

    /// Waits until all of `services` are healthy.
    pub(crate) async fn healthy(&self, services: &[&str]) -> anyhow::Result<()> {
        let end = Instant::now() + HEALTHY_DEADLINE;
        for service in services {
            loop {
                let state = self.state(service).await?;
                if state.health == "healthy" {
                    break;
                }
                if Instant::now() > end {
                    let health = ["inspect", "--format", "{{json .State.Health}}", &state.id];
                    bail!("{service} is {}: {}", state.health, self.docker.ask(&health).await?);
                }
                tokio::time::sleep(POLL).await;
            }
        }
        Ok(())
    }

    /// SIGKILL to the container's process, as from the kernel's out-of-memory killer: `docker kill` counts as a stop by
    /// hand, after which nothing is started again. Returns how long it took to be healthy again.
    pub(crate) async fn kill(&self, service: &str) -> anyhow::Result<Duration> {
        let before = self.state(service).await?;
        let start = Instant::now();
        if !before.kill()? {
            self.docker.ask(&["kill", "--signal", "KILL", &before.id]).await?;
            self.docker.ask(&["start", &before.id]).await?;
        }
        loop {
            let now = self.state(service).await?;
            if now.started != before.started && now.health == "healthy" {
                return Ok(start.elapsed());
            }
            if start.elapsed() > HEALTHY_DEADLINE {
                bail!("{service} was killed {:?} ago, and is {now:?}", start.elapsed());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// The load test in its container, on the servers of the others.
    ///
    /// # Errors
    /// If it ends with anything but 0, or writes no report; its output is in the log.
    pub(crate) async fn load(&self, progress: &Progress) -> anyhow::Result<()> {
        let step = progress.step("running the load test in its container");
        fs::create_dir_all(&self.reports).with_context(|| format!("create {}", self.reports.display()))?;
        let mut load = self.compose();
        load.args(["run", "--rm", "load"]).args(LOAD);
        self.run("docker compose run load", load, LOAD_DEADLINE).await?;
        let reports = fs::read_dir(&self.reports).context("look for its report")?;
        let written: Vec<PathBuf> = reports.map(|report| Ok(report?.path())).collect::<io::Result<_>>()?;
        for kind in ["json", "html"] {
            let is_one = |path: &PathBuf| path.extension().is_some_and(|extension| extension == kind);
            ensure!(
                written.iter().any(is_one),
                "the load test wrote no .{kind}: {written:?}"
            );
        }
        fs::remove_dir_all(&self.reports).context("remove its report")?;
        step.done("the load test has accounted for every event");
        Ok(())
    }

    /// Containers, network and volumes.
    pub(crate) async fn down(&self) -> anyhow::Result<()> {
        let mut down = self.compose();
        down.args(["down", "--volumes", "--remove-orphans"]);
        self.run("docker compose down", down, DOWN_DEADLINE).await
    }

    /// What the containers have said, into the log.
    pub(crate) async fn save_logs(&self) -> anyhow::Result<()> {
        let mut logs = self.compose();
        logs.args(["logs", "--no-color", "--timestamps"]);
        self.run("docker compose logs", logs, DOWN_DEADLINE).await
    }

    async fn state(&self, service: &str) -> anyhow::Result<State> {
        let mut ps = self.compose();
        ps.args(["ps", "--quiet", "--all", service]);
        let id = docker::said("docker compose ps", docker::output(ps).await?)?;
        let format = "{{.State.Pid}} {{.State.StartedAt}} {{.State.Health.Status}}";
        let state = self.docker.ask(&["inspect", "--format", format, &id]).await?;
        let [pid, started, health] = state.split(' ').collect::<Vec<_>>()[..] else {
            bail!("docker inspect says of {service}: {state}");
        };
        Ok(State {
            id,
            pid: pid
                .parse()
                .with_context(|| format!("the process of {service}: {pid}"))?,
            started: started.to_owned(),
            health: health.to_owned(),
        })
    }

    fn compose(&self) -> Command {
        let password = self.password.as_str();
        let reports = self.reports.to_string_lossy();
        let (relay_mode, profiles) = if self.debezium {
            ("external", DEBEZIUM)
        } else {
            ("auto", "")
        };
        let ports = [
            ("LOGISTICS_PORT", self.ports.logistics),
            ("COMMERCE_PORT", self.ports.commerce),
            ("POSTGRES_PORT", self.ports.postgres),
            ("KAFKA_PORT", self.ports.kafka),
        ];
        let mut compose = self.docker.compose();
        compose
            .arg("--file")
            .arg(&self.file)
            .args(["--project-name", NAME])
            // Stronger than an .env of the checkout.
            .envs(ports.map(|(name, port)| (name, port.to_string())))
            .envs([
                ("IMAGE", image::NAME),
                ("LOAD_IMAGE", image::LOAD_NAME),
                ("LOAD_RESULTS", &reports),
                ("OWNER_PASSWORD", password),
                ("LOGISTICS_PASSWORD", password),
                ("RELAY_PASSWORD", password),
                ("COMMERCE_PASSWORD", password),
                ("RELAY_MODE", relay_mode),
                ("COMPOSE_PROFILES", profiles),
                ("ADMIN_TOKENS", ""),
                ("RATE_LIMIT", "5000"),
                ("PARTITIONS", "12"),
            ]);
        compose
    }

    async fn run(&self, what: &str, command: Command, deadline: Duration) -> anyhow::Result<()> {
        process::run(what, command, &self.log, deadline).await
    }
}

impl State {
    /// Whether the process was killed. Not where the engine runs on another machine, real or virtual: the number would be
    /// somebody else's here.
    fn kill(&self) -> anyhow::Result<bool> {
        let groups = fs::read_to_string(format!("/proc/{}/cgroup", self.pid));
        if self.pid == 0 || !groups.is_ok_and(|groups| groups.contains(&self.id)) {
            return Ok(false);
        }
        Ok(kill(Pid::from_raw(self.pid), Signal::SIGKILL).is_ok())
    }
}
