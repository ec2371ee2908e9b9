use clap::{ArgGroup, Args, Subcommand};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{
    Common, Desk, EXIT_CODES,
    client::Listing,
    failure::{Ended, Failure},
    filter::ReadFilter,
    screen::{Column, Table, block, count, grouped, indented, pretty, text, time},
};

/// Redriven, skipped, archived, restored.
mod decide;

/// Tried without effect.
mod dry_run;

/// Another event in a letter's place.
mod edit;

use decide::{Decide, Decision};
use edit::Edit;

#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  commerce-consumer dead-letters groups --state open
  commerce-consumer dead-letters redrive --error-type ships_too_many --reason 'order 10248 was enlarged'",
    after_help = EXIT_CODES)]
pub struct DeadLetters {
    #[command(flatten)]
    pub(super) common: Common,
    #[command(subcommand)]
    pub(super) what: What,
}

#[derive(Debug, Subcommand)]
pub enum What {
    /// Alike dead letters together, the largest group first, at most 200.
    Groups(Groups),
    /// Dead letters one by one, the latest first.
    List(List),
    /// How many there are, by state.
    Count(Count),
    /// One dead letter: its record, and every try that failed.
    Show(Show),
    /// Send dead letters through again, each key's in their sequence; at most 1,000 at once.
    #[command(before_help = "\
Examples:
  commerce-consumer dead-letters redrive --error-type ships_too_many --reason 'order 10248 was enlarged'
  commerce-consumer dead-letters redrive 01a20369-a68f-767c-a83a-078a525f0194 --reason 'repaired' --yes --json")]
    Redrive(Decide),
    /// Let dead letters be: they never take effect, and their keys go on without them; at most 1,000 at once.
    #[command(before_help = "\
Examples:
  commerce-consumer dead-letters skip 01a20369-a68f-767c-a83a-078a525f0194 --reason 'it was never shipped'
  commerce-consumer dead-letters skip --type ShipmentHeld --to 2h --reason 'of no use any more' --dry-run")]
    Skip(Decide),
    /// Try a dead letter on commerce's database as it is now, without effect; exit code 99 if it would fail or wait.
    #[command(before_help = "\
Examples:
  commerce-consumer dead-letters dry-run 01a20369-a68f-767c-a83a-078a525f0194
  commerce-consumer dead-letters dry-run 01a20369-a68f-767c-a83a-078a525f0194 --json | jq .changes")]
    DryRun(Show),
    /// Put another event in the place of an open dead letter: with a file, or in $EDITOR.
    Edit(Edit),
    /// Put dead letters out of sight that need nobody any more: resolved ones, and records that are no events.
    #[command(before_help = "\
Examples:
  commerce-consumer dead-letters archive --fingerprint 'unknown_order: order # is not known' --reason 'orders of the test shop'
  commerce-consumer dead-letters archive 01a20369-a68f-767c-a83a-078a525f0194 --reason 'of no use' --yes")]
    Archive(Decide),
    /// Take dead letters back from the archive.
    #[command(before_help = "\
Examples:
  commerce-consumer dead-letters restore 01a20369-a68f-767c-a83a-078a525f0194 --reason 'still needed'
  commerce-consumer dead-letters restore --type ShipmentHeld --reason 'still needed' --dry-run")]
    Restore(Decide),
}

#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  commerce-consumer dead-letters groups --state open
  commerce-consumer dead-letters groups --from 2h --json | jq -r .fingerprint", after_help = EXIT_CODES)]
pub struct Groups {
    #[command(flatten)]
    filter: ReadFilter,
}

#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  commerce-consumer dead-letters list --state open --error-type ships_too_many
  commerce-consumer dead-letters list --all --json | jq -r .id", after_help = EXIT_CODES)]
pub struct List {
    #[command(flatten)]
    filter: ReadFilter,
    #[command(flatten)]
    most: Most,
}

#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  commerce-consumer dead-letters count
  commerce-consumer dead-letters count --type ShipmentCompleted --from '15 min ago' --json", after_help = EXIT_CODES)]
pub struct Count {
    #[command(flatten)]
    filter: ReadFilter,
}

#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  commerce-consumer dead-letters show 01a20369-a68f-767c-a83a-078a525f0194
  commerce-consumer dead-letters show 01a20369-a68f-767c-a83a-078a525f0194 --json | jq -r .record_value",
    after_help = EXIT_CODES)]
pub struct Show {
    id: Uuid,
}

