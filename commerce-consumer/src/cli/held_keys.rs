use clap::{Args, Subcommand};

use super::{
    Common, Desk, EXIT_CODES,
    client::Listing,
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
    let What::List(asked) = what;
    let listing = Listing {
        path: &["admin", "held-keys"],
        query: asked.state.iter().map(|state| ("state", state.clone())).collect(),
        items: "held_keys",
        cursor: "cursor",
    };
    desk.list(listing, &asked.most, &KEYS, "no key is held").await
}
