use std::{collections::HashSet, net::SocketAddr, num::NonZeroU32, path::PathBuf, str::FromStr, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use inbox::{Handler, Rate};
use service_runtime::{
    auth::AuthSettings, database::PoolSettings, http::HttpSettings, kafka::KafkaSettings, settings::Secret,
    supervise::ProcessSettings,
};

use crate::{
    apply_shipment::{ApplyShipment, KNOWN_TYPES},
    cli,
    rebuild::RebuildSettings,
};

const EXAMPLES: &str = "\
Examples:
  COMMERCE_DATABASE_URL=postgres://commerce_svc:…@db/shop commerce-consumer consume
  commerce-consumer config show --config commerce.toml
  commerce-consumer dead-letters groups --state open";

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 failed while running, 2 usage or configuration error, 3 a dependency could not be reached,
4 done in part, 99 a redrive gave up by its abort ratio, 130 and 143 stopped by SIGINT and SIGTERM after a clean drain.";

/// The longest delay of a retry tier: its topic must keep records for longer than that.
const LONGEST_DELAY: Duration = Duration::from_secs(24 * 60 * 60);
const MOST_TIERS: usize = 10;
const LONGEST_RETENTION: Duration = Duration::from_secs(100 * 366 * 24 * 60 * 60);

/// Applies the warehouse's shipment events to commerce's orders, stock and timelines.
#[derive(Debug, Parser)]
#[command(name = "commerce-consumer", version, before_help = EXAMPLES, after_help = EXIT_CODES)]
pub struct Cli {
    /// TOML file with settings, named as the long flags; flags and environment are stronger.
    #[arg(long, env = "CONFIG_FILE", global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Consume shipment events, and serve what commerce knows over REST.
    Consume(ConsumeSettings),
    /// Apply the missing migrations and end.
    Migrate(MigrateSettings),
    /// Load orders, lines and products from CSV files, all or nothing. Safe to repeat.
    Import(ImportSettings),
    /// Add the dead letters that the table lacks and their topic has. Safe to repeat, also while the consumer runs.
    RebuildDeadLetters(Box<RebuildSettings>),
    /// Print the settings in force, or their reference.
    Config(ConfigCommand),
    #[command(flatten)]
    Operate(cli::Command),
}

#[derive(Debug, Clone, Args)]
pub struct ConsumeSettings {
    #[command(flatten)]
    pub database: DatabaseSettings,
    #[command(flatten)]
    pub listen: ListenSettings,
    #[command(flatten)]
    pub http: HttpSettings,
    #[command(flatten)]
    pub group: GroupSettings,
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
    #[arg(long, env = "COMMERCE_MIGRATION_DATABASE_URL", hide_env_values = true)]
    pub commerce_migration_database_url: Secret,
}

#[derive(Debug, Clone, Args)]
pub struct ImportSettings {
    /// Directory with orders.csv, order_lines.csv and products.csv. A broken file is refused by file, line and column.
    pub dir: PathBuf,
    #[command(flatten)]
    pub database: DatabaseSettings,
}

#[derive(Debug, Args)]
pub struct ConfigCommand {
    pub what: ConfigOutput,
    #[command(flatten)]
    pub settings: ConsumeSettings,
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
    /// PostgreSQL URL of the role `commerce_svc`, `postgres://USER:PASSWORD@HOST:PORT/DATABASE?sslmode=verify-full`.
    /// While it does not answer, events wait in Kafka and the process is not ready.
    #[arg(long, env = "COMMERCE_DATABASE_URL", hide_env_values = true)]
    pub commerce_database_url: Secret,
    /// PostgreSQL URL of the schema's owner. When given, missing migrations are applied at start; when not, the start
    /// is refused if one is missing.
    #[arg(long, env = "COMMERCE_MIGRATION_DATABASE_URL", hide_env_values = true)]
    pub commerce_migration_database_url: Option<Secret>,
    #[command(flatten)]
    pub pool: PoolSettings,
}

#[derive(Debug, Clone, Args)]
pub struct ListenSettings {
    /// Address and port of the REST interface, health and metrics. One that is taken stops the start.
    #[arg(long, env = "COMMERCE_LISTEN", default_value = "127.0.0.1:8081")]
    pub commerce_listen: SocketAddr,
}

#[derive(Debug, Clone, Args)]
pub struct GroupSettings {
    /// Topic of the events. It, its retry topics and its dead-letter topic must exist with equal partition counts;
    /// without them the start is refused.
    #[arg(long, env = "SHIPMENTS_TOPIC", default_value = shared_events::topics::SHIPMENTS)]
    pub shipments_topic: String,
    /// Consumer group, and the name under which its inbox rows stand. A new name reads the topic from its beginning;
    /// what took effect before does not take effect again.
    #[arg(long, env = "COMMERCE_GROUP", default_value = shared_events::topics::COMMERCE_GROUP)]
    pub commerce_group: String,
    /// Most events per second from the main topic, over all instances of the group, or `unlimited`. Too low a value
    /// lets the lag grow, too high a one lets a backlog slow the database for everyone. Give all instances the same.
    #[arg(long, env = "RATE_LIMIT", default_value = "5000")]
    pub rate_limit: Rate,
    /// The same for all retry topics together, on top of it.
    #[arg(long, env = "RETRY_RATE_LIMIT", default_value = "500")]
    pub retry_rate_limit: Rate,
    /// The same for parked events that are let go, on top of both: redriven dead letters, and what waited behind them.
    #[arg(long, env = "REDRIVE_RATE_LIMIT", default_value = "500")]
    pub redrive_rate_limit: Rate,
    #[command(flatten)]
    pub pace: PaceSettings,
    #[command(flatten)]
    pub membership: MembershipSettings,
    /// Delay of each retry tier in order, `5s,30s,5m`, or `none`: the first failure is then a dead letter. At most 10
    /// tiers of at most 1 day. With fewer tiers than before, records in a topic that is no longer read stay there.
    #[arg(long, env = "RETRY_DELAYS", default_value = "5s,30s,5m")]
    pub retry_delays: RetryDelays,
    /// Most events in one transaction, counted, at most 1000, also if several partitions share it. Small values cost throughput,
    /// large ones hold row locks for longer. A rate limit bounds a partition's batch as well, to about 1 % of the events per
    /// second that this instance may take.
    #[arg(long, env = "BATCH_LIMIT", default_value = "500", value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub batch_limit: u32,
    /// Most transactions open at once, counted; keep it below DATABASE_MAX_CONNECTIONS, or readers of the REST interface
    /// wait for a connection.
    #[arg(long, env = "MAX_TRANSACTIONS", default_value = "8", value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub max_transactions: u32,
    /// What becomes of an event of an unknown type: `skip`, because it may be meant for others, or `dead-letter`. One of a
    /// shipment that is skipped keeps its place in the shipment's sequence; as a dead letter it holds those behind it.
    #[arg(long, env = "UNKNOWN_TYPES", default_value = "skip")]
    pub unknown_types: UnknownTypes,
    #[command(flatten)]
    pub ordering: OrderingSettings,
    #[command(flatten)]
    pub flood: FloodSettings,
    /// How long archived dead letters stay in the table, `90days`, at least 1 minute; then they and their failed attempts are
    /// deleted. Their records stay in the dead-letter topic for as long as that keeps them.
    #[arg(long, env = "DEAD_LETTERS_RETENTION", default_value = "90days")]
    pub dead_letters_retention: Retention,
}

#[derive(Debug, Clone, Args)]
pub struct PaceSettings {
    /// Events per second below which a strained database does not push the group, or `none`: the rate limits then stand
    /// whatever the database does. With a floor they fall by 30 % while commits are slow or sessions wait for locks, and rise
    /// again by 5 % a second. Too low a floor lets the lag grow for as long as the strain lasts. Needs a RATE_LIMIT.
    #[arg(long, env = "RATE_FLOOR", default_value = "none")]
    pub rate_floor: Floor,
    /// A commit that takes longer, in the mean of a second, is slow. Too short a time slows down a healthy consumer.
    #[arg(long, env = "RATE_COMMIT_WITHIN", default_value = "50ms")]
    pub rate_commit_within: CommitWithin,
    /// Most sessions of the database that may wait for a lock, counted; one more is strain.
    #[arg(long, env = "RATE_LOCK_WAITS", default_value = "20")]
    pub rate_lock_waits: u32,
}

#[derive(Debug, Clone, Args)]
pub struct MembershipSettings {
    /// Who spreads the partitions: `classic`, the members among themselves, or `consumer`, the brokers (KIP-848, Kafka 4).
    /// Change it for one instance after the other; the group goes over by itself.
    #[arg(long, env = "GROUP_PROTOCOL", default_value = "classic")]
    pub group_protocol: GroupProtocol,
    /// A name of this instance that stays the same over its restarts, or `none`. With one, a restart that takes less than the
    /// session timeout moves no partition. Two instances with the same name end each other.
    #[arg(long, env = "GROUP_INSTANCE_ID", default_value = "none")]
    pub group_instance_id: InstanceId,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GroupProtocol {
    Classic,
    Consumer,
}

/// A rate, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Floor(pub Option<NonZeroU32>);

impl FromStr for Floor {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self(None));
        }
        let floor = text.parse().map(|floor| Self(Some(floor)));
        floor.map_err(|_| "expected events per second, a whole number from 1, or `none`".to_owned())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommitWithin(pub Duration);

impl FromStr for CommitWithin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let within = humantime::parse_duration(text).map_err(|error| error.to_string())?;
        if within.is_zero() || within > Duration::from_secs(60) {
            return Err("expected a time of at most 1 minute".to_owned());
        }
        Ok(Self(within))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceId(pub Option<String>);

impl FromStr for InstanceId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        match text {
            "none" => Ok(Self(None)),
            _ if text.is_empty() || text.len() > 249 || !text.bytes().all(plain) => {
                Err("expected 1 to 249 letters, digits, dots, underscores or hyphens, or `none`".to_owned())
            }
            _ => Ok(Self(Some(text.to_owned()))),
        }
    }
}

