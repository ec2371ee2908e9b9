//! The flag by command line: a client of the admin API, so that neither roles nor the history can be gone around.

use std::{io::Write, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, Subcommand};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::flag::is_printable;

const CONNECT_WITHIN: Duration = Duration::from_secs(5);
const REFUSED: u8 = 2;
const UNREACHABLE: u8 = 3;
/// It is set, and not every instance runs it yet.
const IN_PART: u8 = 4;

const EXAMPLES: &str = "\
Examples:
  logistics-svc flag show
  logistics-svc flag set legacy --percent 10 --reason 'consumer lags, INC-42'
  logistics-svc flag rollout shadow --steps 1,10,100 --soak 30min --mismatches 0 --dead-letters 0 --reason 'CHG-7'";

const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 failed while running; 2 refused or a usage error, nothing was done; 3 the service could not be reached;
4 the flag is set, and not every instance runs it yet.

Changes need the token of an admin, in ADMIN_TOKEN or a file.";

/// Look at the flag, set it, roll a value out.
#[derive(Debug, Args)]
#[command(before_help = EXAMPLES, after_help = EXIT_CODES)]
pub struct FlagCommand {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Service and output")]
struct Common {
    /// Address of an API process; any of them does.
    #[arg(
        long,
        env = "LOGISTICS_ADMIN_URL",
        default_value = "http://127.0.0.1:8080",
        global = true
    )]
    url: String,
    /// File with the token, instead of the variable ADMIN_TOKEN. A token is never an argument: `ps` would show it.
    #[arg(long, env = "ADMIN_TOKEN_FILE", global = true, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Longest wait for one answer.
    #[arg(long, env = "LOGISTICS_ADMIN_TIMEOUT", default_value = "30s", value_parser = humantime::parse_duration, global = true)]
    timeout: Duration,
    /// One JSON object per line, as the API answers; fields may be added to it, never taken away.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum What {
    /// The value in force, and which instance runs which.
    Show,
    /// Set the flag; in force everywhere within a second. Ends a roll-out.
    Set(Set),
    /// Every value it had, with who set it and why.
    History {
        /// Most values.
        #[arg(long, default_value = "20", value_parser = clap::value_parser!(u8).range(1..=200))]
        limit: u8,
    },
    /// Roll a mode out in steps, taken back by itself when a condition is met.
    Rollout(Rollout),
    /// The last roll-outs, with what became of them.
    Rollouts,
    /// What shadow mode found.
    Shadow,
}

#[derive(Debug, Args)]
struct Set {
    /// Mode of the orders within the percentage: `outbox`, `shadow` or `legacy`.
    mode: String,
    /// Of all orders, by a hash of the order's id; at most two decimals.
    #[arg(long, default_value = "100")]
    percent: f64,
    /// Mode of the other orders.
    #[arg(long, default_value = "outbox")]
    rest: String,
    /// Kept with the value.
    #[arg(long)]
    reason: String,
    /// Only if this version is in force, as `flag show` says it: nothing that somebody else has set since is changed.
    #[arg(long, value_name = "VERSION")]
    if_version: Option<i64>,
}

#[derive(Debug, Args)]
struct Rollout {
    /// Mode to be rolled out: `outbox`, `shadow` or `legacy`.
    mode: String,
    /// Mode of the orders that are not within the step.
    #[arg(long, default_value = "outbox")]
    rest: String,
    /// Percent of orders, rising.
    #[arg(long, value_delimiter = ',', default_value = "1,10,50,100")]
    steps: Vec<f64>,
    /// How long each step is in force before the next, e.g. `30min`. It begins again when no process has watched for ten seconds.
    #[arg(long, value_parser = humantime::parse_duration)]
    soak: Duration,
    /// Taken back above so many mismatches of shadow mode.
    #[arg(long)]
    mismatches: Option<u64>,
    /// Taken back when commerce lags by more, e.g. `30s`. The one condition that a dead consumer meets: give it on the way to the outbox.
    #[arg(long, value_parser = humantime::parse_duration)]
    lag: Option<Duration>,
    /// Taken back when a larger share of requests fails, e.g. `0.01`; looked at from 20 requests of a step on.
    #[arg(long)]
    error_ratio: Option<f64>,
    /// Taken back above so many new dead letters of commerce.
    #[arg(long)]
    dead_letters: Option<u64>,
    /// Kept with the roll-out.
    #[arg(long)]
    reason: String,
}

/// What went wrong: one line what, one why, one what to try; and the exit code.
struct Failure {
    code: u8,
    what: String,
    why: String,
    hint: &'static str,
}

