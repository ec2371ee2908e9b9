use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use devstack::testing::{PrivateKafka, PrivatePostgres};
use e2e::{
    client::Client,
    ledger,
    pair::{Role, Running},
    place::Place,
    wait_for, workload,
};
use sqlx::Row;

const PATIENCE: Duration = Duration::from_secs(60);
const QUIET: Duration = Duration::from_secs(180);
const VOLUME_MIB: u32 = 200;
const ORDERS: i64 = 150_000;

/// HAZARDS H12: a broker that is away and a slot that keeps all log would fill the volume, and PostgreSQL would stop. The
/// budget acts before. A mount needs the rights of root, so this is part of the full run only.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_log_volume_is_not_filled_while_the_broker_is_away() -> anyhow::Result<()> {
    if std::env::var_os("E2E_FULL").is_none() {
        println!("only in the full run");
        return Ok(());
    }
    let mut postgres = PrivatePostgres::start().await?;
    let mut kafka = PrivateKafka::start().await?;
    let place = Place::private(&postgres, &kafka).await?;
    let owner = place.owner_pool()?;
    // The server's own limit for slots is far above the volume: nothing but the budget acts.
    for setting in ["max_wal_size = '64MB'", "min_wal_size = '32MB'"] {
        sqlx::query(sqlx::AssertSqlSafe(format!("ALTER SYSTEM SET {setting}")))
            .execute(&owner)
            .await?;
    }
    workload::prepare_orders(&owner, ORDERS).await?;
    sqlx::raw_sql("CHECKPOINT; CHECKPOINT").execute(&owner).await?;
    postgres.stop_fast().await?;
    let volume = Volume::mount(&postgres.data().join("pg_wal"))?;
    postgres.start_again().await?;

    let env = [("RELAY_MODE", "auto"), ("RELAY_WAL_BUDGET_BYTES", "67108864")];
    let api = Running::start(&place, Role::Api, &env).await?;
    let relay = Running::start(&place, Role::Relay, &env).await?;
    let consumer = Running::start(&place, Role::Consumer(0), &env).await?;
    let stop = Arc::new(AtomicBool::new(false));
    let client = Client::new(&api.url(""), PATIENCE)?;
    let clients = tokio::spawn({
        let stop = stop.clone();
        async move { workload::run_in_bulk(&client, ORDERS, 50, 500, stop).await }
    });
    kafka.stop().await?;
    let slot_is_gone = async || -> anyhow::Result<bool> {
        let slots: i64 = sqlx::query_scalar("SELECT count(*) FROM pg_replication_slots WHERE slot_name = $1")
            .bind(&place.slot)
            .fetch_one(&owner)
            .await?;
        Ok(slots == 0)
    };
    let mut most = 0;
    let mut written = 0;
    // Four times the volume is written while the broker is away.
    wait_for("log of four volumes", Duration::from_secs(600), async || {
        most = most.max(volume.used_mib()?);
        // The load alone would take an hour.
        sqlx::raw_sql("CREATE TABLE IF NOT EXISTS noise (text text); INSERT INTO noise SELECT repeat('x', 1000) FROM generate_series(1, 4000); TRUNCATE noise")
            .execute(&owner)
            .await?;
        let row = sqlx::query("SELECT (pg_current_wal_lsn() - '0/0'::pg_lsn)::bigint / 1048576 AS mib")
            .fetch_one(&owner)
            .await?;
        let now: i64 = row.try_get("mib")?;
        if written == 0 {
            written = now;
        }
        Ok(now - written > i64::from(VOLUME_MIB) * 4)
    })
    .await?;
    assert!(slot_is_gone().await?, "the slot was given up");
    kafka.start_again().await?;
    wait_for("the log to be followed again", PATIENCE, async || {
        Ok(!slot_is_gone().await?)
    })
    .await?;
    stop.store(true, Ordering::Release);
    let promises = clients.await??;
    ledger::quiet(&owner, QUIET).await.expect("everything arrives");
    println!(
        "the log took {most} MiB of {VOLUME_MIB} at most, {} completions",
        promises.len()
    );
    for process in [relay, consumer, api] {
        process.stop().await?;
    }
    let ledger = ledger::check(&place, &owner, &promises).await?;
    println!("{ledger}");
    assert!(ledger.is_clean(), "{ledger}");
    postgres.stop_fast().await?;
    drop(volume);
    Ok(())
}

/// A file system in memory of a fixed size, in place of a directory.
struct Volume(PathBuf);

impl Volume {
    fn mount(place: &Path) -> anyhow::Result<Self> {
        let aside = place.with_extension("aside");
        std::fs::rename(place, &aside)?;
        std::fs::create_dir(place)?;
        let size = format!("size={VOLUME_MIB}m");
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(place))?;
        let volume = Self(place.to_owned());
        run(Command::new("cp")
            .arg("-a")
            .arg(format!("{}/.", aside.display()))
            .arg(place))?;
        Ok(volume)
    }

    fn used_mib(&self) -> anyhow::Result<u64> {
        let output = Command::new("df").args(["--output=used", "-m"]).arg(&self.0).output()?;
        let text = String::from_utf8(output.stdout)?;
        let used = text.lines().nth(1).context("df printed nothing")?;
        Ok(used.trim().parse()?)
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        // Lazily: the server may still be ending.
        run(Command::new("umount").arg("-l").arg(&self.0)).ok();
    }
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    anyhow::ensure!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
