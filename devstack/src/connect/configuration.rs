use std::path::Path;

use anyhow::Context;
use percent_encoding::percent_decode_str;
use reqwest::Url;

/// The connector, but for addresses and names.
const CONNECTOR: &str = include_str!("../../debezium/outbox.properties");
/// Its `name`.
pub(super) const CONNECTOR_NAME: &str = "logistics-outbox";
/// Where it says every 10 s how far it came, so that an idle outbox holds back no write-ahead log.
pub(super) const HEARTBEAT_TOPIC: &str = "__debezium-heartbeat.logistics";

/// What Debezium reads and where it publishes.
#[derive(Debug, Clone)]
pub struct OutboxConnector {
    /// Bootstrap address of Kafka.
    pub brokers: String,
    /// Of a login with REPLICATION that may read the outbox: [`crate::database::RELAY`].
    pub database_url: String,
    /// Made when it is missing.
    pub slot: String,
    /// Must exist.
    pub publication: String,
    /// Must exist.
    pub topic: String,
}

/// The whole configuration of the connector; the password stays in the file `login`.
pub(super) fn connector_properties(connector: &OutboxConnector, login: &Path) -> anyhow::Result<String> {
    let url = parse(&connector.database_url)?;
    let host = url.host_str().context("the database URL names no host")?;
    let port = url.port().unwrap_or(5432).to_string();
    let user = decoded(url.username())?;
    let database = decoded(url.path().trim_start_matches('/'))?;
    let password = format!("${{file:{}:password}}", login.display());
    let mut settings = vec![
        ("database.hostname", host),
        ("database.port", &port),
        ("database.user", &user),
        ("database.password", &password),
        ("database.dbname", &database),
        ("slot.name", &connector.slot),
        ("publication.name", &connector.publication),
        ("transforms.topic.replacement", &connector.topic),
    ];
    let parameters: Vec<_> = url.query_pairs().collect();
    let sslmode = parameters.iter().find(|(name, _)| name == "sslmode");
    if let Some((_, sslmode)) = sslmode {
        settings.push(("database.sslmode", sslmode));
    }
    Ok(format!("{CONNECTOR}\n{}", properties(&settings)))
}

/// The file that `database.password` refers to.
pub(super) fn login_properties(database_url: &str) -> anyhow::Result<String> {
    let url = parse(database_url)?;
    let password = decoded(url.password().unwrap_or_default())?;
    Ok(properties(&[("password", &password)]))
}

fn parse(database_url: &str) -> anyhow::Result<Url> {
    // Without the URL in the error: it holds a password.
    Url::parse(database_url).context("the relay's database URL is not a URL")
}

fn decoded(text: &str) -> anyhow::Result<String> {
    let decoded = percent_decode_str(text).decode_utf8();
    Ok(decoded.context("the database URL is not UTF-8")?.into_owned())
}

/// Lines of a Java properties file.
pub(super) fn properties(settings: &[(&str, &str)]) -> String {
    let line = |(name, value): &(&str, &str)| {
        let escaped: String = value
            .chars()
            .flat_map(|char| match char {
                '\\' | ' ' => vec!['\\', char],
                '\n' => vec!['\\', 'n'],
                '\r' => vec!['\\', 'r'],
                _ if char.is_ascii() => vec![char],
                _ => utf16_escape(char),
            })
            .collect();
        format!("{name}={escaped}\n")
    };
    settings.iter().map(line).collect()
}

/// Such a file is read as ISO 8859-1, whatever the locale.
fn utf16_escape(char: char) -> Vec<char> {
    let mut units = [0; 2];
    let units = char.encode_utf16(&mut units).iter();
    units
        .flat_map(|unit| format!("\\u{unit:04x}").chars().collect::<Vec<_>>())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_connectors_configuration_shows_no_password() {
        let connector = OutboxConnector {
            brokers: "127.0.0.1:9092".to_owned(),
            database_url: "postgres://relay:s%20cr%5Ct@db.example:6432/shop?sslmode=require".to_owned(),
            slot: "slot".to_owned(),
            publication: "publication".to_owned(),
            topic: "events".to_owned(),
        };
        let text = connector_properties(&connector, Path::new("/place/login.properties")).unwrap();
        for line in [
            "name=logistics-outbox",
            "database.hostname=db.example",
            "database.port=6432",
            "database.user=relay",
            "database.password=${file:/place/login.properties:password}",
            "database.dbname=shop",
            "database.sslmode=require",
            "slot.name=slot",
            "publication.name=publication",
            "transforms.topic.replacement=events",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("s cr") && !text.contains("s%20cr"));
        assert_eq!(
            login_properties(&connector.database_url).unwrap(),
            "password=s\\ cr\\\\t\n"
        );
    }

    #[test]
    fn the_names_used_here_are_those_of_the_connector() {
        let setting = |name: &str| {
            let lines = CONNECTOR.lines().filter_map(|line| line.split_once('='));
            let values: Vec<&str> = lines
                .filter(|(found, _)| *found == name)
                .map(|(_, value)| value)
                .collect();
            assert_eq!(values.len(), 1, "{name}: {values:?}");
            values[0]
        };
        assert_eq!(setting("name"), CONNECTOR_NAME);
        assert_eq!(
            HEARTBEAT_TOPIC,
            format!("__debezium-heartbeat.{}", setting("topic.prefix"))
        );
    }

    #[test]
    fn properties_outside_ascii_are_escaped_as_java_reads_them() {
        assert_eq!(properties(&[("a", "é\u{1f600}")]), "a=\\u00e9\\ud83d\\ude00\n");
    }
}
