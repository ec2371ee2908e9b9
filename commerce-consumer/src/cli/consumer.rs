use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::{
    Common, Desk, EXIT_CODES,
    consent::Consent,
    failure::{Ended, Failure},
    screen::{block, count, duration, text},
};

#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  commerce-consumer consumer status
  commerce-consumer consumer limits --live 500 --reason 'the backup runs'", after_help = EXIT_CODES)]
pub struct Consumer {
    #[command(flatten)]
    pub(super) common: Common,
    #[command(subcommand)]
    pub(super) what: What,
}

#[derive(Debug, Subcommand)]
pub enum What {
    /// Lag, limits, held keys, and what stands still.
    Status(Status),
    /// Let all instances of the group apply nothing more until they are resumed, also after their restarts.
    Pause(Pause),
    /// Let the group go on, after a pause or after its flood limit has stopped it.
    Resume(Resume),
    /// Say how fast the group may go, or change it for all instances and over their restarts.
    Limits(Limits),
}

#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  commerce-consumer consumer status
  commerce-consumer consumer status --json | jq .lag", after_help = EXIT_CODES)]
pub struct Status {}

#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  commerce-consumer consumer pause --reason 'the failover is on its way'
  commerce-consumer consumer pause --reason 'stocktaking' --yes --quiet", after_help = EXIT_CODES)]
pub struct Pause {
    /// Kept with the action.
    #[arg(long)]
    reason: String,
    #[command(flatten)]
    consent: Consent,
}

#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  commerce-consumer consumer resume --reason 'version 1.4.2 is rolled back'
  commerce-consumer consumer resume --reason 'counted' --json | jq .paused_by_operator", after_help = EXIT_CODES)]
pub struct Resume {
    /// Kept with the action.
    #[arg(long)]
    reason: String,
}

#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  commerce-consumer consumer limits
  commerce-consumer consumer limits --live 500 --redrive default --reason 'the backup runs' --yes",
    after_help = EXIT_CODES)]
pub struct Limits {
    /// Events per second of the whole group, `unlimited`, or `default`: as the settings say.
    #[arg(long, requires = "reason")]
    live: Option<String>,
    /// The same for the retry topics.
    #[arg(long, requires = "reason")]
    retry: Option<String>,
    /// The same for parked events that are let go.
    #[arg(long, requires = "reason")]
    redrive: Option<String>,
    /// Kept with the action; needed for a change.
    #[arg(long)]
    reason: Option<String>,
    #[command(flatten)]
    consent: Consent,
}

const PATH: [&str; 2] = ["admin", "consumer"];

pub(super) async fn run(desk: &Desk, what: &What) -> Result<Ended, Failure> {
    match what {
        What::Status(_) => {
            let view = desk.client.get(&PATH, &[]).await?;
            desk.screen.result(&view, status)?;
        }
        What::Pause(asked) => {
            let target = "all instances of the group apply nothing more, until `commerce-consumer consumer resume`";
            if asked.consent.dry_run {
                desk.screen.line(target)?;
                return Ok(Ended::Done);
            }
            asked.consent.ask(desk, target, 1)?;
            change(desk, "pause", &json!({"reason": asked.reason})).await?;
        }
        What::Resume(asked) => change(desk, "resume", &json!({"reason": asked.reason})).await?,
        What::Limits(asked) => return limits(desk, asked).await,
    }
    Ok(Ended::Done)
}

async fn change(desk: &Desk, verb: &str, body: &Value) -> Result<(), Failure> {
    let view = desk.client.post(&["admin", "consumer", verb], body, true).await?;
    desk.screen.result(&view, status)
}

async fn limits(desk: &Desk, asked: &Limits) -> Result<Ended, Failure> {
    let rates = [
        ("live", &asked.live),
        ("retry", &asked.retry),
        ("redrive", &asked.redrive),
    ];
    let given = rates.into_iter().filter_map(|(budget, rate)| {
        let rate = rate.clone()?;
        Some((budget.to_owned(), rate.into()))
    });
    let mut body: Map<String, Value> = given.collect();
    let now = desk.client.get(&PATH, &[]).await?;
    if body.is_empty() {
        for limit in now["limits"].as_array().into_iter().flatten() {
            desk.screen.result(limit, |limit| block(&[one_limit(limit)]))?;
        }
        return Ok(Ended::Done);
    }
    let before = |budget: &str| {
        let limits = now["limits"].as_array().into_iter().flatten();
        let limit = limits.into_iter().find(|limit| limit["budget"] == budget);
        limit.map_or_else(|| "unknown".to_owned(), |limit| text(&limit["rate"]))
    };
    let steps: Vec<String> = body
        .iter()
        .map(|(budget, rate)| format!("{budget} from {} to {} events per second", before(budget), text(rate)))
        .collect();
    let target = format!("all instances of the group, over their restarts: {}", steps.join(", "));
    if asked.consent.dry_run {
        desk.screen.line(&target)?;
        return Ok(Ended::Done);
    }
    asked.consent.ask(desk, &target, 1)?;
    body.insert("reason".to_owned(), asked.reason.clone().into());
    change(desk, "limits", &Value::Object(body)).await?;
    Ok(Ended::Done)
}

fn one_limit(limit: &Value) -> (&'static str, String) {
    let budget = match limit["budget"].as_str() {
        Some("live") => "limit, live",
        Some("retry") => "limit, retry",
        Some("redrive") => "limit, redrive",
        _ => "limit",
    };
    let share = match limit["share"].as_f64() {
        Some(share) => format!(" events per second, of them {share:.1} here"),
        None => String::new(),
    };
    (budget, format!("{}{share}", text(&limit["rate"])))
}

fn status(view: &Value) -> String {
    let stands = |field: &str| match &view[field] {
        Value::Null => "no".to_owned(),
        reason => text(reason),
    };
    let lag = match &view["oldest_age_seconds"] {
        Value::Null => format!("{} records", count(&view["lag"])),
        age => format!("{} records, the oldest is {} old", count(&view["lag"]), duration(age)),
    };
    let mut rows = vec![
        ("joined its group", text(&view["joined"])),
        ("brokers away", stands("broker_fault")),
        ("paused", stands("paused")),
        ("paused by a person", stands("paused_by_operator")),
        ("stopped by a flood", stands("stopped")),
        ("lag", lag),
        ("nothing left in", duration(&view["drain_seconds"])),
    ];
    rows.extend(view["limits"].as_array().into_iter().flatten().map(one_limit));
    match view["held"].as_array() {
        Some(held) => rows.extend(held.iter().map(|held| {
            let name = match held["state"].as_str() {
                Some("retrying") => "held, retrying",
                Some("dead") => "held, dead",
                Some("waiting") => "held, waiting",
                Some("releasing") => "held, releasing",
                _ => "held",
            };
            (
                name,
                format!(
                    "{} keys, {} events parked",
                    count(&held["keys"]),
                    count(&held["parked"])
                ),
            )
        })),
        None => rows.push(("held", "unknown".to_owned())),
    }
    let behind: String = view["partitions"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|partition| partition["lag"] != 0)
        .map(|partition| {
            let place = format!("{}[{}]", text(&partition["topic"]), text(&partition["partition"]));
            format!(
                "{place}  lag {}  oldest {}\n",
                count(&partition["lag"]),
                duration(&partition["oldest_age_seconds"])
            )
        })
        .collect();
    let partitions = view["partitions"].as_array().map_or(0, Vec::len);
    rows.push(("partitions here", partitions.to_string()));
    format!("{}{behind}", block(&rows))
}
