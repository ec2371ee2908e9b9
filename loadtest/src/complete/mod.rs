use std::{iter, time::Duration};

use anyhow::{Context, bail};
use devstack::progress::Progress;
use futures_util::TryStreamExt;
use serde::Serialize;
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row, postgres::PgRow};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    cli::PairArgs,
    conditions,
    contender::{self, Running},
    latency::Quantiles,
    load::{self, Answers, Pace, Plan, Request},
    place::Place,
    usage::{self, Usage, Watch},
};

use self::{broker::Broker, stretch::Stretch};

/// The peer: PostgreSQL's own load generator.
pub mod pgbench;

/// What stands in the topic afterwards.
pub mod broker;

/// Relay and consumer, killed while the load runs.
mod faults;

/// Whether the last part of a load is worse than the first.
pub mod stretch;

const PREPARE: &str = include_str!("prepare.sql");
const REASON: &str = r#"{"reason":"load test"}"#;
/// Below this share of the offered rate the figures are those of a smaller load.
const REACHED: f64 = 0.99;
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// Which of the product's processes run during the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Processes {
    /// logistics-svc without its relay: what the REST interface can commit.
    Api,
    /// With the relay in the same process: what is committed is published meanwhile.
    Relay,
    /// And commerce-consumer, which applies it meanwhile.
    Pair,
}

/// What each request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scenario {
    /// `POST /v1/shipments/{id}/complete`, each open shipment once.
    Complete,
    /// Load test 1: `POST /load-test/outbox`, an event and nothing else.
    Outbox,
    /// Of ten requests seven complete a shipment, one holds one, one cancels one and one creates one.
    Soak,
}

impl Scenario {
    pub fn name(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Outbox => "outbox",
            Self::Soak => "soak",
        }
    }

    /// The requests, by their number.
    pub fn request(self) -> Request {
        match self {
            Self::Complete => |number| (format!("/v1/shipments/{}/complete", number + 1).into(), "{}".into()),
            Self::Outbox => |number| {
                // Orders that commerce knows, whatever their number: a fifth of the shipments.
                let order = 1 + number / 5;
                let body = format!(
                    r#"{{"order_id":"L{order}","warehouse":"main","carrier":"Speedy Express","lines":[{{"sku":"1","quantity":1}}]}}"#
                );
                ("/load-test/outbox".into(), body.into())
            },
            Self::Soak => |number| {
                let shipment = number + 1;
                match number % 10 {
                    0 => {
                        // Hot orders, which there are whatever the number of shipments and the skew.
                        let order = 1 + number / 10 % 20;
                        let body = format!(
                            r#"{{"order_id":"L{order}","warehouse":"main","carrier":"Speedy Express","lines":[{{"sku":"1","quantity":1}}]}}"#
                        );
                        ("/v1/shipments".into(), body.into())
                    }
                    1 => (format!("/v1/shipments/{shipment}/hold").into(), REASON.into()),
                    2 => (format!("/v1/shipments/{shipment}/cancel").into(), REASON.into()),
                    _ => (format!("/v1/shipments/{shipment}/complete").into(), "{}".into()),
                }
            },
        }
    }

    /// Queries for rows that must not be there at the end.
    fn checks(self) -> &'static str {
        match self {
            Self::Complete | Self::Soak => include_str!("checks.sql"),
            Self::Outbox => include_str!("outbox_checks.sql"),
        }
    }

    /// When each event was committed and when it was applied. A completed shipment's row is written once more by nobody, so its
    /// transaction tells; of an appended event only the row knows, from the begin of its transaction.
    fn times(self) -> &'static str {
        match self {
            Self::Complete => {
                "SELECT pg_xact_commit_timestamp(s.xmin) AS committed, pg_xact_commit_timestamp(i.xmin) AS applied
                   FROM logistics.shipments AS s JOIN commerce.inbox AS i
                     ON i.aggregate_id = s.id::text AND i.sequence = s.sequence WHERE s.status = 'completed'"
            }
            Self::Outbox | Self::Soak => {
                "SELECT o.created_at AS committed, pg_xact_commit_timestamp(i.xmin) AS applied
                   FROM logistics.outbox AS o JOIN commerce.inbox AS i ON i.event_id = o.id"
            }
        }
    }
}

