//! The problem responses of the operations, for the specification.

use std::collections::BTreeMap;

use service_runtime::problem::{self, Kind};
use utoipa::{
    IntoResponses,
    openapi::{ContentBuilder, Ref, RefOr, Response, ResponseBuilder},
};

use super::error::{
    KEY_NOT_WAITING, LETTER_NOT_FOUND, LETTER_NOT_OPEN, ORDER_NOT_FOUND, PRODUCT_NOT_FOUND, REDRIVE_NOT_FOUND,
    SHIPMENT_NOT_FOUND,
};

pub(super) struct OrderProblems;
pub(super) struct ProductProblems;
pub(super) struct ShipmentProblems;
pub(super) struct SummaryProblems;
/// Of every operation that looks at dead letters or held keys.
pub(super) struct LetterProblems;
pub(super) struct RedriveProblems;
/// Of an edit, beside [`OperateProblems`].
pub(super) struct EditProblems;
/// Of a key that is to go on, beside [`OperateProblems`].
pub(super) struct PassProblems;
/// Of a dry run.
pub(super) struct DryRunProblems;
/// Of every operation for which a token is needed.
pub(super) struct OperateProblems;

impl IntoResponses for OrderProblems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        describe(Some(&ORDER_NOT_FOUND))
    }
}

impl IntoResponses for ProductProblems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        describe(Some(&PRODUCT_NOT_FOUND))
    }
}

impl IntoResponses for ShipmentProblems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        describe(Some(&SHIPMENT_NOT_FOUND))
    }
}

impl IntoResponses for RedriveProblems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        describe(Some(&REDRIVE_NOT_FOUND))
    }
}

impl IntoResponses for SummaryProblems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        describe(None)
    }
}

impl IntoResponses for LetterProblems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        describe(Some(&LETTER_NOT_FOUND))
    }
}

impl IntoResponses for EditProblems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        by_status(&[&LETTER_NOT_FOUND, &LETTER_NOT_OPEN])
    }
}

impl IntoResponses for PassProblems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        by_status(&[&KEY_NOT_WAITING])
    }
}

impl IntoResponses for DryRunProblems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        by_status(&[
            &LETTER_NOT_FOUND,
            &problem::MALFORMED,
            &problem::UNAUTHENTICATED,
            &problem::FORBIDDEN,
            &problem::OVERLOADED,
            &problem::TIMEOUT,
            &problem::UNAVAILABLE,
        ])
    }
}

impl IntoResponses for OperateProblems {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        by_status(&[
            &problem::MALFORMED,
            &problem::UNAUTHENTICATED,
            &problem::FORBIDDEN,
            &problem::TOO_LARGE,
            &problem::UNSUPPORTED_MEDIA_TYPE,
            &problem::INVALID,
            &problem::OVERLOADED,
            &problem::TIMEOUT,
            &problem::UNAVAILABLE,
        ])
    }
}

/// One response per status; its description lists the codes.
fn describe(not_found: Option<&'static Kind>) -> BTreeMap<String, RefOr<Response>> {
    let unreadable = not_found.map(|_| &problem::MALFORMED);
    let common = [&problem::OVERLOADED, &problem::TIMEOUT, &problem::UNAVAILABLE];
    let kinds: Vec<&Kind> = not_found.into_iter().chain(unreadable).chain(common).collect();
    by_status(&kinds)
}

fn by_status(kinds: &[&Kind]) -> BTreeMap<String, RefOr<Response>> {
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
    ResponseBuilder::new()
        .description(codes.join("; "))
        .content(
            "application/problem+json",
            ContentBuilder::new()
                .schema(Some(Ref::from_schema_name("Problem")))
                .build(),
        )
        .build()
}
