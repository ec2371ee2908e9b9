use std::collections::HashSet;

use axum::{
    extract::{RawQuery, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use service_runtime::{problem::Problem, telemetry};

use super::{
    Api, answer,
    error::{self, invalid, read_fault},
    list_query::{self, ListQuery},
    problems::{ChangeProblems, CreateProblems, ReadProblems},
    representation::{
        CompleteShipment, CompleteShipments, CompletionResults, CreateShipment, CreateShipments, PageView, Reason,
        ReleaseShipment, ReturnShipment, ShipmentView, ShipmentsView, lines,
    },
    request::{Posted, ShipmentId},
};
use crate::{
    change_shipments::{Change, ChangeError, Outcome, Reply, Request, Work},
    idempotency::{Answer, IdempotencyKey},
    shipment::{Command, NewShipment},
};

const MAX_CREATED: usize = 1_000;
const MAX_COMPLETED: usize = 10_000;

/// Create a shipment for an order. An order may ship in several shipments.
#[utoipa::path(post, path = "/v1/shipments", operation_id = "createShipment", tag = "shipments",
    request_body = CreateShipment, params(("Idempotency-Key" = Option<String>, Header)),
    responses((status = 201, description = "Created", body = ShipmentView, headers(("Location" = String))), CreateProblems))]
pub(super) async fn create(State(api): State<Api>, posted: Posted) -> Result<Response, Problem> {
    let new = NewShipment::from(posted.body.parse::<CreateShipment>()?);
    new.check().map_err(|error| invalid("", &error))?;
    let work = Work::Create(vec![new]);
    execute(&api, work, posted.key("createShipment"), answer::created_one).await
}

/// Create many shipments: all of them or none.
#[utoipa::path(post, path = "/v1/shipments/batch", operation_id = "createShipments", tag = "shipments",
    request_body = CreateShipments, params(("Idempotency-Key" = Option<String>, Header)),
    responses((status = 201, description = "All are created", body = ShipmentsView), CreateProblems))]
pub(super) async fn create_many(State(api): State<Api>, posted: Posted) -> Result<Response, Problem> {
    let input: CreateShipments = posted.body.parse()?;
    check_count("/shipments", input.shipments.len(), MAX_CREATED)?;
    let new: Vec<NewShipment> = input.shipments.into_iter().map(NewShipment::from).collect();
    for (index, new) in new.iter().enumerate() {
        new.check()
            .map_err(|error| invalid(&format!("/shipments/{index}"), &error))?;
    }
    let work = Work::Create(new);
    execute(&api, work, posted.key("createShipments"), answer::created_many).await
}

/// Append the event of a creation and create nothing: load test 1, what outbox, relay and broker carry by themselves.
///
/// Only where the setting `load-test-endpoint` is on. The event's shipment exists nowhere in logistics.
#[utoipa::path(post, path = "/load-test/outbox", operation_id = "appendOnly", tag = "load test",
    request_body = CreateShipment, params(("Idempotency-Key" = Option<String>, Header)),
    responses((status = 201, description = "The event is committed", body = ShipmentView, headers(("Location" = String))), CreateProblems))]
pub(super) async fn append_only(State(api): State<Api>, posted: Posted) -> Result<Response, Problem> {
    let new = NewShipment::from(posted.body.parse::<CreateShipment>()?);
    new.check().map_err(|error| invalid("", &error))?;
    execute(
        &api,
        Work::AppendOnly(new),
        posted.key("appendOnly"),
        answer::created_one,
    )
    .await
}

/// Read a shipment.
///
/// The `ETag` is the sequence of its last event; `If-None-Match` saves the body.
#[utoipa::path(get, path = "/v1/shipments/{id}", operation_id = "readShipment", tag = "shipments",
    params(("id" = i64, Path), ("If-None-Match" = Option<String>, Header)),
    responses((status = 200, description = "The shipment", body = ShipmentView, headers(("ETag" = String))),
              (status = 304, description = "It is still as the given ETag says"), ReadProblems))]
