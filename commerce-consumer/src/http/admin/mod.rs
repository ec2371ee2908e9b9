//! What operators look at and change.

use std::time::Duration;

use inbox::{Controls, DryRun, Operator, Pass, RateLimits, Status, operator::Actor};
use service_runtime::{
    auth::{Caller, Grants},
    problem::Problem,
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::apply_shipment::ApplyShipment;

/// How the consumer is doing, and letting it go on.
pub(super) mod consumer;

/// Which keys are held, and for what.
pub(super) mod held_keys;

/// The dead letters: alike ones together, one by one, one as a whole.
pub(super) mod dead_letters;

/// What becomes of dead letters.
pub(super) mod decisions;

/// Another event in a dead letter's place.
pub(super) mod edits;

/// Dead letters that need nobody any more.
pub(super) mod archive;

/// What a dead letter would do.
pub(super) mod dry_runs;

/// Many dead letters through again, as jobs.
pub(super) mod redrives;

/// What operators did.
pub(super) mod actions;

const DEFAULT_LIMIT: u16 = 50;
const MAX_LIMIT: u16 = 200;
const MAX_REASON_BYTES: usize = 500;
const NOT_A_CURSOR: &str = "is not one that this service gave out; start again without it";
const NOT_A_TIME: &str = "is not a time such as 2026-11-22T05:00:00Z";

/// What the handlers work with.
#[derive(Debug, Clone)]
pub struct Admin {
    pub operator: Operator,
    pub dry_run: DryRun<ApplyShipment>,
    pub pass: Pass<ApplyShipment>,
    pub status: Status,
    pub limits: RateLimits,
    pub controls: Controls,
    pub grants: Grants,
    /// How long an archived dead letter is kept.
    pub letters_retention: Duration,
}

fn instant(value: &str) -> Option<OffsetDateTime> {
    OffsetDateTime::parse(value, &Rfc3339).ok()
}

fn defect() -> Problem {
    Problem::new(
        &service_runtime::problem::INTERNAL,
        "a defect; see the log under this request_id",
    )
}

fn check_reason(reason: &str) -> Result<(), Problem> {
    if reason.trim().is_empty() || reason.len() > MAX_REASON_BYTES || reason.contains('\0') {
        return Err(Problem::invalid_field(
            "/reason",
            "must have 1 to 500 bytes, none of them NUL",
        ));
    }
    Ok(())
}

fn actor<'a>(caller: &'a Caller, reason: &'a str) -> Actor<'a> {
    Actor {
        name: &caller.name,
        role: caller.role.name(),
        reason,
    }
}
