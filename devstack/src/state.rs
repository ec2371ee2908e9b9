//! What a stack remembers between runs: its ports, passwords and where its data is.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use reqwest::Url;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::database::DATABASE;
use crate::place::{Part, Place};
use crate::ports::Ports;
use crate::postgres::SUPERUSER;
use crate::process::ProcessIdentity;
use crate::services::Relay;

/// Kept in `state.json`, readable for its owner alone.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Data of PostgreSQL and Kafka.
    pub data_dir: PathBuf,
    pub ports: Ports,
    /// Of the superuser of the stack's own PostgreSQL.
    pub postgres_password: String,
    /// Of the three roles of the services.
    pub role_password: String,
    /// Opens `/admin` of both services.
    #[serde(default = "secret")]
    pub admin_token: String,
    /// The superuser's URL of a PostgreSQL that is not ours (`DATABASE_URL`) in the present or last run.
    pub database_url: Option<String>,
    /// The address of a Kafka that is not ours (`KAFKA_BROKERS`) in the present or last run.
    pub kafka_brokers: Option<String>,
    /// What publishes the outbox in the present or last run; nothing given leaves it to logistics-svc.
    #[serde(default)]
    pub relay: Option<Relay>,
    /// The `./dev up` that holds the stack.
    pub supervisor: Option<ProcessIdentity>,
    /// The sample arrived in commerce, whole.
    pub sample_shipped: bool,
}

fn secret() -> String {
    Uuid::new_v4().simple().to_string()
}

impl State {
    pub fn new(data_dir: PathBuf, ports: Ports) -> Self {
        Self {
            data_dir,
            ports,
            postgres_password: secret(),
            role_password: secret(),
            admin_token: secret(),
            database_url: None,
            kafka_brokers: None,
            relay: None,
            supervisor: None,
            sample_shipped: false,
        }
    }

    /// The parts that a run has, ours or not.
    pub fn parts(&self) -> Vec<Part> {
        let has = |part: &Part| *part != Part::Debezium || self.relay == Some(Relay::External);
        Part::ALL.into_iter().filter(has).collect()
    }

    /// Host and port of a server (without any password), base URL of a service.
    pub fn address(&self, part: Part) -> anyhow::Result<String> {
        Ok(match part {
            Part::Postgres => {
                let url = self.server_url()?;
                format!(
                    "{}:{}",
                    url.host_str().unwrap_or("localhost"),
                    url.port().unwrap_or(5432)
                )
            }
            Part::Kafka => self.brokers(),
            Part::Debezium => format!("http://127.0.0.1:{}", self.ports.debezium),
            Part::Logistics => format!("http://127.0.0.1:{}", self.ports.logistics),
            Part::Commerce => format!("http://127.0.0.1:{}", self.ports.commerce),
        })
    }

    /// The bootstrap address of Kafka.
    pub fn brokers(&self) -> String {
        let own = || format!("127.0.0.1:{}", self.ports.kafka);
        self.kafka_brokers.clone().unwrap_or_else(own)
    }

    /// The database of both services' schemas: the one in `DATABASE_URL`, unless that is a maintenance database.
    pub fn database(&self) -> String {
        let given = self.database_url.as_deref().and_then(|url| Url::parse(url).ok());
        match given.as_ref().map(|url| url.path().trim_start_matches('/')) {
            None | Some("" | SUPERUSER | "template1") => DATABASE.to_owned(),
            Some(name) => name.to_owned(),
        }
    }

    /// The superuser's URL of the maintenance database.
    pub fn maintenance_url(&self) -> anyhow::Result<String> {
        self.superuser_url("postgres")
    }

    pub fn superuser_url(&self, database: &str) -> anyhow::Result<String> {
        let mut url = self.server_url()?;
        url.set_path(database);
        Ok(url.into())
    }

    /// For one of the roles in [`crate::database`].
    pub fn role_url(&self, role: &str, database: &str) -> anyhow::Result<String> {
        with_login(self.server_url()?, role, &self.role_password, database)
    }

    fn server_url(&self) -> anyhow::Result<Url> {
        let own = format!(
            "postgres://{SUPERUSER}:{}@127.0.0.1:{}",
            self.postgres_password, self.ports.postgres
        );
        Url::parse(self.database_url.as_ref().unwrap_or(&own)).context("read DATABASE_URL")
    }

    /// `None` when the stack was never started.
    pub fn load(place: &Place) -> anyhow::Result<Option<Self>> {
        let path = place.state_file();
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        let state = serde_json::from_slice(&bytes).with_context(|| {
            format!(
                "read {}; `./dev down --purge --name {}` starts over",
                path.display(),
                place.name()
            )
        })?;
        Ok(Some(state))
    }

    /// Of every stack under `root`, running or not. Another stack's broken state is its own affair.
    pub fn load_all(root: &Path) -> anyhow::Result<Vec<(Place, Self)>> {
        let mut states = Vec::new();
        for place in Place::all(root)? {
            if let Ok(Some(state)) = Self::load(&place) {
                states.push((place, state));
            }
        }
        Ok(states)
    }

    /// Replaces the file whole, so that a crash leaves the old or the new one.
    pub fn save(&self, place: &Place) -> anyhow::Result<()> {
        let path = place.state_file();
        let new = path.with_extension("json.new");
        let write = || -> anyhow::Result<()> {
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&new)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            Ok(())
        };
        write().with_context(|| format!("write {}", path.display()))
    }
}

/// The same server and parameters, with another login and database.
pub(crate) fn with_login(mut url: Url, role: &str, password: &str, database: &str) -> anyhow::Result<String> {
    url.set_username(role)
        .and_then(|()| url.set_password(Some(password)))
        .map_err(|()| anyhow!("the database URL has no place for a login"))?;
    url.set_path(database);
    Ok(url.into())
}
