use std::fs;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection};
use uuid::Uuid;

use crate::connect::{Connect, ConnectPrograms, OutboxConnector, WorkerOptions};
use crate::database;
use crate::java::Java;
use crate::kafka::{Kafka, KafkaOptions, Tuning};
use crate::ports;
use crate::postgres::{Postgres, PostgresOptions};
use crate::process::Lifetime;
use crate::progress::Progress;
use crate::servers::Servers;
use crate::testing::TestServers;

/// A PostgreSQL server of one test on a port of its own, with the services' roles. Killed and removed when dropped.
pub struct PrivatePostgres {
    server: Postgres,
    role_password: String,
    // After the server, so that its files go when it is dead.
    _dir: ScratchDir,
}

impl PrivatePostgres {
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_with(&[]).await
    }

    /// With server settings beside the usual ones, and stronger.
    pub async fn start_with(settings: &[(&'static str, &'static str)]) -> anyhow::Result<Self> {
        let dir = ScratchDir::create("postgres")?;
        let options = PostgresOptions {
            dir: dir.path().to_owned(),
            port: ports::reserve()?,
            password: Uuid::new_v4().simple().to_string(),
            log: dir.path().join("postgres.log"),
            lifetime: Lifetime::Bound,
            settings: settings.to_vec(),
        };
        let server = Postgres::start(&cached_servers()?, options).await?;
        let role_password = Uuid::new_v4().simple().to_string();
        let mut connection = server
            .url("postgres")
            .parse::<PgConnectOptions>()
            .context("parse the server's URL")?
            .connect()
            .await
            .context("connect to the private PostgreSQL")?;
        database::ensure_roles(&mut connection, &role_password).await?;
        database::ensure_database(&mut connection, database::DATABASE).await?;
        connection.close().await.context("close the connection")?;
        Ok(Self {
            server,
            role_password,
            _dir: dir,
        })
    }

    /// The database [`database::DATABASE`] for one of the roles in [`crate::database`].
    pub fn role_url(&self, role: &str) -> String {
        self.server.url_for(role, &self.role_password, database::DATABASE)
    }

    /// The database [`database::DATABASE`] for the superuser.
    pub fn superuser_url(&self) -> String {
        self.server.url(database::DATABASE)
    }

    /// This server and a broker in the place of the ones that all tests share.
    pub fn with_broker(&self, brokers: &str) -> anyhow::Result<TestServers> {
        TestServers::new(&self.server.url("postgres"), brokers, &self.role_password)
    }
}

impl Deref for PrivatePostgres {
    type Target = Postgres;

    fn deref(&self) -> &Postgres {
        &self.server
    }
}

impl DerefMut for PrivatePostgres {
    fn deref_mut(&mut self) -> &mut Postgres {
        &mut self.server
    }
}

/// A Kafka broker of one test on ports of its own. Killed and removed when dropped.
pub struct PrivateKafka {
    broker: Kafka,
    _dir: ScratchDir,
}

impl PrivateKafka {
    pub async fn start() -> anyhow::Result<Self> {
        let dir = ScratchDir::create("kafka")?;
        let options = KafkaOptions {
            dir: dir.path().to_owned(),
            java: Java::find()?.path,
            port: ports::reserve()?,
            controller_port: ports::reserve()?,
            log: dir.path().join("kafka.log"),
            tuning: Tuning::QuickStart,
            lifetime: Lifetime::Bound,
        };
        let broker = Kafka::start(&cached_servers()?, options).await?;
        Ok(Self { broker, _dir: dir })
    }
}

impl Deref for PrivateKafka {
    type Target = Kafka;

    fn deref(&self) -> &Kafka {
        &self.broker
    }
}

impl DerefMut for PrivateKafka {
    fn deref_mut(&mut self) -> &mut Kafka {
        &mut self.broker
    }
}

/// A Kafka Connect worker with Debezium of one test, its REST interface on a port of its own. Killed and removed when dropped.
pub struct PrivateConnect {
    worker: Connect,
    _dir: ScratchDir,
}

impl PrivateConnect {
    /// Streaming when it returns. The first use on a machine fetches Debezium through Maven.
    pub async fn start(connector: OutboxConnector) -> anyhow::Result<Self> {
        let dir = ScratchDir::create("debezium")?;
        let log = dir.path().join("debezium.log");
        let programs = ConnectPrograms::ensure(&log, &Progress::on_stderr()).await?;
        let options = WorkerOptions {
            dir: dir.path().to_owned(),
            java: Java::find()?.path,
            port: ports::reserve()?,
            log,
            tuning: Tuning::QuickStart,
            lifetime: Lifetime::Bound,
            connector,
        };
        let worker = Connect::start(&programs, options).await?;
        Ok(Self { worker, _dir: dir })
    }
}

impl Deref for PrivateConnect {
    type Target = Connect;

    fn deref(&self) -> &Connect {
        &self.worker
    }
}

impl DerefMut for PrivateConnect {
    fn deref_mut(&mut self) -> &mut Connect {
        &mut self.worker
    }
}

/// A directory that other accounts can enter, unlike the usual temporary one; removed when dropped.
struct ScratchDir(PathBuf);

impl ScratchDir {
    fn create(kind: &str) -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("devstack-{kind}-{}", Uuid::new_v4().simple()));
        fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o711))
            .with_context(|| format!("open {} to the server's account", path.display()))?;
        Ok(Self(path))
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        // The children of a killed postmaster may still write for a moment; a leftover in the temporary directory
        // must not fail a test that passed.
        for _ in 0..20 {
            if fs::remove_dir_all(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        super::report(&format!("could not remove {}", self.0.display()));
    }
}

fn cached_servers() -> anyhow::Result<Servers> {
    Servers::cached()?.context("the server programs are not in the cache: run `./dev test`")
}
