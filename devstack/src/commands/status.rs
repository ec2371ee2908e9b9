use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use devstack::connect::{self, TaskState};
use devstack::failure::Exit;
use devstack::place::{Part, Place};
use devstack::state::State;
use devstack::{health, leftovers};
use serde::Serialize;
use tokio::net::TcpStream;

use super::{StackName, shown};

const TIMEOUT: Duration = Duration::from_secs(2);

/// Say what of a stack runs, and where.
#[derive(Debug, clap::Args)]
#[command(before_help = "\
Examples:
  ./dev status                                             exit code 0 when every part is up, else 3
  ./dev status --json | jq -r '.parts[] | select(.part == \"logistics-svc\").address'")]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    stack: StackName,
    /// One JSON object on one line.
    #[arg(long)]
    json: bool,
}

/// The JSON of `./dev status --json`; fields may be added.
#[derive(Serialize)]
struct Status {
    stack: String,
    /// Whether every part is.
    up: bool,
    parts: Vec<PartStatus>,
}

#[derive(Serialize)]
struct PartStatus {
    part: &'static str,
    /// Host and port of a server, base URL of a service.
    address: String,
    /// A server answers on its port; a service says that it is ready; Debezium's task runs.
    up: bool,
    /// Of our process; null when the part is not up or not ours.
    pid: Option<i32>,
    /// Null when the part is not ours.
    log: Option<PathBuf>,
    /// Whether `./dev` starts and stops it.
    own: bool,
}

pub(crate) async fn run(args: &StatusArgs) -> anyhow::Result<Exit> {
    let place = args.stack.place()?;
    let parts = match State::load(&place)? {
        Some(state) => parts(&place, &state).await?,
        None => Vec::new(),
    };
    let status = Status {
        stack: place.name().to_owned(),
        up: !parts.is_empty() && parts.iter().all(|part| part.up),
        parts,
    };
    let text = if args.json {
        format!("{}\n", serde_json::to_string(&status)?)
    } else {
        human(&status)?
    };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(if status.up { Exit::Done } else { Exit::Dependency })
}

async fn parts(place: &Place, state: &State) -> anyhow::Result<Vec<PartStatus>> {
    let mut parts = Vec::new();
    for part in state.parts() {
        let external = match part {
            Part::Postgres => state.database_url.is_some(),
            Part::Kafka => state.kafka_brokers.is_some(),
            Part::Debezium | Part::Logistics | Part::Commerce => false,
        };
        let address = state.address(part)?;
        let process = leftovers::running(place, part)?;
        // A foreign program on the same port does not make a part of ours be up.
        let up = (external || process.is_some())
            && match part {
                Part::Postgres | Part::Kafka => accepts(&address).await,
                Part::Debezium => matches!(connect::task_state(&address).await, Ok(TaskState::Running)),
                Part::Logistics | Part::Commerce => health::is_ready(&format!("{address}/health/ready")).await?,
            };
        parts.push(PartStatus {
            part: part.name(),
            address,
            up,
            pid: process.map(|process| process.pid),
            log: (!external).then(|| place.log(part.name())),
            own: !external,
        });
    }
    Ok(parts)
}

/// Whether one of the addresses, separated by commas, takes a connection.
async fn accepts(addresses: &str) -> bool {
    for address in addresses.split(',') {
        let connected = tokio::time::timeout(TIMEOUT, TcpStream::connect(address)).await;
        if matches!(connected, Ok(Ok(_))) {
            return true;
        }
    }
    false
}

fn human(status: &Status) -> anyhow::Result<String> {
    let mut text = String::new();
    if status.parts.is_empty() {
        writeln!(
            text,
            "there is no stack `{}`; ./dev up --name {0} starts it",
            status.stack
        )?;
    }
    for part in &status.parts {
        let state = if part.up { "up" } else { "down" };
        let log = part.log.as_ref().map_or("not ours".to_owned(), |log| shown(log));
        writeln!(text, "{state:<5} {:<18} {:<24} {log}", part.part, part.address)?;
    }
    Ok(text)
}
