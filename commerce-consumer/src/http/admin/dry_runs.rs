use axum::{Json, extract::State, http::HeaderMap};
use inbox::{
    Outcome,
    dry_run::{DryRunError, RowChange, Tried},
};
use serde::Serialize;
use serde_json::{Map, Value};
use service_runtime::{
    auth::Role,
    problem::{self, Problem},
};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{Admin, defect};
use crate::http::{
    error::{Id, LETTER_NOT_FOUND},
    problems::DryRunProblems,
};

#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct TriedView {
    /// `applied`, `duplicate`, `skipped`, `retry` (it would go to a retry topic), `early` (it would wait for an earlier event) or
    /// `dead_letter`.
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    error_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error_message: Option<String>,
    /// Rows of commerce that would change, by table and key.
    changes: Vec<ChangeView>,
}

#[derive(Debug, Serialize, ToSchema)]
struct ChangeView {
    table: &'static str,
    #[schema(value_type = Object)]
    key: Map<String, Value>,
    /// The columns that would change, as they are; null for a row that would be new.
    #[schema(value_type = Option<Object>)]
    before: Option<Map<String, Value>>,
    /// The same columns as they would be; all of them for a new row.
    #[schema(value_type = Option<Object>)]
    after: Option<Map<String, Value>>,
}

impl From<Tried> for TriedView {
    fn from(tried: Tried) -> Self {
        let (outcome, reason) = match tried.outcome {
            Outcome::Applied => ("applied", None),
            Outcome::Duplicate => ("duplicate", None),
            Outcome::Skipped => ("skipped", None),
            Outcome::Retry(reason) => ("retry", Some(reason)),
            Outcome::Early(reason) => ("early", Some(reason)),
            Outcome::DeadLetter(reason) => ("dead_letter", Some(reason)),
        };
        let change = |change: RowChange| ChangeView {
            table: change.table,
            key: change.key,
            before: change.before,
            after: change.after,
        };
        Self {
            outcome,
            error_type: reason.as_ref().map(|reason| reason.error_type.clone().into_owned()),
            error_message: reason.map(|reason| reason.message),
            changes: tried.changes.into_iter().map(change).collect(),
        }
    }
}

/// Try a dead letter on commerce's database as it is now, in a transaction that is rolled back.
///
/// Says what would become of it and which rows would change. Nothing is written; only numbers that the database has given out,
/// such as the id of a timeline's entry, are not given out again.
#[utoipa::path(post, path = "/admin/dead-letters/{id}/dry-run", operation_id = "tryDeadLetter", tag = "operations",
    params(("id" = Uuid, Path)),
    responses((status = 200, description = "What would happen", body = TriedView), DryRunProblems))]
pub(in crate::http) async fn dry_run(
    State(admin): State<Admin>,
    id: Id,
    headers: HeaderMap,
) -> Result<Json<TriedView>, Problem> {
    let caller = admin.grants.require(&headers, Role::Operator)?;
    let letter: Uuid = id.0.parse().map_err(|_| id.not_found(&LETTER_NOT_FOUND))?;
    // A task of its own: a client that hangs up must not leave a connection inside a transaction (HAZARDS H3).
    let dry_run = admin.dry_run.clone();
    let task = tokio::spawn(async move { dry_run.letter(letter).await });
    let tried = match task.await.map_err(|_| defect())? {
        Ok(tried) => tried,
        Err(DryRunError::NotFound) => return Err(id.not_found(&LETTER_NOT_FOUND)),
        Err(error @ DryRunError::Platform(_)) => {
            tracing::warn!(%letter, %error, "a dry run has failed");
            return Err(Problem::new(
                &problem::UNAVAILABLE,
                "the database cannot try it now; repeat the request",
            ));
        }
    };
    let view = TriedView::from(tried);
    let (outcome, changes) = (view.outcome, view.changes.len());
    tracing::info!(by = caller.name, %letter, outcome, changes, "a dead letter is tried without effect");
    Ok(Json(view))
}
