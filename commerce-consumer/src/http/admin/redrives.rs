use axum::{
    Json,
    extract::{RawQuery, State},
    http::{HeaderMap, HeaderName, StatusCode, header},
};
use inbox::operator::{Job, LetterFilter, Plan};
use serde::{Deserialize, Serialize};
use service_runtime::{
    auth::Role,
    http::JsonBody,
    problem::Problem,
    query::{limit, pairs, wrong},
};
use shared_events::envelope::{format_timestamp, rfc3339_micros};
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{
    Admin, DEFAULT_LIMIT, MAX_LIMIT, NOT_A_CURSOR, actor, check_reason,
    decisions::{FilterFields, filter},
    defect,
};
use crate::http::{
    error::{Id, REDRIVE_NOT_FOUND, database, write},
    problems::{LetterProblems, OperateProblems, RedriveProblems},
};

/// Which open dead letters, how, and why. At least one field of the filter is needed; all that are given must apply.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Begin {
    fingerprint: Option<String>,
    error_type: Option<String>,
    /// The event's type.
    #[serde(rename = "type")]
    event_type: Option<String>,
    aggregate_id: Option<String>,
    /// Died last at or after, RFC 3339.
    from: Option<String>,
    /// Died last before, RFC 3339.
    to: Option<String>,
    /// So many letters go first, and the rest only when all of them are settled; 1 to 10,000.
    #[serde(default = "default_canary")]
    canary: u32,
    /// Letters that are let go in a second, at most; 1 to 100,000. The redrive limit of the group holds beside it.
    #[serde(default = "default_rate")]
    rate: u32,
    /// The job is given up if a larger share of its settled letters died again; 0 to 100.
    #[serde(default = "default_abort_percent")]
    abort_percent: u32,
    /// Kept with the job.
    reason: String,
    /// True, the default, only counts which letters are meant.
    #[serde(default = "yes")]
    dry_run: bool,
}

fn default_canary() -> u32 {
    100
}

fn default_rate() -> u32 {
    100
}

fn default_abort_percent() -> u32 {
    10
}

fn yes() -> bool {
    true
}

#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct BegunView {
    dry_run: bool,
    /// Open dead letters that are meant.
    matched: i64,
    /// Of them, those of keys that another redrive works on: they are left to it.
    busy: i64,
    /// Of them, records that are no events: they are left out.
    unreadable: i64,
    /// Absent if nothing has begun.
    #[serde(skip_serializing_if = "Option::is_none")]
    redrive: Option<RedriveView>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct RedriveView {
    id: Uuid,
    /// `canary`, `running`, `cancelled`, `succeeded` or `failed`.
    state: String,
    #[schema(value_type = Object)]
    filter: serde_json::Value,
    /// Meant when it began.
    letters: i64,
    canary: i64,
    rate: i32,
    abort_percent: i32,
    /// Let go so far.
    sent: i64,
    took_effect: i64,
    died_again: i64,
    /// Behind a letter of their key that is dead, or behind an event that has not come.
    held_back: i64,
    on_their_way: i64,
    /// At the pace so far; absent once it has ended, and while nothing is settled.
    #[serde(skip_serializing_if = "Option::is_none")]
    eta_seconds: Option<f64>,
    /// Why it ended as it did.
    ended_because: Option<String>,
    actor: String,
    reason: String,
    #[serde(with = "rfc3339_micros")]
    #[schema(value_type = String, format = DateTime)]
    created_at: OffsetDateTime,
    /// Absent while it is at work.
    #[serde(skip_serializing_if = "Option::is_none")]
    ended_at: Option<String>,
}

