use axum::{
    Json,
    extract::{RawQuery, State},
};
use inbox::KeyState;
use serde::Serialize;
use service_runtime::{
    problem::Problem,
    query::{limit, pairs, wrong},
};
use shared_events::envelope::rfc3339_micros;
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{Admin, DEFAULT_LIMIT, MAX_LIMIT, NOT_A_CURSOR};
use crate::http::{error::database, problems::LetterProblems};

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
