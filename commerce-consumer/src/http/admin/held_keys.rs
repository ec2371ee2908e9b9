use axum::{
    Json,
    extract::{RawQuery, State},
    http::{HeaderMap, StatusCode},
};
use inbox::{HandlerError, KeyState, pass::PassError};
use serde::{Deserialize, Serialize};
use service_runtime::{
    auth::Role,
    http::JsonBody,
    problem::Problem,
    query::{limit, pairs, wrong},
};
use shared_events::envelope::rfc3339_micros;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{Admin, DEFAULT_LIMIT, MAX_LIMIT, NOT_A_CURSOR, actor, check_reason, defect};
use crate::http::{
    error::{KEY_NOT_WAITING, database, write},
    problems::{LetterProblems, OperateProblems, PassProblems},
};

#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct HeldKeysView {
    held_keys: Vec<HeldKeyView>,
    /// Give it as `cursor` for what follows; absent at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
struct HeldKeyView {
    aggregate_type: String,
    aggregate_id: String,
    /// `retrying`: its event is in a retry topic. `dead`: it is a dead letter. `waiting`: an earlier one has not come.
    /// `releasing`: it is settled, those behind it are on their way.
    state: String,
    /// The event that holds the key.
    event_id: Uuid,
    event_type: String,
    sequence: i64,
    partition: i32,
    error_type: String,
    error_message: String,
    /// Events parked behind it.
    parked: i64,
    #[serde(with = "rfc3339_micros")]
    #[schema(value_type = String, format = DateTime)]
    held_since: OffsetDateTime,
}

/// Which keys are held, and for what.
#[utoipa::path(get, path = "/admin/held-keys", operation_id = "listHeldKeys", tag = "operations",
    params(("state" = Option<String>, Query, description = "`retrying`, `dead`, `waiting` or `releasing`"),
           ("cursor" = Option<String>, Query, description = "`next` of the page before"),
           ("limit" = Option<u16>, Query, description = "1 to 200, by default 50")),
    responses((status = 200, body = HeldKeysView), LetterProblems))]
pub(in crate::http) async fn held_keys(
    State(admin): State<Admin>,
    RawQuery(query): RawQuery,
) -> Result<Json<HeldKeysView>, Problem> {
    let (mut state, mut after, mut most) = (None, None, DEFAULT_LIMIT);
    for (name, value) in pairs(&query.unwrap_or_default())? {
        match name.as_str() {
            "state" => state = Some(KeyState::from_name(&value).ok_or_else(|| wrong("state", "is no such state"))?),
            "cursor" => after = Some(place_of_key(&value).ok_or_else(|| wrong("cursor", NOT_A_CURSOR))?),
            "limit" => most = limit("limit", &value, MAX_LIMIT)?,
            _ => return Err(wrong(&name, "is unknown, known are state, cursor and limit")),
        }
    }
    let after = after.as_ref().map(|(kind, id)| (kind.as_str(), id.as_str()));
    let page = admin
        .operator
        .held_keys(state, after, most.into())
        .await
        .map_err(database)?;
    let last = page.keys.last().filter(|_| page.more);
    Ok(Json(HeldKeysView {
        next: last.map(|key| format!("{}/{}", key.aggregate_type, key.aggregate_id)),
        held_keys: page
            .keys
            .into_iter()
            .map(|key| HeldKeyView {
                aggregate_type: key.aggregate_type,
                aggregate_id: key.aggregate_id,
                state: key.state,
                event_id: key.event_id,
                event_type: key.event_type,
                sequence: key.sequence,
                partition: key.partition,
                error_type: key.error_type,
                error_message: key.error_message,
                parked: key.parked,
                held_since: key.held_since,
            })
            .collect(),
    }))
}

fn place_of_key(cursor: &str) -> Option<(String, String)> {
    let (kind, id) = cursor.split_once('/')?;
    (!cursor.contains('\0')).then(|| (kind.to_owned(), id.to_owned()))
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct PassOver {
    aggregate_type: String,
    aggregate_id: String,
    /// The event that is to be the next; at most the one that waits.
    to_sequence: i64,
    /// Kept with the action; 1 to 500 bytes.
    reason: String,
}

#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct PassedView {
    aggregate_type: String,
    aggregate_id: String,
    to_sequence: i64,
}

/// Let a key that waits for an event go on without it.
///
/// For an event that will never come: the key goes on with `to_sequence`, what the events before it would have changed stays
/// undone, and one of them that comes after all is a duplicate. If it is a dead letter that could not be read, edit that instead.
#[utoipa::path(post, path = "/admin/held-keys/pass", operation_id = "passHeldKey", tag = "operations",
    request_body = PassOver,
    responses((status = 202, description = "It is on its way", body = PassedView), PassProblems, OperateProblems))]
pub(in crate::http) async fn pass(
    State(admin): State<Admin>,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<(StatusCode, Json<PassedView>), Problem> {
    let caller = admin.grants.require(&headers, Role::Operator)?;
    let asked: PassOver = body.parse()?;
    check_reason(&asked.reason)?;
    if asked.to_sequence < 2 {
        return Err(Problem::invalid_field(
            "/to_sequence",
            "must be at least 2: nothing comes before the first event",
        ));
    }
    for (pointer, text) in [
        ("/aggregate_type", &asked.aggregate_type),
        ("/aggregate_id", &asked.aggregate_id),
    ] {
        if text.contains('\0') {
            return Err(Problem::invalid_field(pointer, "contains a NUL character"));
        }
    }
    let PassOver {
        aggregate_type,
        aggregate_id,
        to_sequence,
        reason,
    } = asked;
    // A task of its own: a client that hangs up must not leave a connection inside a transaction (HAZARDS H3).
    let task = tokio::spawn(async move {
        let key = (aggregate_type, aggregate_id);
        admin.pass.to(&key, to_sequence, actor(&caller, &reason)).await?;
        tracing::warn!(
            by = caller.name,
            reason,
            aggregate_id = key.1,
            to_sequence,
            "a held key goes on without what it waited for"
        );
        Ok::<_, PassError>(key)
    });
    match task.await.map_err(|_| defect())? {
        Ok((aggregate_type, aggregate_id)) => Ok((
            StatusCode::ACCEPTED,
            Json(PassedView {
                aggregate_type,
                aggregate_id,
                to_sequence,
            }),
        )),
        Err(error @ (PassError::NotWaiting | PassError::Unknown)) => {
            Err(Problem::new(&KEY_NOT_WAITING, error.to_string()))
        }
        Err(error @ PassError::WouldPassParked { .. }) => {
            Err(Problem::invalid_field("/to_sequence", error.to_string()))
        }
        Err(PassError::Database(error) | PassError::Handler(HandlerError::Database(error))) => Err(write(error)),
        Err(PassError::Handler(error)) => {
            tracing::error!(%error, "the handler could not pass over events");
            Err(defect())
        }
    }
}