#[derive(Debug, Clone, Args)]
pub struct OrderingSettings {
    /// `per-key`: once an event of a shipment fails, the later ones of that shipment park behind it in the database and
    /// leave in order after it. `none`: nobody waits; commerce still refuses what is out of sequence, by way of the retry
    /// topics.
    #[arg(long, env = "ORDERING", default_value = "per-key")]
    pub ordering: Ordering,
    /// Most events parked behind one shipment, counted. One more stops its partition until the shipment is settled: the
    /// others of that partition wait as well.
    #[arg(long, env = "PARKED_PER_KEY", default_value = "1000", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub parked_per_key: u32,
    /// Most events parked in all, counted, about. One more stops the partition that brings it.
    #[arg(long, env = "PARKED_IN_ALL", default_value = "100000", value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    pub parked_in_all: u32,
    /// Event types whose dead letters let their shipment go on, `ShipmentHeld,ShipmentReleased`, or `none`. The dead letters
    /// of all other types hold it until a person has settled them. An effect that is left out stays left out.
    #[arg(long, env = "DEAD_LETTERS_RELEASE", default_value = "none")]
    pub dead_letters_release: EventTypes,
}

#[derive(Debug, Clone, Args)]
pub struct FloodSettings {
    /// Most dead letters one after another, counted: one more stops the consumer before it leaves, because something else
    /// than the events must be at fault.
    #[arg(long, env = "DEAD_LETTER_RUN", default_value = "100", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub dead_letter_run: u32,
    /// Largest share of dead letters among the last 1,000 events that took effect or died, in percent; more stops the
    /// consumer as well.
    #[arg(long, env = "DEAD_LETTER_PERCENT", default_value = "20", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub dead_letter_percent: u32,
    /// How long a stopped consumer waits before it tries again by itself, `5m`, or `never`: then only a restart or the
    /// admin API lets it go on. A try that finds nothing changed sends nothing and stops again.
    #[arg(long, env = "FLOOD_RESUME_AFTER", default_value = "5m")]
    pub flood_resume_after: ResumeAfter,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Ordering {
    PerKey,
    None,
}

/// Names of event types.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventTypes(pub HashSet<String>);

impl FromStr for EventTypes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self(HashSet::new()));
        }
        let known = |name: &str| {
            if !KNOWN_TYPES.contains(&name) {
                Err(format!("{name:?} is not one of {}", KNOWN_TYPES.join(", ")))
            } else if !ApplyShipment::can_pass_over(name) {
                Err(format!(
                    "{name:?} cannot be left out: the rest of its shipment builds on it"
                ))
            } else {
                Ok(name.to_owned())
            }
        };
        text.split(',')
            .map(|name| known(name.trim()))
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

