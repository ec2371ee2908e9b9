use std::time::Duration;

use axum::{
    Json,
    extract::{Query, State},
    http::{HeaderMap, StatusCode},
};
use serde::{Deserialize, Serialize};
use service_runtime::{
    auth::{Caller, Grants, Role},
    http::JsonBody,
    problem::Problem,
};
use sqlx::PgPool;
use tokio::time::Instant;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::{
    admin::{database, text},
    error::{FLAG_CHANGED, FLAG_UNAVAILABLE, ROLLOUT_RUNS},
    problems::{FlagProblems, LookProblems},
};
use crate::{
    flag::{Flag, Mode, Share, is_printable},
    switch::Switch,
    tables::{
        flag_instances,
        flag_rollouts::{self, NewRollout, Rollout, StopConditions},
        flag_values::{self, SetFlag},
        shadow,
    },
};

/// How long an answer waits for every instance to run the new value.
const IN_FORCE_WITHIN: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(25);
const LONGEST_REASON: usize = 500;
const MOST_STEPS: usize = 100;
const LONGEST_SOAK: f64 = 7.0 * 24.0 * 3600.0;

/// What people look at and change.
#[derive(Debug, Clone)]
pub struct FlagAdmin {
    pub pool: PgPool,
    pub switch: Switch,
    pub grants: Grants,
}

/// A value of the flag. Orders within `percent` have `mode`, the others `rest`.
#[derive(Debug, Serialize, ToSchema)]
struct ValueView {
    /// Raised by one with each change; 0 is the value before any was set.
    version: i64,
    /// `outbox`, `shadow` or `legacy`.
    mode: &'static str,
    percent: f64,
    rest: &'static str,
    set_at: Option<String>,
    set_by: Option<String>,
    reason: Option<String>,
    /// The roll-out whose step it is, or whose end.
    rollout: Option<i64>,
}

#[derive(Debug, Serialize, ToSchema)]
struct InstanceView {
    instance: Uuid,
    address: String,
    /// Of the value that it runs.
    version: i64,
    /// Why it leaves every event to the outbox, whatever the flag says.
    unable: Option<String>,
    started_at: String,
    seen_at: String,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct FlagView {
    /// The value in force.
    flag: ValueView,
    /// Of the value that this request has set; somebody else's may have followed it already.
    set_version: Option<i64>,
    previous: Option<ValueView>,
    /// Whether every instance that was heard of within ten seconds runs this value, and there is one.
    in_force: bool,
    instances: Vec<InstanceView>,
    /// The roll-out that runs.
    rollout: Option<RolloutView>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct HistoryView {
    /// The newest first.
    values: Vec<ValueView>,
    /// To be given as `before` for the next page.
    next: Option<i64>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct RolloutView {
    id: i64,
    /// `running`, `done` (every step has soaked), `returned` (a condition was met) or `superseded`.
    state: String,
    mode: String,
    rest: String,
    /// Percent of orders, one after the other.
    steps: Vec<f64>,
    soak_seconds: f64,
    stop: StopWhen,
    /// How many steps have begun.
    step: i32,
    step_began_at: Option<String>,
    /// Version of the value that a stop returns to.
    safe_version: i64,
    started_at: String,
    started_by: String,
    reason: String,
    ended_at: Option<String>,
    ended_because: Option<String>,
}

/// What ends a roll-out: it is taken back when one of these is exceeded.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct StopWhen {
    /// Mismatches found by shadow mode since it began.
    mismatches: Option<i64>,
    /// By how much commerce lags behind the outbox.
    lag_seconds: Option<f64>,
    /// Of the requests since the step began, the share that failed in this service; looked at from 20 requests on.
    error_ratio: Option<f64>,
    /// Dead letters of commerce since it began.
    dead_letters: Option<i64>,
}

/// The flag, and which instance runs which value of it.
#[utoipa::path(get, path = "/admin/flag", operation_id = "readFlag", tag = "operations",
    responses((status = 200, description = "The value in force", body = FlagView), LookProblems))]
pub(super) async fn read(State(admin): State<FlagAdmin>) -> Result<Json<FlagView>, Problem> {
    Ok(Json(look(&admin).await?))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct Page {
    /// Most values, 1 to 200.
    limit: Option<i64>,
    /// Values older than this version.
    before: Option<i64>,
}

/// Every value that the flag ever had, with who set it, when and why.
#[utoipa::path(get, path = "/admin/flag/history", operation_id = "readFlagHistory", tag = "operations", params(Page),
    responses((status = 200, description = "The newest values first", body = HistoryView), LookProblems))]
