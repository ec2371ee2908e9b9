use std::{str::FromStr, time::Duration};

use devstack::{
    database::{COMMERCE, LOGISTICS, RELAY},
    ports,
    testing::{PrivateKafka, PrivatePostgres, Service, TestDatabase, TestServers, TestTopics, binary},
};
use sqlx::{PgPool, postgres::PgConnectOptions, postgres::PgPoolOptions};
use uuid::Uuid;

/// Retry delays short enough for a test and far enough apart to tell the tiers from each other.
pub const RETRY_DELAYS: &str = "300ms,600ms,900ms";
/// Tiers of [`RETRY_DELAYS`].
pub const TIERS: usize = 3;
/// As in production.
pub const PARTITIONS: i32 = 12;
/// Most instances of the consumer.
pub const CONSUMERS: usize = 8;

const MIGRATION_DEADLINE: Duration = Duration::from_secs(60);

/// Addresses and names that the processes of one pair share.
pub struct Place {
    pub owner_url: String,
    pub logistics_url: String,
    pub relay_url: String,
    pub commerce_url: String,
    pub brokers: String,
    pub slot: String,
    pub api_port: u16,
    pub relay_port: u16,
    pub other_relay_port: u16,
    pub consumer_ports: Vec<u16>,
    pub topics: TestTopics,
    // Dropped last: what runs in it is gone by then.
    _database: Option<TestDatabase>,
}

impl Place {
    /// A database and topics of its own on the run's shared servers.
    ///
    /// # Errors
    /// If the servers are not there.
    pub async fn shared() -> anyhow::Result<Self> {
        Self::with_partitions(PARTITIONS).await
    }

    /// The same, with so many partitions in each topic.
    ///
    /// # Errors
    /// If the servers are not there.
    pub async fn with_partitions(partitions: i32) -> anyhow::Result<Self> {
        let servers = TestServers::from_env()?;
        let topics = TestTopics::create(&servers, TIERS, partitions).await?;
        // Migrated by the services themselves, as in production: the template only saves doing it for each test.
        let database = TestDatabase::create(&servers, "pair", &build_fingerprint()?, migrate).await?;
        Self::new(
            [
                database.superuser_url(),
                database.url_for(LOGISTICS)?,
                database.url_for(RELAY)?,
                database.url_for(COMMERCE)?,
            ],
            servers.brokers().to_owned(),
            topics,
            Some(database),
        )
    }

    /// On servers that the test may stop and kill.
    ///
    /// # Errors
    /// If the migrations fail.
    pub async fn private(postgres: &PrivatePostgres, kafka: &PrivateKafka) -> anyhow::Result<Self> {
        let topics = TestTopics::create_on(&kafka.brokers(), TIERS, PARTITIONS).await?;
        migrate(&postgres.superuser_url()).await?;
        let urls = [
            postgres.superuser_url(),
            postgres.role_url(LOGISTICS),
            postgres.role_url(RELAY),
            postgres.role_url(COMMERCE),
        ];
        Self::new(urls, kafka.brokers(), topics, None)
    }

    fn new(
        [owner_url, logistics_url, relay_url, commerce_url]: [String; 4],
        brokers: String,
        topics: TestTopics,
        database: Option<TestDatabase>,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            owner_url,
            logistics_url,
            relay_url,
            commerce_url,
            brokers,
            slot: format!("e2e_{}", Uuid::now_v7().simple()),
            api_port: ports::reserve()?,
            relay_port: ports::reserve()?,
            other_relay_port: ports::reserve()?,
            consumer_ports: (0..CONSUMERS).map(|_| ports::reserve()).collect::<Result<_, _>>()?,
            topics,
            _database: database,
        })
    }

    /// The checker's own connections, as the owner of both schemas.
    ///
    /// # Errors
    /// A URL that does not parse.
    pub fn owner_pool(&self) -> anyhow::Result<PgPool> {
        let options = PgConnectOptions::from_str(&self.owner_url)?;
        let pool = PgPoolOptions::new()
            .max_connections(3)
            .acquire_timeout(Duration::from_secs(30));
        Ok(pool.connect_lazy_with(options))
    }
}

/// Both services' own `migrate`.
async fn migrate(owner_url: &str) -> anyhow::Result<()> {
    for (service, variable) in [
        ("logistics-svc", "LOGISTICS_MIGRATION_DATABASE_URL"),
        ("commerce-consumer", "COMMERCE_MIGRATION_DATABASE_URL"),
    ] {
        let mut migration = Service::spawn(&binary(service)?, &["migrate"], &[(variable, owner_url)])?;
        let status = migration.wait(MIGRATION_DEADLINE).await?;
        anyhow::ensure!(status.success(), "{service} migrate: {status}\n{}", migration.log()?);
    }
    Ok(())
}

/// A template made by an older build must not be taken for this one's.
fn build_fingerprint() -> anyhow::Result<String> {
    let mut newest = 0;
    for service in ["logistics-svc", "commerce-consumer"] {
        let modified = std::fs::metadata(binary(service)?)?.modified()?;
        newest = newest.max(modified.duration_since(std::time::UNIX_EPOCH)?.as_millis());
    }
    Ok(format!("{newest:x}"))
}
