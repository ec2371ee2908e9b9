use clap::{ArgGroup, Args};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::cli::{
    Desk, EXIT_CODES,
    consent::Consent,
    failure::{Ended, Failure},
    filter::Filter,
    screen::{grouped, text},
};

/// The API's most at once.
const MOST: i64 = 1_000;

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES, group = ArgGroup::new("by_id").args(["ids"]).conflicts_with_all(FILTER))]
pub struct Decide {
    /// Ids of dead letters; or else a filter.
    #[arg(value_name = "ID")]
    ids: Vec<Uuid>,
    #[command(flatten)]
    filter: Filter,
    /// Kept with the action.
    #[arg(long)]
    reason: String,
    #[command(flatten)]
    consent: Consent,
}

const FILTER: [&str; 6] = ["fingerprint", "error_type", "event_type", "aggregate_id", "from", "to"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    Redrive,
    Skip,
    Archive,
    Restore,
}

impl Decision {
    fn path(self) -> [&'static str; 3] {
        let verb = match self {
            Self::Redrive => "redrive",
            Self::Skip => "skip",
            Self::Archive => "archive",
            Self::Restore => "restore",
        };
        ["admin", "dead-letters", verb]
    }

    fn of_state(self) -> &'static str {
        match self {
            Self::Redrive | Self::Skip => "open ",
            Self::Archive => "",
            Self::Restore => "archived ",
        }
    }

    /// Ends "3 dead letters: they …".
    fn plan(self) -> &'static str {
        match self {
            Self::Redrive => "go through again, each key's in their sequence, and what is parked behind them follows",
            Self::Skip => "are left out for good: they never take effect, and their keys go on without them",
            Self::Archive => "are put out of sight and deleted later; `restore` takes them back until then",
            Self::Restore => "are what they were before they were archived",
        }
    }

    /// The field that says how many were decided.
    fn counted(self) -> &'static str {
        match self {
            Self::Redrive | Self::Skip => "decided",
            Self::Archive | Self::Restore => "changed",
        }
    }

    /// Why one of the given ids is not meant.
    fn left_out(self) -> &'static str {
        match self {
            Self::Redrive | Self::Skip => "not open, or no event",
            Self::Archive => "neither resolved nor a record that is no event",
            Self::Restore => "not archived",
        }
    }

    fn done(self) -> &'static str {
        match self {
            Self::Redrive => "on their way again",
            Self::Skip => "skipped",
            Self::Archive => "archived",
            Self::Restore => "restored",
        }
    }
}

/// First the API's dry run, then the question, then the same for real.
pub(super) async fn run(desk: &Desk, decision: Decision, asked: &Decide) -> Result<Ended, Failure> {
    let mut body = asked.filter.body();
    if !asked.ids.is_empty() {
        body.insert("ids".to_owned(), json!(asked.ids));
    }
    body.insert("reason".to_owned(), asked.reason.clone().into());
    body.insert("dry_run".to_owned(), true.into());
    let meant = desk.client.post(&decision.path(), &body, false).await?;
    let matched = meant["matched"].as_i64().unwrap_or_default();
    let left_out = left_out(asked, &meant, matched);
    if asked.consent.dry_run {
        desk.screen.result(&meant, |meant| {
            let ids: String = ids(meant).map(|id| format!("{}\n", text(id))).collect();
            let more = matched - ids.lines().count() as i64;
            let more = if more > 0 {
                format!("and {} more\n", grouped(more))
            } else {
                String::new()
            };
            format!("{ids}{more}{}; nothing was changed", target(decision, asked, matched))
        })?;
        return Ok(partly(desk, decision, &left_out));
    }
    if matched == 0 {
        desk.screen.result(&meant, |_| {
            "no such dead letter matches; nothing was changed".to_owned()
        })?;
        return Ok(partly(desk, decision, &left_out));
    }
    asked.consent.ask(desk, &target(decision, asked, matched), matched)?;

    pin(&mut body, &meant, matched);
    body.insert("dry_run".to_owned(), false.into());
    let done = desk.client.post(&decision.path(), &body, true).await?;
    let decided = done[decision.counted()].as_i64().unwrap_or_default();
    desk.screen.result(&done, |_| {
        format!(
            "{} of {} dead letters are {}",
            grouped(decided),
            grouped(matched),
            decision.done()
        )
    })?;
    if decided < matched {
        desk.screen.note(&format!(
            "{} were left: somebody else has decided them, or they died with an earlier one of their key",
            grouped(matched - decided)
        ));
        return Ok(Ended::InPart);
    }
    if matched >= MOST {
        desk.screen
            .note("that was the most at once and there may be more: repeat it, or use `redrives begin`");
        return Ok(Ended::InPart);
    }
    Ok(partly(desk, decision, &left_out))
}

fn target(decision: Decision, asked: &Decide, matched: i64) -> String {
    let by = match asked.filter.described() {
        by if by.is_empty() => by,
        by => format!(" of {by}"),
    };
    let letters = if matched == 1 { "dead letter" } else { "dead letters" };
    format!(
        "{} {}{letters}{by}: they {}",
        grouped(matched),
        decision.of_state(),
        decision.plan()
    )
}

fn ids(view: &Value) -> impl Iterator<Item = &Value> {
    view["ids"].as_array().into_iter().flatten()
}

/// What was shown is what is decided, also when a filter would match more by now; beyond the ids that the API names it
/// is the filter again.
fn pin(body: &mut Map<String, Value>, meant: &Value, matched: i64) {
    if ids(meant).count() as i64 == matched {
        body.retain(|name, _| name == "reason");
        body.insert("ids".to_owned(), meant["ids"].clone());
    }
}

/// Of the ids asked for, those that are not meant.
fn left_out(asked: &Decide, meant: &Value, matched: i64) -> Vec<String> {
    let named = ids(meant).count() as i64;
    if asked.ids.len() as i64 == matched || named < matched {
        return Vec::new();
    }
    let is_meant = |id: &String| ids(meant).any(|meant| meant == id.as_str());
    let mut left: Vec<String> = asked
        .ids
        .iter()
        .map(Uuid::to_string)
        .filter(|id| !is_meant(id))
        .collect();
    left.sort();
    left.dedup();
    left
}

fn partly(desk: &Desk, decision: Decision, left_out: &[String]) -> Ended {
    if left_out.is_empty() {
        return Ended::Done;
    }
    let why = decision.left_out();
    desk.screen
        .note(&format!("left out, because {why}: {}", left_out.join(" ")));
    Ended::InPart
}