pub(super) async fn history(
    State(admin): State<FlagAdmin>,
    page: Result<Query<Page>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<HistoryView>, Problem> {
    let Query(page) = page.map_err(|error| Problem::new(&service_runtime::problem::MALFORMED, error.body_text()))?;
    let limit = page.limit.unwrap_or(50);
    if !(1..=200).contains(&limit) {
        return Err(Problem::invalid_field("limit", "must be 1 to 200"));
    }
    let found = flag_values::newest(&admin.pool, limit, page.before)
        .await
        .map_err(database)?;
    let full = found.len() as i64 == limit;
    let next = found.last().filter(|_| full).map(|last| last.flag.version);
    let values = found.into_iter().map(value).collect::<Result<_, _>>()?;
    Ok(Json(HistoryView { values, next }))
}

/// What the flag is to be.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewFlag {
    /// `outbox`, `shadow` or `legacy`.
    mode: String,
    /// Of all orders, by a hash of the order's id, with at most two decimals.
    #[serde(default = "all")]
    percent: f64,
    /// The mode of the other orders.
    #[serde(default = "outbox")]
    rest: String,
    /// Kept with the value.
    reason: String,
    /// Only if this is the version in force: whoever has looked before changes nothing that somebody else has set since.
    if_version: Option<i64>,
}

fn all() -> f64 {
    100.0
}

fn outbox() -> String {
    Mode::Outbox.name().to_owned()
}

/// Set the flag.
///
/// In force on every instance within a second; the answer waits for that, and lists the instances. Any value may follow any
/// other at any moment: an event goes by the synchronous path only if commerce has applied every event of its shipment before
/// it, and by the outbox otherwise. A roll-out that runs ends.
#[utoipa::path(put, path = "/admin/flag", operation_id = "setFlag", tag = "operations", request_body = NewFlag,
    responses((status = 200, description = "The new value", body = FlagView), FlagProblems))]
pub(super) async fn set(
    State(admin): State<FlagAdmin>,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Json<FlagView>, Problem> {
    let caller = admin.grants.require(&headers, Role::Admin)?;
    let asked: NewFlag = body.parse()?;
    check_reason(&asked.reason)?;
    let flag = Flag {
        version: 0,
        mode: mode("/mode", &asked.mode)?,
        rest: mode("/rest", &asked.rest)?,
        share: share("/percent", asked.percent)?,
    };
    if flag.mode == flag.rest && flag.share != Share::ALL {
        return Err(Problem::invalid_field(
            "/rest",
            "is the same as mode: all orders would have it, whatever percent says",
        ));
    }
    check_ability(&admin, &flag)?;
    let mut tx = admin.pool.begin().await.map_err(database)?;
    let set = flag_values::add(&mut tx, flag, (&caller.name, &asked.reason), None, asked.if_version).await;
    let Some(set) = set.map_err(database)? else {
        let version = flag_values::in_force(&mut *tx).await.map_err(database)?.version;
        return Err(Problem::new(&FLAG_CHANGED, format!("it is version {version} now")));
    };
    tx.commit().await.map_err(database)?;
    end_rollout(&admin, &caller, flag.mode).await;
    tracing::warn!(
        by = caller.name,
        reason = asked.reason,
        version = set.version,
        mode = set.mode.name(),
        percent = set.share.percent(),
        rest = set.rest.name(),
        "the flag is set"
    );
    let mut view = once_in_force(&admin).await?;
    view.set_version = Some(set.version);
    Ok(Json(view))
}

/// Said at once if it can be. A roll-out that somebody else moves on at this moment finds the new value in its way, and ends.
async fn end_rollout(admin: &FlagAdmin, caller: &Caller, mode: Mode) {
    let because = format!("{} set the flag to {}", caller.name, mode.name());
    let ended = async {
        let mut tx = admin.pool.begin().await?;
        sqlx::raw_sql("SET LOCAL lock_timeout = '500ms'")
            .execute(&mut *tx)
            .await?;
        flag_rollouts::supersede(&mut tx, &because).await?;
        tx.commit().await
    };
    if let Err(error) = ended.await {
        tracing::debug!(%error, "the roll-out that runs will find out by itself");
    }
}

/// What is to be rolled out.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewRolloutRequest {
    /// `outbox`, `shadow` or `legacy`.
    mode: String,
    /// The mode of the orders that are not within the step.
    rest: String,
    /// Percent of orders, rising.
    steps: Vec<f64>,
    /// How long each step is in force before the next.
    soak_seconds: f64,
    /// At least one.
    stop: StopWhen,
    /// Kept with the roll-out.
    reason: String,
}

