//! The relay on a real PostgreSQL and a real Kafka.
#![allow(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]
#![allow(clippy::print_stdout, reason = "figures of a run are part of its result")]

mod after_commit;
mod auto;
mod faults;
mod lifecycle;
mod poison;
mod poll;
mod publishing;
mod slot;
mod stage;
