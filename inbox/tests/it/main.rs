//! The engine on a real PostgreSQL and a real Kafka, with a handler that only notes what took effect.
#![allow(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]
#![allow(clippy::print_stdout, reason = "seeds and figures are part of a test's result")]

mod archive;
mod controls;
mod edits;
mod effects;
mod faults;
mod flood;
mod isolation;
mod membership;
mod ordering;
mod rate;
mod rebuilding;
mod redirects;
mod release;
mod sharing;
mod stage;
mod throughput;
mod triage;
