use axum::{
    Json,
    extract::{RawQuery, State},
};
use serde::Serialize;
use service_runtime::{
    problem::Problem,
    query::{limit, pairs, wrong},
};
use shared_events::envelope::rfc3339_micros;
use time::OffsetDateTime;
use utoipa::ToSchema;

use super::{Admin, DEFAULT_LIMIT, MAX_LIMIT};
use crate::http::{error::database, problems::LetterProblems};

#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ActionsView {
    /// The latest first.
    actions: Vec<ActionView>,
    /// Give it as `before` for what follows; absent at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<i64>,
}

#[derive(Debug, Serialize, ToSchema)]
struct ActionView {
    id: i64,
    #[serde(with = "rfc3339_micros")]
    #[schema(value_type = String, format = DateTime)]
    acted_at: OffsetDateTime,
    actor: String,
    role: String,
    /// `redrive`, `skip`, `edit`, `archive`, `restore`, `pass`, `redrive-job`, `cancel-job`, `pause`, `limit` or `resume`.
    action: String,
    #[schema(value_type = Object)]
    target: serde_json::Value,
    reason: String,
}

/// What operators did.
#[utoipa::path(get, path = "/admin/actions", operation_id = "listActions", tag = "operations",
    params(("before" = Option<i64>, Query, description = "`next` of the page before"),
           ("limit" = Option<u16>, Query, description = "1 to 200, by default 50")),
    responses((status = 200, body = ActionsView), LetterProblems))]
pub(in crate::http) async fn actions(
    State(admin): State<Admin>,
    RawQuery(query): RawQuery,
) -> Result<Json<ActionsView>, Problem> {
    let (mut before, mut most) = (None, DEFAULT_LIMIT);
    for (name, value) in pairs(&query.unwrap_or_default())? {
        match name.as_str() {
            "before" => {
                before = Some(
                    value
                        .parse()
                        .map_err(|_| wrong("before", "is not the id of an action"))?,
                )
            }
            "limit" => most = limit("limit", &value, MAX_LIMIT)?,
            _ => return Err(wrong(&name, "is unknown, known are before and limit")),
        }
    }
    let rows = admin
        .operator
        .actions(before, u32::from(most) + 1)
        .await
        .map_err(database)?;
    let next = rows
        .get(usize::from(most))
        .and(rows.get(usize::from(most) - 1))
        .map(|last| last.id);
    let view = |row: inbox::operator::ActionRow| ActionView {
        id: row.id,
        acted_at: row.acted_at,
        actor: row.actor,
        role: row.role,
        action: row.action,
        target: serde_json::from_str(&row.target).unwrap_or_default(),
        reason: row.reason,
    };
    Ok(Json(ActionsView {
        actions: rows.into_iter().take(most.into()).map(view).collect(),
        next,
    }))
}
