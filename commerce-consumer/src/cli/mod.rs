//! The operators' command line: a client of the admin API, so that neither roles nor the audit can be gone around.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, Subcommand, ValueEnum};

use self::{
    client::Client,
    failure::{Ended, Failure},
    screen::Screen,
};

/// Dead letters: looked at, decided, edited.
pub mod dead_letters;

/// Many dead letters through again, as jobs of the service.
pub mod redrives;

/// How the consumer is doing, and how fast it may go.
pub mod consumer;

/// Which keys are held, and for what.
pub mod held_keys;

/// What operators did.
pub mod actions;

/// Which dead letters are meant.
mod filter;

/// Target and count are shown, then the person is asked.
mod consent;

/// A redrive until its end.
mod follow;

/// Requests to the admin API, and its problems.
mod client;

/// What becomes of a command: exit codes, and what a person is told.
mod failure;

/// Rows, blocks and JSON lines on standard output; the rest on standard error.
mod screen;

pub const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 failed while running, 2 usage error or refused (nothing was done), 3 the service or its database
could not be reached (nothing was done), 4 done in part (the output names what is left), 99 a redrive gave up by its abort
ratio or a dry run would have no effect, 130 and 143 stopped by SIGINT and SIGTERM. Results go to standard output, everything
else to standard error. The token is read from the variable ADMIN_TOKEN or from --token-file; reading needs none.";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List, redrive, skip and repair dead letters through the admin API.
    DeadLetters(dead_letters::DeadLetters),
    /// Send many dead letters through again as a job: a canary, then a rate, until too many die again.
    Redrives(redrives::Redrives),
    /// Say how a running consumer is doing; pause, resume and slow it down.
    Consumer(consumer::Consumer),
    /// List the keys that are held, and let one go on that waits in vain.
    HeldKeys(held_keys::HeldKeys),
    /// List what operators did, and why.
    Actions(actions::Actions),
}

// No doc comment: it would become the help text of each command that takes these.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Service and output")]
pub struct Common {
    /// Address of the service whose admin API is asked.
    #[arg(
        long,
        env = "COMMERCE_ADMIN_URL",
        default_value = "http://127.0.0.1:8081",
        global = true
    )]
    url: String,
    /// File with the token, instead of the variable ADMIN_TOKEN. A token is never an argument: `ps` would show it.
    #[arg(long, env = "ADMIN_TOKEN_FILE", global = true, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Longest wait for one answer.
    #[arg(long, env = "COMMERCE_ADMIN_TIMEOUT", default_value = "30s", value_parser = humantime::parse_duration, global = true)]
    timeout: Duration,
    /// One JSON object per line; fields may be added to it, never taken away.
    #[arg(long, global = true)]
    json: bool,
    /// Say nothing on standard error but errors.
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Show no progress.
    #[arg(long, global = true)]
    no_progress: bool,
    /// Whether states are coloured. `auto`: on a terminal, without NO_COLOR.
    #[arg(long, value_enum, default_value = "auto", global = true)]
    color: Colour,
    /// Say also what is beneath an error.
    #[arg(long, global = true)]
    verbose: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Colour {
    Auto,
    Always,
    Never,
}

/// What a command works with.
struct Desk {
    client: Client,
    screen: Screen,
}

pub fn run(command: &Command) -> ExitCode {
    let common = match command {
        Command::DeadLetters(asked) => &asked.common,
        Command::Redrives(asked) => &asked.common,
        Command::Consumer(asked) => &asked.common,
        Command::HeldKeys(asked) => &asked.common,
        Command::Actions(asked) => &asked.common,
    };
    let ended = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Failure::from)
        .and_then(|runtime| runtime.block_on(answer(command, common)));
    let ended = ended.unwrap_or_else(|failure| failure.tell(common.verbose));
    ExitCode::from(ended.code())
}

async fn answer(command: &Command, common: &Common) -> Result<Ended, Failure> {
    let desk = Desk {
        client: Client::new(common)?,
        screen: Screen::new(common),
    };
    match command {
        Command::DeadLetters(asked) => dead_letters::run(&desk, &asked.what).await,
        Command::Redrives(asked) => redrives::run(&desk, &asked.what).await,
        Command::Consumer(asked) => consumer::run(&desk, &asked.what).await,
        Command::HeldKeys(asked) => held_keys::run(&desk, &asked.what).await,
        Command::Actions(asked) => actions::run(&desk, &asked.what).await,
    }
}
