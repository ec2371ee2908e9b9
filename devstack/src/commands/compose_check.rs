use std::os::unix::process::CommandExt;
use std::process::Command;

use devstack::compile;
use devstack::failure::Exit;
use devstack::place::{Place, repository_root};
use devstack::prerequisites::{self, Tool};
use devstack::progress::Progress;

/// Build and run docker-compose.yml, send requests through it, kill its containers, compare the tables.
///
/// The check itself is a binary of its own, because it uses what the end-to-end tests use, and those use this crate.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct ComposeCheckArgs {
    /// For the check; `--help` shows them.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    args: Vec<String>,
}

/// Becomes the check.
pub(crate) async fn run(args: &ComposeCheckArgs) -> anyhow::Result<Exit> {
    let root = repository_root()?;
    let place = Place::new(&root, "compose-check")?;
    let binary = {
        let progress = Progress::on_stderr();
        prerequisites::ensure(&Tool::FOR_BUILD, &place.log("prepare"), &progress).await?;
        compile::binary(&root, "compose-check", &place.log("build"), &progress).await?
    };
    let error = Command::new(binary).args(&args.args).env("DEVSTACK_ROOT", &root).exec();
    Err(anyhow::Error::new(error).context("start compose-check"))
}
