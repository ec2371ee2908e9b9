//! The subcommands of `./dev`, one file each.

pub(crate) mod compose_check;
pub(crate) mod doctor;
pub(crate) mod down;
pub(crate) mod env;
pub(crate) mod status;
pub(crate) mod test;
pub(crate) mod up;

use std::path::Path;

use anyhow::Context;
use devstack::failure::Exit;
use devstack::place::{Place, repository_root};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Which stack.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct StackName {
    /// Stack to work on; each has its own servers, ports and data.
    #[arg(long, value_name = "NAME", default_value = "dev", env = "DEVSTACK_NAME")]
    name: String,
}

impl StackName {
    pub(crate) fn place(&self) -> anyhow::Result<Place> {
        Ok(Place::new(&repository_root()?, &self.name)?)
    }
}

/// SIGINT and SIGTERM, caught from here on.
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    pub(crate) fn listen() -> anyhow::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).context("listen for SIGINT")?,
            terminate: signal(SignalKind::terminate()).context("listen for SIGTERM")?,
        })
    }

    /// The next one, as the exit code it leads to.
    pub(crate) async fn next(&mut self) -> Exit {
        tokio::select! {
            _ = self.interrupt.recv() => Exit::Interrupted,
            _ = self.terminate.recv() => Exit::Terminated,
        }
    }
}

/// Shorter when it is below the working directory.
pub(crate) fn shown(path: &Path) -> String {
    let here = std::env::current_dir().ok();
    let below = here.as_ref().and_then(|here| path.strip_prefix(here).ok());
    below.unwrap_or(path).display().to_string()
}
