//! The two services: how they are told about a stack, in the variables that they document.

use std::path::PathBuf;
use std::process::Command;

use shared_events::topics::{COMMERCE_GROUP, SHIPMENTS};

use serde::{Deserialize, Serialize};

use crate::database;
use crate::place::Part;
use crate::state::State;

/// The replication slot and the publication of the outbox, as logistics-svc has them by default.
pub const RELAY_SLOT: &str = "logistics_outbox";
pub const RELAY_PUBLICATION: &str = "logistics_outbox";

/// What publishes the outbox: the values of `RELAY_MODE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Relay {
    /// The write-ahead log, and polling while that is broken.
    Auto,
    /// logistics-svc, from the write-ahead log.
    Wal,
    /// logistics-svc, by polling the table.
    Poll,
    /// logistics-svc, right after each commit.
    AfterCommit,
    /// Debezium, in a Kafka Connect of the stack's own.
    External,
}

impl Relay {
    fn mode(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Wal => "wal",
            Self::Poll => "poll",
            Self::AfterCommit => "after-commit",
            Self::External => "external",
        }
    }
}

/// The built binaries.
#[derive(Debug, Clone)]
pub struct Binaries {
    pub logistics: PathBuf,
    pub commerce: PathBuf,
}

/// Every variable of both services for a stack, in their order of configuration.
pub fn variables(state: &State) -> anyhow::Result<Vec<(&'static str, String)>> {
    let database = state.database();
    let owner = state.superuser_url(&database)?;
    let mut variables = vec![
        (
            "LOGISTICS_DATABASE_URL",
            state.role_url(database::LOGISTICS, &database)?,
        ),
        (
            "LOGISTICS_RELAY_DATABASE_URL",
            state.role_url(database::RELAY, &database)?,
        ),
        ("LOGISTICS_MIGRATION_DATABASE_URL", owner.clone()),
        ("LOGISTICS_LISTEN", format!("127.0.0.1:{}", state.ports.logistics)),
        ("COMMERCE_DATABASE_URL", state.role_url(database::COMMERCE, &database)?),
        ("COMMERCE_MIGRATION_DATABASE_URL", owner),
        ("COMMERCE_LISTEN", format!("127.0.0.1:{}", state.ports.commerce)),
        ("COMMERCE_GROUP", COMMERCE_GROUP.to_owned()),
        ("KAFKA_BROKERS", state.brokers()),
        ("SHIPMENTS_TOPIC", SHIPMENTS.to_owned()),
        ("ADMIN_TOKENS", format!("dev:admin:{}", state.admin_token)),
    ];
    if let Some(relay) = state.relay {
        variables.push(("RELAY_MODE", relay.mode().to_owned()));
    }
    Ok(variables)
}

impl Binaries {
    /// A subcommand of the service that is `part`, with the stack's variables.
    pub fn command(&self, part: Part, args: &[&str], state: &State) -> anyhow::Result<Command> {
        let binary = match part {
            Part::Commerce => &self.commerce,
            _ => &self.logistics,
        };
        let mut command = Command::new(binary);
        command.args(args).envs(variables(state)?).env("LOG_FORMAT", "json");
        Ok(command)
    }
}
