//! The announcing half: a service appends an event in the transaction of its change, a relay carries it to Kafka.
//!
//! ```text
//! append (in the caller's transaction) ─► outbox table ─► write-ahead log ─┬─► relay: next batch ─► publish ─► acknowledge
//!                                         ▲   └─────────── poll ──────────┘                             │
//!                                         └────────────────── mark published ◄──────────────────────────┘
//! ```
//!
//! The library knows no service, no schema and no topic by heart. Modules in the order an event meets them:

/// `append`: the only way into the outbox; takes an open transaction by type.
mod append;

/// All SQL on the outbox table and the tables around it.
mod table;

/// A pool whose questions end, also when the server has vanished.
mod limited_pool;

/// The relay: its modes, its sessions, and how it comes back after every failure.
mod relay;

/// The write-ahead log as a source: replication connection, decoder, and the session that streams.
mod wal;

/// The table as a source: leases on buckets of keys, and passes over their unsent rows.
mod poll;

/// One pass over unsent rows; also what no stream will bring, whenever a slot had to be made.
mod sweep;

/// What a relay does every second beside the next batch: repaired keys, resends, rows that are stuck.
mod upkeep;

/// Publish, then mark: what every source does with an event, up to a position that is safe.
mod delivery;

/// Publishing at once what this process commits, and the hints that wake a relay.
mod after_commit;

/// The Kafka producer: key, headers, delivery reports.
mod publisher;

/// What a new producer may have on its way before the broker knows it.
mod first_batch;

/// What is in flight: the low-water mark below which the broker has acknowledged everything.
mod watermark;

/// The product's own consumer group, which reads the topic back: COMPLETED.
mod confirm;

/// Days made ahead, and dropped when they are over.
mod retention;

/// Backlog and slot, looked at every few seconds whatever the relay does.
mod monitor;

/// What the relay is doing, for health, metrics and people.
mod status;

/// A task that did not return.
mod ended;

/// Looking into the outbox, and asking for events to be sent again.
mod operator;

pub use after_commit::{AfterCommit, Hints, Place};
pub use append::{AppendError, NewEvent, Outbox};
pub use operator::Operator;
pub use relay::{Lifecycle, Mode, Relay, RelaySettings, WalBudget};
pub use status::{RelayState, Seen, SlotHealth, Source, Status, Switch, View};
pub use table::{EventState, Selection, StateCount};
pub use wal::AddressError;
