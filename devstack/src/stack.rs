//! A stack that runs: its servers and services, started in order, stopped in reverse.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use nix::sys::signal::Signal;
use shared_events::topics::{COMMERCE_GROUP, DEFAULT_PARTITIONS, GroupTopics, SHIPMENTS};
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection};

use crate::account::Account;
use crate::connect::{Connect, ConnectPrograms, OutboxConnector, WorkerOptions};
use crate::database;
use crate::external::{self, ExternalServers};
use crate::failure::{Exit, Failure};
use crate::health;
use crate::java::Java;
use crate::kafka::{Kafka, KafkaOptions, Tuning};
use crate::place::{Part, Place, StackLock};
use crate::ports::{Ports, WantedPorts};
use crate::postgres::{Postgres, PostgresOptions};
use crate::process::{self, Lifetime, Process, ProcessIdentity, Stop};
use crate::progress::Progress;
use crate::servers::Servers;
use crate::services::{self, Binaries, Relay};
use crate::state::State;
use crate::topics;

/// In the order in which they start.
const SERVICES: [Part; 2] = [Part::Logistics, Part::Commerce];

const MIGRATE_DEADLINE: Duration = Duration::from_secs(180);
const IMPORT_DEADLINE: Duration = Duration::from_secs(60);
const READY_DEADLINE: Duration = Duration::from_secs(60);
const SERVICE_STOP_DEADLINE: Duration = Duration::from_secs(30);

/// What may differ between stacks.
#[derive(Debug, Clone, Default)]
pub struct StackOptions {
    pub ports: WantedPorts,
    pub external: ExternalServers,
    /// What publishes the outbox; nothing leaves it to logistics-svc.
    pub relay: Option<Relay>,
    /// The servers are killed with this process and compile only quickly: for a run of tests.
    pub for_tests: bool,
}

/// Holds the stack's lock while it exists. Whatever still runs when it is dropped is killed; [`Stack::stop`] is the
/// orderly way.
pub struct Stack {
    place: Place,
    state: State,
    options: StackOptions,
    postgres: Option<Postgres>,
    kafka: Option<Kafka>,
    debezium: Option<Connect>,
    services: Vec<Process>,
    _lock: StackLock,
}

impl Stack {
    /// Takes possession of a stack that nothing runs of: chooses ports and where data goes, and remembers both.
    ///
    /// Errors when there is data whose passwords are lost.
    pub fn open(place: Place, lock: StackLock, options: StackOptions) -> anyhow::Result<Self> {
        let last = State::load(&place)?;
        let mut reserved = Vec::new();
        for (other, state) in State::load_all(place.root())? {
            if other.name() != place.name() {
                reserved.push(state.ports);
            }
        }
        let ports = Ports::choose(options.ports, last.as_ref().map(|state| state.ports), &reserved)?;
        let mut state = match last {
            Some(state) => State { ports, ..state },
            None => State::new(new_data_dir(&place)?, ports),
        };
        state.supervisor = ProcessIdentity::of_self();
        if let Some(password) = &options.external.role_password {
            state.role_password.clone_from(password);
        }
        state.database_url.clone_from(&options.external.database_url);
        state.kafka_brokers.clone_from(&options.external.kafka_brokers);
        state.relay = options.relay;
        state.save(&place)?;
        Ok(Self {
            place,
            state,
            options,
            postgres: None,
            kafka: None,
            debezium: None,
            services: Vec::new(),
            _lock: lock,
        })
    }

    pub fn place(&self) -> &Place {
        &self.place
    }

    pub fn state(&self) -> &State {
        &self.state
    }

    pub fn remember_sample_shipped(&mut self) -> anyhow::Result<()> {
        self.state.sample_shipped = true;
        self.state.save(&self.place)
    }

    /// Starts the servers that were not given from outside, both at once, and creates roles, database and topics.
    pub async fn start_servers(&mut self, servers: Option<&Servers>, progress: &Progress) -> anyhow::Result<()> {
        let (postgres, kafka) = tokio::try_join!(
            self.start_postgres(servers, progress),
            self.start_kafka(servers, progress)
        )?;
        self.postgres = postgres;
        self.kafka = kafka;

        let step = progress.step("creating roles, database and topics");
        self.create_database().await?;
        topics::create(
            &self.state.brokers(),
            &GroupTopics::new(SHIPMENTS, COMMERCE_GROUP),
            topics::DEFAULT_TIERS,
            DEFAULT_PARTITIONS,
        )
        .await?;
        step.done("roles, database and topics are there");
        Ok(())
    }