pub fn run(command: &FlagCommand) -> ExitCode {
    let done = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| failed("the command could not begin", error.to_string()))
        .and_then(|runtime| runtime.block_on(answer(command)))
        .and_then(|answer| say(&answer.lines).map(|()| answer.code));
    match done {
        Ok(code) => ExitCode::from(code),
        Err(Failure { code, what, why, hint }) => {
            let told = writeln!(std::io::stderr(), "error: {what}\n  why: {why}\n  try: {hint}");
            ExitCode::from(if told.is_ok() { code } else { 1 })
        }
    }
}

/// What is printed, and the exit code.
struct Answer {
    lines: Vec<String>,
    code: u8,
}

async fn answer(command: &FlagCommand) -> Result<Answer, Failure> {
    let common = &command.common;
    let (method, path, body) = match &command.what {
        What::Show => (Method::GET, "/admin/flag".to_owned(), None),
        What::History { limit } => (Method::GET, format!("/admin/flag/history?limit={limit}"), None),
        What::Rollouts => (Method::GET, "/admin/flag/rollout".to_owned(), None),
        What::Shadow => (Method::GET, "/admin/shadow".to_owned(), None),
        What::Set(set) => {
            let body = json!({"mode": set.mode, "percent": set.percent, "rest": set.rest, "reason": set.reason,
                              "if_version": set.if_version});
            (Method::PUT, "/admin/flag".to_owned(), Some(body))
        }
        What::Rollout(asked) => {
            let stop = json!({"mismatches": asked.mismatches, "lag_seconds": asked.lag.map(|lag| lag.as_secs_f64()),
                              "error_ratio": asked.error_ratio, "dead_letters": asked.dead_letters});
            let body = json!({"mode": asked.mode, "rest": asked.rest, "steps": asked.steps,
                              "soak_seconds": asked.soak.as_secs_f64(), "stop": stop, "reason": asked.reason});
            (Method::POST, "/admin/flag/rollout".to_owned(), Some(body))
        }
    };
    let view = ask(common, method, &path, body).await?;
    let set = matches!(command.what, What::Set(_));
    let code = if set && view["in_force"] != true { IN_PART } else { 0 };
    if common.json {
        let lines = vec![view.to_string()];
        return Ok(Answer { lines, code });
    }
    let lines = match &command.what {
        What::Show | What::Set(_) => flag(&view),
        What::History { .. } => list(&view["values"]).map(value).collect(),
        What::Rollout(_) => vec![rollout(&view)],
        What::Rollouts => list(&view["rollouts"]).map(rollout).collect(),
        What::Shadow => shadow(&view),
    };
    Ok(Answer { lines, code })
}

async fn ask(common: &Common, method: Method, path: &str, body: Option<Value>) -> Result<Value, Failure> {
    // A proxy or a redirect would be given the token.
    let http = reqwest::Client::builder()
        .timeout(common.timeout)
        .connect_timeout(CONNECT_WITHIN.min(common.timeout))
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .build()
        .map_err(|error| failed("no HTTP client", error.to_string()))?;
    let mut request = http.request(method, format!("{}{path}", common.url.trim_end_matches('/')));
    if let Some(token) = token(common)? {
        request = request.bearer_auth(token);
    }
    if let Some(body) = &body {
        request = request.json(body);
    }
    let changes = body.is_some();
    let unanswered = |error: &reqwest::Error| Failure {
        code: if error.is_builder() {
            REFUSED
        } else if error.is_connect() || !changes {
            UNREACHABLE
        } else {
            1
        },
        what: format!("{} did not answer", common.url),
        why: deepest(error),
        hint: "is the service up, and is it there? --url or LOGISTICS_ADMIN_URL says where; `flag show` says what is in force",
    };
    let response = request.send().await.map_err(|error| unanswered(&error))?;
    let status = response.status();
    let view: Value = response.json().await.map_err(|error| unanswered(&error))?;
    if status.is_success() {
        return Ok(view);
    }
    Err(refused(status, &view))
}

/// The cause that the others were made from.
fn deepest(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), deepest)
}

