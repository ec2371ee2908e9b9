//! The pair as a user runs it: the real processes, talked to over HTTP, and a ledger that holds their tables and topics
//! against each other afterwards.

/// Where a pair runs: its database, broker, topics and ports.
pub mod place;

/// The processes of a pair, to be started, stopped and killed.
pub mod pair;

/// The switch between the outbox and the synchronous path.
pub mod flag;

/// REST calls that end in a definite answer, whatever happens to the server meanwhile.
pub mod client;

/// Orders to ship, and clients that ship them and write down what they were promised.
pub mod workload;

/// Events put into the topic without a relay, and what they must have done to commerce.
pub mod feed;

/// Everything a topic holds, read from its beginning.
pub mod topic;

/// The checker: what was committed, what travelled and what took effect, compared row by row.
pub mod ledger;

use std::time::Duration;

use tokio::time::Instant;

const LOOK: Duration = Duration::from_millis(20);

/// Waits until `holds`, looking every 20 ms; less often if a look takes long, so that it is no load of its own.
///
/// # Errors
/// What was waited for, when `deadline` passes.
pub async fn wait_for(
    what: &str,
    deadline: Duration,
    mut holds: impl AsyncFnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let end = Instant::now() + deadline;
    loop {
        let start = Instant::now();
        if holds().await? {
            return Ok(());
        }
        anyhow::ensure!(Instant::now() < end, "waited {deadline:?} for {what}");
        tokio::time::sleep(LOOK.max(5 * start.elapsed())).await;
    }
}
