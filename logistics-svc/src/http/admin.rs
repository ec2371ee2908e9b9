use axum::{
    Json,
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
};
use outbox::{EventState, Operator, Selection, Status};
use serde::{Deserialize, Serialize};
use service_runtime::{
    auth::{Grants, Role},
    http::JsonBody,
    problem::Problem,
};
use shared_events::envelope::format_timestamp;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{
    error::{EVENT_NOT_FOUND, read_fault},
    problems::{LookProblems, OperateProblems},
};
use crate::{config::RelayMode, fault::Fault};

/// Most events of one request to send again.
const MAX_RESENT: i64 = 10_000;

/// What operators look at and change.
#[derive(Debug, Clone)]
pub struct Admin {
    pub operator: Operator,
    /// Of the relay in this process, if there is one.
    pub relay: Option<Status>,
    pub mode: RelayMode,
    pub grants: Grants,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct RelayView {
    /// The configured mode.
    mode: &'static str,
    /// Whether this process relays; the rest is absent if not.
    runs_here: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    relay: Option<RunningView>,
}

#[derive(Debug, Serialize, ToSchema)]
struct RunningView {
    /// `starting`, `standby`, `sweeping`, `streaming`, `polling`, `stalled`, `failing` or `stopped`.
    state: &'static str,
    /// The state with its reason.
    detail: String,
    for_seconds: u64,
    /// Where events are read from now: `wal` or `poll`.
    source: &'static str,
    last_switch: Option<SwitchView>,
    /// Events not yet published, at most 1,000,000 are counted; absent while the database does not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    backlog: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    oldest_unpublished_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    slot: Option<SlotView>,
}

#[derive(Debug, Serialize, ToSchema)]
struct SwitchView {
    at: String,
    from: &'static str,
    to: &'static str,
    reason: String,
}

#[derive(Debug, Serialize, ToSchema)]
struct SlotView {
    /// Write-ahead log behind the slot's position.
    lag_bytes: i64,
    /// Write-ahead log that the server keeps because of the slot.
    retained_bytes: i64,
    /// How long its position has not moved although there is log behind it.
    still_for_seconds: u64,
}

/// How the relay of this process is doing.
#[utoipa::path(get, path = "/admin/relay", operation_id = "readRelay", tag = "operations",
    responses((status = 200, description = "Mode, state, source and slot", body = RelayView), LookProblems))]
pub(super) async fn relay(State(admin): State<Admin>) -> Result<Json<RelayView>, Problem> {
    let mode = match admin.mode {
        RelayMode::Wal => "wal",
        RelayMode::Poll => "poll",
        RelayMode::AfterCommit => "after-commit",
        RelayMode::External => "external",
        RelayMode::Auto => "auto",
    };
    Ok(Json(RelayView {
        mode,
        runs_here: admin.relay.is_some(),
        relay: admin.relay.as_ref().map(running).transpose()?,
    }))
}

fn running(status: &Status) -> Result<RunningView, Problem> {
    let (view, seen) = (status.view(), status.seen());
    let last_switch = view.last_switch.map(|switch| {
        Ok::<_, Problem>(SwitchView {
            at: text(switch.at)?,
            from: switch.from.name(),
            to: switch.to.name(),
            reason: switch.reason,
        })
    });
    Ok(RunningView {
        state: view.state.name(),
        detail: view.state.to_string(),
        for_seconds: view.since.elapsed().as_secs(),
        source: view.source.name(),
        last_switch: last_switch.transpose()?,
        backlog: seen.backlog.map(|(events, _)| events),
        oldest_unpublished_at: seen.backlog.and_then(|(_, oldest)| oldest).map(text).transpose()?,
        slot: seen.slot.map(|slot| SlotView {
            lag_bytes: slot.lag_bytes,
            retained_bytes: slot.retained_bytes,
            still_for_seconds: slot.still_for.as_secs(),
        }),
    })
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct OutboxView {
    states: Vec<StateView>,
}

#[derive(Debug, Serialize, ToSchema)]
struct StateView {
    /// `init`, `failed`, `published` or `completed`.
    state: &'static str,
    /// At most 1,000,000 are counted.
    events: i64,
    oldest_created_at: Option<String>,
    oldest_age_seconds: Option<f64>,
}

/// How many events are in each state of their life.
#[utoipa::path(get, path = "/admin/outbox", operation_id = "readOutbox", tag = "operations",
    responses((status = 200, description = "Counts and oldest event per state", body = OutboxView), LookProblems))]
pub(super) async fn outbox(State(admin): State<Admin>) -> Result<Json<OutboxView>, Problem> {
    let counts = admin.operator.counts().await.map_err(database)?;
    let now = OffsetDateTime::now_utc();
    let states = counts
        .into_iter()
        .map(|count| {
            Ok(StateView {
                state: count.state,
                events: count.events,
                oldest_created_at: count.oldest.map(text).transpose()?,
                oldest_age_seconds: count.oldest.map(|oldest| (now - oldest).as_seconds_f64().max(0.0)),
            })
        })
        .collect::<Result<_, Problem>>()?;
    Ok(Json(OutboxView { states }))
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct EventView {
    id: Uuid,
    /// `init`, `failed`, `published` or `completed`.
    state: &'static str,
    aggregate_id: String,
    #[serde(rename = "type")]
    event_type: String,
    sequence: i64,
    created_at: String,
    published_at: Option<String>,
    confirmed_at: Option<String>,
    failed_at: Option<String>,
    /// Why the broker refuses it.
    failure: Option<String>,
    /// Whether it is asked for again and not yet sent.
    resend_open: bool,
}

/// One event's life.
#[utoipa::path(get, path = "/admin/outbox/{event_id}", operation_id = "readEvent", tag = "operations",
    params(("event_id" = Uuid, Path)),
    responses((status = 200, description = "The event", body = EventView),
              (status = 404, description = "No such event, or no more", body = Problem, content_type = "application/problem+json"), LookProblems))]
