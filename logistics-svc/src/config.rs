use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use service_runtime::{
    auth::AuthSettings, database::PoolSettings, http::HttpSettings, kafka::KafkaSettings, settings::Secret,
    supervise::ProcessSettings,
};

use crate::cli::FlagCommand;

const EXAMPLES: &str = "\
Examples:
  LOGISTICS_DATABASE_URL=postgres://logistics_svc:…@db/shop logistics-svc all
  logistics-svc config show --config logistics.toml";

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 failed while running, 2 usage or configuration error, 3 a dependency could not be reached,
130 and 143 stopped by SIGINT and SIGTERM after a clean drain.";

/// Takes the warehouse's shipments, and announces every change on Kafka.
#[derive(Debug, Parser)]
#[command(name = "logistics-svc", version, before_help = EXAMPLES, after_help = EXIT_CODES)]
pub struct Cli {
    /// TOML file with settings, named as the long flags; flags and environment are stronger.
    #[arg(long, env = "CONFIG_FILE", global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the REST interface.
    Api(ServeSettings),
    /// Relay committed events to Kafka.
    Relay(RelaySettings),
    /// Both in one process.
    All(ServeSettings),
    /// Apply the missing migrations and end.
    Migrate(MigrateSettings),
    /// Look at the flag between outbox and synchronous path, set it, roll a value out.
    Flag(FlagCommand),
    /// Print the settings in force, or their reference.
    Config(ConfigCommand),
}

/// Of the processes that serve the REST interface, with a relay or without.
#[derive(Debug, Clone, Args)]
pub struct ServeSettings {
    #[command(flatten)]
    pub database: DatabaseSettings,
    #[command(flatten)]
    pub listen: ListenSettings,
    #[command(flatten)]
    pub http: HttpSettings,
    #[command(flatten)]
    pub events: EventSettings,
    #[command(flatten)]
    pub switch: SwitchSettings,
    #[command(flatten)]
    pub source: RelaySourceSettings,
    #[command(flatten)]
    pub kafka: KafkaSettings,
    #[command(flatten)]
    pub auth: AuthSettings,
    #[command(flatten)]
    pub process: ProcessSettings,
}

#[derive(Debug, Clone, Args)]
pub struct RelaySettings {
    #[command(flatten)]
    pub database: DatabaseSettings,
    #[command(flatten)]
    pub listen: ListenSettings,
    #[command(flatten)]
    pub http: HttpSettings,
    #[command(flatten)]
    pub source: RelaySourceSettings,
    #[command(flatten)]
    pub kafka: KafkaSettings,
    #[command(flatten)]
    pub auth: AuthSettings,
    #[command(flatten)]
    pub process: ProcessSettings,
}

#[derive(Debug, Clone, Args)]
pub struct MigrateSettings {
    /// PostgreSQL URL of the schema's owner.
    #[arg(long, env = "LOGISTICS_MIGRATION_DATABASE_URL", hide_env_values = true)]
    pub logistics_migration_database_url: Secret,
}

#[derive(Debug, Args)]
pub struct ConfigCommand {
    pub what: ConfigOutput,
    #[command(flatten)]
    pub settings: ServeSettings,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ConfigOutput {
    /// Each setting with its value and where it comes from; secrets are hidden.
    Show,
    /// The reference of all settings as a Markdown table.
    Docs,
}

#[derive(Debug, Clone, Args)]
pub struct DatabaseSettings {
    /// PostgreSQL URL of the role `logistics_svc`, `postgres://USER:PASSWORD@HOST:PORT/DATABASE?sslmode=verify-full`.
    /// While it does not answer, the process lives on and is not ready.
    #[arg(
        long,
        env = "LOGISTICS_DATABASE_URL",
        default_value = "postgres://logistics_svc@127.0.0.1:5432/shop",
        hide_env_values = true
    )]
    pub logistics_database_url: Secret,
    /// PostgreSQL URL of the schema's owner. When given, missing migrations are applied at start; when not, the start
    /// is refused if one is missing.
    #[arg(long, env = "LOGISTICS_MIGRATION_DATABASE_URL", hide_env_values = true)]
    pub logistics_migration_database_url: Option<Secret>,
    #[command(flatten)]
    pub pool: PoolSettings,
}

