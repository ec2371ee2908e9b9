//! The listening half of the pair: events from Kafka take effect in a service's own tables, once and in order.
//!
//! The engine knows no service. A service gives it a [`Handler`], which is handed an open transaction and a batch of
//! decoded events and answers with one [`Outcome`] per event; the handler in turn knows nothing of Kafka. What is
//! promised rests on one order of steps, which every path below keeps:
//!
//! ```text
//! poll → queue → rate limit → decode → ONE transaction {inbox rows, effect} → commit → redirects acknowledged → offset
//! ```
//!
//! A crash between any two steps repeats the later ones: the inbox rows make the repeated effect a duplicate, and a
//! repeated redirect meets the same inbox. Modules stand in the order in which a record meets them:

/// Start, run, stop: the topics are checked, then one poll thread and a worker per partition do the rest.
pub mod engine;

/// What operators set while it runs: paused or not, and how fast; the same for all instances.
mod controls;

/// The one consumer: its settings, and the poll thread that work never blocks.
mod consumer;

/// The partitions owned: a worker for each, pause and resume, offsets of finished work, what a rebalance does.
mod assignment;

/// What the poll thread and a partition's worker share.
mod lane;

/// A record as it is kept between them.
mod record;

/// A partition's bounded queue between the two.
mod queue;

/// The worker of one partition: batch, limit, process, redirect, offset; and a failing batch halved down to what is at
/// fault.
mod partition;

/// What a worker has in hand: records, events and their verdicts.
mod in_hand;

/// Events per second of the whole group, shared by the partitions owned.
pub mod rate_limit;

/// How the limits follow the database's health.
pub mod pace;

/// Record to event or rejection; pure.
mod decode;

/// What a service does with an event: the trait it implements, and what it may answer.
pub mod handler;

/// Batches of several partitions in one transaction.
mod shared_transaction;

/// A batch's inbox rows: streamed where all its events are expected to be new.
mod claim;

/// One batch, one transaction: claim, held keys, apply, take back what was not applied, hold, park, commit.
mod process;

/// Events that take effect in the transaction that causes them, and whose records then find them done.
pub mod synchronous;

/// Whose turn it is, and what becomes of a batch when one of its events fails; pure.
pub mod ordering;

/// Parked events leave, in order, once what held them is settled.
mod release;

/// What failures of one cause have in common; pure.
mod fingerprint;

/// All SQL: inbox, held keys, parked events, dead letters, what operators set.
pub mod table;

/// The one function that decides between pausing, retrying and giving up.
pub mod failure;

/// The schedule: which attempt goes to which tier, or to the dead letters; and the pauses during an outage. Pure.
pub mod retry;

/// The stop before a flood of dead letters.
pub mod flood;

/// The producer to retry and dead-letter topics; done only when the broker says so.
mod redirect;

pub mod operator;

/// What a dead letter would do, in a transaction that is rolled back.
pub mod dry_run;

/// A key goes on without events that will never come.
pub mod pass;

/// The table of dead letters, filled again from their topic.
pub mod rebuild;

/// What a person may ask: assignment, lag, and why nothing moves.
pub mod status;

mod metrics;

/// Where a test can end the process, between durable steps.
pub mod crash_point;

pub use controls::Controls;
pub use dry_run::DryRun;
pub use engine::{Engine, EngineError, GroupProtocol, Membership, Settings, UnknownTypes};
pub use flood::FloodLimit;
pub use handler::{Handler, HandlerError, IncomingEvent, Outcome, Position, Reason, Row};
pub use operator::Operator;
pub use ordering::{Key, KeyState, Ordering, Parking};
pub use pace::Pace;
pub use pass::Pass;
pub use rate_limit::{Budget, Rate, RateLimits};
pub use rebuild::{Rebuild, RebuildError};
pub use retry::Schedule;
pub use status::Status;
pub use synchronous::Synchronous;
pub use table::{Remembered, Table};
