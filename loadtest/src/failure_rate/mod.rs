use anyhow::{Context, bail};
use devstack::progress::Progress;
use serde::Serialize;
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};
use std::time::Duration;
use tokio::time::Instant;

use crate::{
    cli::{FailureArgs, Path},
    complete::{self, Scenario},
    contender,
    latency::Quantiles,
    load::{self, Pace, Plan},
    place::Place,
};

/// Commerce refuses changes of some shipments, as a defect or a broken record of it would: an error of the event, and none of the
/// platform. Which orders, their hash says.
const FAILING: &str = include_str!("failing_commerce.sql");
const LONGEST: Duration = Duration::from_secs(600);
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// So that an event that fails comes to its end while somebody looks on.
const RETRY_DELAYS: &str = "100ms,200ms";

/// What became of the calls by one path.
#[derive(Debug, Serialize)]
pub struct Failed {
    pub contender: String,
    pub calls: u64,
    /// Calls that were not answered with success.
    pub failed: u64,
    pub first_failure: Option<String>,
    pub response: Quantiles,
    /// Changes that logistics has committed.
    pub committed: i64,
    /// Events of them that took effect in commerce.
    pub applied: i64,
    /// Events of them that are kept for a person: dead letters and what waits behind them.
    pub kept: i64,
    /// Committed, without an effect and without a trace of it.
    pub lost: i64,
    /// Why the figures are not to be trusted; empty if they are.
    pub failures: Vec<String>,
}

/// Sends the calls, and waits until each event has taken effect or is kept.
///
/// # Errors
/// If a process ends, or events neither take effect nor are kept.
pub async fn measure(path: Path, args: &FailureArgs, place: &Place, progress: &Progress) -> anyhow::Result<Failed> {
    let name = path.name().to_owned();
    let step = progress.step(format!(
        "{name}: {} calls while commerce fails for {} % of the orders",
        args.calls, args.share
    ));
    place.make().await?;
    place.make_commerce().await?;
    let mut owner = place.owner().await?;
    complete::prepare(&mut owner, args.calls, 1.0).await?;
    let failing = format!("SET loadtest.share = {}; {FAILING}", args.share);
    sqlx::raw_sql(AssertSqlSafe(failing))
        .execute(&mut owner)
        .await
        .context("let commerce fail")?;

    let mut settings = vec![
        ("RELAY_MODE".to_owned(), path.relay_mode().to_owned()),
        ("RETRY_DELAYS".to_owned(), RETRY_DELAYS.to_owned()),
        ("COMMERCE_GROUP".to_owned(), place.group_topics.group().to_owned()),
        // What is measured is what becomes of the calls, not when the consumer gives up by itself.
        ("DEAD_LETTER_RUN".to_owned(), "1000000".to_owned()),
        ("DEAD_LETTER_PERCENT".to_owned(), "100".to_owned()),
    ];
    settings.extend_from_slice(&args.stack.settings);
    if path == Path::Legacy {
        sqlx::raw_sql(include_str!("legacy_flag.sql"))
            .execute(&mut owner)
            .await
            .context("set the flag to legacy")?;
    }
    let mut running = contender::start_logistics(place, "all", &settings).await?;
    running.add(contender::start_commerce(place, &settings).await?);
    let plan = Plan {
        pace: Pace::Closed,
        connections: args.connections,
        warm_up: Duration::ZERO,
        duration: LONGEST,
        most: args.calls,
    };
    let answers = load::run(running.address()?, plan, Scenario::Complete.request()).await?;
    let (committed, applied, kept) = settled(&mut owner, &mut running, args.stack.patience).await?;
    running.stop().await?;
    owner.close().await.context("close the connection")?;
    let mut failed = Failed {
        contender: name.clone(),
        calls: args.calls,
        failed: answers.failed,
        first_failure: answers.first_failure,
        response: Quantiles::of(&answers.response),
        committed,
        applied,
        kept,
        lost: committed - applied - kept,
        failures: Vec::new(),
    };
    if failed.lost != 0 {
        failed.failures.push(format!(
            "{} committed changes have neither effect nor trace",
            failed.lost
        ));
    }
    step.done(&format!(
        "{name}: {} of {} calls failed, {} events lost",
        failed.failed, failed.calls, failed.lost
    ));
    Ok(failed)
}

/// Waits until every event has taken effect or is kept, as long as some still do: committed, applied, kept.
async fn settled(
    owner: &mut PgConnection,
    running: &mut contender::Running,
    patience: Duration,
) -> anyhow::Result<(i64, i64, i64)> {
    let (mut seen, mut moved) = ((0, 0), Instant::now());
    loop {
        let row = sqlx::query(
            "SELECT (SELECT count(*) FROM logistics.outbox) AS committed, (SELECT count(*) FROM commerce.inbox) AS applied,
                    (SELECT count(*) FROM commerce.dead_letters WHERE state = 'open') + (SELECT count(*) FROM commerce.parked_events) AS kept",
        )
        .fetch_one(&mut *owner)
        .await
        .context("count the events")?;
        let (committed, applied, kept): (i64, i64, i64) =
            (row.try_get("committed")?, row.try_get("applied")?, row.try_get("kept")?);
        if committed == applied + kept {
            return Ok((committed, applied, kept));
        }
        running.check()?;
        if seen != (applied, kept) {
            (seen, moved) = ((applied, kept), Instant::now());
        }
        if moved.elapsed() > patience {
            bail!(
                "{committed} events are committed, {applied} applied and {kept} kept\n{}",
                running.log_tails()
            );
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

impl Path {
    pub fn name(self) -> &'static str {
        match self {
            Self::Legacy => "legacy",
            _ => self.relay_mode(),
        }
    }

    fn relay_mode(self) -> &'static str {
        match self {
            Self::Wal => "wal",
            Self::Poll => "poll",
            Self::AfterCommit => "after-commit",
            Self::Auto | Self::Legacy => "auto",
        }
    }
}