#[derive(Debug, Clone, Args)]
#[command(group = ArgGroup::new("how_many"))]
pub struct Most {
    /// Most rows.
    #[arg(long, default_value = "50", group = "how_many", value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
    /// All rows.
    #[arg(long, group = "how_many")]
    all: bool,
}

impl Most {
    pub(super) fn rows(&self) -> Option<u32> {
        (!self.all).then_some(self.limit)
    }
}

const GROUPS: [Column; 7] = [
    ("LETTERS", |group| count(&group["letters"])),
    ("KEYS", |group| count(&group["keys"])),
    ("STATE", |group| text(&group["state"])),
    ("FIRST DIED", |group| time(&group["first_died_at"])),
    ("LAST DIED", |group| time(&group["last_died_at"])),
    ("ERROR TYPE", |group| text(&group["error_type"])),
    ("FINGERPRINT", |group| text(&group["fingerprint"])),
];

const LETTERS: [Column; 8] = [
    ("ID", |letter| text(&letter["id"])),
    ("STATE", |letter| text(&letter["state"])),
    ("TYPE", |letter| text(&letter["type"])),
    ("AGGREGATE", |letter| text(&letter["aggregate_id"])),
    ("SEQUENCE", |letter| text(&letter["sequence"])),
    ("DEATHS", |letter| count(&letter["deaths"])),
    ("LAST DIED", |letter| time(&letter["last_died_at"])),
    ("ERROR", |letter| {
        format!("{}: {}", text(&letter["error_type"]), text(&letter["error_message"]))
    }),
];

const ATTEMPTS: [Column; 5] = [
    ("ATTEMPT", |attempt| text(&attempt["attempt"])),
    ("FAILED", |attempt| time(&attempt["failed_at"])),
    ("TOPIC", |attempt| {
        format!("{}[{}]", text(&attempt["topic"]), text(&attempt["partition"]))
    }),
    ("CONSUMER", |attempt| text(&attempt["consumer_version"])),
    ("ERROR", |attempt| {
        let class = text(&attempt["error_class"]);
        format!(
            "{class} {}: {}",
            text(&attempt["error_type"]),
            text(&attempt["error_message"])
        )
    }),
];

/// The API's most.
const MOST_GROUPS: usize = 200;
const NONE_MATCH: &str = "no dead letter matches";

pub(super) async fn run(desk: &Desk, what: &What) -> Result<Ended, Failure> {
    match what {
        What::Groups(asked) => groups(desk, asked).await,
        What::List(asked) => list(desk, asked).await,
        What::Count(asked) => counted(desk, asked).await,
        What::Show(asked) => show(desk, asked.id).await,
        What::Redrive(asked) => decide::run(desk, Decision::Redrive, asked).await,
        What::Skip(asked) => decide::run(desk, Decision::Skip, asked).await,
        What::DryRun(asked) => dry_run::run(desk, asked.id).await,
        What::Edit(asked) => edit::run(desk, asked).await,
        What::Archive(asked) => decide::run(desk, Decision::Archive, asked).await,
        What::Restore(asked) => decide::run(desk, Decision::Restore, asked).await,
    }
}

async fn groups(desk: &Desk, asked: &Groups) -> Result<Ended, Failure> {
    let groups = all_groups(desk, &asked.filter).await?;
    Table::new(&desk.screen, &GROUPS).rows(&groups)?;
    if groups.is_empty() {
        desk.screen.note(NONE_MATCH);
    }
    if groups.len() >= MOST_GROUPS {
        desk.screen.note("there may be more groups: narrow the filter");
    }
    Ok(Ended::Done)
}

async fn all_groups(desk: &Desk, filter: &ReadFilter) -> Result<Vec<Value>, Failure> {
    let path = ["admin", "dead-letters", "groups"];
    let mut view = desk.client.get(&path, &filter.query()).await?;
    Ok(view["groups"].as_array_mut().map(std::mem::take).unwrap_or_default())
}

async fn list(desk: &Desk, asked: &List) -> Result<Ended, Failure> {
    let listing = Listing {
        path: &["admin", "dead-letters"],
        query: asked.filter.query(),
        items: "dead_letters",
        cursor: "cursor",
    };
    desk.list(listing, &asked.most, &LETTERS, NONE_MATCH).await
}

impl Desk {
    pub(super) async fn list(
        &self,
        listing: Listing<'_>,
        most: &Most,
        columns: &[Column],
        none: &str,
    ) -> Result<Ended, Failure> {
        let mut table = Table::new(&self.screen, columns);
        let (shown, more) = self
            .client
            .each(listing, most.rows(), |items| table.rows(items))
            .await?;
        if shown == 0 {
            self.screen.note(none);
        }
        if more {
            self.screen.note(&format!(
                "{} shown, there are more: --limit or --all",
                grouped(shown.into())
            ));
        }
        Ok(Ended::Done)
    }
}