fn refused(status: StatusCode, problem: &Value) -> Failure {
    let fields =
        list(&problem["errors"]).map(|error| format!("{}: {}", text(&error["pointer"]), text(&error["message"])));
    let fields: Vec<String> = fields.collect();
    Failure {
        code: if status.is_client_error() { REFUSED } else { 1 },
        what: text(&problem["title"]).to_owned(),
        why: if fields.is_empty() {
            text(&problem["detail"]).to_owned()
        } else {
            fields.join("; ")
        },
        hint: match text(&problem["code"]) {
            "unauthenticated" => {
                "set ADMIN_TOKEN or --token-file to one of the tokens that the service's ADMIN_TOKENS names"
            }
            "forbidden" => "use a token of somebody with that role",
            "invalid-request" => "correct that value; --help says what it may be",
            "flag-changed" => {
                "`logistics-svc flag show` says what it is now; give its version if that is what you want to change"
            }
            "rollout-runs" => "`logistics-svc flag rollouts` shows it; setting the flag ends it",
            "flag-unavailable" => "repair what the line above names, or set another value",
            _ => "again in a moment; /health/ready of the service says what is away",
        },
    }
}

fn token(common: &Common) -> Result<Option<String>, Failure> {
    let token = match &common.token_file {
        Some(file) => Some(std::fs::read_to_string(file).map_err(|error| Failure {
            code: REFUSED,
            what: format!("--token-file {} cannot be read", file.display()),
            why: error.to_string(),
            hint: "name a file that holds the token alone",
        })?),
        None => std::env::var("ADMIN_TOKEN").ok(),
    };
    Ok(token
        .map(|token| token.trim().to_owned())
        .filter(|token| !token.is_empty()))
}

fn flag(view: &Value) -> Vec<String> {
    let mut lines = vec![value(&view["flag"])];
    if let Some(set) = view["set_version"]
        .as_i64()
        .filter(|set| view["flag"]["version"] != *set)
    {
        lines.push(format!(
            "what you have set is version {set}; somebody else's has followed it, as above"
        ));
    }
    if !view["previous"].is_null() {
        lines.push(format!("before: {}", value(&view["previous"])));
    }
    for instance in list(&view["instances"]) {
        let unable = match instance["unable"].as_str() {
            Some(unable) => format!(", leaves all to the outbox: {unable}"),
            None => String::new(),
        };
        lines.push(format!(
            "{} runs version {}{unable}",
            text(&instance["address"]),
            instance["version"]
        ));
    }
    if view["in_force"] != true {
        lines.push("not every instance runs it yet".to_owned());
    }
    if !view["rollout"].is_null() {
        lines.push(rollout(&view["rollout"]));
    }
    lines
}

fn value(value: &Value) -> String {
    let rest = match value["percent"].as_f64() {
        Some(percent) if percent < 100.0 => {
            format!(" for {percent} % of orders, {} for the rest", text(&value["rest"]))
        }
        _ => String::new(),
    };
    let set = match (value["set_at"].as_str(), value["set_by"].as_str()) {
        (Some(at), Some(by)) => format!(", since {at} by {by}: {}", text(&value["reason"])),
        _ => ", never set".to_owned(),
    };
    format!("version {}: {}{rest}{set}", value["version"], text(&value["mode"]))
}

fn rollout(rollout: &Value) -> String {
    let because = match rollout["ended_because"].as_str() {
        Some(because) => format!(": {because}"),
        None => String::new(),
    };
    format!(
        "roll-out {} of {}, {} for the rest, by {} ({}): {}, step {} of {} {}{because}",
        rollout["id"],
        text(&rollout["mode"]),
        text(&rollout["rest"]),
        text(&rollout["started_by"]),
        text(&rollout["reason"]),
        text(&rollout["state"]),
        rollout["step"],
        list(&rollout["steps"]).count(),
        rollout["steps"]
    )
}

fn shadow(view: &Value) -> Vec<String> {
    let mut lines = vec![format!(
        "{} events compared by {} rows, {} different, {} wait; {} rows said nothing, because other events had changed them too",
        view["compared"], view["rows_compared"], view["different"], view["waiting"], view["rows_overtaken"]
    )];
    for group in list(&view["groups"]) {
        lines.push(format!(
            "{}.{} by {}: {} times, last in order {} row {}: expected {}, found {}",
            text(&group["table"]),
            text(&group["column"]),
            text(&group["event_type"]),
            group["count"],
            text(&group["order_id"]),
            text(&group["row"]),
            text(&group["expected"]),
            text(&group["found"])
        ));
    }
    lines
}

fn say(lines: &[String]) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    for line in lines {
        // Reasons, names and rows were written by others.
        let line = line.replace(|character| !is_printable(character), "\u{fffd}");
        match writeln!(out, "{line}") {
            // Whoever read our output has read enough.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            written => written.map_err(|error| failed("the output could not be written", error.to_string()))?,
        }
    }
    Ok(())
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn failed(what: &str, why: String) -> Failure {
    Failure {
        code: 1,
        what: what.to_owned(),
        why,
        hint: "look at the line above",
    }
}
