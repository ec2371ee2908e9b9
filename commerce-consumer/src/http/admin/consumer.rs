use axum::{Json, extract::State, http::HeaderMap};
use inbox::{Budget, KeyState, Rate, operator::Change, rate_limit::InvalidRate};
use serde::{Deserialize, Serialize};
use service_runtime::{
    auth::{Caller, Role},
    http::JsonBody,
    problem::Problem,
};
use utoipa::ToSchema;

use super::{Admin, actor, check_reason, defect};
use crate::http::{
    error::write,
    problems::{OperateProblems, SummaryProblems},
};

#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ConsumerView {
    /// Whether the group has given this instance its place.
    joined: bool,
    /// Why the brokers cannot be reached, if they cannot.
    broker_fault: Option<String>,
    /// Why work stands still, if it does; nothing is lost meanwhile.
    paused: Option<String>,
    /// Why an operator has paused all instances, if one has.
    paused_by_operator: Option<String>,
    /// Why the flood limit has stopped it, if it has.
    stopped: Option<String>,
    /// Records not finished in the partitions of this instance, as far as they are known.
    lag: i64,
    /// Age of the oldest record that is not finished.
    oldest_age_seconds: Option<f64>,
    /// Until this instance's partitions of the main topic have nothing left, at the pace of the last half minute; null while
    /// that is not known, or while the lag does not shrink.
    drain_seconds: Option<f64>,
    limits: Vec<LimitView>,
    /// Of the whole group; absent until the table has been asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    held: Option<Vec<HeldCountView>>,
    partitions: Vec<PartitionView>,
}

#[derive(Debug, Serialize, ToSchema)]
struct LimitView {
    /// `live`, `retry` or `redrive`.
    budget: &'static str,
    /// Events per second of the whole group, or `unlimited`.
    rate: String,
    /// Of them, this instance's; absent while unlimited.
    #[serde(skip_serializing_if = "Option::is_none")]
    share: Option<f64>,
}

#[derive(Debug, Serialize, ToSchema)]
struct HeldCountView {
    /// `retrying`, `dead`, `waiting` or `releasing`.
    state: &'static str,
    keys: i64,
    /// Events parked behind them.
    parked: i64,
}

#[derive(Debug, Serialize, ToSchema)]
struct PartitionView {
    topic: String,
    partition: i32,
    lag: Option<i64>,
    oldest_age_seconds: Option<f64>,
}

/// How the consumer of this process is doing.
#[utoipa::path(get, path = "/admin/consumer", operation_id = "readConsumer", tag = "operations",
    responses((status = 200, description = "Lag, limits, held keys and what stands still", body = ConsumerView), SummaryProblems))]
pub(in crate::http) async fn consumer(State(admin): State<Admin>) -> Json<ConsumerView> {
    let snapshot = admin.status.snapshot();
    let ages = snapshot
        .partitions
        .iter()
        .filter_map(|partition| partition.oldest_age_seconds);
    let limits = Budget::ALL.map(|budget| LimitView {
        budget: budget.as_str(),
        rate: admin.limits.total(budget).to_string(),
        share: admin.limits.share(budget),
    });
    let held = snapshot.held.map(|held| {
        let view = |(state, keys, parked): (KeyState, i64, i64)| HeldCountView {
            state: state.as_str(),
            keys,
            parked,
        };
        held.into_iter().map(view).collect()
    });
    Json(ConsumerView {
        joined: snapshot.joined,
        broker_fault: snapshot.broker_fault,
        paused: snapshot.paused,
        paused_by_operator: snapshot.paused_by_operator,
        stopped: admin.controls.stopped(),
        lag: snapshot.partitions.iter().filter_map(|partition| partition.lag).sum(),
        oldest_age_seconds: ages.reduce(f64::max),
        drain_seconds: snapshot.drain_seconds,
        limits: limits.into(),
        held,
        partitions: snapshot
            .partitions
            .into_iter()
            .map(|partition| PartitionView {
                topic: partition.topic,
                partition: partition.partition,
                lag: partition.lag,
                oldest_age_seconds: partition.oldest_age_seconds,
            })
            .collect(),
    })
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Because {
    /// Kept with the action; 1 to 500 bytes.
    reason: String,
}

/// Let all instances of the group apply nothing more until they are resumed, also after their restarts.
///
/// What is in a transaction now is finished. Instances other than this one follow within two seconds.
#[utoipa::path(post, path = "/admin/consumer/pause", operation_id = "pauseConsumer", tag = "operations",
    request_body = Because, responses((status = 200, body = ConsumerView), OperateProblems))]