/// A time, or until somebody says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResumeAfter(pub Option<Duration>);

impl FromStr for ResumeAfter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "never" {
            return Ok(Self(None));
        }
        let after = humantime::parse_duration(text).map_err(|error| error.to_string())?;
        if after.is_zero() || after > LONGEST_DELAY {
            return Err("expected a time of at most 1 day, or `never`".to_owned());
        }
        Ok(Self(Some(after)))
    }
}

/// Long enough for whoever archives by mistake to notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention(pub Duration);

impl FromStr for Retention {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let retention = humantime::parse_duration(text).map_err(|error| error.to_string())?;
        if (Duration::from_secs(60)..=LONGEST_RETENTION).contains(&retention) {
            Ok(Self(retention))
        } else {
            Err("expected a time of 1 minute to 100 years".to_owned())
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum UnknownTypes {
    Skip,
    DeadLetter,
}

/// The delays of the retry tiers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryDelays(pub Vec<Duration>);

impl FromStr for RetryDelays {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self(Vec::new()));
        }
        let mut delays = Vec::new();
        for part in text.split(',') {
            let delay = humantime::parse_duration(part.trim()).map_err(|error| format!("{part:?}: {error}"))?;
            if delay.is_zero() || delay > LONGEST_DELAY {
                return Err(format!("{part:?} is not between 1ns and 1 day"));
            }
            delays.push(delay);
        }
        if delays.len() > MOST_TIERS {
            return Err(format!("{} tiers, at most {MOST_TIERS} are possible", delays.len()));
        }
        Ok(Self(delays))
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use clap::CommandFactory;
    use service_runtime::settings;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_type_on_which_all_others_build_cannot_be_left_out() {
        assert!("ShipmentHeld,ShipmentReleased".parse::<EventTypes>().is_ok());
        let refused = "ShipmentHeld,ShipmentCreated".parse::<EventTypes>();
        assert!(refused.is_err_and(|reason| reason.contains("cannot be left out")));
    }

