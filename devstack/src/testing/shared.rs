use anyhow::Context;
use reqwest::Url;
use sqlx::postgres::PgConnectOptions;

use crate::state::with_login;

/// The superuser's URL of the run's PostgreSQL.
pub const TEST_DATABASE_URL: &str = "TEST_DATABASE_URL";
/// The bootstrap address of the run's Kafka.
pub const KAFKA_BROKERS: &str = "KAFKA_BROKERS";
/// The password of the services' three roles.
pub const ROLE_PASSWORD: &str = "TEST_ROLE_PASSWORD";

/// The servers that all tests of a run share.
#[derive(Clone)]
pub struct TestServers {
    superuser: PgConnectOptions,
    superuser_url: Url,
    brokers: String,
    role_password: String,
}

impl TestServers {
    /// Reads where the servers are.
    ///
    /// Errors with what to type when the variables are missing.
    pub fn from_env() -> anyhow::Result<Self> {
        Self::new(
            &variable(TEST_DATABASE_URL)?,
            &variable(KAFKA_BROKERS)?,
            &variable(ROLE_PASSWORD)?,
        )
        .with_context(|| format!("{TEST_DATABASE_URL} is not a database URL"))
    }

    pub(super) fn new(superuser_url: &str, brokers: &str, role_password: &str) -> anyhow::Result<Self> {
        Ok(Self {
            superuser: superuser_url.parse()?,
            superuser_url: Url::parse(superuser_url)?,
            brokers: brokers.to_owned(),
            role_password: role_password.to_owned(),
        })
    }

    pub fn brokers(&self) -> &str {
        &self.brokers
    }

    /// The superuser's URL of a database.
    pub fn superuser_url(&self, database: &str) -> String {
        let mut url = self.superuser_url.clone();
        url.set_path(database);
        url.into()
    }

    /// The URL of a database for one of the roles in [`crate::database`].
    pub fn role_url(&self, role: &str, database: &str) -> anyhow::Result<String> {
        with_login(self.superuser_url.clone(), role, &self.role_password, database)
    }

    pub(super) fn superuser(&self, database: &str) -> PgConnectOptions {
        self.superuser.clone().database(database)
    }
}

fn variable(name: &str) -> anyhow::Result<String> {
    std::env::var(name).with_context(|| {
        format!("{name} is not set: run `./dev test`, or `./dev up --only-servers` and `eval \"$(./dev env)\"`")
    })
}
