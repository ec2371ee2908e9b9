//! Processes of a stack whose `./dev up` is gone: found by their records, stopped in reverse order of start.

use std::fs;
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::Signal;

use crate::place::{Part, Place, StackLock};
use crate::process::{ProcessIdentity, Stop};
use crate::progress::Progress;

const DEADLINE: Duration = Duration::from_secs(30);

/// The recorded process of a part, if it still runs.
pub fn running(place: &Place, part: Part) -> anyhow::Result<Option<ProcessIdentity>> {
    let path = place.record(part);
    match fs::read(&path) {
        // A record cut short by a crash names nobody.
        Ok(bytes) => Ok(serde_json::from_slice::<ProcessIdentity>(&bytes)
            .ok()
            .filter(ProcessIdentity::is_alive)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

/// Stops every recorded process and removes the records. Returns the names of those that ran.
pub async fn stop(place: &Place, _lock: &StackLock, progress: &Progress) -> anyhow::Result<Vec<&'static str>> {
    let mut stopped = Vec::new();
    for part in Part::ALL.into_iter().rev() {
        if let Some(identity) = running(place, part)? {
            let step = progress.step(format!("stopping {} (process {})", part.name(), identity.pid));
            let signal = match part {
                Part::Postgres => Signal::SIGINT,
                Part::Kafka | Part::Debezium | Part::Logistics | Part::Commerce => Signal::SIGTERM,
            };
            match identity.stop(signal, DEADLINE).await? {
                Stop::Clean => step.done(&format!("{} stopped", part.name())),
                Stop::Killed => step.done(&format!("{} killed after {} s", part.name(), DEADLINE.as_secs())),
            }
            stopped.push(part.name());
        }
        match fs::remove_file(place.record(part)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).context("remove a process record");
            }
            _ => {}
        }
    }
    Ok(stopped)
}
