use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use devstack::{
    failure::{Exit, Failure},
    process,
};
use serde::Serialize;

use crate::place::Place;

const PROGRAM: &str = "pg_recvlogical";

/// PostgreSQL's own reader of a logical slot. The server programs of a local stack do not include it; a package of the
/// client does.
#[derive(Debug, Clone)]
pub struct PgRecvlogical {
    pub version: String,
}

/// How long it took for all rows, from its start to its end.
#[derive(Debug, Clone, Serialize)]
pub struct Read {
    pub seconds: f64,
    pub rows_per_second: f64,
}

impl PgRecvlogical {
    /// # Errors
    /// If it is not on the `PATH`.
    pub fn find() -> anyhow::Result<Self> {
        let output = Command::new(PROGRAM).arg("--version").stdin(Stdio::null()).output();
        let Ok(output) = output else {
            return Err(Failure::new(
                Exit::Dependency,
                "--peer pg-recvlogical: pg_recvlogical is not on the PATH",
                "apt-get install postgresql-client, and put its folder /usr/lib/postgresql/<version>/bin on the PATH",
            )
            .into());
        };
        Ok(Self {
            version: String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        })
    }

    /// Makes its slot; what is appended afterwards waits in it.
    ///
    /// # Errors
    /// If PostgreSQL refuses.
    pub async fn prepare(&self, place: &Place) -> anyhow::Result<()> {
        let mut owner = place.owner().await?;
        sqlx::query("SELECT pg_create_logical_replication_slot($1, 'pgoutput')")
            .bind(slot(place))
            .execute(&mut owner)
            .await
            .context("make the slot of pg_recvlogical")?;
        Ok(())
    }

    /// Reads the slot up to `end` through the product's publication and throws the rows away. Then drops the slot.
    ///
    /// # Errors
    /// If it fails, or does not reach the end within `deadline`.
    pub async fn read(&self, place: &Place, rows: u64, end: &str, deadline: Duration) -> anyhow::Result<Read> {
        let url = &place.owner_url;
        let mut command = Command::new(PROGRAM);
        command
            .env("PGHOST", url.host_str().unwrap_or("127.0.0.1"))
            .env("PGPORT", url.port().unwrap_or(5432).to_string())
            .env("PGUSER", url.username())
            .env("PGPASSWORD", url.password().unwrap_or_default())
            .args([
                "--dbname",
                url.path().trim_start_matches('/'),
                "--slot",
                &slot(place),
                "--start",
                "--no-loop",
            ])
            .args([
                "--option",
                "proto_version=1",
                "--option",
                "publication_names=logistics_outbox",
            ])
            .args(["--endpos", end, "--file", "/dev/null"]);
        let start = Instant::now();
        process::run(PROGRAM, command, &place.log(PROGRAM), deadline).await?;
        let seconds = start.elapsed().as_secs_f64();

        let mut owner = place.owner().await?;
        let left: Option<bool> = sqlx::query_scalar(
            "SELECT confirmed_flush_lsn < $2::pg_lsn FROM pg_replication_slots WHERE slot_name = $1",
        )
        .bind(slot(place))
        .bind(end)
        .fetch_optional(&mut owner)
        .await
        .context("look at the slot of pg_recvlogical")?;
        if left != Some(false) {
            bail!("pg_recvlogical ended before it had read everything up to {end}");
        }
        sqlx::query("SELECT pg_drop_replication_slot($1)")
            .bind(slot(place))
            .execute(&mut owner)
            .await
            .context("drop the slot of pg_recvlogical")?;
        Ok(Read {
            seconds,
            rows_per_second: rows as f64 / seconds,
        })
    }
}

fn slot(place: &Place) -> String {
    format!("{}_read", place.slot)
}
