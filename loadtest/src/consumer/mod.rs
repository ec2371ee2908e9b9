use std::time::Duration;

use anyhow::{Context, ensure};
use devstack::progress::Progress;
use serde::Serialize;
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};
use tokio::time::Instant;

use crate::{
    cli::ConsumerArgs,
    complete::{self, Scenario},
    conditions, contender,
    contender::Running,
    http::Client,
    place::Place,
    usage::{Usage, Watch},
};

/// The least that a consumer can do, by the engine and by its peers.
pub mod same_work;

/// Shipments completed by one call while the backlog is made.
const PER_CALL: u64 = 1_000;
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// A backlog that commerce has applied.
#[derive(Debug, Serialize)]
pub struct Consumed {
    pub contender: String,
    pub load_before: Option<f64>,
    pub events: i64,
    /// From the commit of the first transaction that applied something to that of the last.
    pub seconds: f64,
    pub events_per_second: f64,
    /// Most events that were committed within one second of the clock.
    pub fastest_second: i64,
    pub checks: Vec<(String, i64)>,
    pub usage: Vec<Usage>,
    /// Why the figures are not to be trusted; empty if they are.
    pub failures: Vec<String>,
}

/// Makes the backlog through the product: completions in bulk, published by its relay. Then starts commerce, without a limit of its
/// rate, and waits.
///
/// # Errors
/// If a process ends, or a server does not answer.
pub async fn measure(args: &ConsumerArgs, place: &Place, progress: &Progress) -> anyhow::Result<Consumed> {
    let name = format!("commerce-consumer x {}", args.instances);
    let step = progress.step(format!("{name}: publishing {} events", args.events));
    place.make().await?;
    place.make_commerce().await?;
    let mut owner = place.owner().await?;
    complete::prepare(&mut owner, args.events, args.skew).await?;
    publish_backlog(args, place, &mut owner).await?;
    step.done(&format!("{name}: {} events published", args.events));

    let step = progress.step(format!("{name}: applying"));
    let load_before = conditions::load();
    let mut settings = vec![("RATE_LIMIT".to_owned(), "unlimited".to_owned())];
    settings.extend_from_slice(&args.stack.settings);
    let mut running = Running::none();
    for _ in 0..args.instances {
        running.add(contender::start_commerce(place, &settings).await?);
    }
    let watch = Watch::over(running.identities()?);
    complete::drain(&mut owner, &mut running, args.stack.patience).await?;
    let usage = watch.finish().await;
    running.stop().await?;
    let checks = complete::checks(&mut owner, Scenario::Complete).await?;
    let consumed = Consumed::new(name.clone(), load_before, usage, &mut owner, "commerce.inbox", checks).await?;
    owner.close().await.context("close the connection")?;
    step.done(&format!("{name}: {:.0} events per second", consumed.events_per_second));
    Ok(consumed)
}

async fn publish_backlog(args: &ConsumerArgs, place: &Place, owner: &mut PgConnection) -> anyhow::Result<()> {
    let mut running = contender::start_logistics(place, "all", &args.stack.settings).await?;
    let mut client = Client::new(running.address()?);
    let mut next = 1;
    while next <= args.events {
        let last = args.events.min(next + PER_CALL - 1);
        let ids: Vec<String> = (next..=last).map(|id| id.to_string()).collect();
        let body = format!("{{\"ids\":[{}]}}", ids.join(","));
        let status = client.post("/v1/shipments/complete", &body).await?;
        ensure!(
            status == 200,
            "completing in bulk was answered with {status}\n{}",
            running.log_tails()
        );
        next = last + 1;
    }
    let (mut left, mut moved) = (i64::MAX, Instant::now());
    while left > 0 {
        let now: i64 = sqlx::query_scalar("SELECT count(*) FROM logistics.outbox WHERE published_at IS NULL")
            .fetch_one(&mut *owner)
            .await
            .context("count what is to be published")?;
        if now < left {
            (left, moved) = (now, Instant::now());
        }
        running.check()?;
        ensure!(
            moved.elapsed() < args.stack.patience,
            "{left} events are not published\n{}",
            running.log_tails()
        );
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    running.stop().await?;
    for statement in ["VACUUM ANALYZE", "CHECKPOINT"] {
        sqlx::query(statement).execute(&mut *owner).await.context(statement)?;
    }
    Ok(())
}

impl Consumed {
    async fn new(
        contender: String,
        load_before: Option<f64>,
        usage: Vec<Usage>,
        owner: &mut PgConnection,
        inbox: &str,
        checks: Vec<(String, i64)>,
    ) -> anyhow::Result<Self> {
        let commits = format!(
            "WITH applied AS (SELECT pg_xact_commit_timestamp(xmin) AS at FROM {inbox}),
                  second AS (SELECT count(*) AS events FROM applied GROUP BY date_trunc('second', at))
             SELECT count(*) AS events, coalesce(extract(epoch FROM max(at) - min(at)), 0)::double precision AS seconds,
                    (SELECT coalesce(max(events), 0) FROM second) AS fastest FROM applied"
        );
        let row = sqlx::query(AssertSqlSafe(commits))
            .fetch_one(&mut *owner)
            .await
            .context("read the commit times")?;
        let (events, seconds): (i64, f64) = (row.try_get("events")?, row.try_get("seconds")?);
        let wrong = checks.iter().filter(|(_, rows)| *rows != 0);
        Ok(Self {
            contender,
            load_before,
            events,
            seconds,
            events_per_second: events as f64 / seconds,
            fastest_second: row.try_get("fastest")?,
            failures: wrong.map(|(what, rows)| format!("{what}: {rows} rows")).collect(),
            checks,
            usage,
        })
    }
}