/// Roll a mode out in steps.
///
/// Each step soaks; when a stop condition is met, the flag returns to the last value that has soaked, or to the one before the
/// first step, and the roll-out says why. Whoever sets the flag meanwhile ends it.
#[utoipa::path(post, path = "/admin/flag/rollout", operation_id = "startRollout", tag = "operations",
    request_body = NewRolloutRequest,
    responses((status = 202, description = "It has begun", body = RolloutView), FlagProblems))]
pub(super) async fn roll_out(
    State(admin): State<FlagAdmin>,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<(StatusCode, Json<RolloutView>), Problem> {
    let caller = admin.grants.require(&headers, Role::Admin)?;
    let asked: NewRolloutRequest = body.parse()?;
    let mut new = checked(asked, caller)?;
    for name in [new.mode, new.rest] {
        let whole = mode("/mode", name)?;
        check_ability(
            &admin,
            &Flag {
                mode: whole,
                ..Flag::FIRST
            },
        )?;
    }
    let mut tx = admin.pool.begin().await.map_err(database)?;
    new.safe_version = flag_values::in_force(&mut *tx).await.map_err(database)?.version;
    let begun = flag_rollouts::begin(&mut tx, &new).await.map_err(database)?;
    tx.commit().await.map_err(database)?;
    let Some(begun) = begun else {
        return Err(Problem::new(
            &ROLLOUT_RUNS,
            "another roll-out runs; setting the flag ends it",
        ));
    };
    tracing::warn!(
        by = begun.started_by,
        reason = begun.reason,
        rollout = begun.id,
        "a roll-out has begun"
    );
    Ok((StatusCode::ACCEPTED, Json(rollout(begun)?)))
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct RolloutsView {
    /// The newest first.
    rollouts: Vec<RolloutView>,
}

/// The last roll-outs, with what became of them.
#[utoipa::path(get, path = "/admin/flag/rollout", operation_id = "listRollouts", tag = "operations",
    responses((status = 200, description = "The newest first, at most 50", body = RolloutsView), LookProblems))]
pub(super) async fn roll_outs(State(admin): State<FlagAdmin>) -> Result<Json<RolloutsView>, Problem> {
    let found = flag_rollouts::newest(&admin.pool, 50).await.map_err(database)?;
    let rollouts = found.into_iter().map(rollout).collect::<Result<_, _>>()?;
    Ok(Json(RolloutsView { rollouts }))
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ShadowView {
    /// Events whose rows were compared.
    compared: i64,
    /// Of them, those with a difference.
    different: i64,
    /// Rows of them that were compared.
    rows_compared: i64,
    /// Rows that said nothing, because another event had changed them too.
    rows_overtaken: i64,
    /// Events that commerce did not apply in time.
    expired: i64,
    /// Events that wait for commerce to apply them.
    waiting: i64,
    oldest_waiting_at: Option<String>,
    /// The last week's mismatches, the most frequent first.
    groups: Vec<MismatchView>,
}

/// Mismatches of one column by one type of event, and the latest of them.
#[derive(Debug, Serialize, ToSchema)]
struct MismatchView {
    table: String,
    /// `*` stands for the whole row.
    column: String,
    event_type: String,
    count: i64,
    first_found_at: String,
    last_found_at: String,
    event_id: Uuid,
    shipment_id: String,
    order_id: String,
    /// JSON.
    row: String,
    /// JSON, as the synchronous path would have written it.
    expected: String,
    /// JSON, as the consumer has written it.
    found: String,
}

/// What shadow mode found.
#[utoipa::path(get, path = "/admin/shadow", operation_id = "readShadow", tag = "operations",
    responses((status = 200, description = "Counts and mismatches", body = ShadowView), LookProblems))]
