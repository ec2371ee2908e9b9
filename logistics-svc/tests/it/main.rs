//! The service against a real PostgreSQL, each test with a database of its own (`./dev test`).
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

/// A database, the router over it, and what a test asks them.
mod service;

/// A TCP proxy that loses the answer to COMMIT.
mod lost_commit;

mod admin;
mod atomicity;
mod bulk;
mod concurrency;
mod flag;
mod hang_up;
mod idempotency;
mod process;
mod reading;
mod rights;
mod specification;
mod wrong_input;
