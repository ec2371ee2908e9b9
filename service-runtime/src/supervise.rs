use std::{collections::HashMap, future::Future, process::ExitCode, time::Duration};

use clap::Args;
use tokio::{
    signal::unix::{SignalKind, signal},
    task::{Id, JoinError, JoinSet},
};
use tokio_util::sync::CancellationToken;

use crate::telemetry::TelemetrySettings;

#[derive(Debug, Clone, Args)]
pub struct ProcessSettings {
    /// Longest time from SIGTERM to the end, e.g. `25s`; what is not finished then is cut off, and comes again at the
    /// next start. Keep it below the orchestrator's own deadline.
    #[arg(long, env = "SHUTDOWN_DEADLINE", default_value = "25s", value_parser = humantime::parse_duration)]
    pub shutdown_deadline: Duration,
    #[command(flatten)]
    pub telemetry: TelemetrySettings,
}

/// The tasks of a process, by name. A task that fails, panics or ends unasked stops all of them: a process that looks
/// healthy while one of its tasks is gone is worse than a restart (HAZARDS H82).
pub struct Supervisor {
    tasks: JoinSet<anyhow::Result<()>>,
    names: HashMap<Id, &'static str>,
    stop: CancellationToken,
}

/// Why the process ended, as its exit code (UX: 130 and 143 are a clean drain after a signal).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    Interrupt,
    Terminate,
    Failure,
}

impl Default for Supervisor {
    fn default() -> Self {
        Self::new()
    }
}

impl Supervisor {
    pub fn new() -> Self {
        Self {
            tasks: JoinSet::new(),
            names: HashMap::new(),
            stop: CancellationToken::new(),
        }
    }

    /// Cancelled when the process is to stop; tasks then finish what they hold and return.
    pub fn stop_token(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Starts a task that runs until the stop token is cancelled.
    pub fn spawn(&mut self, name: &'static str, task: impl Future<Output = anyhow::Result<()>> + Send + 'static) {
        let handle = self.tasks.spawn(task);
        self.names.insert(handle.id(), name);
    }

    /// Waits for a signal or the first failure, then for every task to end, at most `deadline`. A second signal ends
    /// the process at once.
    ///
    /// # Errors
    /// Only if the signal handlers cannot be installed.
    pub async fn run(mut self, deadline: Duration) -> anyhow::Result<ExitCode> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut cause = tokio::select! {
            _ = interrupt.recv() => Cause::Interrupt,
            _ = terminate.recv() => Cause::Terminate,
            Some(ended) = self.tasks.join_next_with_id() => { self.report(ended, false); Cause::Failure }
        };
        tracing::info!(?cause, ?deadline, "stopping");
        self.stop.cancel();
        let deadline = tokio::time::sleep(deadline);
        tokio::pin!(deadline);
        loop {
            tokio::select! {
                ended = self.tasks.join_next_with_id() => match ended {
                    Some(ended) => if !self.report(ended, true) { cause = Cause::Failure },
                    None => break,
                },
                () = &mut deadline => {
                    let left: Vec<_> = self.names.values().collect();
                    tracing::error!(?left, "the deadline passed before these tasks ended");
                    cause = Cause::Failure;
                    break;
                }
                _ = interrupt.recv() => return Ok(ExitCode::from(130)),
                _ = terminate.recv() => return Ok(ExitCode::from(143)),
            }
        }
        Ok(match cause {
            Cause::Interrupt => ExitCode::from(130),
            Cause::Terminate => ExitCode::from(143),
            Cause::Failure => ExitCode::FAILURE,
        })
    }

    /// Logs how a task ended; true if it ended well and was asked to.
    fn report(&mut self, ended: Result<(Id, anyhow::Result<()>), JoinError>, asked: bool) -> bool {
        let id = match &ended {
            Ok((id, _)) => *id,
            Err(error) => error.id(),
        };
        let task = self.names.remove(&id).unwrap_or("unnamed");
        match ended {
            Ok((_, Ok(()))) if asked => true,
            Ok((_, Ok(()))) => {
                tracing::error!(task, "a task ended without being asked to");
                false
            }
            Ok((_, Err(error))) => {
                tracing::error!(task, error = format!("{error:#}"), "a task failed");
                false
            }
            Err(error) => {
                tracing::error!(task, %error, "a task panicked");
                false
            }
        }
    }
}