/// One load on a place of its own.
#[derive(Debug, Serialize)]
pub struct Completed {
    pub contender: String,
    pub connections: u32,
    /// Requests per second; `None` for as many as the connections get answered.
    pub offered: Option<u64>,
    pub load_before: Option<f64>,
    /// Requests answered per second, after the warm-up.
    pub achieved: f64,
    pub answered: u64,
    pub failed: u64,
    pub dropped: u64,
    pub first_failure: Option<String>,
    pub response: Quantiles,
    pub service: Quantiles,
    pub late_start: Quantiles,
    /// What the topic holds; not without a relay.
    pub broker: Option<Broker>,
    /// From logistics' commit to commerce's, of what was committed after the warm-up; only of the pair.
    pub commit_to_applied: Option<Quantiles>,
    pub seconds: Vec<Second>,
    /// The time in equal parts.
    pub stretches: Vec<Stretch>,
    /// How often a process was killed meanwhile.
    pub kills: u64,
    /// From the last answer until commerce had applied everything.
    pub drain_seconds: Option<f64>,
    /// What must be 0, and is counted in the tables afterwards.
    pub checks: Vec<(String, i64)>,
    pub events: i64,
    pub usage: Vec<Usage>,
    /// Processors that the load test itself kept busy, on average.
    pub generator_cores: Option<f64>,
    /// Why the figures are not to be trusted; empty if they are.
    pub failures: Vec<String>,
}

/// Requests that were due within one second, and how long they took.
#[derive(Debug, Serialize)]
pub struct Second {
    pub offered: u64,
    pub answered: u64,
    pub failed: u64,
    pub response_p50: f64,
    pub response_p99: f64,
    pub response_max: f64,
    pub applied_p50: Option<f64>,
    pub applied_p99: Option<f64>,
    /// Events that were committed before its end, and applied after it.
    pub backlog: Option<u64>,
}

/// Completes open shipments, one in each request, and accounts for every event.
///
/// # Errors
/// If a process ends, or a server does not answer.
pub async fn measure(
    scenario: Scenario,
    args: &PairArgs,
    connections: u32,
    place: &Place,
    progress: &Progress,
) -> anyhow::Result<Completed> {
    let name = format!("{} x {connections}", args.with.name());
    let step = progress.step(format!("{name}: preparing {} open shipments", args.shipments));
    place.make().await?;
    place.make_commerce().await?;
    let mut owner = place.owner().await?;
    prepare(&mut owner, args.shipments, args.skew).await?;
    let mut running = start(scenario, args, place).await?;
    step.done(&format!("{name}: {} open shipments, ready", args.shipments));

    let plan = Plan {
        pace: args.rate.map_or(Pace::Closed, Pace::Open),
        connections,
        warm_up: args.warm_up,
        duration: args.duration,
        most: args.shipments,
    };
    let step = progress.step(format!("{name}: {}, one change per request", scenario.name()));
    let load_before = conditions::load();
    let mut watch = Watch::over(running.identities()?);
    let cpu_before = usage::own_cpu_seconds();
    let began = Instant::now();
    let address = running.address()?;
    let over = CancellationToken::new();
    let load = async {
        let answers = load::run(address, plan, scenario.request()).await;
        over.cancel();
        answers
    };
    let kills = faults::kill_in_turn(args, place, &mut running, &mut watch, &over);
    let (answers, kills) = tokio::try_join!(load, kills)?;
    let took = began.elapsed().as_secs_f64();
    let used = usage::own_cpu_seconds()
        .zip(cpu_before)
        .map(|(after, before)| (after - before) / took);
    running.check()?;
    let achieved = answers.response.len() as f64 / plan.duration.as_secs_f64();
    step.done(&format!("{name}: {achieved:.0} requests per second"));

    let mut completed = Completed::new(name.clone(), plan, args.rate, answers, load_before)?;
    completed.generator_cores = used;
    completed.kills = kills;
    if args.with == Processes::Pair {
        let step = progress.step(format!("{name}: waiting until commerce has applied everything"));
        let drained = drain(&mut owner, &mut running, args.stack.patience).await?;
        completed.drain_seconds = Some(drained.as_secs_f64());
        step.done(&format!(
            "{name}: drained {:.1} s after the last answer",
            drained.as_secs_f64()
        ));
    }
    completed.usage = watch.finish().await;
    stretch::note_memory(&mut completed.stretches, &completed.usage, plan.warm_up);
    running.stop().await?;
    if args.with == Processes::Pair {
        let step = progress.step(format!("{name}: accounting for every event"));
        completed.broker = Some(broker::read_back(place, args.stack.patience).await?);
        completed.take_times(&mut owner, scenario, plan).await?;
        completed.account(&mut owner, scenario, args).await?;
        step.done(&format!("{name}: {} events accounted for", completed.events));
    }
    completed.judge(scenario, args);
    owner.close().await.context("close the connection")?;
    Ok(completed)
}

