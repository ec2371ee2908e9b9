use axum::{
    Json,
    extract::{RawQuery, State},
};
use inbox::operator::{Letter, LetterFilter, LetterGroup, LetterRow};
use serde::{Deserialize, Serialize};
use service_runtime::{
    problem::Problem,
    query::{limit, pairs, wrong},
};
use shared_events::envelope::{format_timestamp, rfc3339_micros};
use time::{Duration, OffsetDateTime};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{Admin, DEFAULT_LIMIT, MAX_LIMIT, NOT_A_CURSOR, NOT_A_TIME, instant};
use crate::http::{
    error::{Id, LETTER_NOT_FOUND, database},
    problems::LetterProblems,
};

#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct GroupsView {
    /// The largest first, at most 200.
    groups: Vec<GroupView>,
}

#[derive(Debug, Serialize, ToSchema)]
struct GroupView {
    /// Error type and message without what differs from letter to letter.
    fingerprint: String,
    error_type: String,
    /// `open`, `redriving`, `resolved` or `archived`.
    state: String,
    letters: i64,
    keys: i64,
    #[serde(with = "rfc3339_micros")]
    #[schema(value_type = String, format = DateTime)]
    first_died_at: OffsetDateTime,
    #[serde(with = "rfc3339_micros")]
    #[schema(value_type = String, format = DateTime)]
    last_died_at: OffsetDateTime,
}

impl From<LetterGroup> for GroupView {
    fn from(group: LetterGroup) -> Self {
        Self {
            fingerprint: group.fingerprint,
            error_type: group.error_type,
            state: group.state,
            letters: group.letters,
            keys: group.keys,
            first_died_at: group.first_died_at,
            last_died_at: group.last_died_at,
        }
    }
}

/// What the dead letters have in common.
#[utoipa::path(get, path = "/admin/dead-letters/groups", operation_id = "groupDeadLetters", tag = "operations",
    params(FilterParameters), responses((status = 200, body = GroupsView), LetterProblems))]
pub(in crate::http) async fn groups(
    State(admin): State<Admin>,
    RawQuery(query): RawQuery,
) -> Result<Json<GroupsView>, Problem> {
    let mut filter = LetterFilter::default();
    for (name, value) in pairs(&query.unwrap_or_default())? {
        if !narrow(&mut filter, &name, &value)? {
            return Err(wrong(&name, UNKNOWN_FILTER));
        }
    }
    let groups = admin.operator.groups(&filter).await.map_err(database)?;
    Ok(Json(GroupsView {
        groups: groups.into_iter().map(GroupView::from).collect(),
    }))
}

/// What a filter may name; used for its documentation alone.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "only described by it, read by `narrow`")]
pub(in crate::http) struct FilterParameters {
    /// `open`, `redriving`, `resolved` or `archived`; without it, all but the archived ones.
    state: Option<String>,
    fingerprint: Option<String>,
    error_type: Option<String>,
    /// The event's type.
    r#type: Option<String>,
    aggregate_id: Option<String>,
    consumer_version: Option<String>,
    /// Died last at or after, RFC 3339.
    from: Option<String>,
    /// Died last before, RFC 3339.
    to: Option<String>,
}

const UNKNOWN_FILTER: &str =
    "is unknown, known are state, fingerprint, error_type, type, aggregate_id, consumer_version, from and to";

/// Takes one parameter into the filter; false if it is none of a filter's.
fn narrow(filter: &mut LetterFilter, name: &str, value: &str) -> Result<bool, Problem> {
    if value.contains('\0') {
        return Err(wrong(name, "contains a NUL character"));
    }
    let text = Some(value.to_owned());
    match name {
        "state" if !["open", "redriving", "resolved", "archived"].contains(&value) => {
            return Err(wrong("state", "is not one of open, redriving, resolved, archived"));
        }
        "state" => filter.state = text,
        "fingerprint" => filter.fingerprint = text,
        "error_type" => filter.error_type = text,
        "type" => filter.event_type = text,
        "aggregate_id" => filter.aggregate_id = text,
        "consumer_version" => filter.consumer_version = text,
        "from" => filter.from = Some(instant(value).ok_or_else(|| wrong("from", NOT_A_TIME))?),
        "to" => filter.to = Some(instant(value).ok_or_else(|| wrong("to", NOT_A_TIME))?),
        _ => return Ok(false),
    }
    Ok(true)
}

