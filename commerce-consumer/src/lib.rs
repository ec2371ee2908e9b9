//! The commerce service's consumer: what the warehouse ships changes orders, stock and timelines here, once and in order.
//!
//! ```text
//! logistics.shipments ─ inbox engine ─ one transaction ┬ inbox row         (the engine)
//!   batch of events                                    ├ decide            order + shipment + event → effect or refusal
//!                                                      └ save              lines → orders → shipments → timeline → products
//! ```
//!
//! Modules in the order in which an event meets them:

/// The wiring of the engine: this service's topic, group, limits and handler.
pub mod consume;

/// The handler given to the engine: lock, decide in memory, write one statement per table.
pub mod apply_shipment;

/// The domain, pure: an event and what is known of its shipment and order, to an effect or a refusal.
pub mod shipment;

/// The domain, pure: an order's lines, and the status that follows from them.
pub mod order;

/// All SQL, one file per table.
pub mod tables;

/// The rows of an event as one path leaves them, held against what the other has written.
pub mod comparison;

/// What commerce knows, over REST: orders, products, shipments. Read only.
pub mod http;

/// What operators do by command line, over that interface.
pub mod cli;

/// Takes over orders, lines and products, as they are before anything ships.
pub mod import;

/// The table of dead letters, filled again from their topic.
pub mod rebuild;

/// The embedded migrations.
pub mod schema;

/// Every setting, with its meaning, unit and default.
pub mod config;
