//! Servers that run already: used when their addresses are given, never started or stopped.

use std::time::Duration;

use anyhow::{Context, bail};
use reqwest::Url;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, PgConnection};

use crate::database;
use crate::failure::{Exit, Failure};
use crate::kafka;
use crate::place::Place;
use crate::state::State;

const DEADLINE: Duration = Duration::from_secs(10);

/// The addresses given by the caller.
#[derive(Debug, Clone, Default)]
pub struct ExternalServers {
    /// Of a login that may create roles and databases.
    pub database_url: Option<String>,
    pub kafka_brokers: Option<String>,
    /// Of the services' three roles, when they exist there already.
    pub role_password: Option<String>,
}

impl ExternalServers {
    /// Takes out the addresses of the stacks' own servers, this stack's and others': `eval "$(./dev env)"` puts them
    /// into the environment of every later command. Returns a line about each for the caller.
    pub fn take_out_own(&mut self, stacks: &[(Place, State)]) -> Vec<String> {
        let mut lines = Vec::new();
        let kafka = |state: &State| state.kafka_brokers.is_none().then_some(state.ports.kafka);
        let given = self.kafka_brokers.as_deref().unwrap_or_default();
        if let Some(name) = own(stacks, kafka, given.split(',').filter_map(broker_port)) {
            lines.push(format!(
                "not used: KAFKA_BROKERS={given}, the own Kafka of the stack `{name}`"
            ));
            self.kafka_brokers = None;
        }
        let postgres = |state: &State| state.database_url.is_none().then_some(state.ports.postgres);
        let port = self.database_url.as_deref().and_then(database_port);
        if let Some(name) = own(stacks, postgres, port.into_iter()) {
            lines.push(format!(
                "not used: DATABASE_URL, the own PostgreSQL of the stack `{name}`"
            ));
            self.database_url = None;
        }
        lines
    }

    /// The variable that names a server whose data `--fresh` cannot throw away.
    pub fn first_given(&self) -> Option<&'static str> {
        let postgres = self.database_url.as_ref().map(|_| "DATABASE_URL");
        postgres.or(self.kafka_brokers.as_ref().map(|_| "KAFKA_BROKERS"))
    }
}

/// The name of the first stack whose own server has one of `ports` on this machine.
fn own(
    stacks: &[(Place, State)],
    own_port: impl Fn(&State) -> Option<u16>,
    mut ports: impl Iterator<Item = u16>,
) -> Option<String> {
    let owner = |port| stacks.iter().find(|(_, state)| own_port(state) == Some(port));
    ports.find_map(owner).map(|(place, _)| place.name().to_owned())
}

/// `None` for an address on another machine.
fn broker_port(broker: &str) -> Option<u16> {
    let (host, port) = broker.trim().rsplit_once(':')?;
    is_here(host).then(|| port.parse().ok())?
}

/// `None` for an address on another machine.
fn database_port(url: &str) -> Option<u16> {
    let url = Url::parse(url).ok()?;
    is_here(url.host_str()?).then(|| url.port().unwrap_or(5432))
}

/// Own servers listen nowhere else.
fn is_here(host: &str) -> bool {
    matches!(host, "127.0.0.1" | "localhost")
}

/// Errors when the server does not answer or cannot serve a WAL relay.
pub async fn check_postgres(url: &str) -> anyhow::Result<()> {
    let unreachable = || {
        Failure::new(
            Exit::Dependency,
            "the PostgreSQL of DATABASE_URL cannot be reached",
            "check DATABASE_URL, or unset it to have a server started",
        )
    };
    let options: PgConnectOptions = url.parse().with_context(unreachable)?;
    let mut connection = tokio::time::timeout(DEADLINE, options.connect())
        .await
        .with_context(unreachable)?
        .with_context(unreachable)?;
    let wal_level: String = sqlx::query_scalar("SHOW wal_level")
        .fetch_one(&mut connection)
        .await
        .context("ask for wal_level")?;
    connection.close().await.context("close the connection")?;
    if wal_level != "logical" {
        return Err(Failure::new(
            Exit::Dependency,
            format!("the PostgreSQL of DATABASE_URL has wal_level={wal_level}, and the relay reads logical WAL"),
            "ALTER SYSTEM SET wal_level = 'logical', then restart it",
        )
        .into());
    }
    Ok(())
}

pub async fn check_kafka(brokers: &str) -> anyhow::Result<()> {
    if !kafka::answers(brokers.to_owned(), DEADLINE).await? {
        bail!(Failure::new(
            Exit::Dependency,
            "the Kafka of KAFKA_BROKERS cannot be reached",
            "check KAFKA_BROKERS, or unset it to have a broker started",
        ));
    }
    Ok(())
}

/// Creates the roles when none of them exists. Roles that exist belong to somebody: their passwords are not changed,
/// only tried.
pub async fn ensure_roles(connection: &mut PgConnection, state: &State) -> anyhow::Result<()> {
    let existing = database::existing_roles(connection).await?;
    if existing.is_empty() {
        return database::ensure_roles(connection, &state.role_password).await;
    }
    for role in [database::LOGISTICS, database::RELAY, database::COMMERCE] {
        let options: PgConnectOptions = state
            .role_url(role, "postgres")?
            .parse()
            .context("parse a role's URL")?;
        let attempt = options.connect().await;
        match attempt {
            Ok(connection) => connection.close().await.context("close the connection")?,
            Err(error) => {
                return Err(anyhow::Error::new(error).context(Failure::new(
                    Exit::Dependency,
                    format!("the role {role} cannot log in to the PostgreSQL of DATABASE_URL"),
                    "set DEVSTACK_ROLE_PASSWORD to the password of the three roles, or drop them to have them created",
                )));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::ports::Ports;

    fn stack(name: &str, postgres: u16, kafka: u16) -> (Place, State) {
        let ports = Ports {
            postgres,
            kafka,
            kafka_controller: 1,
            debezium: 4,
            logistics: 2,
            commerce: 3,
        };
        let place = Place::new(Path::new("/nowhere"), name).unwrap();
        (place, State::new(PathBuf::from("/nowhere/data"), ports))
    }

    #[test]
    fn addresses_of_any_stacks_own_servers_are_taken_out() {
        let stacks = [stack("a", 15432, 19092), stack("b", 15433, 19093)];
        let mut given = ExternalServers {
            database_url: Some("postgres://postgres:x@localhost:15432/shop".to_owned()),
            kafka_brokers: Some("127.0.0.1:19093".to_owned()),
            role_password: None,
        };
        let lines = given.take_out_own(&stacks);
        assert!(lines[0].contains("Kafka of the stack `b`"), "{lines:?}");
        assert!(lines[1].contains("PostgreSQL of the stack `a`"), "{lines:?}");
        assert_eq!(given.first_given(), None);
    }

    #[test]
    fn servers_elsewhere_and_those_that_a_stack_was_given_stay() {
        let mut user = stack("user", 15432, 19092);
        user.1.database_url = Some("postgres://postgres:x@127.0.0.1:15432/".to_owned());
        user.1.kafka_brokers = Some("127.0.0.1:19092".to_owned());
        let mut given = ExternalServers {
            database_url: user.1.database_url.clone(),
            kafka_brokers: Some("127.0.0.1:19092, broker.example:19093".to_owned()),
            role_password: None,
        };
        assert!(given.take_out_own(&[user, stack("b", 15433, 19093)]).is_empty());
        assert_eq!(given.first_given(), Some("DATABASE_URL"));
    }
}