#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct LettersView {
    /// The latest first.
    dead_letters: Vec<LetterView>,
    /// Give it as `cursor` for what follows; absent at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct LetterView {
    /// The event's id, or one made of the record's place if it is no event.
    id: Uuid,
    /// `open`: waits for a person. `redriving`: on its way again. `resolved`: it took effect after all, was skipped, or another
    /// one took its place. `archived`: out of sight, and to be deleted.
    state: String,
    aggregate_type: Option<String>,
    aggregate_id: Option<String>,
    sequence: Option<i64>,
    #[serde(rename = "type")]
    event_type: Option<String>,
    error_class: String,
    error_type: String,
    error_message: String,
    fingerprint: String,
    consumer_version: String,
    /// Up to its last death.
    attempts: i32,
    /// 0: it was made of another letter, whose error this is, and has not been tried.
    deaths: i32,
    /// Whether later events of its key wait for it.
    holds_key: bool,
    #[serde(with = "rfc3339_micros")]
    #[schema(value_type = String, format = DateTime)]
    first_died_at: OffsetDateTime,
    #[serde(with = "rfc3339_micros")]
    #[schema(value_type = String, format = DateTime)]
    last_died_at: OffsetDateTime,
    resolved_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    archived_at: Option<String>,
    /// The letter that this one was made of.
    #[serde(skip_serializing_if = "Option::is_none")]
    edited_from: Option<Uuid>,
    /// The letter that took its place.
    #[serde(skip_serializing_if = "Option::is_none")]
    replaced_by: Option<Uuid>,
    origin: OriginView,
}

/// Where its record first stood.
#[derive(Debug, Serialize, ToSchema)]
struct OriginView {
    topic: String,
    partition: i32,
    offset: i64,
}

impl From<LetterRow> for LetterView {
    fn from(row: LetterRow) -> Self {
        Self {
            id: row.id,
            state: row.state,
            aggregate_type: row.aggregate_type,
            aggregate_id: row.aggregate_id,
            sequence: row.sequence,
            event_type: row.event_type,
            error_class: row.error_class,
            error_type: row.error_type,
            error_message: row.error_message,
            fingerprint: row.fingerprint,
            consumer_version: row.consumer_version,
            attempts: row.attempts,
            deaths: row.deaths,
            holds_key: row.holds,
            first_died_at: row.first_died_at,
            last_died_at: row.last_died_at,
            resolved_at: row.resolved_at.and_then(|time| format_timestamp(time).ok()),
            archived_at: row.archived_at.and_then(|time| format_timestamp(time).ok()),
            edited_from: row.edited_from,
            replaced_by: row.replaced_by,
            origin: OriginView {
                topic: row.origin_topic,
                partition: row.origin_partition,
                offset: row.origin_offset,
            },
        }
    }
}

/// The dead letters, one by one.
#[utoipa::path(get, path = "/admin/dead-letters", operation_id = "listDeadLetters", tag = "operations",
    params(FilterParameters,
           ("cursor" = Option<String>, Query, description = "`next` of the page before"),
           ("limit" = Option<u16>, Query, description = "1 to 200, by default 50")),
    responses((status = 200, body = LettersView), LetterProblems))]
