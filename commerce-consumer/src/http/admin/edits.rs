use axum::{Json, extract::State, http::HeaderMap};
use inbox::operator::{Edit, EditError, Edited};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use service_runtime::{auth::Role, http::JsonBody, problem::Problem};
use shared_events::{Envelope, envelope::rfc3339_micros};
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{Admin, actor, check_reason, defect};
use crate::http::{
    error::{Id, LETTER_NOT_FOUND, LETTER_NOT_OPEN, write},
    problems::{EditProblems, OperateProblems},
};

/// What to change: at least one of `type`, `version` and `payload`; or `envelope` alone, for a record that is no event.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Change {
    #[serde(rename = "type")]
    event_type: Option<String>,
    version: Option<i32>,
    #[schema(value_type = Option<Object>)]
    payload: Option<Box<RawValue>>,
    envelope: Option<WholeEnvelope>,
    /// Kept with the action; 1 to 500 bytes.
    reason: String,
    /// True, the default, only shows what it would become.
    #[serde(default = "yes")]
    dry_run: bool,
}

/// An event without its id, which will be a new one. `aggregateId` must be the record's key, if it has one.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct WholeEnvelope {
    #[serde(rename = "type")]
    event_type: String,
    version: i32,
    #[serde(with = "rfc3339_micros")]
    #[schema(value_type = String, format = DateTime)]
    timestamp: OffsetDateTime,
    aggregate_type: String,
    aggregate_id: String,
    sequence: i64,
    transaction_key: Uuid,
    #[schema(value_type = Object)]
    payload: Box<RawValue>,
}

fn yes() -> bool {
    true
}

#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct EditedView {
    dry_run: bool,
    /// Of the new dead letter and its event; absent after a dry run.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<Uuid>,
    /// The record as it is, as text; bytes that are none are replaced by U+FFFD.
    before: Option<String>,
    /// The record that takes its place. After a dry run, its id will be another one.
    after: String,
}

/// Put another event in the place of an open dead letter.
///
/// The new event has a new id and is an open dead letter of its own, to be redriven or skipped; aggregate, sequence, time,
/// transaction key and headers stay as they are. The first letter is resolved, and a later copy of its event is a duplicate.
/// `dry_run` is true unless you say otherwise.
#[utoipa::path(post, path = "/admin/dead-letters/{id}/edit", operation_id = "editDeadLetter", tag = "operations",
    params(("id" = Uuid, Path)), request_body = Change,
    responses((status = 200, description = "What it becomes", body = EditedView), EditProblems, OperateProblems))]
pub(in crate::http) async fn edit(
    State(admin): State<Admin>,
    id: Id,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Json<EditedView>, Problem> {
    let caller = admin.grants.require(&headers, Role::Operator)?;
    let asked: Change = body.parse()?;
    let (dry_run, reason) = (asked.dry_run, asked.reason.clone());
    check_reason(&reason)?;
    let change = change(asked)?;
    let letter: Uuid = id.0.parse().map_err(|_| id.not_found(&LETTER_NOT_FOUND))?;
    let edited = if dry_run {
        admin.operator.preview_edit(letter, change).await
    } else {
        // A task of its own: a client that hangs up must not leave a connection inside a transaction (HAZARDS H3).
        let operator = admin.operator.clone();
        let task = tokio::spawn(async move {
            let edited = operator.edit(letter, change, actor(&caller, &reason)).await;
            edited.inspect(|edited| {
                tracing::warn!(by = caller.name, reason, %letter, replaced_by = %edited.id, "a dead letter is edited");
            })
        });
        task.await.map_err(|_| defect())?
    };
    let Edited {
        id: new_id,
        before,
        value,
    } = edited.map_err(|error| problem(&id, error))?;
    Ok(Json(EditedView {
        dry_run,
        id: (!dry_run).then_some(new_id),
        before: before.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
        after: value,
    }))
}

fn change(asked: Change) -> Result<Edit, Problem> {
    let Change {
        event_type,
        version,
        payload,
        envelope,
        ..
    } = asked;
    let has_fields = event_type.is_some() || version.is_some() || payload.is_some();
    match envelope {
        Some(_) if has_fields => Err(Problem::invalid_field(
            "/envelope",
            "excludes type, version and payload",
        )),
        Some(envelope) => Ok(Edit::Event(Box::new(Envelope {
            id: Uuid::nil(),
            event_type: envelope.event_type,
            version: envelope.version,
            timestamp: envelope.timestamp,
            aggregate_type: envelope.aggregate_type,
            aggregate_id: envelope.aggregate_id,
            sequence: envelope.sequence,
            transaction_key: envelope.transaction_key,
            payload: envelope.payload,
        }))),
        None if has_fields => Ok(Edit::Fields {
            event_type,
            version,
            payload,
        }),
        None => Err(Problem::invalid_field(
            "",
            "needs type, version or payload; or envelope, for a record that is no event",
        )),
    }
}

fn problem(id: &Id, error: EditError) -> Problem {
    let text = error.to_string();
    match error {
        EditError::NotFound => id.not_found(&LETTER_NOT_FOUND),
        EditError::NotOpen(_) | EditError::TookEffect => Problem::new(&LETTER_NOT_OPEN, text),
        EditError::NoEvent(_) | EditError::IsEvent => Problem::invalid_field("/envelope", text),
        EditError::OtherKey { .. } => Problem::invalid_field("/envelope/aggregateId", text),
        EditError::Rejected(_) => Problem::invalid_field("", text),
        EditError::Database(error) => write(error),
    }
}
