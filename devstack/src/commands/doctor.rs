use std::fmt::Write as _;
use std::io::Write as _;

use devstack::connect::ConnectPrograms;
use devstack::failure::Exit;
use devstack::place::repository_root;
use devstack::prerequisites::{self, Tool};
use devstack::progress::Progress;
use devstack::servers::Servers;

/// List what this machine must have, each with its version or the command that installs it.
#[derive(Debug, clap::Args)]
#[command(before_help = "\
Examples:
  ./dev doctor              look, change nothing
  ./dev doctor --install    install what is missing (as root on a system with apt-get)")]
pub(crate) struct DoctorArgs {
    /// Install what is missing.
    #[arg(long)]
    install: bool,
}

pub(crate) async fn run(args: &DoctorArgs) -> anyhow::Result<Exit> {
    if args.install {
        let log = repository_root()?.join(".devstack/install.log");
        prerequisites::ensure(&Tool::ALL, &log, &Progress::on_stderr()).await?;
    }
    let mut text = String::new();
    let mut missing = Vec::new();
    for finding in prerequisites::look(&Tool::ALL) {
        let name = finding.tool.name();
        match finding.found {
            Some(version) => writeln!(text, "ok       {name:<18} {version}")?,
            None => {
                writeln!(text, "missing  {name:<18} {}", finding.tool.purpose())?;
                missing.push(finding.tool);
            }
        }
    }
    match Servers::cached()? {
        Some(_) => writeln!(text, "ok       {:<18} in the cache", "PostgreSQL, Kafka")?,
        None => writeln!(text, "later    {:<18} ./dev up fetches them", "PostgreSQL, Kafka")?,
    }
    match ConnectPrograms::cached()? {
        Some(_) => writeln!(text, "ok       {:<18} in the cache", "Debezium")?,
        None => writeln!(
            text,
            "later    {:<18} ./dev up --relay external and its tests fetch it",
            "Debezium"
        )?,
    }
    if !missing.is_empty() {
        writeln!(
            text,
            "\nInstall what is missing:\n  {}",
            prerequisites::install_command(&missing)
        )?;
    }
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(if missing.is_empty() {
        Exit::Done
    } else {
        Exit::Dependency
    })
}
