use axum::{Json, extract::State, http::HeaderMap};
use inbox::operator::Shelving;
use serde::Serialize;
use service_runtime::{auth::Role, http::JsonBody, problem::Problem};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{
    Admin, actor, check_reason,
    decisions::{Decide, MAX_DECIDED, Meant, meant},
    defect,
};
use crate::http::{
    error::{database, write},
    problems::OperateProblems,
};

#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct ShelvedView {
    dry_run: bool,
    /// Dead letters that are meant and can be archived, or restored; at most 1,000.
    matched: usize,
    /// Of them, those that now are.
    changed: usize,
    /// Those that are meant.
    ids: Vec<Uuid>,
}

/// Put dead letters out of sight that need nobody any more.
///
/// Those that are resolved, and records that are no events: these hold no key and cannot be redriven. Lists and groups show
/// archived ones only for `state=archived`; after DEAD_LETTERS_RETENTION they are deleted. At most 1,000 at once. `dry_run` is
/// true unless you say otherwise.
#[utoipa::path(post, path = "/admin/dead-letters/archive", operation_id = "archiveDeadLetters", tag = "operations",
    request_body = Decide,
    responses((status = 200, description = "Which are meant, and how many are archived", body = ShelvedView), OperateProblems))]
pub(in crate::http) async fn archive(
    State(admin): State<Admin>,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Json<ShelvedView>, Problem> {
    shelve(&admin, &headers, &body, Shelving::Archive).await
}

/// Take archived dead letters back, in the state that they had.
///
/// At most 1,000 at once. `dry_run` is true unless you say otherwise.
#[utoipa::path(post, path = "/admin/dead-letters/restore", operation_id = "restoreDeadLetters", tag = "operations",
    request_body = Decide,
    responses((status = 200, description = "Which are meant, and how many are back", body = ShelvedView), OperateProblems))]
pub(in crate::http) async fn restore(
    State(admin): State<Admin>,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Json<ShelvedView>, Problem> {
    shelve(&admin, &headers, &body, Shelving::Restore).await
}

async fn shelve(
    admin: &Admin,
    headers: &HeaderMap,
    body: &JsonBody,
    shelving: Shelving,
) -> Result<Json<ShelvedView>, Problem> {
    let caller = admin.grants.require(headers, Role::Operator)?;
    let asked: Decide = body.parse()?;
    let (dry_run, reason) = (asked.dry_run, asked.reason.clone());
    check_reason(&reason)?;
    let operator = admin.operator.clone();
    let ids = match meant(asked)? {
        Meant::Ids(ids) => operator.possible_for(shelving, &ids).await,
        Meant::Filter(filter) => operator.select_for(shelving, &filter, MAX_DECIDED).await,
    };
    let ids = ids.map_err(database)?;
    let changed = if dry_run {
        Vec::new()
    } else {
        // A task of its own: a client that hangs up must not leave a connection inside a transaction (HAZARDS H3).
        let meant = ids.clone();
        let task = tokio::spawn(async move {
            let changed = operator.shelve(&meant, shelving, actor(&caller, &reason)).await;
            changed.inspect(|changed| {
                let (what, letters) = (shelving.as_str(), changed.len());
                tracing::warn!(
                    by = caller.name,
                    reason,
                    what,
                    letters,
                    "dead letters are archived or restored"
                );
            })
        });
        task.await.map_err(|_| defect())?.map_err(write)?
    };
    Ok(Json(ShelvedView {
        dry_run,
        matched: ids.len(),
        changed: changed.len(),
        ids,
    }))
}