    async fn start_postgres(&self, servers: Option<&Servers>, progress: &Progress) -> anyhow::Result<Option<Postgres>> {
        if let Some(url) = &self.state.database_url {
            let step = progress.step("looking at the PostgreSQL of DATABASE_URL");
            external::check_postgres(url).await?;
            step.done("PostgreSQL of DATABASE_URL answers");
            return Ok(None);
        }
        let servers = servers.context("the stack's own PostgreSQL needs its programs")?;
        let step = progress.step("starting PostgreSQL");
        let options = PostgresOptions {
            dir: self.state.data_dir.join("postgres"),
            port: self.state.ports.postgres,
            password: self.state.postgres_password.clone(),
            log: self.place.log(Part::Postgres.name()),
            lifetime: self.lifetime(Part::Postgres),
            settings: Vec::new(),
        };
        let postgres = Postgres::start(servers, options).await?;
        step.done(&format!("PostgreSQL on 127.0.0.1:{}", self.state.ports.postgres));
        Ok(Some(postgres))
    }

    async fn start_kafka(&self, servers: Option<&Servers>, progress: &Progress) -> anyhow::Result<Option<Kafka>> {
        if let Some(brokers) = &self.state.kafka_brokers {
            let step = progress.step("looking at the Kafka of KAFKA_BROKERS");
            external::check_kafka(brokers).await?;
            step.done("Kafka of KAFKA_BROKERS answers");
            return Ok(None);
        }
        let servers = servers.context("the stack's own Kafka needs its programs")?;
        let step = progress.step("starting Kafka");
        let options = KafkaOptions {
            dir: self.state.data_dir.join("kafka"),
            java: Java::find()?.path,
            port: self.state.ports.kafka,
            controller_port: self.state.ports.kafka_controller,
            log: self.place.log(Part::Kafka.name()),
            tuning: self.tuning(),
            lifetime: self.lifetime(Part::Kafka),
        };
        let kafka = Kafka::start(servers, options).await?;
        step.done(&format!("Kafka on {}", kafka.brokers()));
        Ok(Some(kafka))
    }

    async fn create_database(&self) -> anyhow::Result<()> {
        let mut connection = self
            .state
            .maintenance_url()?
            .parse::<PgConnectOptions>()
            .context("parse the database URL")?
            .connect()
            .await
            .context("connect to PostgreSQL")?;
        if self.state.database_url.is_some() {
            external::ensure_roles(&mut connection, &self.state).await?;
        } else {
            database::ensure_roles(&mut connection, &self.state.role_password).await?;
        }
        database::ensure_database(&mut connection, &self.state.database()).await?;
        connection.close().await.context("close the connection")
    }

    /// The parts of this stack that run, ours or not.
    pub fn parts(&self) -> Vec<Part> {
        let runs = |part: &Part| match part {
            Part::Postgres | Part::Kafka => true,
            Part::Debezium => self.debezium.is_some(),
            Part::Logistics | Part::Commerce => !self.services.is_empty(),
        };
        Part::ALL.into_iter().filter(runs).collect()
    }

    /// Whether we start and stop that part.
    pub fn is_own(&self, part: Part) -> bool {
        match part {
            Part::Postgres => self.state.database_url.is_none(),
            Part::Kafka => self.state.kafka_brokers.is_none(),
            Part::Debezium | Part::Logistics | Part::Commerce => true,
        }
    }

    pub fn has_own_server(&self) -> bool {
        self.is_own(Part::Postgres) || self.is_own(Part::Kafka)
    }

    /// Applies the migrations of both services, starts both (after Debezium, where that is the relay), and waits until
    /// they say that they are ready.
    pub async fn start_services(
        &mut self,
        binaries: &Binaries,
        debezium: Option<&ConnectPrograms>,
        progress: &Progress,
    ) -> anyhow::Result<()> {
        let step = progress.step("applying migrations");
        for part in SERVICES {
            self.run_subcommand(binaries, part, &["migrate"], MIGRATE_DEADLINE)
                .await?;
        }
        step.done("migrations applied");
        if let Some(programs) = debezium {
            // Before the services: events committed before there is a slot would wait for the sweep.
            self.debezium = Some(self.start_debezium(programs, progress).await?);
        }

        let step = progress.step("starting the services");
        for (part, subcommand) in SERVICES.into_iter().zip(["all", "consume"]) {
            let command = binaries.command(part, &[subcommand], &self.state)?;
            let process = Process::spawn(part.name(), command, &self.place.log(part.name()), self.lifetime(part))?;
            self.services.push(process);
        }
        for (process, part) in self.services.iter_mut().zip(SERVICES) {
            let url = format!("{}/health/ready", self.state.address(part)?);
            health::wait_until_ready(process, &url, READY_DEADLINE).await?;
        }
        step.done("logistics-svc and commerce-consumer are ready");
        Ok(())
    }

