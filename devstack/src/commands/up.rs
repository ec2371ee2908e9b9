use std::convert::Infallible;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow};
use devstack::connect::ConnectPrograms;
use devstack::external::ExternalServers;
use devstack::failure::{Exit, Failure};
use devstack::place::{Part, Place, StackLock};
use devstack::ports::WantedPorts;
use devstack::prerequisites::{self, Tool};
use devstack::progress::{Progress, seconds};
use devstack::sample::{Sample, Totals, grouped};
use devstack::servers::Servers;
use devstack::services::{Binaries, Relay};
use devstack::stack::{Stack, StackOptions};
use devstack::state::State;
use devstack::{compile, leftovers};

use super::{Signals, StackName, down, shown};

const WATCH_INTERVAL: Duration = Duration::from_millis(200);

/// Build and start everything, ship the sample, and stay up until Ctrl-C.
#[derive(Debug, clap::Args)]
#[command(
    before_help = "\
Examples:
  ./dev up                            start (again), ship the Northwind sample the first time
  ./dev up --fresh --no-sample        start over with empty tables and topics
  ./dev up --name b                   a second stack beside the first, on other ports
  ./dev up --relay external           the same with Debezium in place of the built-in relay
  DATABASE_URL=postgres://postgres:secret@127.0.0.1/ KAFKA_BROKERS=127.0.0.1:9092 ./dev up
                                      use servers that already run; they are never started or stopped",
    after_help = "\
When the services' roles exist already in the PostgreSQL of DATABASE_URL, their password is taken from
DEVSTACK_ROLE_PASSWORD."
)]
pub(crate) struct UpArgs {
    #[command(flatten)]
    stack: StackName,
    /// Throw the stack's own data away first. Refused with DATABASE_URL or KAFKA_BROKERS: data there is not ours.
    #[arg(long)]
    fresh: bool,
    /// Do not load and ship the sample.
    #[arg(long)]
    no_sample: bool,
    /// Start PostgreSQL and Kafka with roles, database and topics, but no service.
    #[arg(long)]
    only_servers: bool,
    /// What publishes the outbox: a mode of logistics-svc (RELAY_MODE), or Debezium (`external`), which is fetched
    /// through Maven the first time [default: the default of logistics-svc].
    #[arg(long, value_name = "MODE", conflicts_with = "only_servers")]
    relay: Option<Relay>,
    /// Build and run the services with optimisations.
    #[arg(long)]
    release: bool,
    /// Port of PostgreSQL on 127.0.0.1 [default: the last one, else a free one].
    #[arg(long, value_name = "PORT", env = "DEVSTACK_POSTGRES_PORT")]
    postgres_port: Option<u16>,
    /// Port of Kafka on 127.0.0.1 [default: the last one, else a free one].
    #[arg(long, value_name = "PORT", env = "DEVSTACK_KAFKA_PORT")]
    kafka_port: Option<u16>,
    /// Port of logistics-svc on 127.0.0.1 [default: the last one, else 8080 or the next free one].
    #[arg(long, value_name = "PORT", env = "DEVSTACK_LOGISTICS_PORT")]
    logistics_port: Option<u16>,
    /// Port of commerce-consumer on 127.0.0.1 [default: the last one, else 8081 or the next free one].
    #[arg(long, value_name = "PORT", env = "DEVSTACK_COMMERCE_PORT")]
    commerce_port: Option<u16>,
    /// Superuser's URL of a PostgreSQL that already runs, used instead of an own one. Its database is used, or `shop`
    /// when it names none or `postgres`.
    #[arg(long, value_name = "URL", env = "DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
    /// Addresses of a Kafka that already runs, used instead of an own one.
    #[arg(long, value_name = "HOST:PORT,…", env = "KAFKA_BROKERS")]
    kafka_brokers: Option<String>,
}

pub(crate) async fn run(args: &UpArgs) -> anyhow::Result<Exit> {
    let mut signals = Signals::listen()?;
    let progress = Progress::on_stderr();
    let mut stack = None;
    let outcome = tokio::select! {
        outcome = start_and_watch(args, &progress, &mut stack) => outcome.map(|never| match never {}),
        exit = signals.next() => Ok(exit),
    };
    if let Some(stack) = stack {
        let stopped = tokio::select! {
            stopped = stack.stop(&progress) => stopped,
            // The stack is dropped with its future, and kills what still runs.
            _ = signals.next() => {
                progress.note("killed everything at once");
                Ok(())
            }
        };
        // What went wrong first matters more.
        if outcome.is_ok() {
            stopped?;
        }
    }
    outcome
}