async fn counted(desk: &Desk, asked: &Count) -> Result<Ended, Failure> {
    let groups = all_groups(desk, &asked.filter).await?;
    let of = |state: &str| -> i64 {
        let groups = groups.iter().filter(|group| group["state"] == state);
        groups.filter_map(|group| group["letters"].as_i64()).sum()
    };
    let mut states: Vec<&str> = groups.iter().filter_map(|group| group["state"].as_str()).collect();
    states.extend(["open", "redriving", "resolved"]);
    states.sort_unstable();
    states.dedup();
    let all: i64 = groups.iter().filter_map(|group| group["letters"].as_i64()).sum();
    // More groups than the API gives: the smallest are not counted.
    let at_least = groups.len() >= MOST_GROUPS;
    let mut object = json!({"letters": all, "at_least": at_least});
    for state in &states {
        object[*state] = of(state).into();
    }
    desk.screen.result(&object, |_| {
        let mut rows: Vec<(&str, String)> = states.iter().map(|state| (*state, grouped(of(state)))).collect();
        rows.push(("all", grouped(all)));
        let more = if at_least {
            "at least; narrow the filter to count them all\n"
        } else {
            ""
        };
        block(&rows) + more
    })?;
    Ok(Ended::Done)
}

async fn show(desk: &Desk, id: Uuid) -> Result<Ended, Failure> {
    let letter = desk
        .client
        .get(&["admin", "dead-letters", &id.to_string()], &[])
        .await?;
    if desk.screen.json {
        desk.screen.line(&letter.to_string())?;
        return Ok(Ended::Done);
    }
    desk.screen.line(whole(&letter).trim_end())?;
    let attempts = letter["failed_attempts"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    desk.screen.line("\nfailed attempts")?;
    Table::new(&desk.screen, &ATTEMPTS).rows(attempts)?;
    let value = letter["record_value"].as_str().unwrap_or_default();
    // As it stands in the record if it is no JSON.
    let shown = indented(&pretty(value).unwrap_or_else(|| value.to_owned()));
    desk.screen.line(&format!("\nrecord value\n{}", shown.trim_end()))?;
    Ok(Ended::Done)
}

fn whole(letter: &Value) -> String {
    let origin = &letter["origin"];
    let holds = match letter["holds_key"].as_bool() {
        Some(true) => format!("yes, {} events wait behind it", count(&letter["parked"])),
        Some(false) => "no".to_owned(),
        None => "unknown".to_owned(),
    };
    let mut rows = vec![
        ("id", text(&letter["id"])),
        ("state", text(&letter["state"])),
        ("type", text(&letter["type"])),
        (
            "aggregate",
            format!("{} {}", text(&letter["aggregate_type"]), text(&letter["aggregate_id"])),
        ),
        ("sequence", text(&letter["sequence"])),
        (
            "error",
            format!("{}: {}", text(&letter["error_type"]), text(&letter["error_message"])),
        ),
        ("class", text(&letter["error_class"])),
        ("fingerprint", text(&letter["fingerprint"])),
        ("consumer", text(&letter["consumer_version"])),
        (
            "deaths",
            format!(
                "{}, after {} attempts",
                count(&letter["deaths"]),
                count(&letter["attempts"])
            ),
        ),
        (
            "died",
            format!(
                "first {}, last {}",
                time(&letter["first_died_at"]),
                time(&letter["last_died_at"])
            ),
        ),
        ("resolved", time(&letter["resolved_at"])),
        ("holds its key", holds),
        (
            "origin",
            format!(
                "{}[{}] offset {}",
                text(&origin["topic"]),
                text(&origin["partition"]),
                text(&origin["offset"])
            ),
        ),
        ("record key", text(&letter["record_key"])),
    ];
    for (name, field) in [
        ("edited from", "edited_from"),
        ("replaced by", "replaced_by"),
        ("archived", "archived_at"),
        ("deleted after", "deleted_after"),
    ] {
        if !letter[field].is_null() {
            rows.push((name, time(&letter[field])));
        }
    }
    let headers = letter["headers"].as_array().map(Vec::as_slice).unwrap_or_default();
    let headers: String = headers
        .iter()
        .map(|header| format!("  {}: {}\n", text(&header["name"]), text(&header["value"])))
        .collect();
    format!("{}\nheaders\n{headers}", block(&rows))
}
