//! The measuring side: how many shipments a second the pair completes, how fast a relay drains a backlog, how long an event takes,
//! and what the peers reach in the same run. Every figure comes with an account of the events: rows in, distinct
//! rows out.
//!
//! Modules in the order in which a run meets them:

/// The command line: every argument with its range.
pub mod cli;

/// PostgreSQL and Kafka: started for the run, or named by the environment.
pub mod servers;

/// A fresh database and topic for one contender.
pub mod place;

/// The topic between contender and figures: made, watched, deleted.
pub mod topic;

/// What is measured: a mode of our relay, or Debezium.
pub mod contender;

/// Kafka Connect with Debezium, as a peer.
pub mod debezium;

/// `pg_recvlogical`, the limit of whatever reads the write-ahead log.
pub mod pg_recvlogical;

/// Memory and processor time of a contender's processes, while they work.
pub mod usage;

/// The events: which key, which sequence, exactly how many bytes.
pub mod workload;

/// A backlog, in bulk and in the order in which each key must leave.
pub mod fill;

/// One event at a time on an open schedule, straight into the table or through the API.
pub mod append;

/// The accounting: what stands in the topic against what was appended.
pub mod verify;

/// Reads records as they come, and takes the times.
pub mod receive;

/// The measurement of a drain.
pub mod drain;

/// The measurement of append → broker.
pub mod latency;

/// Requests on one raw connection.
pub mod http;

/// Requests by schedule or in a closed loop, with every answer's times.
pub mod load;

/// The measurement of completions over the REST interface, with the whole pair.
pub mod complete;

/// The measurement of a backlog that commerce applies.
pub mod consumer;

/// Calls while commerce fails, by each path.
pub mod failure_rate;

/// What a broker carries without the product.
pub mod kafka;

/// What an event costs, for backlogs of several sizes.
pub mod cost;

/// Bounds that figures must meet.
pub mod threshold;

/// What the figures were measured on.
pub mod conditions;

/// A table for people, JSON for everything else.
pub mod report;

/// The report with its pictures: one file that needs nothing else.
pub mod html;
