//! The logistics service: a request changes shipments and appends their events in one transaction, and answers.
//!
//! ```text
//! POST /v1/shipments/{id}/complete
//!   http        limits, key, JSON → command; errors → problems
//!   change      one transaction: key → lock → decide → update → append → keep the answer → commit
//!     switch    which way its effect goes: by the outbox alone, or commerce's part in the same transaction
//!   relay       outbox → Kafka, in this process or another
//! ```
//!
//! Modules in the order in which a request meets them:

/// The router and its handlers: parse, call, render. Knows neither SQL nor Kafka.
pub mod http;

/// A client's Idempotency-Key, and the answer that is kept for its repetition.
pub mod idempotency;

/// THE transaction: one function opens it, and every change goes through it.
pub mod change_shipments;

/// Requests that wait at the same time share one transaction.
mod group_commit;

/// The domain, pure: states and commands, an event or a refusal.
pub mod shipment;

/// The flag: which way the effect of an order's events goes; pure.
pub mod flag;

/// The flag as this process runs it, looked at four times a second.
pub mod switch;

/// A value of the flag in steps, taken back by itself when a condition is met.
mod rollout;

/// Commerce's part of a change, in the same transaction: the old path, behind the feature `legacy`.
#[cfg(feature = "legacy")]
mod legacy;
#[cfg(not(feature = "legacy"))]
#[path = "without_legacy.rs"]
mod legacy;

/// From a domain event to the outbox: envelope, ids, trace.
pub mod announce;

/// One shipment or a page of them, as they are now.
pub mod find_shipments;

/// All SQL, one file per table.
pub mod tables;

/// A failed statement, by what can be done about it: one function decides.
pub mod fault;

/// The wiring of the relay: this service's outbox, slot and topic.
pub mod relay;

/// The embedded migrations.
pub mod schema;

/// Deletes kept answers when their day is over.
pub mod forget_answers;

/// The flag by command line.
pub mod cli;

/// Every setting, with its meaning, unit and default.
pub mod config;

/// The process around all this: its tasks, their order of stopping, its exit code.
pub mod serve;
