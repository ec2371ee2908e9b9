use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use devstack::account::Account;
use devstack::failure::{Exit, Failure};
use devstack::leftovers;
use devstack::place::{Place, StackLock};
use devstack::progress::Progress;
use devstack::state::State;
use nix::sys::signal::Signal;

use super::StackName;

/// Longer than `./dev up` takes to stop everything at its own deadlines.
const DEADLINE: Duration = Duration::from_secs(150);

/// Stop a stack that was started elsewhere, also after its `./dev up` was killed. Data is kept.
#[derive(Debug, clap::Args)]
#[command(before_help = "\
Examples:
  ./dev down                    stop the stack `dev`; the next ./dev up finds its data
  ./dev down --purge --name b   stop the stack `b` and delete its data, logs and passwords")]
pub(crate) struct DownArgs {
    #[command(flatten)]
    stack: StackName,
    /// Delete the stack's data, logs, ports and passwords as well.
    #[arg(long)]
    purge: bool,
}

pub(crate) async fn run(args: &DownArgs) -> anyhow::Result<Exit> {
    let place = args.stack.place()?;
    let progress = Progress::on_stderr();
    if !place.dir().exists() {
        progress.note(&format!("there is no stack `{}`", place.name()));
        return Ok(Exit::Done);
    }
    let (lock, was_held) = take_over(&place, &progress).await?;
    let stopped = leftovers::stop(&place, &lock, &progress).await?;
    if args.purge {
        // A state that cannot be read must not keep anybody from starting over.
        let state = State::load(&place).ok().flatten();
        purge(&place)?;
        progress.note(&format!("removed the data of the stack `{}`", place.name()));
        if state.as_ref().is_some_and(|state| state.database_url.is_some()) {
            progress.note(
                "not removed: database and roles in the PostgreSQL of DATABASE_URL; \
                 drop the roles to have them created again, their password is gone",
            );
        }
        if state.is_some_and(|state| state.kafka_brokers.is_some()) {
            progress.note("not removed: topics in the Kafka of KAFKA_BROKERS");
        }
    } else if !was_held && stopped.is_empty() {
        progress.note(&format!("nothing of the stack `{}` was running", place.name()));
    }
    Ok(Exit::Done)
}

/// The stack's lock, and whether somebody had to be asked for it.
async fn take_over(place: &Place, progress: &Progress) -> anyhow::Result<(StackLock, bool)> {
    if let Some(lock) = place.try_lock()? {
        return Ok((lock, false));
    }
    let supervisor = State::load(place)?.and_then(|state| state.supervisor);
    let step = progress.step(format!("waiting for the ./dev that runs `{}` to stop it", place.name()));
    if let Some(supervisor) = &supervisor {
        supervisor.signal(Signal::SIGTERM)?;
    }
    let end = Instant::now() + DEADLINE;
    while Instant::now() < end {
        if let Some(lock) = place.try_lock()? {
            step.done(&format!("`{}` is stopped", place.name()));
            return Ok((lock, true));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // It hangs; its children are found by their records.
    if let Some(supervisor) = &supervisor {
        supervisor.stop(Signal::SIGKILL, Duration::from_secs(5)).await?;
    }
    let lock = place.try_lock()?.ok_or_else(|| {
        Failure::new(
            Exit::Failed,
            format!("another command still holds the stack `{}`", place.name()),
            "wait for it to end, or end it",
        )
    })?;
    Ok((lock, true))
}

/// Deletes everything of a stack; the locked directory with the passwords goes last.
pub(crate) fn purge(place: &Place) -> anyhow::Result<()> {
    delete_data(place)?;
    remove(&place.dir())
}

/// Deletes the data of the stack's own servers, and the logs; ports and passwords stay.
pub(crate) fn delete_data(place: &Place) -> anyhow::Result<()> {
    let data_dir = match State::load(place).ok().flatten() {
        Some(state) => state.data_dir,
        None => place.choose_data_dir(&Account::for_server()?),
    };
    remove(&data_dir)?;
    remove(&place.dir().join("logs"))
}

fn remove(path: &Path) -> anyhow::Result<()> {
    let removed = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
