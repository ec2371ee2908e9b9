use axum::http::StatusCode;
use service_runtime::problem::{self, Kind, Problem};
use shared_events::envelope::InvalidField;

use crate::{change_shipments::ChangeError, fault::Fault, shipment::Refusal};

/// The problems of this service beside the common ones.
pub static KINDS: [&Kind; 10] = [
    &FLAG_UNAVAILABLE,
    &FLAG_CHANGED,
    &ROLLOUT_RUNS,
    &EVENT_NOT_FOUND,
    &SHIPMENT_NOT_FOUND,
    &WRONG_STATUS,
    &OTHER_TRACKING_NUMBER,
    &KEY_IN_PROGRESS,
    &KEY_REUSED,
    &OUTCOME_UNKNOWN,
];

pub static FLAG_UNAVAILABLE: Kind = Kind {
    code: "flag-unavailable",
    status: StatusCode::CONFLICT,
    title: "This value of the flag cannot be run here",
    help: "`legacy` and `shadow` need both schemas in one database, and the right to act as commerce. The detail names what is missing. Nothing was changed.",
};
pub static FLAG_CHANGED: Kind = Kind {
    code: "flag-changed",
    status: StatusCode::CONFLICT,
    title: "The flag has another version",
    help: "`if_version` was given, and somebody has set the flag since. `GET /admin/flag` shows what it is now. Nothing was changed.",
};
pub static ROLLOUT_RUNS: Kind = Kind {
    code: "rollout-runs",
    status: StatusCode::CONFLICT,
    title: "A roll-out runs already",
    help: "One runs at a time. `GET /admin/flag/rollout` shows it; setting the flag ends it.",
};
pub static SHIPMENT_NOT_FOUND: Kind = Kind {
    code: "shipment-not-found",
    status: StatusCode::NOT_FOUND,
    title: "There is no such shipment",
    help: "The path names a shipment that does not exist. `GET /v1/shipments?order_id=` finds the shipments of an order.",
};
pub static EVENT_NOT_FOUND: Kind = Kind {
    code: "event-not-found",
    status: StatusCode::NOT_FOUND,
    title: "There is no such event in the outbox",
    help: "The id was never committed, or its day is past retention. The consumer's tables may still know it.",
};
pub static WRONG_STATUS: Kind = Kind {
    code: "wrong-status",
    status: StatusCode::CONFLICT,
    title: "The shipment's status does not allow this",
    help: "The detail names the status it has and the one it needs. Read the shipment, then decide. Nothing was changed.",
};
pub static OTHER_TRACKING_NUMBER: Kind = Kind {
    code: "other-tracking-number",
    status: StatusCode::CONFLICT,
    title: "The shipment was completed with another tracking number",
    help: "Completing again is harmless, but not with another parcel's number. Nothing was changed.",
};
pub static KEY_IN_PROGRESS: Kind = Kind {
    code: "idempotency-key-in-progress",
    status: StatusCode::CONFLICT,
    title: "A request with this Idempotency-Key is in progress",
    help: "Repeat the request after `Retry-After` seconds: it then gets the first one's answer.",
};
pub static KEY_REUSED: Kind = Kind {
    code: "idempotency-key-reused",
    status: StatusCode::UNPROCESSABLE_ENTITY,
    title: "This Idempotency-Key belongs to another request",
    help: "The key was used with another path or body. Take a new key for every request that is not a repetition.",
};
pub static OUTCOME_UNKNOWN: Kind = Kind {
    code: "outcome-unknown",
    status: StatusCode::SERVICE_UNAVAILABLE,
    title: "It is not known whether the change was made",
    help: "The connection to the database was lost during the commit. Repeat the request with the same Idempotency-Key: \
           it is then carried out if it was not. Without a key, read the shipment first.",
};