pub(super) async fn read(State(api): State<Api>, id: ShipmentId, headers: HeaderMap) -> Result<Response, Problem> {
    let found = api.shipments.one(id.0).await.map_err(read_fault)?;
    let shipment = found.ok_or_else(|| error::shipment_not_found(id.0))?;
    let etag = format!("\"{}\"", shipment.sequence);
    let known = headers.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok());
    if known.is_some_and(|known| known.split(',').any(|known| known.trim() == etag)) {
        return Ok((StatusCode::NOT_MODIFIED, [(header::ETAG, etag)]).into_response());
    }
    Ok(([(header::ETAG, etag)], axum::Json(ShipmentView::from(&shipment))).into_response())
}

/// List shipments, the newest id first.
///
/// Shipments that are created while you page do not appear in later pages.
#[utoipa::path(get, path = "/v1/shipments", operation_id = "listShipments", tag = "shipments",
    params(("status" = Option<String>, Query, description = "`open`, `on_hold`, `completed`, `cancelled` or `returned`"),
           ("order_id" = Option<String>, Query),
           ("cursor" = Option<String>, Query, description = "`next_cursor` of the page before"),
           ("limit" = Option<u16>, Query, description = "1 to 200, 50 by default")),
    responses((status = 200, description = "A page", body = PageView, headers(("Link" = String, description = "rel=next, RFC 8288"))),
              ReadProblems))]
pub(super) async fn list(State(api): State<Api>, RawQuery(query): RawQuery) -> Result<Response, Problem> {
    let query = query.unwrap_or_default();
    let ListQuery { filter, before, limit } = list_query::parse(&query)?;
    let page = api.shipments.page(&filter, before, limit).await.map_err(read_fault)?;
    let next_cursor = page.next_before.map(super::cursor::encode);
    let link = next_cursor
        .as_deref()
        .map(|cursor| list_query::next_link(&query, cursor));
    let view = PageView {
        items: page.items.iter().map(ShipmentView::from).collect(),
        next_cursor,
    };
    let mut response = axum::Json(view).into_response();
    if let Some(link) = link.and_then(|link| link.parse().ok()) {
        response.headers_mut().insert(header::LINK, link);
    }
    Ok(response)
}

/// Complete a shipment: the goods have left. Completing it again answers the same and announces nothing.
#[utoipa::path(post, path = "/v1/shipments/{id}/complete", operation_id = "completeShipment", tag = "shipments",
    request_body = Option<CompleteShipment>, params(("id" = i64, Path), ("Idempotency-Key" = Option<String>, Header)),
    responses((status = 200, description = "The shipment as it is now", body = ShipmentView), ChangeProblems))]
pub(super) async fn complete(State(api): State<Api>, id: ShipmentId, posted: Posted) -> Result<Response, Problem> {
    let input: Option<CompleteShipment> = posted.body.parse_or_default()?;
    let command = Command::Complete {
        tracking_number: input.and_then(|input| input.tracking_number),
    };
    change_one(&api, id, command, posted.key("completeShipment")).await
}

/// Complete up to 10,000 shipments in one transaction, each with its own result.
///
/// What is refused or not found does not hold up the rest.
#[utoipa::path(post, path = "/v1/shipments/complete", operation_id = "completeShipments", tag = "shipments",
    request_body = CompleteShipments, params(("Idempotency-Key" = Option<String>, Header)),
    responses((status = 200, description = "A result for each", body = CompletionResults), CreateProblems))]
pub(super) async fn complete_many(State(api): State<Api>, posted: Posted) -> Result<Response, Problem> {
    let input: CompleteShipments = posted.body.parse()?;
    check_count("/ids", input.ids.len(), MAX_COMPLETED)?;
    if let Some(index) = input.ids.iter().position(|id| *id < 1) {
        let message = format!("{} is below 1", input.ids[index]);
        return Err(Problem::invalid_field(format!("/ids/{index}"), message));
    }
    let mut seen = HashSet::with_capacity(input.ids.len());
    let distinct = input.ids.into_iter().filter(|id| seen.insert(*id));
    let complete = |id| Change {
        id,
        command: Command::Complete { tracking_number: None },
    };
    let work = Work::Change(distinct.map(complete).collect());
    execute(&api, work, posted.key("completeShipments"), answer::completed_many).await
}

