use clap::{Args, Subcommand};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{
    Common, Desk, EXIT_CODES,
    client::Listing,
    consent::Consent,
    dead_letters::Most,
    failure::{Ended, Failure},
    filter::Filter,
    follow,
    screen::{Column, block, count, duration, grouped, text, time},
};

#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  commerce-consumer redrives begin --error-type ships_too_many --canary 20 --rate 50 --reason 'the orders are repaired'
  commerce-consumer redrives follow 01a2042d-4cac-763a-a97c-020765ad4f43", after_help = EXIT_CODES)]
pub struct Redrives {
    #[command(flatten)]
    pub(super) common: Common,
    #[command(subcommand)]
    pub(super) what: What,
}

#[derive(Debug, Subcommand)]
pub enum What {
    /// Begin a redrive, and follow it to its end.
    Begin(Begin),
    /// Redrives, the latest first.
    List(List),
    /// One redrive, and what became of its letters so far.
    #[command(before_help = "\
Examples:
  commerce-consumer redrives show 01a2042d-4cac-763a-a97c-020765ad4f43
  commerce-consumer redrives show 01a2042d-4cac-763a-a97c-020765ad4f43 --json | jq -r .state")]
    Show(One),
    /// Let nothing more of a redrive go. What is on its way arrives; the rest stays an open dead letter.
    Cancel(Cancel),
    /// Watch a redrive to its end. Ctrl-C leaves it at work.
    #[command(before_help = "\
Examples:
  commerce-consumer redrives follow 01a2042d-4cac-763a-a97c-020765ad4f43
  commerce-consumer redrives follow 01a2042d-4cac-763a-a97c-020765ad4f43 --quiet --json | jq .took_effect")]
    Follow(One),
}

#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  commerce-consumer redrives begin --error-type ships_too_many --canary 20 --rate 50 --reason 'the orders are repaired'
  commerce-consumer redrives begin --type ShipmentHeld --from 2h --reason 'fixed in 1.4.3' --yes --detach --json",
    after_help = EXIT_CODES)]
pub struct Begin {
    #[command(flatten)]
    filter: Filter,
    /// So many letters go first, and the rest only when all of them are settled; 1 to 10,000.
    #[arg(long, default_value = "100")]
    canary: u32,
    /// Letters that are let go in a second, at most; 1 to 100,000. The redrive limit of the group holds beside it.
    #[arg(long, default_value = "100")]
    rate: u32,
    /// Give the job up if a larger share of its settled letters died again; 0 to 100.
    #[arg(long, default_value = "10")]
    abort_percent: u32,
    /// Kept with the job.
    #[arg(long)]
    reason: String,
    /// Do not follow it.
    #[arg(long)]
    detach: bool,
    #[command(flatten)]
    consent: Consent,
}

#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  commerce-consumer redrives list
  commerce-consumer redrives list --all --json | jq -c '{id, state, died_again}'", after_help = EXIT_CODES)]
pub struct List {
    #[command(flatten)]
    most: Most,
}

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub struct One {
    id: Uuid,
}

#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  commerce-consumer redrives cancel 01a2042d-4cac-763a-a97c-020765ad4f43 --reason 'too early'
  commerce-consumer redrives cancel 01a2042d-4cac-763a-a97c-020765ad4f43 --reason 'too early' --yes",
    after_help = EXIT_CODES)]
pub struct Cancel {
    id: Uuid,
    /// Kept with the action.
    #[arg(long)]
    reason: String,
    #[command(flatten)]
    consent: Consent,
}

const REDRIVES: [Column; 9] = [
    ("ID", |job| text(&job["id"])),
    ("STATE", |job| text(&job["state"])),
    ("LETTERS", |job| count(&job["letters"])),
    ("TOOK EFFECT", |job| count(&job["took_effect"])),
    ("DIED AGAIN", |job| count(&job["died_again"])),
    ("HELD BACK", |job| count(&job["held_back"])),
    ("BEGAN", |job| time(&job["created_at"])),
    ("WHO", |job| text(&job["actor"])),
    ("REASON", |job| text(&job["reason"])),
];

pub(super) async fn run(desk: &Desk, what: &What) -> Result<Ended, Failure> {
    match what {
        What::Begin(asked) => begin(desk, asked).await,
        What::List(asked) => {
            let listing = Listing {
                path: &["admin", "redrives"],
                query: Vec::new(),
                items: "redrives",
                cursor: "before",
            };
            desk.list(listing, &asked.most, &REDRIVES, "there was no redrive yet")
                .await
        }
        What::Show(asked) => {
            let job = read(desk, asked.id).await?;
            desk.screen.result(&job, redrive)?;
            Ok(Ended::Done)
        }
        What::Cancel(asked) => cancel(desk, asked).await,
        What::Follow(asked) => follow::to_the_end(desk, asked.id, read(desk, asked.id).await?).await,
    }
}

