//! The write-ahead log as a source, by logical replication (PostgreSQL documentation, chapters 53.4 to 53.6 and 55.5).

/// Where the database is, read from a URL.
mod address;

/// The replication connection: start-up, authentication, TLS, frames. Knows no outbox.
mod connection;

/// The stream's messages, decoded without a connection or a table.
mod pgoutput;

/// The replication slot: looked at, made, repaired.
mod slot;

/// One connection's life: stream, publish, mark, confirm.
mod session;

pub(crate) use address::Address;
pub use address::AddressError;
pub(crate) use connection::{Connection, ConnectionError};
pub(crate) use session::{StreamError, stream};
pub(crate) use slot::{Origin, Slot};