/// Leaves the stack in `slot` as soon as there is something to stop.
async fn start_and_watch(args: &UpArgs, progress: &Progress, slot: &mut Option<Stack>) -> anyhow::Result<Infallible> {
    let typed = typed_at();
    let place = args.stack.place()?;
    let lock = take(&place, progress).await?;
    let options = args.stack_options(&place, progress)?;
    if args.fresh {
        start_over(&place, &options.external)?;
    }
    find_tools(args, &options, &place, progress).await?;

    let stack = slot.insert(Stack::open(place.clone(), lock, options)?);
    if args.only_servers {
        start_servers(stack, progress).await?;
        write_screen(&screen(stack, None, typed, &[])?)?;
        return watch(stack).await;
    }
    let build_log = place.log("build");
    let build = compile::services(place.root(), args.release, &build_log, progress);
    let servers = async {
        start_servers(stack, progress).await?;
        find_debezium(args, &place, progress).await
    };
    let (debezium, binaries) = tokio::try_join!(servers, build)?;
    stack.start_services(&binaries, debezium.as_ref(), progress).await?;

    let mut totals = None;
    let mut open = Vec::new();
    if !args.no_sample {
        let dir = place.root().join("samples/northwind");
        let sample = Sample::read(
            &dir,
            stack.state().address(Part::Logistics)?,
            stack.state().address(Part::Commerce)?,
        )?;
        totals = Some(ship_sample(stack, &binaries, &sample, dir, progress).await?);
        open = sample.open_shipments(1).await?;
    }
    write_screen(&screen(stack, totals, typed, &open)?)?;
    watch(stack).await
}

/// The stack's lock, with nothing of an earlier run left.
async fn take(place: &Place, progress: &Progress) -> anyhow::Result<StackLock> {
    place.create()?;
    let Some(lock) = place.try_lock()? else {
        let name = place.name();
        let holder = State::load(place)?
            .and_then(|state| state.supervisor)
            .map_or_else(String::new, |supervisor| format!(" (process {})", supervisor.pid));
        return Err(Failure::new(
            Exit::Usage,
            format!("the stack `{name}` is up already{holder}"),
            format!("./dev status --name {name}, ./dev down --name {name}, or another --name"),
        )
        .into());
    };
    leftovers::stop(place, &lock, progress).await?;
    Ok(lock)
}

/// Deletes the stack's data. Ports and passwords stay: the roles in a PostgreSQL that is not ours keep theirs as well.
fn start_over(place: &Place, external: &ExternalServers) -> anyhow::Result<()> {
    if let Some(variable) = external.first_given() {
        return Err(Failure::new(
            Exit::Usage,
            format!("--fresh deletes nothing in the server of {variable}, which is not ours"),
            "drop its tables and topics yourself, then ./dev up without --fresh",
        )
        .into());
    }
    if let Some(mut state) = State::load(place)? {
        // Before the data: an interrupted deletion must not leave a sample that counts as shipped.
        state.sample_shipped = false;
        state.save(place)?;
    }
    down::delete_data(place)?;
    place.create()
}

async fn find_tools(args: &UpArgs, options: &StackOptions, place: &Place, progress: &Progress) -> anyhow::Result<()> {
    let mut tools = Vec::new();
    if !args.only_servers {
        tools.extend(Tool::FOR_BUILD);
    }
    if options.external.kafka_brokers.is_none() || args.relay == Some(Relay::External) {
        tools.extend(Tool::FOR_KAFKA);
    }
    prerequisites::ensure(&tools, &place.log("install"), progress).await
}

/// Fetched only when it is asked for.
async fn find_debezium(args: &UpArgs, place: &Place, progress: &Progress) -> anyhow::Result<Option<ConnectPrograms>> {
    if args.relay != Some(Relay::External) {
        return Ok(None);
    }
    Ok(Some(ConnectPrograms::ensure(&place.log("install"), progress).await?))
}

/// Fetches the programs only when the stack runs a server of its own.
async fn start_servers(stack: &mut Stack, progress: &Progress) -> anyhow::Result<()> {
    let servers = if stack.has_own_server() {
        Some(Servers::ensure(&stack.place().log("install"), progress).await?)
    } else {
        None
    };
    stack.start_servers(servers.as_ref(), progress).await
}