/// Open shipments in both services' tables, and the orders in commerce's.
///
/// # Errors
/// If PostgreSQL does not answer.
pub async fn prepare(owner: &mut PgConnection, shipments: u64, skew: f64) -> anyhow::Result<()> {
    let settings = format!("SET loadtest.shipments = {shipments}; SET loadtest.skew = {skew}; {PREPARE}");
    sqlx::raw_sql(AssertSqlSafe(settings))
        .execute(&mut *owner)
        .await
        .context("prepare the shipments")?;
    for statement in ["VACUUM ANALYZE", "CHECKPOINT"] {
        sqlx::query(AssertSqlSafe(statement.to_owned()))
            .execute(&mut *owner)
            .await
            .context(statement)?;
    }
    Ok(())
}

async fn start(scenario: Scenario, args: &PairArgs, place: &Place) -> anyhow::Result<Running> {
    let mut settings = args.stack.settings.clone();
    let endpoint = scenario == Scenario::Outbox;
    settings.push(("LOAD_TEST_ENDPOINT".to_owned(), endpoint.to_string()));
    // What is killed meanwhile is not to take the API with it.
    let apart = args.faults_every.is_some();
    let role = if args.with == Processes::Api || apart {
        "api"
    } else {
        "all"
    };
    let mut running = contender::start_logistics(place, role, &settings).await?;
    if apart && args.with != Processes::Api {
        running.add(faults::start_relay(args, place).await?);
    }
    if args.with == Processes::Pair {
        running.add(contender::start_commerce(place, &args.stack.settings).await?);
    }
    Ok(running)
}

