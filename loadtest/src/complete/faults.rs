use devstack::process::Process;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{LOOK_INTERVAL, Processes};
use crate::{
    cli::PairArgs,
    contender::{self, Running},
    place::Place,
    usage::Watch,
};

/// Kills consumer and relay in turn, one after each interval, and starts it again at once, until `over`. Returns how often; 0 if
/// nothing is to be killed.
///
/// # Errors
/// If one of them cannot be killed, or does not come back.
pub(super) async fn kill_in_turn(
    args: &PairArgs,
    place: &Place,
    running: &mut Running,
    watch: &mut Watch,
    over: &CancellationToken,
) -> anyhow::Result<u64> {
    let Some(every) = args.faults_every else { return Ok(0) };
    let mut kills = 0;
    let mut due = Instant::now() + every;
    loop {
        tokio::select! {
            () = over.cancelled() => return Ok(kills),
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
        }
        // What ends by itself must not pass for one that was killed.
        running.check()?;
        if Instant::now() < due {
            continue;
        }
        due = Instant::now() + every;
        let consumer = args.with == Processes::Pair && kills % 2 == 0;
        running.kill(if consumer { CONSUMER } else { RELAY })?;
        let process = if consumer {
            contender::start_commerce(place, &args.stack.settings).await?
        } else {
            start_relay(args, place).await?
        };
        watch.again(process.name().to_owned(), process.identity().clone());
        running.add(process);
        kills += 1;
    }
}

/// As [`contender`] names its processes.
const CONSUMER: &str = "commerce-consumer";
const RELAY: &str = "logistics-svc relay";

/// A process of its own.
///
/// # Errors
/// If it ends or is not ready in time, with the end of its log.
pub(super) async fn start_relay(args: &PairArgs, place: &Place) -> anyhow::Result<Process> {
    let (relay, _) = contender::spawn_logistics(place, "relay", &args.stack.settings).await?;
    Ok(relay)
}
