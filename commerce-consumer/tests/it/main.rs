//! Commerce's tables, its REST interface and its part of the flow, on a real PostgreSQL and a real Kafka.
#![allow(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]

mod applying;
mod cli;
mod cli_repairs;
mod consuming;
mod importing;
mod reading;
mod repairs;
mod stage;
mod triage;
