//! The contract between the services: what travels from logistics to whoever listens.
//!
//! An event is a fact about one aggregate. It is written once, as the [`envelope::Envelope`] JSON in the outbox column
//! `payload`, and those bytes are the Kafka value, unchanged by any relay. Nothing in this crate knows a database, a
//! Kafka client or a service.
//!
//! Read in the order an event meets them:

/// The payloads: one type per event and version, the facts that logistics announces about a shipment.
pub mod shipment;

/// The envelope around every payload, its bytes, and the typed rejection of bytes that are not one.
pub mod envelope;

/// Every topic name of the system, and how a consumer group's retry and dead-letter topics are derived.
pub mod topics;

/// Kafka headers, encoded and decoded in one place: CloudEvents hints, and the history of a redirected record.
pub mod headers;

pub use envelope::{Envelope, Payload, Rejection};
