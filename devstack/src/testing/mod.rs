//! For the integration tests of every crate. `./dev test` starts PostgreSQL and Kafka once for the whole run and says
//! in the environment where they are; each test takes a database and topics of its own from them. A test that stops
//! or kills a server starts a private one.
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use devstack::testing::{TestDatabase, TestServers, TestTopics};
//!
//! let servers = TestServers::from_env()?;
//! let database = TestDatabase::create(&servers, "logistics", "migrations-hash", async |owner_url| {
//!     // apply the migrations to the template, once per run
//!     # let _: &str = owner_url;
//!     Ok(())
//! })
//! .await?;
//! let topics = TestTopics::create(&servers, 3, 12).await?;
//! let pool = sqlx::PgPool::connect(&database.url_for(devstack::database::LOGISTICS)?).await?;
//! # drop((pool, topics));
//! # Ok(())
//! # }
//! ```

/// Where the servers of the run are.
mod shared;

/// A database per test, cloned from a template.
mod database;

/// Topics per test.
mod topics;

/// Servers of one test, to be stopped and killed.
mod private;

/// A service process under test.
mod service;

pub use crate::connect::OutboxConnector;
pub use database::TestDatabase;
pub use private::{PrivateConnect, PrivateKafka, PrivatePostgres};
pub use service::{Service, binary};
pub use shared::{KAFKA_BROKERS, ROLE_PASSWORD, TEST_DATABASE_URL, TestServers};
pub use topics::TestTopics;

/// Runs an asynchronous clean-up to its end from `Drop`, whatever runtime the caller is in or not in.
fn clean_up<F>(what: &str, work: impl FnOnce() -> F + Send)
where
    F: Future<Output = anyhow::Result<()>>,
{
    let result = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .map_err(anyhow::Error::from)
                    .and_then(|runtime| runtime.block_on(work()))
            })
            .join()
    });
    match result {
        Ok(Ok(())) => {}
        // A second panic would hide the first; a leftover goes away with the servers of the run.
        Ok(Err(error)) if std::thread::panicking() => report(&format!("could not remove {what}: {error:#}")),
        Ok(Err(error)) => panic!("could not remove {what}: {error:#}"),
        Err(_) => report(&format!("the clean-up of {what} panicked")),
    }
}

/// To the output of a failing test.
#[expect(
    clippy::print_stderr,
    reason = "the test harness captures it and shows it when the test fails"
)]
fn report(message: &str) {
    eprintln!("{message}");
}
