//! The HTTP server over real sockets, and the process around it.
#![allow(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]

mod limits;
mod settings;
mod supervision;