    #[test]
    fn every_setting_has_a_variable_and_a_meaning() {
        let args = [
            "commerce-consumer",
            "config",
            "docs",
            "--commerce-database-url=postgres://u:hunter2@h/d",
        ];
        let (_, effective) = settings::parse_from::<Cli>(args.iter().map(OsString::from)).expect("valid settings");
        for line in effective.to_markdown().lines().skip(2) {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            assert!(cells[2].len() > 2 && cells[4].len() > 20, "{line}");
        }
        assert!(!effective.to_text().contains("hunter2"), "{}", effective.to_text());
    }

    /// The command's own words of an example: what a pipe or a remark adds is not ours.
    fn words(example: &str) -> Vec<String> {
        let (mut words, mut word, mut quote) = (Vec::new(), String::new(), None);
        for character in example.chars().chain([' ']) {
            match (character, quote) {
                ('\'', None) => quote = Some(character),
                ('\'', Some(_)) => quote = None,
                ('|', None) => break,
                (' ', None) if word.is_empty() => {}
                (' ', None) => words.push(std::mem::take(&mut word)),
                _ => word.push(character),
            }
        }
        words
    }

    fn examples(command: &clap::Command, path: &str, found: &mut Vec<String>) {
        let help = command
            .get_before_help()
            .map(|help| help.to_string())
            .unwrap_or_default();
        let own: Vec<String> = help
            .lines()
            .filter(|line| !line.contains("DATABASE_URL="))
            .filter_map(|line| line.find("commerce-consumer ").map(|start| line[start..].to_owned()))
            .collect();
        let asks_the_service = ["dead-letters", "redrives", "consumer", "held-keys", "actions"];
        if path
            .split(' ')
            .nth(1)
            .is_some_and(|noun| asks_the_service.contains(&noun))
        {
            assert!(own.len() >= 2, "{path} --help opens with {own:?}");
            let after = command
                .get_after_help()
                .map(|help| help.to_string())
                .unwrap_or_default();
            assert!(after.contains("Exit codes"), "{path}");
        }
        found.extend(own);
        for subcommand in command.get_subcommands() {
            examples(subcommand, &format!("{path} {}", subcommand.get_name()), found);
        }
    }

    #[test]
    fn every_example_in_the_help_is_a_command() {
        let mut found = Vec::new();
        examples(&Cli::command(), "commerce-consumer", &mut found);
        for example in found {
            if example.contains("--config ") {
                continue;
            }
            let words = words(&example).into_iter().map(OsString::from);
            if let Err(error) = settings::parse_from::<Cli>(words) {
                panic!("{example}: {error}");
            }
        }
    }

    #[test]
    fn retry_delays_are_a_bounded_list() {
        let seconds = |list: &[u64]| Ok(RetryDelays(list.iter().copied().map(Duration::from_secs).collect()));
        assert_eq!("5s,30s,5m".parse(), seconds(&[5, 30, 300]));
        assert_eq!("5s, 1m".parse(), seconds(&[5, 60]));
        assert_eq!("none".parse(), seconds(&[]));
        for wrong in ["", "5", "0s", "2days", "5s,", "-1s", "1s,1s,1s,1s,1s,1s,1s,1s,1s,1s,1s"] {
            assert!(wrong.parse::<RetryDelays>().is_err(), "{wrong:?}");
        }
    }
}