/// Once per data: afterwards a person may have changed what was shipped.
async fn ship_sample(
    stack: &mut Stack,
    binaries: &Binaries,
    sample: &Sample,
    dir: PathBuf,
    progress: &Progress,
) -> anyhow::Result<Totals> {
    let imported = sample.is_imported().await?;
    if imported && stack.state().sample_shipped {
        return sample.totals().await;
    }
    if !imported {
        let step = progress.step("importing the sample's orders into commerce");
        stack.import(binaries, &dir).await?;
        step.done("the sample's orders are in commerce");
    }
    let ship = sample.ship(progress);
    let totals = tokio::select! {
        totals = ship => totals.context("ship the sample")?,
        ended = watch(stack) => match ended? {},
    };
    stack.remember_sample_shipped()?;
    Ok(totals)
}

/// Returns only when something has ended by itself.
async fn watch(stack: &mut Stack) -> anyhow::Result<Infallible> {
    loop {
        if let Some(ended) = stack.first_ended()? {
            return Err(anyhow!(ended));
        }
        tokio::time::sleep(WATCH_INTERVAL).await;
    }
}

/// What runs where, and what to try next.
fn screen(
    stack: &Stack,
    totals: Option<Totals>,
    typed: Instant,
    open: &[devstack::sample::Shipment],
) -> anyhow::Result<String> {
    let (place, state) = (stack.place(), stack.state());
    let mut text = String::new();
    writeln!(text, "\nThe stack `{}` is up.\n", place.name())?;
    for part in stack.parts() {
        let log = if stack.is_own(part) {
            shown(&place.log(part.name()))
        } else {
            "not ours".to_owned()
        };
        writeln!(text, "  {:<18} {:<24} {log}", part.name(), state.address(part)?)?;
    }
    writeln!(text)?;
    if let Some(totals) = totals {
        writeln!(
            text,
            "  sample: {} orders, {} shipped, {} units",
            grouped(totals.orders as u64),
            grouped(totals.shipped),
            grouped(totals.units)
        )?;
        if let Some(first_applied) = totals.first_applied {
            let waited = first_applied.duration_since(typed);
            writeln!(
                text,
                "  first event applied {} after the command was typed",
                seconds(waited)
            )?;
        }
        writeln!(text)?;
    }
    let logistics = state.address(Part::Logistics)?;
    let commerce = state.address(Part::Commerce)?;
    match open.first() {
        Some(shipment) => write!(
            text,
            "Try next:\n\
             \x20 # complete a shipment that still waits in the warehouse\n\
             \x20 curl -X POST {logistics}/v1/shipments/{id}/complete -H 'content-type: application/json' -d '{{}}'\n\
             \x20 # its order, as commerce sees it a moment later\n\
             \x20 curl {commerce}/v1/orders/{order}\n\
             \x20 # what commerce knows of the shipment, and through which event\n\
             \x20 curl {commerce}/v1/shipments/{id}\n",
            id = shipment.id,
            order = shipment.order_id,
        )?,
        None if stack.parts().contains(&Part::Logistics) => write!(
            text,
            "Try next:\n\
             \x20 curl '{logistics}/v1/shipments?limit=3'\n\
             \x20 curl {commerce}/v1/summary\n\
             \x20 curl {commerce}/health/ready\n",
        )?,
        None => writeln!(text, "Try next:\n  eval \"$(./dev env --name {})\"", place.name())?,
    }
    writeln!(text, "\nCtrl-C stops everything.")?;
    Ok(text)
}

/// When the command was typed: `./dev` says it in seconds since 1970, because it may have built this program first.
fn typed_at() -> Instant {
    let now = Instant::now();
    let ago = || -> Option<Duration> {
        let typed = std::env::var("DEVSTACK_STARTED").ok()?.replace(',', ".");
        let typed = Duration::try_from_secs_f64(typed.parse().ok()?).ok()?;
        SystemTime::now().duration_since(UNIX_EPOCH + typed).ok()
    };
    ago().and_then(|ago| now.checked_sub(ago)).unwrap_or(now)
}

fn write_screen(text: &str) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()?;
    Ok(())
}

impl UpArgs {
    fn stack_options(&self, place: &Place, progress: &Progress) -> anyhow::Result<StackOptions> {
        let given = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
        let mut external = ExternalServers {
            database_url: given(&self.database_url),
            kafka_brokers: given(&self.kafka_brokers),
            // From the environment only: every user of the machine can read arguments.
            role_password: given(&std::env::var("DEVSTACK_ROLE_PASSWORD").ok()),
        };
        for line in external.take_out_own(&State::load_all(place.root())?) {
            progress.note(&line);
        }
        Ok(StackOptions {
            ports: WantedPorts {
                postgres: self.postgres_port,
                kafka: self.kafka_port,
                logistics: self.logistics_port,
                commerce: self.commerce_port,
            },
            external,
            relay: self.relay,
            for_tests: false,
        })
    }
}