pub(super) async fn compared(State(admin): State<FlagAdmin>) -> Result<Json<ShadowView>, Problem> {
    let tally = shadow::tally(&admin.pool).await.map_err(database)?;
    let count = |outcome: &str| {
        let found = tally.iter().find(|(name, _)| name == outcome);
        found.map_or(0, |(_, count)| *count)
    };
    let (waiting, oldest) = shadow::waiting(&admin.pool).await.map_err(database)?;
    let groups = shadow::groups(&admin.pool).await.map_err(database)?;
    Ok(Json(ShadowView {
        compared: count("compared"),
        different: count("different"),
        rows_compared: count("rows_compared"),
        rows_overtaken: count("rows_overtaken"),
        expired: count("expired"),
        waiting,
        oldest_waiting_at: oldest.map(text).transpose()?,
        groups: groups.into_iter().map(mismatch).collect::<Result<_, _>>()?,
    }))
}

fn mismatch(group: shadow::Group) -> Result<MismatchView, Problem> {
    Ok(MismatchView {
        table: group.table_name,
        column: group.column_name,
        event_type: group.event_type,
        count: group.count,
        first_found_at: text(group.first_found_at)?,
        last_found_at: text(group.last_found_at)?,
        event_id: group.event_id,
        shipment_id: group.shipment_id,
        order_id: group.order_id,
        row: group.row_key,
        expected: group.expected,
        found: group.found,
    })
}