impl From<Job> for RedriveView {
    fn from(job: Job) -> Self {
        let settled = job.took_effect + job.died_again + job.held_back;
        let elapsed = (OffsetDateTime::now_utc() - job.created_at).as_seconds_f64();
        let at_work = job.ended_at.is_none() && settled > 0;
        Self {
            eta_seconds: at_work.then(|| elapsed / settled as f64 * (job.letters - settled) as f64),
            id: job.id,
            state: job.state,
            filter: serde_json::from_str(&job.filter).unwrap_or_default(),
            letters: job.letters,
            canary: job.canary,
            rate: job.rate,
            abort_percent: job.abort_percent,
            sent: job.sent,
            took_effect: job.took_effect,
            died_again: job.died_again,
            held_back: job.held_back,
            on_their_way: job.on_their_way,
            ended_because: job.ended_because,
            actor: job.actor,
            reason: job.reason,
            created_at: job.created_at,
            ended_at: job.ended_at.and_then(|at| format_timestamp(at).ok()),
        }
    }
}

/// Send many dead letters through again, as a job of the service: a canary first, then at a rate, until too many die again.
///
/// Each key's letters go in their sequence, and only one redrive works on a key. The job goes on after a restart. `dry_run` is
/// true unless you say otherwise.
#[utoipa::path(post, path = "/admin/redrives", operation_id = "beginRedrive", tag = "operations",
    request_body = Begin,
    responses((status = 200, description = "What is meant; nothing has begun", body = BegunView),
              (status = 202, description = "It has begun", body = BegunView, headers(("Location" = String))), OperateProblems))]
pub(in crate::http) async fn begin(
    State(admin): State<Admin>,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<(StatusCode, [(HeaderName, String); 1], Json<BegunView>), Problem> {
    let caller = admin.grants.require(&headers, Role::Operator)?;
    let asked: Begin = body.parse()?;
    check_reason(&asked.reason)?;
    for (pointer, value, range) in [
        ("/canary", asked.canary, 1..=10_000),
        ("/rate", asked.rate, 1..=100_000),
        ("/abort_percent", asked.abort_percent, 0..=100),
    ] {
        if !range.contains(&value) {
            let allowed = format!("must be {} to {}", range.start(), range.end());
            return Err(Problem::invalid_field(pointer, allowed));
        }
    }
    let (meant, described) = meant(&asked)?;
    let eligible = admin.operator.eligible(&meant).await.map_err(database)?;
    let plan = Plan {
        canary: asked.canary,
        rate: asked.rate,
        abort_percent: asked.abort_percent,
    };
    let begun = if asked.dry_run {
        None
    } else {
        // A task of its own: a client that hangs up must not leave a connection inside a transaction (HAZARDS H3).
        let (operator, reason) = (admin.operator.clone(), asked.reason.clone());
        let task = tokio::spawn(async move {
            let begun = operator
                .begin_job(&meant, &described, plan, actor(&caller, &reason))
                .await;
            begun.inspect(|job| tracing::warn!(by = caller.name, reason, ?job, "a redrive begins"))
        });
        task.await.map_err(|_| defect())?.map_err(write)?
    };
    let job = match begun {
        Some(id) => admin.operator.job(id).await.map_err(database)?,
        None => None,
    };
    let (status, location) = match &job {
        Some(job) => (StatusCode::ACCEPTED, format!("/admin/redrives/{}", job.id)),
        None => (StatusCode::OK, "/admin/redrives".to_owned()),
    };
    let view = BegunView {
        dry_run: asked.dry_run,
        matched: eligible.matched,
        busy: eligible.busy,
        unreadable: eligible.unreadable,
        redrive: job.map(RedriveView::from),
    };
    Ok((status, [(header::LOCATION, location)], Json(view)))
}

fn meant(asked: &Begin) -> Result<(LetterFilter, String), Problem> {
    let fields = FilterFields {
        fingerprint: asked.fingerprint.clone(),
        error_type: asked.error_type.clone(),
        event_type: asked.event_type.clone(),
        aggregate_id: asked.aggregate_id.clone(),
        from: asked.from.clone(),
        to: asked.to.clone(),
    };
    let described = serde_json::json!({
        "fingerprint": fields.fingerprint, "error_type": fields.error_type, "type": fields.event_type,
        "aggregate_id": fields.aggregate_id, "from": fields.from, "to": fields.to,
    });
    let given = described
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(_, value)| !value.is_null());
    let described: serde_json::Map<_, _> = given.map(|(name, value)| (name.clone(), value.clone())).collect();
    match filter(fields)? {
        Some(filter) => Ok((filter, serde_json::Value::from(described).to_string())),
        None => Err(Problem::invalid_field("", "needs at least one field of a filter")),
    }
}

