use clap::{Args, Subcommand};
use serde_json::json;
use shared_events::shipment::AGGREGATE_TYPE;

use super::{
    Common, Desk, EXIT_CODES,
    client::Listing,
    consent::Consent,
    dead_letters::Most,
    failure::{Ended, Failure},
    screen::{Column, count, text, time},
};

#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  commerce-consumer held-keys list --state dead
  commerce-consumer held-keys list --all --json | jq -r .aggregate_id", after_help = EXIT_CODES)]
pub struct HeldKeys {
    #[command(flatten)]
    pub(super) common: Common,
    #[command(subcommand)]
    pub(super) what: What,
}

#[derive(Debug, Subcommand)]
pub enum What {
    /// The keys that are held, in the order of their names.
    List(List),
    /// Let a key that waits for an event that will never come go on without it.
    Pass(Pass),
}

#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  commerce-consumer held-keys list --state dead
  commerce-consumer held-keys list --all --json | jq -r .aggregate_id", after_help = EXIT_CODES)]
pub struct List {
    /// `retrying`, `dead`, `waiting` or `releasing`.
    #[arg(long)]
    state: Option<String>,
    #[command(flatten)]
    most: Most,
}

#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  commerce-consumer held-keys pass 829 --to-sequence 4 --reason 'number 3 was deleted unread'
  commerce-consumer held-keys pass 829 --to-sequence 4 --reason 'number 3 was deleted unread' --yes",
    after_help = EXIT_CODES)]
pub struct Pass {
    /// The shipment's id.
    #[arg(value_name = "AGGREGATE_ID")]
    aggregate_id: String,
    /// What the id is of.
    #[arg(long, default_value = AGGREGATE_TYPE)]
    aggregate_type: String,
    /// The event that is to be the next; at most the one that waits.
    #[arg(long)]
    to_sequence: i64,
    /// Kept with the action.
    #[arg(long)]
    reason: String,
    #[command(flatten)]
    consent: Consent,
}

const KEYS: [Column; 7] = [
    ("AGGREGATE", |key| {
        format!("{} {}", text(&key["aggregate_type"]), text(&key["aggregate_id"]))
    }),
    ("STATE", |key| text(&key["state"])),
    ("PARKED", |key| count(&key["parked"])),
    ("HELD SINCE", |key| time(&key["held_since"])),
    ("EVENT", |key| text(&key["event_id"])),
    ("TYPE", |key| {
        format!("{} {}", text(&key["event_type"]), text(&key["sequence"]))
    }),
    ("ERROR", |key| {
        format!("{}: {}", text(&key["error_type"]), text(&key["error_message"]))
    }),
];

pub(super) async fn run(desk: &Desk, what: &What) -> Result<Ended, Failure> {
    match what {
        What::List(asked) => {
            let listing = Listing {
                path: &["admin", "held-keys"],
                query: asked.state.iter().map(|state| ("state", state.clone())).collect(),
                items: "held_keys",
                cursor: "cursor",
            };
            desk.list(listing, &asked.most, &KEYS, "no key is held").await
        }
        What::Pass(asked) => pass(desk, asked).await,
    }
}

/// The API has no dry run for it: the target is what was typed.
async fn pass(desk: &Desk, asked: &Pass) -> Result<Ended, Failure> {
    let key = text(&format!("{} {}", asked.aggregate_type, asked.aggregate_id).into());
    let target = format!(
        "{key} goes on with number {}: what the events before it would have changed stays undone",
        asked.to_sequence
    );
    if asked.consent.dry_run {
        desk.screen.line(&target)?;
        return Ok(Ended::Done);
    }
    asked.consent.ask(desk, &target, 1)?;
    let body = json!({
        "aggregate_type": asked.aggregate_type, "aggregate_id": asked.aggregate_id,
        "to_sequence": asked.to_sequence, "reason": asked.reason,
    });
    let passed = desk.client.post(&["admin", "held-keys", "pass"], &body, true).await?;
    desk.screen.result(&passed, |_| format!("{key} is on its way"))?;
    Ok(Ended::Done)
}
