use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use devstack::progress::Progress;
use outbox::NewEvent;
use serde::Serialize;
use sqlx::{Connection, PgConnection, PgPool};
use time::OffsetDateTime;
use tokio::task::JoinSet;

use crate::{append, place::Place, workload::Workload};

/// Most connections that fill at once. Each has keys of its own, so every key's rows are committed in sequence.
pub const LANES: u64 = 4;

const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// How the backlog was made.
#[derive(Debug, Clone, Serialize)]
pub struct Filled {
    pub rows: u64,
    pub seconds: f64,
    pub rows_per_second: f64,
    /// Of write-ahead log, between the first and the last row.
    pub wal_bytes: i64,
    /// Where the log ends after the last row.
    pub end_lsn: String,
}

/// Commits every event of the workload with the product's own append, `per_transaction` at a time, while nobody reads.
///
/// # Errors
/// If PostgreSQL refuses, or holds another number of rows afterwards.
pub async fn fill(
    place: &Place,
    workload: &Workload,
    per_transaction: u64,
    progress: &Progress,
) -> anyhow::Result<Filled> {
    let step = progress.step("filling the outbox");
    let mut owner = place.owner().await?;
    let begin = position(&mut owner).await?;
    let before = count(&mut owner).await?;
    let pool = place.appenders(workload.lanes() as u32).await?;
    let start = Instant::now();
    let done = Arc::new(AtomicU64::new(0));
    let mut lanes = JoinSet::new();
    for lane in 0..workload.lanes() {
        lanes.spawn(fill_lane(
            pool.clone(),
            workload.clone(),
            lane,
            per_transaction,
            done.clone(),
        ));
    }
    loop {
        tokio::select! {
            ended = lanes.join_next() => match ended {
                Some(ended) => ended.context("a lane panicked")??,
                None => break,
            },
            () = tokio::time::sleep(REPORT_INTERVAL) => {
                step.detail(format!("{} of {} rows", done.load(Ordering::Relaxed), workload.events()));
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    pool.close().await;
    let rows = count(&mut owner).await? - before;
    ensure!(
        rows == workload.events(),
        "{rows} rows are in the outbox, {} were appended",
        workload.events()
    );
    let end_lsn = position(&mut owner).await?;
    let wal_bytes = sqlx::query_scalar("SELECT ($1::pg_lsn - $2::pg_lsn)::bigint")
        .bind(&end_lsn)
        .bind(&begin)
        .fetch_one(&mut owner)
        .await
        .context("measure the log")?;
    settle(&mut owner).await?;
    owner.close().await.context("close the connection")?;
    let rows_per_second = rows as f64 / seconds;
    step.done(&format!("{rows} rows in the outbox, {rows_per_second:.0}/s"));
    Ok(Filled {
        rows,
        seconds,
        rows_per_second,
        wal_bytes,
        end_lsn,
    })
}

/// What would otherwise be charged to whoever drains: the checkpoint of the fill, and the statistics that autovacuum
/// would have gathered while a backlog grows in earnest.
async fn settle(owner: &mut PgConnection) -> anyhow::Result<()> {
    for statement in ["ANALYZE logistics.outbox", "CHECKPOINT"] {
        sqlx::query(statement).execute(&mut *owner).await.context(statement)?;
    }
    Ok(())
}

async fn fill_lane(
    pool: PgPool,
    workload: Workload,
    lane: u64,
    per_transaction: u64,
    done: Arc<AtomicU64>,
) -> anyhow::Result<()> {
    let outbox = append::outbox();
    let mut indices = (lane..workload.events()).step_by(workload.lanes() as usize).peekable();
    while indices.peek().is_some() {
        let mut transaction = pool.begin().await.context("begin")?;
        let mut events = Vec::new();
        for index in indices.by_ref().take(per_transaction as usize) {
            let envelope = workload.event(index, OffsetDateTime::now_utc())?;
            events.push(NewEvent {
                envelope,
                traceparent: None,
            });
        }
        outbox.append(&mut transaction, &events).await?;
        transaction.commit().await.context("commit")?;
        done.fetch_add(events.len() as u64, Ordering::Relaxed);
    }
    Ok(())
}

async fn position(owner: &mut PgConnection) -> anyhow::Result<String> {
    sqlx::query_scalar("SELECT pg_current_wal_lsn()::text")
        .fetch_one(owner)
        .await
        .context("ask for the end of the log")
}

async fn count(owner: &mut PgConnection) -> anyhow::Result<u64> {
    let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM logistics.outbox")
        .fetch_one(owner)
        .await
        .context("count the rows")?;
    Ok(rows.cast_unsigned())
}