#[derive(Debug, Clone, Args)]
pub struct ListenSettings {
    /// Address and port of the REST interface, health and metrics. One that is taken stops the start.
    #[arg(long, env = "LOGISTICS_LISTEN", default_value = "127.0.0.1:8080")]
    pub logistics_listen: SocketAddr,
}

#[derive(Debug, Clone, Args)]
pub struct EventSettings {
    /// Largest event in bytes, as a Kafka record with key and headers. A change whose event is larger gets a 413. A value
    /// above the topic's `max.message.bytes` lets events in that the broker refuses for ever.
    #[arg(long, env = "MAX_EVENT_BYTES", default_value = "1000000", value_parser = clap::value_parser!(u32).range(1_000..=1_048_576))]
    pub max_event_bytes: u32,
    /// `true` serves `POST /load-test/outbox`, which appends events of shipments that do not exist. Never where the events are believed.
    #[arg(long, env = "LOAD_TEST_ENDPOINT", default_value_t = false, action = clap::ArgAction::Set, value_name = "BOOL")]
    pub load_test_endpoint: bool,
}

#[derive(Debug, Clone, Args)]
pub struct SwitchSettings {
    /// Commerce's consumer group, whose inbox the synchronous path writes to (modes `legacy` and `shadow` of the flag). With another
    /// name than commerce's own, held keys are not seen, and neither is how far commerce is.
    #[arg(long, env = "COMMERCE_GROUP", default_value = shared_events::topics::COMMERCE_GROUP)]
    pub commerce_group: String,
}

/// How events come from the outbox to Kafka.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RelayMode {
    /// From the write-ahead log, in commit order, at once.
    Wal,
    /// From the table; several instances share the keys.
    Poll,
    /// The API publishes at once after each commit; the relay sends from the table what it could not.
    AfterCommit,
    /// Debezium, or another, publishes from the same table; the relay sends from it what was not published.
    External,
    /// From the log while it is healthy, from the table meanwhile.
    Auto,
}

/// Which marks an outbox row gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RelayLifecycle {
    /// None; the log's position says what is published. Modes that read the table set the mark of publication all the same.
    Off,
    /// When the broker has acknowledged the event.
    Published,
    /// Also when the product's own group has read it back.
    Full,
}