pub(super) async fn read(desk: &Desk, id: Uuid) -> Result<Value, Failure> {
    desk.client.get(&["admin", "redrives", &id.to_string()], &[]).await
}

async fn begin(desk: &Desk, asked: &Begin) -> Result<Ended, Failure> {
    let mut body = asked.filter.body();
    for (name, value) in [
        ("canary", asked.canary),
        ("rate", asked.rate),
        ("abort_percent", asked.abort_percent),
    ] {
        body.insert(name.to_owned(), value.into());
    }
    body.insert("reason".to_owned(), asked.reason.clone().into());
    body.insert("dry_run".to_owned(), true.into());
    let path = ["admin", "redrives"];
    let meant = desk.client.post(&path, &body, false).await?;
    let number = |field: &str| meant[field].as_i64().unwrap_or_default();
    let eligible = number("matched") - number("busy") - number("unreadable");
    let target = target(asked, &meant, eligible);
    if asked.consent.dry_run || eligible <= 0 {
        desk.screen.result(&meant, |_| format!("{target}\nnothing has begun"))?;
        let left = !asked.consent.dry_run && number("matched") > 0;
        return Ok(if left { Ended::InPart } else { Ended::Done });
    }
    asked.consent.ask(desk, &target, eligible)?;

    body.insert("dry_run".to_owned(), false.into());
    let begun = desk.client.post(&path, &body, true).await?;
    let job = &begun["redrive"];
    let Some(id) = job["id"].as_str().and_then(|id| id.parse::<Uuid>().ok()) else {
        desk.screen
            .result(&begun, |_| "nothing has begun: others were faster".to_owned())?;
        return Ok(Ended::InPart);
    };
    if asked.detach {
        desk.screen.result(job, redrive)?;
        return Ok(Ended::Done);
    }
    desk.screen.note(&format!("redrive {id} has begun"));
    follow::to_the_end(desk, id, job.clone()).await
}

fn target(asked: &Begin, meant: &Value, eligible: i64) -> String {
    format!(
        "{} open dead letters of {} go through again: {} first, then at most {} a second, given up if more than {} % die again \
         ({} matched, {} are of keys that another redrive works on, {} are no events)",
        grouped(eligible),
        asked.filter.described(),
        grouped(eligible.min(asked.canary.into())),
        grouped(asked.rate.into()),
        asked.abort_percent,
        count(&meant["matched"]),
        count(&meant["busy"]),
        count(&meant["unreadable"]),
    )
}

async fn cancel(desk: &Desk, asked: &Cancel) -> Result<Ended, Failure> {
    let job = read(desk, asked.id).await?;
    let number = |field: &str| job[field].as_i64().unwrap_or_default();
    let unsent = number("letters") - number("sent");
    let target = format!(
        "redrive {}, {}: {} of {} letters are not let go any more and stay open",
        asked.id,
        text(&job["state"]),
        grouped(unsent),
        grouped(number("letters"))
    );
    if asked.consent.dry_run {
        desk.screen.result(&job, |_| target)?;
        return Ok(Ended::Done);
    }
    if job["ended_at"].is_null() {
        asked.consent.ask(desk, &target, 1)?;
    }
    let path = ["admin", "redrives", &asked.id.to_string(), "cancel"];
    let job = desk.client.post(&path, &json!({"reason": asked.reason}), true).await?;
    desk.screen.result(&job, redrive)?;
    Ok(Ended::Done)
}

pub(super) fn redrive(job: &Value) -> String {
    let filter: Vec<String> = job["filter"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, value)| format!("{name} = {}", text(value)))
        .collect();
    let mut rows = vec![
        ("redrive", text(&job["id"])),
        ("state", text(&job["state"])),
        ("of", filter.join(", ")),
        ("letters", count(&job["letters"])),
        ("sent", count(&job["sent"])),
        ("took effect", count(&job["took_effect"])),
        ("died again", count(&job["died_again"])),
        ("held back", count(&job["held_back"])),
        ("on their way", count(&job["on_their_way"])),
        (
            "plan",
            format!(
                "{} first, then {} a second, given up above {} %",
                count(&job["canary"]),
                count(&job["rate"]),
                text(&job["abort_percent"])
            ),
        ),
        (
            "begun",
            format!(
                "{} by {}: {}",
                time(&job["created_at"]),
                text(&job["actor"]),
                text(&job["reason"])
            ),
        ),
    ];
    if job["ended_at"].is_null() {
        rows.push(("nothing left in", duration(&job["eta_seconds"])));
    } else {
        rows.push(("ended", time(&job["ended_at"])));
    }
    if !job["ended_because"].is_null() {
        rows.push(("because", text(&job["ended_because"])));
    }
    block(&rows)
}
