//! The binary behind `./dev`.

mod commands;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use devstack::failure::{Exit, Failure};

/// A local stack: PostgreSQL, Kafka, logistics-svc and commerce-consumer.
#[derive(Debug, Parser)]
#[command(name = "dev", bin_name = "./dev", version, before_help = "\
Examples:
  ./dev up            build and start everything, ship the sample, stay up until Ctrl-C
  ./dev test          the whole test suite on servers of its own", after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 failed while running; 2 usage or configuration error, nothing was done; 3 a dependency is \
missing or cannot be reached; 130, 143 stopped by SIGINT, SIGTERM after a clean drain";

#[derive(Debug, clap::Subcommand)]
enum Command {
    Up(commands::up::UpArgs),
    Test(commands::test::TestArgs),
    Down(commands::down::DownArgs),
    Status(commands::status::StatusArgs),
    Doctor(commands::doctor::DoctorArgs),
    Env(commands::env::EnvArgs),
    ComposeCheck(commands::compose_check::ComposeCheckArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(exit) => ExitCode::from(exit.code()),
        Err(error) => {
            let exit = explain(&error);
            ExitCode::from(exit.code())
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<Exit> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(async {
        match &cli.command {
            Command::Up(args) => commands::up::run(args).await,
            Command::Test(args) => commands::test::run(args).await,
            Command::Status(args) => commands::status::run(args).await,
            Command::Doctor(args) => commands::doctor::run(args).await,
            Command::Down(args) => commands::down::run(args).await,
            Command::Env(args) => commands::env::run(args),
            Command::ComposeCheck(args) => commands::compose_check::run(args).await,
        }
    })
}

/// One line what failed, why, what to try; returns the exit code it stands for.
fn explain(error: &anyhow::Error) -> Exit {
    // A reader that closed the pipe (`./dev status | head -1`) has what it wanted.
    let closed = error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe);
    if closed {
        return Exit::Done;
    }
    let failure = error.downcast_ref::<Failure>();
    let mut text = format!("error: {error}\n");
    for cause in error.chain().skip(1) {
        text.push_str(&format!("  because: {cause}\n"));
    }
    if let Some(failure) = failure {
        text.push_str(&format!("  try: {}\n", failure.hint));
    }
    // With standard error closed as well there is nobody to tell.
    std::io::stderr().write_all(text.as_bytes()).ok();
    failure.map_or(Exit::Failed, |failure| failure.exit)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        super::Cli::command().debug_assert();
    }
}