/// Waits until every committed event is in commerce's inbox, as long as some still come.
///
/// # Errors
/// If a process ends, or nothing has come for `patience`.
pub async fn drain(owner: &mut PgConnection, running: &mut Running, patience: Duration) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let (mut seen, mut moved) = (-1, Instant::now());
    loop {
        let row = sqlx::query(
            "SELECT (SELECT count(*) FROM logistics.outbox) AS committed, (SELECT count(*) FROM commerce.inbox) AS applied,
                    EXISTS (SELECT FROM logistics.outbox WHERE published_at IS NULL) AS unmarked",
        )
        .fetch_one(&mut *owner)
        .await
        .context("count the events")?;
        let (committed, applied): (i64, i64) = (row.try_get("committed")?, row.try_get("applied")?);
        if committed == applied && !row.try_get::<bool, _>("unmarked")? {
            return Ok(began.elapsed());
        }
        running.check()?;
        if applied > seen {
            (seen, moved) = (applied, Instant::now());
        }
        if moved.elapsed() > patience {
            bail!(
                "{} events are not applied, and none came for {patience:?}\n{}",
                committed - applied,
                running.log_tails()
            );
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Rows that must not be there once everything has been applied, by what is wrong with them.
///
/// # Errors
/// If PostgreSQL does not answer.
pub async fn checks(owner: &mut PgConnection, scenario: Scenario) -> anyhow::Result<Vec<(String, i64)>> {
    let rows = sqlx::query(scenario.checks())
        .fetch_all(owner)
        .await
        .context("check the tables")?;
    let check = |row: &PgRow| Ok((row.try_get(0)?, row.try_get(1)?));
    rows.iter().map(check).collect()
}

impl Completed {
    fn new(
        contender: String,
        plan: Plan,
        offered: Option<u64>,
        answers: Answers,
        load_before: Option<f64>,
    ) -> anyhow::Result<Self> {
        let seconds = answers.seconds.iter().map(|second| Second {
            offered: second.offered,
            answered: second.answered,
            failed: second.failed,
            response_p50: second.response.value_at_quantile(0.5) as f64 / 1e3,
            response_p99: second.response.value_at_quantile(0.99) as f64 / 1e3,
            response_max: second.response.max() as f64 / 1e3,
            applied_p50: None,
            applied_p99: None,
            backlog: None,
        });
        Ok(Self {
            stretches: stretch::of(&answers.seconds)?,
            kills: 0,
            contender,
            connections: plan.connections,
            offered,
            load_before,
            achieved: answers.response.len() as f64 / plan.duration.as_secs_f64(),
            answered: answers.answered_in_all,
            failed: answers.failed,
            dropped: answers.dropped,
            first_failure: answers.first_failure,
            response: Quantiles::of(&answers.response),
            service: Quantiles::of(&answers.service),
            late_start: Quantiles::of(&answers.late),
            broker: None,
            commit_to_applied: None,
            seconds: seconds.collect(),
            drain_seconds: None,
            checks: Vec::new(),
            events: 0,
            usage: Vec::new(),
            generator_cores: None,
            failures: Vec::new(),
        })
    }

    /// See [`Scenario::times`] for what they are of.
    async fn take_times(&mut self, owner: &mut PgConnection, scenario: Scenario, plan: Plan) -> anyhow::Result<()> {
        let query = format!(
            "WITH pair AS ({})
             SELECT extract(epoch FROM committed - min(committed) OVER ())::double precision AS at,
                    (extract(epoch FROM applied - committed) * 1e6)::bigint AS took FROM pair",
            scenario.times()
        );
        let mut rows = sqlx::query(AssertSqlSafe(query)).fetch(&mut *owner);
        let mut all = load::histogram()?;
        let mut by_second = vec![load::histogram()?; self.seconds.len()];
        let mut backlog = vec![0; self.seconds.len()];
        while let Some(row) = rows.try_next().await.context("read the commit times")? {
            let (at, took): (f64, i64) = (row.try_get("at")?, row.try_get("took")?);
            let counted = at - plan.warm_up.as_secs_f64();
            let applied = counted + took as f64 / 1e6;
            let from = counted.ceil().max(1.0) as usize;
            for waiting in (from..).take_while(|end| (*end as f64) < applied) {
                let Some(waiting) = backlog.get_mut(waiting - 1) else {
                    break;
                };
                *waiting += 1;
            }
            if counted < 0.0 {
                continue;
            }
            all.saturating_record(took.max(0) as u64);
            if let Some(second) = by_second.get_mut(counted as usize) {
                second.saturating_record(took.max(0) as u64);
            }
        }
        for (second, waiting) in iter::zip(&mut self.seconds, backlog) {
            second.backlog = Some(waiting);
        }
        stretch::note_applied(&mut self.stretches, &by_second)?;
        let applied = iter::zip(&mut self.seconds, by_second);
        for (second, times) in applied.filter(|(_, times)| !times.is_empty()) {
            second.applied_p50 = Some(times.value_at_quantile(0.5) as f64 / 1e3);
            second.applied_p99 = Some(times.value_at_quantile(0.99) as f64 / 1e3);
        }
        self.commit_to_applied = Some(Quantiles::of(&all));
        Ok(())
    }

    async fn account(&mut self, owner: &mut PgConnection, scenario: Scenario, args: &PairArgs) -> anyhow::Result<()> {
        self.checks = checks(owner, scenario).await?;
        self.events = sqlx::query_scalar("SELECT count(*) FROM logistics.outbox")
            .fetch_one(&mut *owner)
            .await
            .context("count the events")?;
        let in_topic = self.broker.as_ref().map_or(0, |broker| broker.events.cast_signed());
        if in_topic != self.events {
            self.failures.push(format!(
                "{in_topic} events are in the topic, {} are committed",
                self.events
            ));
        }
        // A request without an answer may have been carried out; one with an answer has been.
        let answered = i64::try_from(self.answered).unwrap_or(i64::MAX);
        let most = answered + i64::try_from(self.failed).unwrap_or(i64::MAX);
        if !(answered..=most).contains(&self.events) {
            let lost = format!(
                "{answered} requests were answered, {} events are committed",
                self.events
            );
            self.failures.push(lost);
        }
        if self.answered == args.shipments {
            self.failures
                .push("the open shipments ran out before the time".to_owned());
        }
        Ok(())
    }

    fn judge(&mut self, scenario: Scenario, args: &PairArgs) {
        if scenario == Scenario::Soak {
            self.failures.extend(stretch::growth(&self.stretches, &self.usage));
        }
        if let Some(every) = args.faults_every.filter(|_| self.kills == 0) {
            self.failures.push(format!(
                "no process was killed: the load ended before the first {every:?}"
            ));
        }
        for (what, rows) in self.checks.iter().filter(|(_, rows)| *rows != 0) {
            self.failures.push(format!("{what}: {rows} rows"));
        }
        if self.failed > 0 {
            let first = self.first_failure.clone().unwrap_or_default();
            self.failures
                .push(format!("{} requests failed, the first: {first}", self.failed));
        }
        if let Some(offered) = args.rate
            && (self.achieved < offered as f64 * REACHED || self.dropped > 0)
        {
            let reason = format!(
                "{:.0} of {offered} requests per second, {} dropped",
                self.achieved, self.dropped
            );
            self.failures.push(reason);
        }
        for threshold in &args.thresholds {
            if let Some(reason) = threshold.missed_by(self) {
                self.failures.push(reason);
            }
        }
    }
}

impl Processes {
    pub fn name(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Relay => "api + relay",
            Self::Pair => "api + relay + commerce",
        }
    }
}
