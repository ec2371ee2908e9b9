use std::{process::Command, time::Duration};

use anyhow::{Context, bail};
use devstack::{
    database::{COMMERCE, LOGISTICS, RELAY},
    process,
    topics::{self, DEFAULT_TIERS},
};
use shared_events::topics::GroupTopics;
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tempfile::TempDir;
use url::Url;
use uuid::Uuid;

use crate::{
    servers::{self, Servers},
    topic::Topic,
};

const MIGRATION_DEADLINE: Duration = Duration::from_secs(60);
/// A slot stays active for a moment after its reader was told to end.
const SLOT_DEADLINE: Duration = Duration::from_secs(10);

/// One contender's own database, topic and slots. Everything is named before anything is made, so that an interrupted
/// run can be removed wherever it stopped.
pub struct Place {
    database: String,
    maintenance: PgConnectOptions,
    pub owner_url: Url,
    pub logistics_url: Url,
    pub relay_url: Url,
    pub commerce_url: Url,
    pub brokers: String,
    pub topic: Topic,
    /// Of the commerce consumer, whose group bears the name of the place.
    pub group_topics: GroupTopics,
    /// The contender's replication slot.
    pub slot: String,
    /// Logs and files of its processes.
    pub dir: TempDir,
}

impl Place {
    /// Names it; nothing is made on the servers yet.
    ///
    /// # Errors
    /// If the servers' address does not do, or there is no temporary directory.
    pub fn new(servers: &Servers, partitions: i32) -> anyhow::Result<Self> {
        // No longer than names are in production: group and topic stand in each row of the inbox.
        let (unique, ..) = Uuid::new_v4().as_fields();
        let name = format!("load_{unique:08x}");
        Ok(Self {
            maintenance: servers
                .owner_url("postgres")
                .as_str()
                .parse()
                .context("the address of PostgreSQL")?,
            owner_url: servers.owner_url(&name),
            logistics_url: servers.role_url(LOGISTICS, &name)?,
            relay_url: servers.role_url(RELAY, &name)?,
            commerce_url: servers.role_url(COMMERCE, &name)?,
            brokers: servers.brokers.clone(),
            topic: Topic::new(&servers.brokers, &format!("{name}.shipments"), partitions),
            group_topics: GroupTopics::new(format!("{name}.shipments"), &name),
            slot: name.clone(),
            database: name,
            dir: tempfile::tempdir().context("create a directory")?,
        })
    }

    /// Makes database and topic, and applies the product's migrations.
    ///
    /// # Errors
    /// If a server does not answer, or a migration fails.
    pub async fn make(&self) -> anyhow::Result<()> {
        self.topic.create().await?;
        let mut connection = self.maintenance.connect().await.context("connect to PostgreSQL")?;
        sqlx::query(AssertSqlSafe(format!("CREATE DATABASE {}", self.database)))
            .execute(&mut connection)
            .await
            .context("create the database")?;
        connection.close().await.context("close the connection")?;
        let mut migrate = Command::new(servers::program("logistics-svc")?);
        migrate
            .arg("migrate")
            .env("LOGISTICS_MIGRATION_DATABASE_URL", self.owner_url.as_str());
        process::run(
            "logistics-svc migrate",
            migrate,
            &self.log("migrate"),
            MIGRATION_DEADLINE,
        )
        .await
    }

    /// Beside what [`Place::make`] made: commerce's schema, its retry topics and its dead-letter topic.
    ///
    /// # Errors
    /// If a server does not answer, or a migration fails.
    pub async fn make_commerce(&self) -> anyhow::Result<()> {
        let partitions = self.topic.partitions();
        topics::create(&self.brokers, &self.group_topics, DEFAULT_TIERS, partitions).await?;
        let mut migrate = Command::new(servers::program("commerce-consumer")?);
        migrate
            .arg("migrate")
            .env("COMMERCE_DATABASE_URL", self.commerce_url.as_str())
            .env("COMMERCE_MIGRATION_DATABASE_URL", self.owner_url.as_str());
        let log = self.log("migrate");
        process::run("commerce-consumer migrate", migrate, &log, MIGRATION_DEADLINE).await
    }

    /// A connection of the owner of everything.
    ///
    /// # Errors
    /// If PostgreSQL does not answer.
    pub async fn owner(&self) -> anyhow::Result<PgConnection> {
        let options: PgConnectOptions = self.owner_url.as_str().parse().context("the address of PostgreSQL")?;
        options.connect().await.context("connect to PostgreSQL")
    }

    /// Connections of the role that appends.
    ///
    /// # Errors
    /// If PostgreSQL does not answer.
    pub async fn appenders(&self, connections: u32) -> anyhow::Result<PgPool> {
        PgPoolOptions::new()
            .min_connections(connections)
            .max_connections(connections)
            .acquire_timeout(Duration::from_secs(30))
            .connect(self.logistics_url.as_str())
            .await
            .context("connect to PostgreSQL")
    }

    pub fn log(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(format!("{name}.log"))
    }

    /// Removes everything that bears its name, made or not.
    ///
    /// # Errors
    /// If a server does not answer, or a slot stays in use.
    pub async fn remove(self) -> anyhow::Result<()> {
        let topics = topics::delete(&self.brokers, &self.group_topics, DEFAULT_TIERS).await;
        let mut connection = self.maintenance.connect().await.context("connect to PostgreSQL")?;
        let exists: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)")
            .bind(&self.database)
            .fetch_one(&mut connection)
            .await
            .context("look for the database")?;
        if exists {
            drop_slots(&mut connection, &self.database).await?;
            sqlx::query(AssertSqlSafe(format!("DROP DATABASE {} WITH (FORCE)", self.database)))
                .execute(&mut connection)
                .await
                .context("drop the database")?;
        }
        connection.close().await.context("close the connection")?;
        topics
    }
}

async fn drop_slots(connection: &mut PgConnection, database: &str) -> anyhow::Result<()> {
    let deadline = tokio::time::Instant::now() + SLOT_DEADLINE;
    loop {
        sqlx::query("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE database = $1 AND active")
            .bind(database)
            .execute(&mut *connection)
            .await
            .context("end the readers of the slots")?;
        sqlx::query(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = $1 AND NOT active",
        )
        .bind(database)
        .execute(&mut *connection)
        .await
        .context("drop the slots")?;
        let left: i64 = sqlx::query_scalar("SELECT count(*) FROM pg_replication_slots WHERE database = $1")
            .bind(database)
            .fetch_one(&mut *connection)
            .await
            .context("count the slots")?;
        if left == 0 {
            return Ok(());
        }
        if tokio::time::Instant::now() >= deadline {
            bail!("{left} slots are still in use after {SLOT_DEADLINE:?}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
