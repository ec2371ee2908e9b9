//! Subcommands: `api`, `relay` or `all` serve; `migrate`, `flag` and `config` do one thing and end.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command line program talks to its terminal"
)]

use std::process::ExitCode;

use logistics_svc::{
    cli,
    config::{Cli, Command, ConfigOutput, MigrateSettings},
    schema::{MIGRATOR, SCHEMA},
    serve::{self, CONFIGURATION_ERROR, Roles},
};
use service_runtime::{
    schema::{self, SchemaError},
    settings::{self, Effective},
    telemetry::Telemetry,
};

const UNREACHABLE: u8 = 3;

#[cfg(feature = "mimalloc")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let (cli, effective) = settings::parse_or_exit::<Cli>();
    match cli.command {
        Command::Api(settings) => serve(Roles::serving(settings, false)),
        Command::Relay(settings) => serve(Roles::relaying(settings)),
        Command::All(settings) => serve(Roles::serving(settings, true)),
        Command::Migrate(settings) => migrate(&settings),
        Command::Flag(command) => cli::run(&command),
        Command::Config(command) => show(command.what, &effective),
    }
}

fn serve(roles: Roles) -> ExitCode {
    // Before the runtime: the exporter's client blocks.
    let telemetry = match Telemetry::install("logistics-svc", &roles.process.telemetry) {
        Ok(telemetry) => telemetry,
        Err(error) => {
            eprintln!("error: {error:#}");
            return ExitCode::from(CONFIGURATION_ERROR);
        }
    };
    let code = serve::run(roles, &telemetry);
    telemetry.flush();
    code
}

fn migrate(settings: &MigrateSettings) -> ExitCode {
    let url = &settings.logistics_migration_database_url;
    let migrated = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map(|runtime| runtime.block_on(schema::migrate(url, SCHEMA, &MIGRATOR)));
    match migrated {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            let unreachable = matches!(error, SchemaError::Unreachable(_));
            eprintln!("error: {:#}", anyhow::Error::new(error));
            if unreachable {
                ExitCode::from(UNREACHABLE)
            } else {
                ExitCode::FAILURE
            }
        }
        Err(error) => {
            eprintln!("error: the runtime could not be started: {error}");
            ExitCode::FAILURE
        }
    }
}

fn show(what: ConfigOutput, effective: &Effective) -> ExitCode {
    match what {
        ConfigOutput::Show => print!("{}", effective.to_text()),
        ConfigOutput::Docs => print!("{}", effective.to_markdown()),
    }
    ExitCode::SUCCESS
}