/// Waits until every instance runs the newest value, or time is up.
async fn once_in_force(admin: &FlagAdmin) -> Result<FlagView, Problem> {
    let end = Instant::now() + IN_FORCE_WITHIN;
    loop {
        let view = look(admin).await?;
        if view.in_force || Instant::now() >= end {
            return Ok(view);
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn look(admin: &FlagAdmin) -> Result<FlagView, Problem> {
    let mut newest = flag_values::newest(&admin.pool, 2, None)
        .await
        .map_err(database)?
        .into_iter();
    let (flag, previous) = (newest.next(), newest.next());
    let instances = flag_instances::list(&admin.pool).await.map_err(database)?;
    let version = flag.as_ref().map_or(0, |set| set.flag.version);
    let rollouts = flag_rollouts::newest(&admin.pool, 1).await.map_err(database)?;
    let running = rollouts.into_iter().find(|rollout| rollout.state == "running");
    Ok(FlagView {
        in_force: !instances.is_empty() && instances.iter().all(|instance| instance.version >= version),
        previous: match (&flag, previous) {
            (_, Some(previous)) => Some(value(previous)?),
            (Some(_), None) => Some(first()),
            (None, None) => None,
        },
        flag: flag.map_or_else(|| Ok(first()), value)?,
        set_version: None,
        instances: instances
            .into_iter()
            .map(|instance| {
                Ok(InstanceView {
                    instance: instance.instance,
                    address: instance.address,
                    version: instance.version,
                    unable: instance.unable,
                    started_at: text(instance.started_at)?,
                    seen_at: text(instance.seen_at)?,
                })
            })
            .collect::<Result<_, Problem>>()?,
        rollout: running.map(rollout).transpose()?,
    })
}

fn first() -> ValueView {
    ValueView {
        version: 0,
        mode: Flag::FIRST.mode.name(),
        percent: Flag::FIRST.share.percent(),
        rest: Flag::FIRST.rest.name(),
        set_at: None,
        set_by: None,
        reason: None,
        rollout: None,
    }
}

fn value(set: SetFlag) -> Result<ValueView, Problem> {
    Ok(ValueView {
        version: set.flag.version,
        mode: set.flag.mode.name(),
        percent: set.flag.share.percent(),
        rest: set.flag.rest.name(),
        set_at: Some(text(set.set_at)?),
        set_by: Some(set.set_by),
        reason: Some(set.reason),
        rollout: set.rollout,
    })
}

fn rollout(rollout: Rollout) -> Result<RolloutView, Problem> {
    Ok(RolloutView {
        id: rollout.id,
        state: rollout.state,
        mode: rollout.mode,
        rest: rollout.rest,
        steps: rollout.steps.into_iter().map(|step| f64::from(step) / 100.0).collect(),
        soak_seconds: rollout.soak_seconds,
        stop: StopWhen {
            mismatches: rollout.stop.most_mismatches,
            lag_seconds: rollout.stop.most_lag_seconds,
            error_ratio: rollout.stop.most_error_ratio,
            dead_letters: rollout.stop.most_dead_letters,
        },
        step: rollout.step,
        step_began_at: rollout.step_began_at.map(text).transpose()?,
        safe_version: rollout.safe_version,
        started_at: text(rollout.started_at)?,
        started_by: rollout.started_by,
        reason: rollout.reason,
        ended_at: rollout.ended_at.map(text).transpose()?,
        ended_because: rollout.ended_because,
    })
}

/// All but the version that is safe, which only the database knows.
fn checked(asked: NewRolloutRequest, caller: Caller) -> Result<NewRollout, Problem> {
    check_reason(&asked.reason)?;
    let (to, rest) = (mode("/mode", &asked.mode)?, mode("/rest", &asked.rest)?);
    if to == rest {
        return Err(Problem::invalid_field("/rest", "is the same as mode"));
    }
    if asked.steps.is_empty() || asked.steps.len() > MOST_STEPS {
        return Err(Problem::invalid_field(
            "/steps",
            format!("must have 1 to {MOST_STEPS} steps"),
        ));
    }
    let mut steps = Vec::with_capacity(asked.steps.len());
    for (place, percent) in asked.steps.iter().enumerate() {
        let pointer = format!("/steps/{place}");
        let step = i32::from(share(&pointer, *percent)?.hundredths());
        if steps.last().is_some_and(|last| *last >= step) || step == 0 {
            return Err(Problem::invalid_field(&pointer, "is not above the step before"));
        }
        steps.push(step);
    }
    if !(0.0..=LONGEST_SOAK).contains(&asked.soak_seconds) {
        return Err(Problem::invalid_field("/soak_seconds", "must be 0 to 604800"));
    }
    let stop = asked.stop;
    let limits = [
        ("/stop/mismatches", stop.mismatches.map(|most| most as f64)),
        ("/stop/lag_seconds", stop.lag_seconds),
        ("/stop/error_ratio", stop.error_ratio),
        ("/stop/dead_letters", stop.dead_letters.map(|most| most as f64)),
    ];
    for (pointer, limit) in limits {
        if limit.is_some_and(|limit| !(0.0..=1e9).contains(&limit)) {
            return Err(Problem::invalid_field(
                pointer,
                "must not be negative, nor above 1000000000",
            ));
        }
    }
    if stop.error_ratio.is_some_and(|ratio| ratio > 1.0) {
        return Err(Problem::invalid_field(
            "/stop/error_ratio",
            "must be 0 to 1: 0.01 is one in a hundred",
        ));
    }
    if limits.iter().all(|(_, limit)| limit.is_none()) {
        return Err(Problem::invalid_field("/stop", "needs at least one condition"));
    }
    Ok(NewRollout {
        mode: to.name(),
        rest: rest.name(),
        steps,
        soak_seconds: asked.soak_seconds,
        stop: StopConditions {
            most_mismatches: stop.mismatches,
            most_lag_seconds: stop.lag_seconds,
            most_error_ratio: stop.error_ratio,
            most_dead_letters: stop.dead_letters,
        },
        safe_version: 0,
        started_by: caller.name,
        reason: asked.reason,
    })
}

fn check_reason(reason: &str) -> Result<(), Problem> {
    if reason.trim().is_empty() || reason.len() > LONGEST_REASON {
        return Err(Problem::invalid_field(
            "/reason",
            "must have 1 to 500 bytes, and not only spaces",
        ));
    }
    // It is shown on one line, in the history that everybody believes.
    if !reason.chars().all(is_printable) {
        let message =
            "must be one line, without control characters and without marks that turn the direction of writing";
        return Err(Problem::invalid_field("/reason", message));
    }
    Ok(())
}

fn mode(pointer: &str, name: &str) -> Result<Mode, Problem> {
    Mode::from_name(name).ok_or_else(|| Problem::invalid_field(pointer, "is not one of outbox, shadow, legacy"))
}

fn share(pointer: &str, percent: f64) -> Result<Share, Problem> {
    Share::from_percent(percent)
        .ok_or_else(|| Problem::invalid_field(pointer, "must be 0 to 100, with at most two decimals"))
}

/// A value that this very process could not run would be found out by its requests.
fn check_ability(admin: &FlagAdmin, flag: &Flag) -> Result<(), Problem> {
    match admin.switch.unable() {
        Some(unable) if flag.has(Mode::Legacy) || flag.has(Mode::Shadow) => Err(Problem::new(
            &FLAG_UNAVAILABLE,
            format!("the synchronous path is closed: {unable}"),
        )),
        _ => Ok(()),
    }
}
