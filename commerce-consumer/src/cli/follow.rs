use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use uuid::Uuid;

use super::{
    Desk,
    failure::{Ended, Failure, MAY_BE_DONE},
    redrives,
    screen::{Moving, Screen, duration, grouped, say, text},
};

const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Between plain lines.
const SAY_EVERY: Duration = Duration::from_secs(10);
/// The service may restart meanwhile, and goes on with the redrive then.
const LOST_AFTER: Duration = Duration::from_secs(60);
const BAR: usize = 30;

/// Shows a redrive until it has ended. It belongs to the service: whatever becomes of us, it goes on.
pub(super) async fn to_the_end(desk: &Desk, id: Uuid, mut job: Value) -> Result<Ended, Failure> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut progress = Progress::new(&desk.screen);
    progress.show(&job);
    while job["ended_at"].is_null() {
        job = tokio::select! {
            job = look(desk, id) => job?,
            _ = interrupt.recv() => return Ok(left(desk, id, Ended::Interrupted)),
            _ = terminate.recv() => return Ok(left(desk, id, Ended::Terminated)),
        };
        progress.show(&job);
    }
    desk.screen.clear();
    desk.screen.result(&job, redrives::redrive)?;
    Ok(outcome(desk, &job))
}

fn left(desk: &Desk, id: Uuid, ended: Ended) -> Ended {
    desk.screen.note(&format!(
        "the redrive goes on in the service\n  go on watching:  commerce-consumer redrives follow {id}\n  \
         stop it:         commerce-consumer redrives cancel {id} --reason WHY"
    ));
    ended
}

/// The redrive a moment later. While the service is away, it is asked again.
async fn look(desk: &Desk, id: Uuid) -> Result<Value, Failure> {
    let mut lost = None;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        match redrives::read(desk, id).await {
            Err(failure) if failure.is_retryable() => {}
            answer => return answer,
        }
        let since = *lost.get_or_insert_with(|| {
            desk.screen
                .note("the service does not answer; the redrive goes on with it");
            Instant::now()
        });
        if since.elapsed() > LOST_AFTER {
            return Err(Failure::told(
                Ended::Failed,
                format!("redrive {id} was lost sight of"),
                format!("the service has not answered for {} s", LOST_AFTER.as_secs()),
                format!("`commerce-consumer redrives follow {id}` when it is back"),
            ));
        }
    }
}

fn outcome(desk: &Desk, job: &Value) -> Ended {
    let number = |field: &str| job[field].as_i64().unwrap_or_default();
    let left = number("letters") - number("took_effect");
    match job["state"].as_str() {
        Some("succeeded") if left == 0 => return Ended::Done,
        Some("failed") => desk
            .screen
            .note(&format!("it gave up: {}", text(&job["ended_because"]))),
        _ => {}
    }
    desk.screen.note(&format!(
        "{} of {} letters did not take effect: {} died again, {} held back, {} not sent; \
         `commerce-consumer dead-letters list --state open` shows them",
        grouped(left),
        grouped(number("letters")),
        grouped(number("died_again")),
        grouped(number("held_back")),
        grouped(number("letters") - number("sent"))
    ));
    match job["state"].as_str() {
        Some("failed") => Ended::Unmet,
        Some("succeeded" | "cancelled") => Ended::InPart,
        _ => {
            desk.screen.note(MAY_BE_DONE);
            Ended::Failed
        }
    }
}

struct Progress<'a> {
    screen: &'a Screen,
    /// When it was first looked at, and how many were settled then.
    begun: Option<(Instant, i64)>,
    said: Option<Instant>,
}

impl<'a> Progress<'a> {
    fn new(screen: &'a Screen) -> Self {
        Self {
            screen,
            begun: None,
            said: None,
        }
    }

    fn show(&mut self, job: &Value) {
        let number = |field: &str| job[field].as_i64().unwrap_or_default();
        let settled = number("took_effect") + number("died_again") + number("held_back");
        let (begun, before) = *self.begun.get_or_insert_with(|| (Instant::now(), settled));
        let elapsed = begun.elapsed().as_secs_f64().max(0.001);
        let line = format!(
            "{}/{} settled, {} died again, {:.1}/s, ETA {} ({})",
            grouped(settled),
            grouped(number("letters")),
            grouped(number("died_again")),
            (settled - before) as f64 / elapsed,
            duration(&job["eta_seconds"]),
            text(&job["state"])
        );
        match self.screen.progress {
            Some(Moving::Bar) => {
                let share = settled.max(0) as usize * BAR / number("letters").max(1) as usize;
                let share = share.min(BAR);
                self.screen.clear();
                say(&format!("[{}{}] {line}", "#".repeat(share), ".".repeat(BAR - share)));
            }
            Some(Moving::Lines) if self.said.is_none_or(|said| said.elapsed() >= SAY_EVERY) => {
                self.said = Some(Instant::now());
                say(&format!("{line}\n"));
            }
            _ => {}
        }
    }
}