/// Put an open shipment on hold.
#[utoipa::path(post, path = "/v1/shipments/{id}/hold", operation_id = "holdShipment", tag = "shipments",
    request_body = Reason, params(("id" = i64, Path), ("Idempotency-Key" = Option<String>, Header)),
    responses((status = 200, description = "The shipment as it is now", body = ShipmentView), ChangeProblems))]
pub(super) async fn hold(State(api): State<Api>, id: ShipmentId, posted: Posted) -> Result<Response, Problem> {
    let Reason { reason } = posted.body.parse()?;
    change_one(&api, id, Command::Hold { reason }, posted.key("holdShipment")).await
}

/// Release a shipment that is on hold: it is open again.
#[utoipa::path(post, path = "/v1/shipments/{id}/release", operation_id = "releaseShipment", tag = "shipments",
    request_body = Option<ReleaseShipment>, params(("id" = i64, Path), ("Idempotency-Key" = Option<String>, Header)),
    responses((status = 200, description = "The shipment as it is now", body = ShipmentView), ChangeProblems))]
pub(super) async fn release(State(api): State<Api>, id: ShipmentId, posted: Posted) -> Result<Response, Problem> {
    let _: Option<ReleaseShipment> = posted.body.parse_or_default()?;
    change_one(&api, id, Command::Release, posted.key("releaseShipment")).await
}

/// Cancel a shipment that is open or on hold.
#[utoipa::path(post, path = "/v1/shipments/{id}/cancel", operation_id = "cancelShipment", tag = "shipments",
    request_body = Reason, params(("id" = i64, Path), ("Idempotency-Key" = Option<String>, Header)),
    responses((status = 200, description = "The shipment as it is now", body = ShipmentView), ChangeProblems))]
pub(super) async fn cancel(State(api): State<Api>, id: ShipmentId, posted: Posted) -> Result<Response, Problem> {
    let Reason { reason } = posted.body.parse()?;
    change_one(&api, id, Command::Cancel { reason }, posted.key("cancelShipment")).await
}

/// Take back goods of a completed shipment, all or a part.
///
/// It is `returned` when nothing is left out; until then it stays `completed`.
#[utoipa::path(post, path = "/v1/shipments/{id}/return", operation_id = "returnShipment", tag = "shipments",
    request_body = ReturnShipment, params(("id" = i64, Path), ("Idempotency-Key" = Option<String>, Header)),
    responses((status = 200, description = "The shipment as it is now", body = ShipmentView), ChangeProblems))]
pub(super) async fn take_back(State(api): State<Api>, id: ShipmentId, posted: Posted) -> Result<Response, Problem> {
    let input: ReturnShipment = posted.body.parse()?;
    let command = Command::Return {
        reason: input.reason,
        lines: input.lines.map(lines),
    };
    change_one(&api, id, command, posted.key("returnShipment")).await
}

async fn change_one(
    api: &Api,
    id: ShipmentId,
    command: Command,
    key: Option<IdempotencyKey>,
) -> Result<Response, Problem> {
    command.check().map_err(|error| invalid("", &error))?;
    let work = Work::Change(vec![Change { id: id.0, command }]);
    execute(api, work, key, answer::changed_one).await
}

async fn execute(
    api: &Api,
    work: Work,
    key: Option<IdempotencyKey>,
    answer: fn(&[Outcome]) -> Result<Answer, ChangeError>,
) -> Result<Response, Problem> {
    let request = Request {
        work,
        key,
        answer,
        traceparent: telemetry::traceparent(&tracing::Span::current()),
    };
    Ok(match api.changes.execute(request).await? {
        Reply::Fresh(answer) => answer::response(answer),
        Reply::Replayed(answer) => answer::replayed(answer),
    })
}

fn check_count(pointer: &str, count: usize, max: usize) -> Result<(), Problem> {
    if (1..=max).contains(&count) {
        return Ok(());
    }
    let message = format!("has {count} entries, allowed are 1 to {max}");
    Err(Problem::invalid_field(pointer, message))
}