pub(in crate::http) async fn pause(
    State(admin): State<Admin>,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Json<ConsumerView>, Problem> {
    let caller = admin.grants.require(&headers, Role::Operator)?;
    let Because { reason } = body.parse()?;
    change(&admin, caller, reason, Decided::Pause).await?;
    Ok(consumer(State(admin)).await)
}

/// Let the group go on: all instances after a pause, and this one after its flood limit has stopped it, with fresh counts.
#[utoipa::path(post, path = "/admin/consumer/resume", operation_id = "resumeConsumer", tag = "operations",
    request_body = Because, responses((status = 200, body = ConsumerView), OperateProblems))]
pub(in crate::http) async fn resume(
    State(admin): State<Admin>,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Json<ConsumerView>, Problem> {
    let caller = admin.grants.require(&headers, Role::Operator)?;
    let Because { reason } = body.parse()?;
    change(&admin, caller, reason, Decided::GoOn).await?;
    admin.controls.resume();
    Ok(consumer(State(admin)).await)
}

/// Which limits, and why. Each is events per second of the whole group, `unlimited`, or `default`: as the settings say.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Limit {
    live: Option<String>,
    retry: Option<String>,
    redrive: Option<String>,
    reason: String,
}

/// Change how fast the group may go, for all instances and over their restarts.
#[utoipa::path(post, path = "/admin/consumer/limits", operation_id = "limitConsumer", tag = "operations",
    request_body = Limit, responses((status = 200, body = ConsumerView), OperateProblems))]
pub(in crate::http) async fn limit(
    State(admin): State<Admin>,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Json<ConsumerView>, Problem> {
    let caller = admin.grants.require(&headers, Role::Operator)?;
    let asked: Limit = body.parse()?;
    let mut rates = Vec::new();
    for (budget, text) in [
        (Budget::Live, asked.live),
        (Budget::Retry, asked.retry),
        (Budget::Redrive, asked.redrive),
    ] {
        let rate = match text.as_deref() {
            None => continue,
            Some("default") => None,
            Some(text) => {
                let pointer = format!("/{}", budget.as_str());
                let invalid = |error: InvalidRate| Problem::invalid_field(&pointer, format!("{error}, or `default`"));
                Some(text.parse::<Rate>().map_err(invalid)?)
            }
        };
        rates.push((budget, rate));
    }
    if rates.is_empty() {
        return Err(Problem::invalid_field("", "needs live, retry or redrive"));
    }
    change(&admin, caller, asked.reason, Decided::Rates(rates)).await?;
    Ok(consumer(State(admin)).await)
}

enum Decided {
    Pause,
    GoOn,
    Rates(Vec<(Budget, Option<Rate>)>),
}

/// Changes it in the database, and here at once.
async fn change(admin: &Admin, caller: Caller, reason: String, decided: Decided) -> Result<(), Problem> {
    check_reason(&reason)?;
    let operator = admin.operator.clone();
    // A task of its own: a client that hangs up must not leave a connection inside a transaction (HAZARDS H3).
    let task = tokio::spawn(async move {
        let change = match &decided {
            Decided::Pause => Change::Pause,
            Decided::GoOn => Change::GoOn,
            Decided::Rates(rates) => Change::Rates(rates),
        };
        let changed = operator.change(change, actor(&caller, &reason)).await;
        changed.inspect(|_| tracing::warn!(by = caller.name, reason, ?change, "changed by an operator"))
    });
    let remembered = task.await.map_err(|_| defect())?.map_err(write)?;
    admin.controls.follow(&remembered);
    Ok(())
}
