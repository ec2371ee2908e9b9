use std::io::Write;

use anyhow::Context;
use devstack::failure::{Exit, Failure};
use devstack::services;
use devstack::state::State;
use devstack::testing;

use super::StackName;

/// Print the variables of a stack, passwords included, for a shell to evaluate; also puts the programs on its path.
#[derive(Debug, clap::Args)]
#[command(before_help = "\
Examples:
  eval \"$(./dev env)\"          then: psql \"$LOGISTICS_DATABASE_URL\", cargo run -p commerce-consumer -- consume
  eval \"$(./dev env)\"          then: cargo test -p outbox   (with ./dev up --only-servers running)")]
pub(crate) struct EnvArgs {
    #[command(flatten)]
    stack: StackName,
}

pub(crate) fn run(args: &EnvArgs) -> anyhow::Result<Exit> {
    let place = args.stack.place()?;
    let Some(state) = State::load(&place)? else {
        let up = format!("./dev up --name {}", place.name());
        return Err(Failure::new(Exit::Usage, format!("there is no stack `{}`", place.name()), up).into());
    };
    let mut variables = services::variables(&state)?;
    variables.push((testing::TEST_DATABASE_URL, state.maintenance_url()?));
    // For the operators' commands.
    for (listen, admin) in [
        ("LOGISTICS_LISTEN", "LOGISTICS_ADMIN_URL"),
        ("COMMERCE_LISTEN", "COMMERCE_ADMIN_URL"),
    ] {
        let address = variables.iter().find(|(name, _)| *name == listen);
        let address = address.map(|(_, address)| format!("http://{address}"));
        variables.extend(address.map(|address| (admin, address)));
    }
    // For `curl -H "Authorization: Bearer $ADMIN_TOKEN"`.
    variables.push(("ADMIN_TOKEN", state.admin_token.clone()));
    variables.push((testing::ROLE_PASSWORD, state.role_password.clone()));

    let mut text = String::new();
    for (name, value) in variables {
        text.push_str(&format!("export {name}={}\n", quoted(&value)));
    }
    // Built beside this program.
    let programs = std::env::current_exe().context("find this program")?;
    if let Some(programs) = programs.parent() {
        text.push_str(&format!(
            "export PATH={}:\"$PATH\"\n",
            quoted(&programs.display().to_string())
        ));
    }
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(Exit::Done)
}

/// For a shell, whatever it holds.
fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\'', "'\\''"))
}
