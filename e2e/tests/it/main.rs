//! The real processes on real servers. Each test's name is the property that it holds.
#![allow(clippy::print_stdout, reason = "figures of a run are part of its result")]

mod bad_records;
// A release build has no crash points.
#[cfg(debug_assertions)]
mod crash_points;
mod dashboards;
mod debezium;
mod documents;
mod faults;
mod flag;
mod latency;
mod northwind;
mod outages;
mod random;
mod rate_limit;
mod redrive;
mod relays;
mod restarts;
mod traces;
mod wal_volume;
