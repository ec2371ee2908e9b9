use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use clap::{ArgGroup, Args};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, value::RawValue};
use uuid::Uuid;

use crate::cli::{
    Desk, EXIT_CODES,
    consent::Consent,
    failure::{Ended, Failure},
    screen::{difference, indented, pretty, text},
};

#[derive(Debug, Args)]
#[command(before_help = "\
Examples:
  EDITOR=nano commerce-consumer dead-letters edit 01a20369-a68f-767c-a83a-078a525f0194 --reason '12 were packed'
  commerce-consumer dead-letters edit 01a20369-a68f-767c-a83a-078a525f0194 --payload-file payload.json --reason '12 were packed'",
    after_help = EXIT_CODES, group = ArgGroup::new("whole").args(["envelope_file"]).conflicts_with("fields"),
    group = ArgGroup::new("fields").args(["event_type", "version", "payload_file"]).multiple(true))]
pub struct Edit {
    id: Uuid,
    /// Another type for the event.
    #[arg(long = "type", value_name = "EVENT_TYPE")]
    event_type: Option<String>,
    /// Another version of its payload.
    #[arg(long)]
    version: Option<i32>,
    /// File with the payload that takes the place of the present one.
    #[arg(long, value_name = "FILE")]
    payload_file: Option<PathBuf>,
    /// File with a whole event, for a record that is none.
    #[arg(long, value_name = "FILE")]
    envelope_file: Option<PathBuf>,
    /// Kept with the action.
    #[arg(long)]
    reason: String,
    #[command(flatten)]
    consent: Consent,
}

/// What the API is asked. The payload goes as it was typed, number for number.
#[derive(Debug, Serialize)]
struct Change<'a> {
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    event_type: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    envelope: Option<Map<String, Value>>,
    reason: &'a str,
    dry_run: bool,
}

/// Of a record that is an event, what a person edits.
#[derive(Deserialize)]
struct Event {
    payload: Box<RawValue>,
}

/// Without a file or a field, $VISUAL or $EDITOR is opened on the payload.
pub(super) async fn run(desk: &Desk, asked: &Edit) -> Result<Ended, Failure> {
    let mut change = Change {
        event_type: asked.event_type.as_deref(),
        version: asked.version,
        payload: asked.payload_file.as_deref().map(payload).transpose()?,
        envelope: asked.envelope_file.as_deref().map(envelope).transpose()?,
        reason: &asked.reason,
        dry_run: true,
    };
    let by_hand = change.event_type.is_none()
        && change.version.is_none()
        && change.payload.is_none()
        && change.envelope.is_none();
    if !by_hand {
        return change_it(desk, asked, change).await;
    }
    let letter = desk
        .client
        .get(&["admin", "dead-letters", &asked.id.to_string()], &[])
        .await?;
    let record = letter["record_value"].as_str().unwrap_or_default();
    let event = serde_json::from_str::<Event>(record).ok();
    let present = event.as_ref().map_or(record, |event| event.payload.get());
    let present = pretty(present).unwrap_or_else(|| present.to_owned());
    let draft = edit_by_hand(asked.id, &present)?;
    if fs::read_to_string(&draft)?.trim() == present.trim() {
        fs::remove_file(&draft)?;
        desk.screen.note("nothing was changed");
        return Ok(Ended::Done);
    }
    let written = match event {
        Some(_) => payload(&draft).map(|payload| change.payload = Some(payload)),
        None => envelope(&draft).map(|envelope| change.envelope = Some(envelope)),
    };
    let ended = match written {
        Ok(()) => change_it(desk, asked, change).await,
        Err(failure) => Err(failure),
    };
    // What a person wrote is theirs until it is in force.
    if ended.is_ok() && !asked.consent.dry_run {
        fs::remove_file(draft)?;
    } else {
        desk.screen.note(&format!("what you wrote is in {}", draft.display()));
    }
    ended
}

async fn change_it(desk: &Desk, asked: &Edit, mut change: Change<'_>) -> Result<Ended, Failure> {
    let id = asked.id.to_string();
    let path = ["admin", "dead-letters", &id, "edit"];
    let shown = desk.client.post(&path, &change, false).await?;
    let lines = |side: &str| {
        let text = shown[side].as_str().unwrap_or_default();
        pretty(text).unwrap_or_else(|| text.to_owned())
    };
    let target = format!(
        "dead letter {id} is resolved, and an event with a new id takes its place:\n{}",
        indented(&difference(&lines("before"), &lines("after"))).trim_end()
    );
    if asked.consent.dry_run {
        desk.screen
            .result(&shown, |_| format!("{target}\nnothing was changed"))?;
        return Ok(Ended::Done);
    }
    asked.consent.ask(desk, &target, 1)?;
    change.dry_run = false;
    let edited = desk.client.post(&path, &change, true).await?;
    desk.screen.result(&edited, |edited| text(&edited["id"]))?;
    desk.screen.note(&format!(
        "it is an open dead letter of its own; next: commerce-consumer dead-letters redrive {} --reason WHY",
        text(&edited["id"])
    ));
    Ok(Ended::Done)
}

fn payload(file: &Path) -> Result<Box<RawValue>, Failure> {
    parsed(file)
}

/// Without its id: it gets a new one.
fn envelope(file: &Path) -> Result<Map<String, Value>, Failure> {
    let mut envelope: Map<String, Value> = parsed(file)?;
    envelope.remove("id");
    Ok(envelope)
}

fn parsed<T: for<'de> Deserialize<'de>>(file: &Path) -> Result<T, Failure> {
    let wrong = |why: String| {
        Failure::usage(
            format!("{} cannot be used", file.display()),
            why,
            "correct it, and name it with --payload-file or --envelope-file",
        )
    };
    let text = fs::read_to_string(file).map_err(|error| wrong(error.to_string()))?;
    serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))
}

/// Opens a file of its own in the person's editor, and waits for its end.
fn edit_by_hand(id: Uuid, present: &str) -> Result<PathBuf, Failure> {
    let file = std::env::temp_dir().join(format!("dead-letter-{id}-{}.json", Uuid::now_v7().simple()));
    // A payload is nobody else's business.
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&file)?
        .write_all(format!("{}\n", present.trim_end()).as_bytes())?;
    let editor = ["VISUAL", "EDITOR"]
        .into_iter()
        .find_map(|name| std::env::var(name).ok().filter(|editor| !editor.trim().is_empty()))
        .unwrap_or_else(|| "vi".to_owned());
    // Through the shell, because an editor may come with options.
    let status = Command::new("sh")
        .args(["-c", &format!("{editor} \"$1\""), "sh"])
        .arg(&file)
        .status()?;
    if !status.success() {
        fs::remove_file(&file)?;
        return Err(Failure::usage(
            "nothing was changed",
            format!("the editor {editor:?} ended with {status}"),
            "set EDITOR, or name a file with --payload-file",
        ));
    }
    Ok(file)
}
