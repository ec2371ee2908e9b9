use std::{error::Error, fmt::Write, io};

use serde::Deserialize;

/// How a command ended; the exit codes of the whole product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    Done,
    Failed,
    /// Usage or configuration error, or refused: nothing was done.
    Usage,
    /// The service or its database could not be reached: nothing was done.
    Unreachable,
    /// The output names what is left.
    InPart,
    /// A redrive gave up, because more died again than it allowed.
    Unmet,
    Interrupted,
    Terminated,
}

impl Ended {
    pub(super) fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Unreachable => 3,
            Self::InPart => 4,
            Self::Unmet => 99,
            Self::Interrupted => 130,
            Self::Terminated => 143,
        }
    }
}

#[derive(Debug)]
pub(super) enum Failure {
    /// Whoever read our output has read enough.
    ClosedPipe,
    Told(Box<Told>),
}

/// One line what failed, why, and what to try.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) ended: Ended,
    pub(super) what: String,
    pub(super) why: Vec<String>,
    pub(super) hint: String,
    /// The chain beneath, for `--verbose`.
    pub(super) causes: Vec<String>,
    /// Whether the same request may succeed later.
    pub(super) retryable: bool,
}

/// An error of the API (RFC 9457), as far as it is shown.
#[derive(Debug, Deserialize)]
pub(super) struct Problem {
    title: String,
    status: u16,
    code: String,
    #[serde(default)]
    detail: String,
    #[serde(default)]
    retryable: bool,
    #[serde(default)]
    request_id: Option<String>,
    #[serde(default)]
    errors: Vec<FieldError>,
}

#[derive(Debug, Deserialize)]
struct FieldError {
    pointer: String,
    message: String,
}

impl FieldError {
    fn told(&self) -> String {
        let Self { pointer, message } = self;
        match flag(pointer) {
            Some(flag) => format!("{flag} ({pointer}): {message}"),
            None if pointer.is_empty() => message.clone(),
            None => format!("{pointer}: {message}"),
        }
    }
}

impl Failure {
    pub(super) fn usage(what: impl Into<String>, why: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::told(Ended::Usage, what, why, hint)
    }

    pub(super) fn told(ended: Ended, what: impl Into<String>, why: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Told(Box::new(Told {
            ended,
            what: what.into(),
            why: vec![why.into()],
            hint: hint.into(),
            causes: Vec::new(),
            retryable: false,
        }))
    }

    /// What the service says. `changes`: the request was to change something.
    pub(super) fn refused(problem: Problem, changes: bool) -> Self {
        let ended = match problem.status {
            400..=499 => Ended::Usage,
            // Refused before any work.
            503 if problem.code == "overloaded" || !changes => Ended::Unreachable,
            _ => Ended::Failed,
        };
        let hint = match problem.code.as_str() {
            "unauthenticated" => {
                "set ADMIN_TOKEN or --token-file to one of the tokens that the service's ADMIN_TOKENS names"
            }
            "forbidden" => "use a token of somebody with that role",
            "malformed-request" | "invalid-request" => "correct that value; --help says what it may be",
            "dead-letter-not-found" => "`commerce-consumer dead-letters list` shows which there are",
            "dead-letter-not-open" => "`commerce-consumer dead-letters show` says what became of it",
            "key-not-waiting" => {
                "`commerce-consumer held-keys list --state waiting` shows which keys wait, and since when"
            }
            "redrive-not-found" => "`commerce-consumer redrives list` shows which there are",
            "not-found" => "look at --url: does commerce-consumer answer there, in this version?",
            _ if ended == Ended::Failed && changes => MAY_BE_DONE,
            "overloaded" | "unavailable" | "timeout" => {
                "again in a moment; /health/ready of the service says what is away"
            }
            _ => "the log of the service has more, under the request's id",
        };
        let mut why: Vec<String> = problem.errors.iter().map(FieldError::told).collect();
        // The detail of a field repeats what the field says.
        if !problem
            .errors
            .iter()
            .any(|error| problem.detail.contains(&error.message))
        {
            why.insert(0, problem.detail);
        }
        let mut causes = vec![format!("HTTP {}, code {}", problem.status, problem.code)];
        causes.extend(problem.request_id.map(|id| format!("request id {id}")));
        Self::Told(Box::new(Told {
            ended,
            what: problem.title,
            why,
            hint: hint.to_owned(),
            causes,
            retryable: problem.retryable,
        }))
    }

    pub(super) fn is_retryable(&self) -> bool {
        matches!(self, Self::Told(told) if told.retryable)
    }

    /// Says it on standard error.
    pub(super) fn tell(&self, verbose: bool) -> Ended {
        let Self::Told(told) = self else {
            return Ended::Done;
        };
        let mut text = format!("error: {}\n", told.what);
        for why in &told.why {
            writeln!(text, "  why: {why}").ok();
        }
        if verbose {
            for cause in &told.causes {
                writeln!(text, "  beneath: {cause}").ok();
            }
        }
        writeln!(text, "  try: {}", told.hint).ok();
        super::screen::say(&text);
        told.ended
    }
}

pub(super) const MAY_BE_DONE: &str =
    "it may have been done all the same: look at `commerce-consumer actions list` before you repeat it";

/// The option whose value a JSON Pointer of the API names.
fn flag(pointer: &str) -> Option<String> {
    let name = pointer.strip_prefix("#query/").or_else(|| pointer.strip_prefix('/'))?;
    let plain = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    // Ids are not an option.
    (plain && name != "ids").then(|| format!("--{}", name.replace('_', "-")))
}

/// What is beneath an error, one line each.
pub(super) fn causes(error: &dyn Error) -> Vec<String> {
    let mut causes = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        causes.push(error.to_string());
        next = error.source();
    }
    causes
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Self::ClosedPipe;
        }
        Self::told(
            Ended::Failed,
            "the output could not be written",
            error.to_string(),
            "look where standard output goes",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::flag;

    #[test]
    fn a_pointer_is_told_as_the_option_that_a_person_typed() {
        assert_eq!(flag("#query/error_type").as_deref(), Some("--error-type"));
        assert_eq!(flag("/abort_percent").as_deref(), Some("--abort-percent"));
        for none in ["", "/ids", "/payload/lines/0", "#header/Idempotency-Key"] {
            assert_eq!(flag(none), None, "{none:?}");
        }
    }
}