#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct RedrivesView {
    redrives: Vec<RedriveView>,
    /// Give it as `before` for what follows; absent at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<Uuid>,
}

/// Redrives, the latest first.
#[utoipa::path(get, path = "/admin/redrives", operation_id = "listRedrives", tag = "operations",
    params(("before" = Option<String>, Query, description = "`next` of the page before"),
           ("limit" = Option<u16>, Query, description = "1 to 200, by default 50")),
    responses((status = 200, body = RedrivesView), LetterProblems))]
pub(in crate::http) async fn list(
    State(admin): State<Admin>,
    RawQuery(query): RawQuery,
) -> Result<Json<RedrivesView>, Problem> {
    let (mut before, mut most) = (None, DEFAULT_LIMIT);
    for (name, value) in pairs(&query.unwrap_or_default())? {
        match name.as_str() {
            "before" => before = Some(value.parse().map_err(|_| wrong("before", NOT_A_CURSOR))?),
            "limit" => most = limit("limit", &value, MAX_LIMIT)?,
            _ => return Err(wrong(&name, "is unknown, known are before and limit")),
        }
    }
    let mut jobs = admin
        .operator
        .jobs(before, u32::from(most) + 1)
        .await
        .map_err(database)?;
    let more = jobs.len() > usize::from(most);
    jobs.truncate(most.into());
    Ok(Json(RedrivesView {
        next: jobs.last().filter(|_| more).map(|job| job.id),
        redrives: jobs.into_iter().map(RedriveView::from).collect(),
    }))
}

/// One redrive, and what became of its letters so far.
#[utoipa::path(get, path = "/admin/redrives/{id}", operation_id = "readRedrive", tag = "operations",
    params(("id" = String, Path)), responses((status = 200, body = RedriveView), RedriveProblems))]
pub(in crate::http) async fn read(State(admin): State<Admin>, id: Id) -> Result<Json<RedriveView>, Problem> {
    Ok(Json(found(&admin, &id).await?.into()))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Cancel {
    /// Kept with the action; 1 to 500 bytes.
    reason: String,
}

/// Let nothing more of a redrive go. What is on its way arrives; the rest stays an open dead letter.
#[utoipa::path(post, path = "/admin/redrives/{id}/cancel", operation_id = "cancelRedrive", tag = "operations",
    params(("id" = String, Path)), request_body = Cancel,
    responses((status = 200, description = "As it is now; one that has ended stays as it is", body = RedriveView),
              (status = 404, description = "`redrive-not-found`"), OperateProblems))]
pub(in crate::http) async fn cancel(
    State(admin): State<Admin>,
    id: Id,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Json<RedriveView>, Problem> {
    let caller = admin.grants.require(&headers, Role::Operator)?;
    let Cancel { reason } = body.parse()?;
    check_reason(&reason)?;
    let job = found(&admin, &id).await?;
    let operator = admin.operator.clone();
    let task = tokio::spawn(async move { operator.cancel_job(job.id, actor(&caller, &reason)).await });
    task.await.map_err(|_| defect())?.map_err(write)?;
    Ok(Json(found(&admin, &id).await?.into()))
}

async fn found(admin: &Admin, id: &Id) -> Result<Job, Problem> {
    let Ok(job) = id.0.parse::<Uuid>() else {
        return Err(id.not_found(&REDRIVE_NOT_FOUND));
    };
    let job = admin.operator.job(job).await.map_err(database)?;
    job.ok_or_else(|| id.not_found(&REDRIVE_NOT_FOUND))
}
