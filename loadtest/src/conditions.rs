use std::fs;

use anyhow::Context;
use serde::Serialize;
use shared_events::envelope::format_timestamp;
use sqlx::{ConnectOptions, Connection, Row, postgres::PgConnectOptions};
use time::OffsetDateTime;

use crate::{pg_recvlogical::PgRecvlogical, servers::Servers};

/// What of PostgreSQL decides the figures.
const POSTGRES_SETTINGS: [&str; 7] = [
    "server_version",
    "fsync",
    "synchronous_commit",
    "full_page_writes",
    "shared_buffers",
    "max_wal_size",
    "max_slot_wal_keep_size",
];

/// What the figures were measured on. A value that is not known is absent.
#[derive(Debug, Serialize)]
pub struct Conditions {
    pub started_at: String,
    /// As it was typed.
    pub command: Vec<String>,
    /// Of this program and of logistics-svc beside it.
    pub build: &'static str,
    pub cores: Option<usize>,
    pub memory_gib: Option<u64>,
    pub system: &'static str,
    /// `own` or `environment`.
    pub servers: &'static str,
    pub postgres: Vec<(String, String)>,
    pub topic: String,
    pub settings: Vec<(String, String)>,
    pub pg_recvlogical: Option<String>,
}

impl Conditions {
    /// # Errors
    /// If PostgreSQL does not answer.
    pub async fn gather(
        servers: &Servers,
        partitions: i32,
        settings: &[(String, String)],
        reader: Option<&PgRecvlogical>,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            started_at: format_timestamp(OffsetDateTime::now_utc())?,
            command: std::env::args().collect(),
            build: if cfg!(debug_assertions) { "debug" } else { "release" },
            cores: std::thread::available_parallelism().ok().map(usize::from),
            memory_gib: memory_gib(),
            system: std::env::consts::OS,
            servers: servers.whose,
            postgres: postgres_settings(servers).await?,
            topic: format!("{partitions} partitions, one replica, LogAppendTime; acks=all"),
            settings: settings.to_vec(),
            pg_recvlogical: reader.map(|reader| reader.version.clone()),
        })
    }
}

async fn postgres_settings(servers: &Servers) -> anyhow::Result<Vec<(String, String)>> {
    let url = servers.owner_url("postgres");
    let options: PgConnectOptions = url.as_str().parse().context("the address of PostgreSQL")?;
    let mut connection = options.connect().await.context("connect to PostgreSQL")?;
    let mut settings = Vec::new();
    for name in POSTGRES_SETTINGS {
        let row = sqlx::query("SELECT current_setting($1)")
            .bind(name)
            .fetch_one(&mut connection)
            .await;
        settings.push((name.to_owned(), row.and_then(|row| row.try_get(0)).context(name)?));
    }
    connection.close().await.context("close the connection")?;
    Ok(settings)
}

/// Rounded: a machine of 24 GiB shows a little less.
fn memory_gib() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some((kib + 512 * 1024) / (1024 * 1024))
}

/// Processes that wanted a processor during the last minute: what else the machine had to do.
pub fn load() -> Option<f64> {
    fs::read_to_string("/proc/loadavg")
        .ok()?
        .split(' ')
        .next()?
        .parse()
        .ok()
}
