use clap::{Args, Subcommand};

use super::{
    Common, Desk, EXIT_CODES,
    client::Listing,
    dead_letters::Most,
    failure::{Ended, Failure},
    screen::{Column, text, time},
};

#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  commerce-consumer actions list
  commerce-consumer actions list --limit 500 --json | jq -c '{actor, action, reason}'", after_help = EXIT_CODES)]
pub struct Actions {
    #[command(flatten)]
    pub(super) common: Common,
    #[command(subcommand)]
    pub(super) what: What,
}

#[derive(Debug, Subcommand)]
pub enum What {
    /// What operators did, the latest first.
    List(List),
}

#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  commerce-consumer actions list
  commerce-consumer actions list --limit 500 --json | jq -c '{actor, action, reason}'", after_help = EXIT_CODES)]
pub struct List {
    #[command(flatten)]
    most: Most,
}

const ACTIONS: [Column; 6] = [
    ("ID", |action| text(&action["id"])),
    ("TIME", |action| time(&action["acted_at"])),
    ("WHO", |action| {
        format!("{} ({})", text(&action["actor"]), text(&action["role"]))
    }),
    ("ACTION", |action| text(&action["action"])),
    ("REASON", |action| text(&action["reason"])),
    ("TARGET", |action| text(&action["target"])),
];

pub(super) async fn run(desk: &Desk, what: &What) -> Result<Ended, Failure> {
    let What::List(asked) = what;
    let listing = Listing {
        path: &["admin", "actions"],
        query: Vec::new(),
        items: "actions",
        cursor: "before",
    };
    desk.list(listing, &asked.most, &ACTIONS, "nobody did anything yet")
        .await
}
