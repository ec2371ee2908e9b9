//! All SQL of this service, one file per table; the outbox table is the `outbox` crate's.

pub mod flag_instances;
pub mod flag_rollouts;
pub mod flag_values;
pub mod idempotency_keys;
pub mod shadow;
pub mod shipments;
