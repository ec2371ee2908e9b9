use std::{fs, path::PathBuf, process::Command, time::Duration};

use anyhow::Context;
use devstack::{
    failure::{Exit, Failure},
    process,
};
use serde::Serialize;

use crate::place::Place;

const TABLES: &str = include_str!("pgbench_tables.sql");
const SCRIPT: &str = include_str!("pgbench.sql");
/// Where Debian puts what is not on the `PATH`.
const DEBIAN: &str = "/usr/lib/postgresql";

/// Beyond its time, to connect and to end.
const GRACE: Duration = Duration::from_secs(60);

/// PostgreSQL's own load generator, with one shipment update and one outbox insert per transaction.
#[derive(Debug, Serialize)]
pub struct Pgbench {
    pub version: String,
    pub clients: u32,
    pub seconds: u64,
    pub transactions_per_second: f64,
    pub latency_ms: f64,
}

/// # Errors
/// If it is not installed.
pub fn find() -> anyhow::Result<PathBuf> {
    let on_path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&on_path).collect();
    if let Ok(versions) = fs::read_dir(DEBIAN) {
        folders.extend(versions.flatten().map(|version| version.path().join("bin")));
    }
    let found = folders
        .into_iter()
        .map(|folder| folder.join("pgbench"))
        .find(|path| path.is_file());
    found.ok_or_else(|| {
        let what = "--peer pgbench: pgbench is not on the PATH";
        Failure::new(
            Exit::Dependency,
            what,
            "apt-get install postgresql-client postgresql-contrib, or leave the peer out",
        )
        .into()
    })
}

/// Runs it against the server of the place, in the place's database.
///
/// # Errors
/// If it fails, or says no figure.
pub async fn measure(place: &Place, clients: u32, seconds: u64) -> anyhow::Result<Pgbench> {
    let program = find()?;
    let mut owner = place.owner().await?;
    sqlx::raw_sql(TABLES)
        .execute(&mut owner)
        .await
        .context("prepare the peer's tables")?;
    drop(owner);
    let script = place.dir.path().join("pgbench.sql");
    fs::write(&script, SCRIPT).context("write pgbench's script")?;
    let version = Command::new(&program).arg("--version").output();
    let version = version.context("ask pgbench for its version")?.stdout;
    let mut command = Command::new(&program);
    command
        .args(["-n", "-M", "prepared", "-j", "2", "-c", &clients.to_string()])
        .args(["-T", &seconds.to_string(), "-f"])
        .arg(&script)
        .arg(place.owner_url.as_str());
    let log = place.log("pgbench");
    process::run("pgbench", command, &log, Duration::from_secs(seconds) + GRACE).await?;
    let text = fs::read_to_string(&log).context("read what pgbench says")?;
    Ok(Pgbench {
        version: String::from_utf8_lossy(&version).trim().to_owned(),
        clients,
        seconds,
        transactions_per_second: figure(&text, "tps = ").context("pgbench says no rate")?,
        latency_ms: figure(&text, "latency average = ").context("pgbench says no latency")?,
    })
}

fn figure(text: &str, before: &str) -> Option<f64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(before))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_figures_are_read() {
        let text = "latency average = 20.123 ms\ntps = 3180.4 (without initial connection time)\n";
        assert_eq!(figure(text, "tps = "), Some(3180.4));
        assert_eq!(figure(text, "latency average = "), Some(20.123));
    }
}