pub(super) async fn event(State(admin): State<Admin>, Path(id): Path<String>) -> Result<Json<EventView>, Problem> {
    let not_found = || Problem::new(&EVENT_NOT_FOUND, format!("event {id} is not in the outbox"));
    let id: Uuid = id.parse().map_err(|_| not_found())?;
    let found = admin.operator.event(id).await.map_err(database)?;
    Ok(Json(view(found.ok_or_else(not_found)?)?))
}

fn view(event: EventState) -> Result<EventView, Problem> {
    Ok(EventView {
        state: event.state(),
        id: event.id,
        aggregate_id: event.aggregate_id,
        event_type: event.event_type,
        sequence: event.sequence,
        created_at: text(event.created_at)?,
        published_at: event.published_at.map(text).transpose()?,
        confirmed_at: event.confirmed_at.map(text).transpose()?,
        failed_at: event.failed_at.map(text).transpose()?,
        failure: event.failure,
        resend_open: event.resend_open,
    })
}

/// What to send again: exactly one of `ids`, `shipment_id`, or `from` with `to`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Resend {
    ids: Option<Vec<Uuid>>,
    shipment_id: Option<i64>,
    /// Created at or after, RFC 3339.
    from: Option<String>,
    /// Created before, RFC 3339.
    to: Option<String>,
    /// Kept with the request.
    reason: String,
    /// True, the default, only says what would be sent.
    #[serde(default = "yes")]
    dry_run: bool,
}

fn yes() -> bool {
    true
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ResendView {
    dry_run: bool,
    /// Events that the request means.
    matched: usize,
    /// Events asked for now; those already asked for are not counted again.
    requested: u64,
    /// The first hundred.
    event_ids: Vec<Uuid>,
}

/// Send events again, each shipment's in their order.
///
/// The relay sends them within a second or two; consumers see duplicates, and absorb them. An event that was set aside goes
/// out like this once its cause is repaired, and its shipment's later events after it. `dry_run` is true unless you say
/// otherwise.
#[utoipa::path(post, path = "/admin/outbox/resend", operation_id = "resendEvents", tag = "operations",
    request_body = Resend,
    responses((status = 200, description = "What would be sent", body = ResendView),
              (status = 202, description = "What was asked for", body = ResendView),
              OperateProblems))]
pub(super) async fn resend(
    State(admin): State<Admin>,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<(StatusCode, Json<ResendView>), Problem> {
    let caller = admin.grants.require(&headers, Role::Operator)?;
    let asked: Resend = body.parse()?;
    let dry_run = asked.dry_run;
    if asked.reason.trim().is_empty() || asked.reason.len() > 500 {
        return Err(Problem::invalid_field("/reason", "must have 1 to 500 bytes"));
    }
    let reason = asked.reason.clone();
    let meant = selection(asked)?;
    let ids = admin.operator.select(&meant, MAX_RESENT + 1).await.map_err(database)?;
    if ids.len() as i64 > MAX_RESENT {
        let message = format!("means more than {MAX_RESENT} events; take a shorter span");
        return Err(Problem::invalid_field("/from", message));
    }
    let requested = if dry_run {
        0
    } else {
        let requested = admin
            .operator
            .resend(&ids, &caller.name, &reason)
            .await
            .map_err(database)?;
        tracing::warn!(
            by = caller.name,
            reason,
            matched = ids.len(),
            requested,
            "events are to be sent again"
        );
        requested
    };
    let status = if dry_run { StatusCode::OK } else { StatusCode::ACCEPTED };
    let view = ResendView {
        dry_run,
        matched: ids.len(),
        requested,
        event_ids: ids.into_iter().take(100).collect(),
    };
    Ok((status, Json(view)))
}

fn selection(asked: Resend) -> Result<Selection, Problem> {
    match (asked.ids, asked.shipment_id, asked.from, asked.to) {
        (Some(ids), None, None, None) if ids.is_empty() => Err(Problem::invalid_field("/ids", "is empty")),
        (Some(ids), None, None, None) => Ok(Selection::Ids(ids)),
        (None, Some(id), None, None) => Ok(Selection::AggregateId(id.to_string())),
        (None, None, Some(from), Some(to)) => {
            let (from, to) = (instant("/from", &from)?, instant("/to", &to)?);
            if from >= to {
                return Err(Problem::invalid_field("/to", "is not after from"));
            }
            Ok(Selection::Created { from, to })
        }
        _ => Err(Problem::invalid_field(
            "",
            "needs exactly one of ids, shipment_id, or from with to",
        )),
    }
}

fn instant(pointer: &str, value: &str) -> Result<OffsetDateTime, Problem> {
    OffsetDateTime::parse(value, &Rfc3339)
        .map_err(|_| Problem::invalid_field(pointer, "is not a time such as 2026-11-22T05:00:00Z"))
}

pub(super) fn text(time: OffsetDateTime) -> Result<String, Problem> {
    format_timestamp(time).map_err(|error| {
        tracing::error!(%error, "a time cannot be written");
        Problem::new(
            &service_runtime::problem::INTERNAL,
            "a defect; see the log under this request_id",
        )
    })
}

pub(super) fn database(error: sqlx::Error) -> Problem {
    read_fault(Fault::from(error))
}