    async fn start_debezium(&self, programs: &ConnectPrograms, progress: &Progress) -> anyhow::Result<Connect> {
        let step = progress.step("starting Debezium");
        let state = &self.state;
        let options = WorkerOptions {
            dir: state.data_dir.join("debezium"),
            java: Java::find()?.path,
            port: state.ports.debezium,
            log: self.place.log(Part::Debezium.name()),
            tuning: self.tuning(),
            lifetime: self.lifetime(Part::Debezium),
            connector: OutboxConnector {
                brokers: state.brokers(),
                database_url: state.role_url(database::RELAY, &state.database())?,
                slot: services::RELAY_SLOT.to_owned(),
                publication: services::RELAY_PUBLICATION.to_owned(),
                topic: SHIPMENTS.to_owned(),
            },
        };
        let debezium = Connect::start(programs, options).await?;
        step.done(&format!("Debezium streams from the slot `{}`", services::RELAY_SLOT));
        Ok(debezium)
    }

    /// Loads the sample in `dir` into commerce, in one transaction.
    pub async fn import(&self, binaries: &Binaries, dir: &Path) -> anyhow::Result<()> {
        let dir = dir.to_string_lossy();
        self.run_subcommand(binaries, Part::Commerce, &["import", &dir], IMPORT_DEADLINE)
            .await
    }

    async fn run_subcommand(
        &self,
        binaries: &Binaries,
        part: Part,
        args: &[&str],
        deadline: Duration,
    ) -> anyhow::Result<()> {
        let name = format!("{} {}", part.name(), args[0]);
        let log = self.place.log(&format!("{}-{}", part.name(), args[0]));
        process::run(&name, binaries.command(part, args, &self.state)?, &log, deadline).await
    }

    /// The first part found to have ended by itself, with its exit status and the end of its log.
    pub fn first_ended(&mut self) -> anyhow::Result<Option<String>> {
        let postgres = self.postgres.as_mut().and_then(Postgres::process);
        let kafka = self.kafka.as_mut().and_then(Kafka::process);
        let debezium = self.debezium.as_mut().and_then(Connect::process);
        for process in postgres
            .into_iter()
            .chain(kafka)
            .chain(debezium)
            .chain(&mut self.services)
        {
            if let Some(status) = process.exited()? {
                return Ok(Some(format!(
                    "{} ended ({status}); end of {}:\n{}",
                    process.name(),
                    process.log().display(),
                    process.log_tail(20)
                )));
            }
        }
        Ok(None)
    }

    /// Stops what was started, services before servers, each within a deadline. Goes on after an error, so that one
    /// stubborn process does not keep the others.
    pub async fn stop(mut self, progress: &Progress) -> anyhow::Result<()> {
        let mut trouble = Vec::new();
        let mut note = |name: &str, stop: anyhow::Result<Stop>| match stop {
            Ok(Stop::Clean) => {}
            Ok(Stop::Killed) => trouble.push(format!("{name} did not stop in time and was killed")),
            Err(error) => trouble.push(format!("{name}: {error:#}")),
        };
        if !self.services.is_empty() {
            let step = progress.step("stopping the services");
            for service in self.services.iter_mut().rev() {
                let stop = service.stop(Signal::SIGTERM, SERVICE_STOP_DEADLINE).await;
                note(service.name(), stop);
            }
            step.done("services stopped");
        }
        if let Some(debezium) = &mut self.debezium {
            let step = progress.step("stopping Debezium");
            note(Part::Debezium.name(), debezium.stop().await);
            step.done("Debezium stopped");
        }
        if let Some(kafka) = &mut self.kafka {
            let step = progress.step("stopping Kafka");
            note(Part::Kafka.name(), kafka.stop().await);
            step.done("Kafka stopped");
        }
        if let Some(postgres) = &mut self.postgres {
            let step = progress.step("stopping PostgreSQL");
            note(Part::Postgres.name(), postgres.stop_fast().await);
            step.done("PostgreSQL stopped");
        }
        self.state.supervisor = None;
        if let Err(error) = self.state.save(&self.place) {
            trouble.push(format!("{error:#}"));
        }
        if !trouble.is_empty() {
            bail!("{}", trouble.join("\n"));
        }
        Ok(())
    }

    fn tuning(&self) -> Tuning {
        if self.options.for_tests {
            Tuning::QuickStart
        } else {
            Tuning::Throughput
        }
    }

    fn lifetime(&self, part: Part) -> Lifetime {
        if self.options.for_tests {
            Lifetime::Bound
        } else {
            Lifetime::Recorded(self.place.record(part))
        }
    }
}

/// Data can outlive the state that holds its passwords: the one may be outside the checkout, the other is in it.
fn new_data_dir(place: &Place) -> anyhow::Result<PathBuf> {
    let dir = place.choose_data_dir(&Account::for_server()?);
    if dir.exists() {
        return Err(Failure::new(
            Exit::Usage,
            format!(
                "{} holds data of an earlier stack `{}`, and its passwords are lost with {}",
                dir.display(),
                place.name(),
                place.state_file().display()
            ),
            format!("./dev up --fresh --name {} deletes that data", place.name()),
        )
        .into());
    }
    Ok(dir)
}
