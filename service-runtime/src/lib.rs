//! What every service process needs around its work, so that the services themselves hold only domain and wiring.
//!
//! Modules stand in the order in which a process meets them, from its first line to its last:

/// Settings from flags, environment and file, in one strict layer with the source of each value.
pub mod settings;

/// Logs, metrics and traces: installed once, flushed at the end.
pub mod telemetry;

/// Connection pools, with the limits that keep a lost client from holding locks.
pub mod database;

/// Migrations: applied by the owner, or waited for and verified by a service that may not.
pub mod schema;

/// Broker address and security, and the client configuration every producer and consumer starts from.
pub mod kafka;

/// Readiness: what is missing, said by name.
pub mod health;

/// RFC 9457 problem responses: the one error shape of every HTTP interface.
pub mod problem;

/// Who may do what: bearer tokens with a name and a role.
pub mod auth;

/// Query strings, read strictly.
pub mod query;

/// The HTTP server with its limits, and the extractors that name the field at fault.
pub mod http;

/// A connection that ends when its peer takes nothing.
mod stalled;

/// Named tasks: the first failure stops the process, a signal drains it within a deadline.
pub mod supervise;