impl From<ChangeError> for Problem {
    fn from(error: ChangeError) -> Self {
        match error {
            ChangeError::NotFound { id } => shipment_not_found(id),
            ChangeError::Refused { refusal, .. } => refused(&refusal),
            ChangeError::KeyInProgress => {
                let detail = "repeat this request in a second to get the first one's answer";
                Self::new(&KEY_IN_PROGRESS, detail).retry_after(1)
            }
            ChangeError::KeyReused => {
                let message = "was used with another path or body within the last 24 hours; take a new key";
                Self::new(&KEY_REUSED, format!("the Idempotency-Key {message}")).field(
                    "#header/Idempotency-Key",
                    "reused",
                    message,
                )
            }
            ChangeError::EventTooLarge { .. } => Self::new(
                &problem::TOO_LARGE,
                format!("{error}; use fewer lines or shorter texts"),
            ),
            ChangeError::TooManyLines { .. } => Self::invalid_field("/ids", format!("{error}; split the call")),
            ChangeError::Overloaded => Self::new(&problem::OVERLOADED, "too many changes are in progress"),
            ChangeError::OutcomeUnknown(_) => Self::new(
                &OUTCOME_UNKNOWN,
                "the connection to the database was lost during the commit; repeat with the same Idempotency-Key",
            ),
            ChangeError::Fault(fault) => unlogged(&fault),
            ChangeError::Encode(_) | ChangeError::Broken(_) => {
                Self::new(&problem::INTERNAL, "a defect; see the log under this request_id")
            }
        }
    }
}

/// A fault of a reading request: logged here, because nobody did before.
pub(super) fn read_fault(fault: Fault) -> Problem {
    use std::error::Error;
    let cause = fault.source().map(ToString::to_string);
    match &fault {
        Fault::Defect(_) => tracing::error!(error = %fault, cause, "a read failed"),
        Fault::Conflict(_) | Fault::Unavailable(_) => tracing::warn!(error = %fault, cause, "a read failed"),
    }
    unlogged(&fault)
}

fn unlogged(fault: &Fault) -> Problem {
    match fault {
        Fault::Conflict(_) => Problem::new(
            &problem::UNAVAILABLE,
            "other changes of the same shipments were faster; nothing was changed, repeat the request",
        ),
        Fault::Unavailable(_) => Problem::new(
            &problem::UNAVAILABLE,
            "the database cannot be reached or is busy; nothing was changed, repeat the request",
        ),
        Fault::Defect(_) => Problem::new(&problem::INTERNAL, "a defect; see the log under this request_id"),
    }
}

pub(super) fn shipment_not_found(id: impl std::fmt::Display) -> Problem {
    Problem::new(&SHIPMENT_NOT_FOUND, format!("shipment {id} does not exist"))
}

/// A field that parses but cannot be meant; `prefix` is the pointer of the object it is in.
pub(super) fn invalid(prefix: &str, error: &InvalidField) -> Problem {
    Problem::invalid_field(format!("{prefix}{}", pointer(&error.field)), &*error.reason)
}

/// `lines[2].quantity` → `/lines/2/quantity`.
fn pointer(field: &str) -> String {
    format!("/{}", field.replace('[', "/").replace(']', "").replace('.', "/"))
}

fn refused(refusal: &Refusal) -> Problem {
    let detail = refusal.to_string();
    match refusal {
        Refusal::WrongStatus { .. } => Problem::new(&WRONG_STATUS, detail),
        Refusal::OtherTrackingNumber { .. } => {
            Problem::new(&OTHER_TRACKING_NUMBER, detail.clone()).field("/tracking_number", "conflict", detail)
        }
        Refusal::UnknownSku { line, .. } => Problem::invalid_field(format!("/lines/{line}/sku"), detail),
        Refusal::ReturnsTooMany { line, .. } => Problem::invalid_field(format!("/lines/{line}/quantity"), detail),
    }
}

/// The code under which a refusal stands in a list of results.
pub(super) fn refusal_code(refusal: &Refusal) -> &'static str {
    refused(refusal).code
}
