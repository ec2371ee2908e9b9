//! The problem responses of the operations, for the specification.

use std::collections::BTreeMap;

use serde_json::json;
use service_runtime::problem::{self, Kind};
use utoipa::{
    IntoResponses,
    openapi::{ContentBuilder, Ref, RefOr, Response, ResponseBuilder},
};

use super::error::{
    FLAG_CHANGED, FLAG_UNAVAILABLE, KEY_IN_PROGRESS, KEY_REUSED, OTHER_TRACKING_NUMBER, OUTCOME_UNKNOWN, ROLLOUT_RUNS,
    SHIPMENT_NOT_FOUND, WRONG_STATUS,
};

static READ: [&Kind; 5] = [
    &problem::MALFORMED,
    &SHIPMENT_NOT_FOUND,
    &problem::OVERLOADED,
    &problem::TIMEOUT,
    &problem::UNAVAILABLE,
];
static CREATE: [&Kind; 10] = [
    &problem::MALFORMED,
    &KEY_IN_PROGRESS,
    &problem::TOO_LARGE,
    &problem::UNSUPPORTED_MEDIA_TYPE,
    &problem::INVALID,
    &KEY_REUSED,
    &problem::OVERLOADED,
    &problem::TIMEOUT,
    &problem::UNAVAILABLE,
    &OUTCOME_UNKNOWN,
];
static LOOK: [&Kind; 3] = [&problem::OVERLOADED, &problem::TIMEOUT, &problem::UNAVAILABLE];
static OPERATE: [&Kind; 9] = [
    &problem::MALFORMED,
    &problem::UNAUTHENTICATED,
    &problem::FORBIDDEN,
    &problem::TOO_LARGE,
    &problem::UNSUPPORTED_MEDIA_TYPE,
    &problem::INVALID,
    &problem::OVERLOADED,
    &problem::TIMEOUT,
    &problem::UNAVAILABLE,
];
static CHANGE_ONE: [&Kind; 3] = [&SHIPMENT_NOT_FOUND, &WRONG_STATUS, &OTHER_TRACKING_NUMBER];

/// Of every operation that changes the flag.
pub(super) struct FlagProblems;
/// Of every operation that reads.
pub(super) struct ReadProblems;
/// Of every operation that changes something.
pub(super) struct CreateProblems;
/// Of every operation that changes one shipment.
pub(super) struct ChangeProblems;

/// Of every operation that only looks at the service itself.
pub(super) struct LookProblems;
/// Of every operation for which a token is needed.
pub(super) struct OperateProblems;

impl IntoResponses for LookProblems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        describe(&LOOK)
    }
}

impl IntoResponses for OperateProblems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        describe(&OPERATE)
    }
}

impl IntoResponses for FlagProblems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let kinds: Vec<&Kind> = OPERATE
            .into_iter()
            .chain([&FLAG_UNAVAILABLE, &FLAG_CHANGED, &ROLLOUT_RUNS])
            .collect();
        describe(&kinds)
    }
}

impl IntoResponses for ReadProblems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        describe(&READ)
    }
}

impl IntoResponses for CreateProblems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        describe(&CREATE)
    }
}

impl IntoResponses for ChangeProblems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let kinds: Vec<&Kind> = CREATE.into_iter().chain(CHANGE_ONE).collect();
        describe(&kinds)
    }
}

/// One response per status; its description lists the codes.
fn describe(kinds: &[&'static Kind]) -> BTreeMap<String, RefOr<Response>> {
    let mut by_status = BTreeMap::<u16, Vec<&Kind>>::new();
    for kind in kinds {
        by_status.entry(kind.status.as_u16()).or_default().push(kind);
    }
    by_status
        .into_iter()
        .map(|(status, kinds)| (status.to_string(), RefOr::T(response(&kinds))))
        .collect()
}

fn response(kinds: &[&Kind]) -> Response {
    let codes: Vec<String> = kinds
        .iter()
        .map(|kind| format!("`{}`: {}", kind.code, kind.title))
        .collect();
    let example = kinds.first().map(|kind| {
        json!({"type": format!("/problems/{}", kind.code), "title": kind.title, "status": kind.status.as_u16(),
               "code": kind.code, "detail": kind.help, "retryable": kind.status.as_u16() == 503})
    });
    let content = ContentBuilder::new()
        .schema(Some(Ref::from_schema_name("Problem")))
        .example(example)
        .build();
    ResponseBuilder::new()
        .description(codes.join("; "))
        .content("application/problem+json", content)
        .build()
}