#[derive(Debug, Clone, Args)]
pub struct RelaySourceSettings {
    /// How events come from the outbox to Kafka. `api` needs to know of `after-commit` only; give every process the same.
    #[arg(long, env = "RELAY_MODE", value_enum, default_value = "auto")]
    pub relay_mode: RelayMode,
    /// Which marks a row gets: `off` saves the relay's writes to the table, `full` proves that each event can be read.
    #[arg(long, env = "RELAY_LIFECYCLE", value_enum, default_value = "published")]
    pub relay_lifecycle: RelayLifecycle,
    /// PostgreSQL URL of the role `logistics_relay`, which has REPLICATION. Default: the service's own URL.
    #[arg(long, env = "LOGISTICS_RELAY_DATABASE_URL", hide_env_values = true)]
    pub logistics_relay_database_url: Option<Secret>,
    /// Replication slot, of `a-z0-9_`. One relay at a time works on it, others stand by; two slots publish every event
    /// twice.
    #[arg(long, env = "RELAY_SLOT", default_value = "logistics_outbox")]
    pub relay_slot: String,
    /// Publication of the outbox table. A name that does not exist keeps the relay failing, and not ready.
    #[arg(long, env = "RELAY_PUBLICATION", default_value = "logistics_outbox")]
    pub relay_publication: String,
    /// Most bytes of write-ahead log that the server may keep for the slot. Past it, `auto` drops the slot and goes on from
    /// the table until the backlog is published; `wal` only raises the alarm. Keep it well below the log's volume.
    #[arg(long, env = "RELAY_WAL_BUDGET_BYTES", default_value = "1073741824", value_parser = clap::value_parser!(u64).range(16_777_216..))]
    pub relay_wal_budget_bytes: u64,
    /// Longest time that the slot may stand still with log behind it, with the same consequence.
    #[arg(long, env = "RELAY_WAL_BUDGET_AGE", default_value = "15min", value_parser = humantime::parse_duration)]
    pub relay_wal_budget_age: Duration,
    /// Longest pause of a relay that reads the table and finds nothing. Short costs queries, long is latency.
    #[arg(long, env = "RELAY_POLL_INTERVAL", default_value = "200ms", value_parser = humantime::parse_duration)]
    pub relay_poll_interval: Duration,
    /// Events that are unsent for longer, although their source should have brought them, are sent from the table. In mode
    /// `external` the time that the other publisher has.
    #[arg(long, env = "RELAY_SWEEP_AFTER", default_value = "1min", value_parser = humantime::parse_duration)]
    pub relay_sweep_after: Duration,
    /// Events that are published and not read back for longer are sent again (lifecycle `full`, mode `external`).
    #[arg(long, env = "RELAY_CONFIRM_WITHIN", default_value = "5min", value_parser = humantime::parse_duration)]
    pub relay_confirm_within: Duration,
    /// Consumer group that reads the topic back.
    #[arg(long, env = "RELAY_CONFIRM_GROUP", default_value = "logistics-outbox")]
    pub relay_confirm_group: String,
    /// How long published events stay in the outbox; then their day is dropped as a whole.
    #[arg(long, env = "OUTBOX_RETENTION", default_value = "7days", value_parser = parse_retention)]
    pub outbox_retention: Duration,
    /// Topic of the events. It must exist; the relay never creates it.
    #[arg(long, env = "SHIPMENTS_TOPIC", default_value = shared_events::topics::SHIPMENTS)]
    pub shipments_topic: String,
    /// Most events sent and not yet acknowledged by the broker, counted. Few slow the relay, many cost memory.
    #[arg(long, env = "RELAY_MAX_IN_FLIGHT", default_value = "10000", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub relay_max_in_flight: u32,
    /// Most bytes of them; bounds the relay's memory while the broker is away.
    #[arg(long, env = "RELAY_MAX_IN_FLIGHT_BYTES", default_value = "33554432", value_parser = clap::value_parser!(u32).range(1_048_576..))]
    pub relay_max_in_flight_bytes: u32,
    /// How long the producer waits to fill a batch, e.g. `1ms`. It is added to every event's latency.
    #[arg(long, env = "RELAY_LINGER", default_value = "1ms", value_parser = humantime::parse_duration)]
    pub relay_linger: Duration,
}

/// The database refuses less than an hour: a typing error must not empty the outbox.
fn parse_retention(text: &str) -> Result<Duration, String> {
    let retention = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if retention < Duration::from_secs(2 * 60 * 60) {
        return Err("it must be 2 hours or more".to_owned());
    }
    Ok(retention)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use clap::CommandFactory;
    use service_runtime::settings;

    use super::Cli;

    fn args<'a>(list: &'a [&'a str]) -> impl Iterator<Item = OsString> + 'a {
        list.iter().map(OsString::from)
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_setting_has_a_variable_and_a_meaning() {
        let (_, effective) = settings::parse_from::<Cli>(args(&[
            "logistics-svc",
            "config",
            "docs",
            "--logistics-database-url=postgres://u:hunter2@h/d",
        ]))
        .unwrap();
        for line in effective.to_markdown().lines().skip(2) {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            assert!(cells[2].len() > 2 && cells[4].len() > 20, "{line}");
        }
        assert!(!effective.to_text().contains("hunter2"), "{}", effective.to_text());
    }
}
