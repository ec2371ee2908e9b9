//! The table as a source: unsent rows are found by their state, never by an id cursor (HAZARDS H22), and each key is
//! published by one instance at a time (HAZARDS H24).

/// Which keys this instance publishes.
mod leases;

/// Passes over the unsent rows until told to stop.
mod session;

pub(crate) use session::{Poll, PollSettings};
