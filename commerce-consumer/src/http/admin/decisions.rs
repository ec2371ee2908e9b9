use axum::{
    Json,
    extract::State,
    http::{HeaderMap, StatusCode},
};
use inbox::operator::{Decision, LetterFilter};
use serde::{Deserialize, Serialize};
use service_runtime::{auth::Role, http::JsonBody, problem::Problem};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{Admin, NOT_A_TIME, actor, check_reason, defect, instant};
use crate::http::{
    error::{database, write},
    problems::OperateProblems,
};

/// Most dead letters of one decision.
pub(super) const MAX_DECIDED: u32 = 1_000;

/// Which dead letters, and why: either `ids`, or fields of a filter, all of which must apply. At least one field is
/// needed.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Decide {
    ids: Option<Vec<Uuid>>,
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
    /// Kept with the action.
    pub(super) reason: String,
    /// True, the default, only says which letters are meant.
    #[serde(default = "yes")]
    pub(super) dry_run: bool,
}

fn yes() -> bool {
    true
}

#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct DecidedView {
    dry_run: bool,
    /// Open dead letters that are meant, at most 1,000; those that are no events cannot be.
    matched: usize,
    /// Of them, on their way now.
    decided: usize,
    /// Those that are meant.
    ids: Vec<Uuid>,
}

/// Send dead letters through again, each key's in their sequence.
///
/// They go by the rate limit for redrives, with a fresh retry schedule; what is parked behind their keys follows. One that
/// fails again is an open dead letter again. At most 1,000 at once. `dry_run` is true unless you say otherwise.
#[utoipa::path(post, path = "/admin/dead-letters/redrive", operation_id = "redriveDeadLetters", tag = "operations",
    request_body = Decide,
    responses((status = 200, description = "Which are meant", body = DecidedView),
              (status = 202, description = "Which are on their way", body = DecidedView), OperateProblems))]
pub(in crate::http) async fn redrive(
    State(admin): State<Admin>,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<(StatusCode, Json<DecidedView>), Problem> {
    decide(&admin, &headers, &body, Decision::Redrive).await
}

/// Let dead letters be: they never take effect, and their keys go on without them.
///
/// What they would have changed stays undone; say in `reason` why that is right. A shipment's first event cannot be skipped:
/// nothing of it could take effect any more. At most 1,000 at once. `dry_run` is true
/// unless you say otherwise.
#[utoipa::path(post, path = "/admin/dead-letters/skip", operation_id = "skipDeadLetters", tag = "operations",
    request_body = Decide,
    responses((status = 200, description = "Which are meant", body = DecidedView),
              (status = 202, description = "Which are skipped", body = DecidedView), OperateProblems))]
pub(in crate::http) async fn skip(
    State(admin): State<Admin>,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<(StatusCode, Json<DecidedView>), Problem> {
    decide(&admin, &headers, &body, Decision::Skip).await
}

async fn decide(
    admin: &Admin,
    headers: &HeaderMap,
    body: &JsonBody,
    decision: Decision,
) -> Result<(StatusCode, Json<DecidedView>), Problem> {
    let caller = admin.grants.require(headers, Role::Operator)?;
    let asked: Decide = body.parse()?;
    let (dry_run, reason) = (asked.dry_run, asked.reason.clone());
    check_reason(&reason)?;
    let ids = match meant(asked)? {
        Meant::Ids(ids) => admin.operator.open(&ids).await.map_err(database)?,
        Meant::Filter(filter) => admin.operator.select(&filter, MAX_DECIDED).await.map_err(database)?,
    };
    if decision == Decision::Skip
        && let Some((id, event_type)) = admin.operator.unskippable(&ids).await.map_err(database)?.first()
    {
        return Err(Problem::invalid_field(
            "",
            format!("means {id}, a {event_type}: the rest of its shipment builds on it, so that it cannot be skipped"),
        ));
    }
    let decided = if dry_run {
        Vec::new()
    } else {
        // A task of its own: a client that hangs up must not leave a connection inside a transaction (HAZARDS H3).
        let (operator, caller, ids, reason) = (admin.operator.clone(), caller.clone(), ids.clone(), reason.clone());
        let by = caller.name.clone();
        let why = reason.clone();
        let task = tokio::spawn(async move { operator.decide(&ids, decision, actor(&caller, &reason)).await });
        let decided = task.await.map_err(|_| defect())?.map_err(write)?;
        tracing::warn!(
            by,
            reason = why,
            decision = decision.as_str(),
            letters = decided.len(),
            "dead letters are decided"
        );
        decided
    };
    let view = DecidedView {
        dry_run,
        matched: ids.len(),
        decided: decided.len(),
        ids,
    };
    // Nothing is on its way if nothing was decided.
    let status = if view.decided == 0 {
        StatusCode::OK
    } else {
        StatusCode::ACCEPTED
    };
    Ok((status, Json(view)))
}

pub(super) enum Meant {
    Ids(Vec<Uuid>),
    Filter(Box<LetterFilter>),
}

pub(super) fn meant(asked: Decide) -> Result<Meant, Problem> {
    let narrowed = filter(FilterFields {
        fingerprint: asked.fingerprint,
        error_type: asked.error_type,
        event_type: asked.event_type,
        aggregate_id: asked.aggregate_id,
        from: asked.from,
        to: asked.to,
    })?;
    match (asked.ids, narrowed) {
        (Some(_), Some(_)) => Err(Problem::invalid_field(
            "/ids",
            "excludes every other field but reason and dry_run",
        )),
        (Some(ids), None) if ids.is_empty() => Err(Problem::invalid_field("/ids", "is empty")),
        (Some(ids), None) if ids.len() > MAX_DECIDED as usize => Err(Problem::invalid_field(
            "/ids",
            format!("has more than {MAX_DECIDED} ids"),
        )),
        (Some(ids), None) => Ok(Meant::Ids(ids)),
        (None, Some(filter)) => Ok(Meant::Filter(Box::new(filter))),
        (None, None) => Err(Problem::invalid_field(
            "",
            "needs ids, or at least one field of a filter",
        )),
    }
}

/// The fields of a filter as they are asked for.
pub(super) struct FilterFields {
    pub(super) fingerprint: Option<String>,
    pub(super) error_type: Option<String>,
    pub(super) event_type: Option<String>,
    pub(super) aggregate_id: Option<String>,
    pub(super) from: Option<String>,
    pub(super) to: Option<String>,
}

/// `None` if no field is given.
pub(super) fn filter(fields: FilterFields) -> Result<Option<LetterFilter>, Problem> {
    let time = |pointer: &str, value: Option<String>| {
        let read = |value: String| instant(&value).ok_or_else(|| Problem::invalid_field(pointer, NOT_A_TIME));
        value.map(read).transpose()
    };
    let filter = LetterFilter {
        state: None,
        fingerprint: fields.fingerprint,
        error_type: fields.error_type,
        event_type: fields.event_type,
        aggregate_id: fields.aggregate_id,
        consumer_version: None,
        from: time("/from", fields.from)?,
        to: time("/to", fields.to)?,
    };
    let texts = [
        &filter.fingerprint,
        &filter.error_type,
        &filter.event_type,
        &filter.aggregate_id,
    ];
    if texts
        .iter()
        .any(|text| text.as_ref().is_some_and(|text| text.contains('\0')))
    {
        return Err(Problem::invalid_field("", "contains a NUL character"));
    }
    let narrowed = texts.iter().any(|text| text.is_some()) || filter.from.is_some() || filter.to.is_some();
    Ok(narrowed.then_some(filter))
}