pub(in crate::http) async fn letters(
    State(admin): State<Admin>,
    RawQuery(query): RawQuery,
) -> Result<Json<LettersView>, Problem> {
    let (mut filter, mut before, mut most) = (LetterFilter::default(), None, DEFAULT_LIMIT);
    for (name, value) in pairs(&query.unwrap_or_default())? {
        match name.as_str() {
            "cursor" => before = Some(place_of_letter(&value).ok_or_else(|| wrong("cursor", NOT_A_CURSOR))?),
            "limit" => most = limit("limit", &value, MAX_LIMIT)?,
            _ if narrow(&mut filter, &name, &value)? => {}
            _ => return Err(wrong(&name, UNKNOWN_FILTER)),
        }
    }
    let rows = admin
        .operator
        .letters(&filter, before, u32::from(most) + 1)
        .await
        .map_err(database)?;
    let next = rows
        .get(usize::from(most))
        .and(rows.get(usize::from(most) - 1))
        .map(|last| {
            let micros = last.last_died_at.unix_timestamp_nanos() / 1_000;
            format!("{micros}.{}", last.id)
        });
    Ok(Json(LettersView {
        dead_letters: rows.into_iter().take(most.into()).map(LetterView::from).collect(),
        next,
    }))
}

fn place_of_letter(cursor: &str) -> Option<(OffsetDateTime, Uuid)> {
    let (micros, id) = cursor.split_once('.')?;
    let nanos = micros.parse::<i64>().ok().map(i128::from)?.checked_mul(1_000)?;
    Some((OffsetDateTime::from_unix_timestamp_nanos(nanos).ok()?, id.parse().ok()?))
}

#[derive(Debug, Serialize, ToSchema)]
pub(in crate::http) struct WholeLetterView {
    #[serde(flatten)]
    letter: LetterView,
    /// As text; bytes that are none are replaced by U+FFFD.
    record_key: Option<String>,
    /// As text; bytes that are none are replaced by U+FFFD.
    record_value: Option<String>,
    headers: Vec<HeaderView>,
    /// Events parked behind its key.
    parked: i64,
    /// When it will be deleted; absent if it is not archived.
    #[serde(skip_serializing_if = "Option::is_none")]
    deleted_after: Option<String>,
    failed_attempts: Vec<AttemptView>,
}

#[derive(Debug, Serialize, ToSchema)]
struct HeaderView {
    name: String,
    value: String,
}

#[derive(Debug, Serialize, ToSchema)]
struct AttemptView {
    attempt: i32,
    #[serde(with = "rfc3339_micros")]
    #[schema(value_type = String, format = DateTime)]
    failed_at: OffsetDateTime,
    topic: String,
    partition: i32,
    error_class: String,
    error_type: String,
    error_message: String,
    consumer_version: String,
}

/// One dead letter: its record, and every try that failed.
#[utoipa::path(get, path = "/admin/dead-letters/{id}", operation_id = "readDeadLetter", tag = "operations",
    params(("id" = Uuid, Path)), responses((status = 200, body = WholeLetterView), LetterProblems))]
pub(in crate::http) async fn letter(State(admin): State<Admin>, id: Id) -> Result<Json<WholeLetterView>, Problem> {
    let Ok(letter_id) = id.0.parse::<Uuid>() else {
        return Err(id.not_found(&LETTER_NOT_FOUND));
    };
    let letter = admin.operator.letter(letter_id).await.map_err(database)?;
    letter
        .map(|letter| {
            Json(whole(
                letter,
                admin.letters_retention.try_into().unwrap_or(Duration::MAX),
            ))
        })
        .ok_or_else(|| id.not_found(&LETTER_NOT_FOUND))
}

fn whole(letter: Letter, retention: Duration) -> WholeLetterView {
    let deleted_after = letter.row.archived_at.map(|at| at.saturating_add(retention));
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    WholeLetterView {
        letter: letter.row.into(),
        record_key: letter.key.map(text),
        record_value: letter.value.map(text),
        headers: letter
            .headers
            .into_iter()
            .map(|(name, value)| HeaderView {
                name,
                value: text(value),
            })
            .collect(),
        parked: letter.parked,
        deleted_after: deleted_after.and_then(|time| format_timestamp(time).ok()),
        failed_attempts: letter
            .attempts
            .into_iter()
            .map(|attempt| AttemptView {
                attempt: attempt.attempt,
                failed_at: attempt.failed_at,
                topic: attempt.topic,
                partition: attempt.partition,
                error_class: attempt.error_class,
                error_type: attempt.error_type,
                error_message: attempt.error_message,
                consumer_version: attempt.consumer_version,
            })
            .collect(),
    }
}
