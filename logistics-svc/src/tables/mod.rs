//! All SQL of this service, one file per table; the outbox table is the `outbox` crate's.

pub mod idempotency_keys;
pub mod shipments;
