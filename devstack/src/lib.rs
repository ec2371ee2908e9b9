//! A local stack without a container engine: PostgreSQL 18, Apache Kafka 4 and the two services (and Debezium when asked
//! for), for `./dev` and for tests.
//!
//! In the order in which `./dev up` meets them:

/// What a person is told when something fails, and the exit code that scripts see.
pub mod failure;

/// What a machine must have, found, installed or named.
pub mod prerequisites;

/// The Java runtime that Kafka needs.
pub mod java;

/// Programs fetched once through Maven into a cache.
pub mod cache;

/// The server programs of every stack.
pub mod servers;

/// Child processes: started, identified, stopped within a deadline.
pub mod process;

/// The unprivileged account that runs PostgreSQL when the caller is root.
pub mod account;

/// One PostgreSQL server.
pub mod postgres;

/// One Kafka broker.
pub mod kafka;

/// One Kafka Connect worker with Debezium, in place of the built-in relay.
pub mod connect;

/// Roles and database that the migrations expect.
pub mod database;

/// The topics of a consumer group, with their settings.
pub mod topics;

/// Servers that run already.
pub mod external;

/// Where a stack lives.
pub mod place;

/// Ports, chosen once among the free ones.
pub mod ports;

/// What a stack remembers between runs.
pub mod state;

/// What a person sees while they wait.
pub mod progress;

/// A stack that runs: servers and services, started in order, stopped in reverse.
pub mod stack;

/// What remains of a stack whose `./dev up` was killed.
pub mod leftovers;

/// How the two services are told about a stack.
pub mod services;

/// The services, built by cargo.
pub mod compile;

/// The Northwind sample on its way through the product.
pub mod sample;

/// Waiting for a service to say that it is ready.
pub mod health;

/// For the integration tests of every crate: databases, topics, private servers and service processes.
pub mod testing;
