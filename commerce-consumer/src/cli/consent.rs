use std::io::{self, IsTerminal};

use clap::Args;

use super::{
    Desk,
    failure::{Ended, Failure},
    screen::{grouped, say},
};

/// Above it, the number itself must be typed.
const TYPED_ABOVE: i64 = 1_000;

#[derive(Debug, Clone, Args)]
pub(super) struct Consent {
    /// Show what would happen, and stop there.
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Do not ask. Needed where there is no terminal.
    #[arg(long, conflicts_with = "dry_run")]
    yes: bool,
}

impl Consent {
    /// Shows the target, and asks.
    ///
    /// # Errors
    /// Nobody said yes: nothing was done.
    pub(super) fn ask(&self, desk: &Desk, target: &str, count: i64) -> Result<(), Failure> {
        if self.yes {
            desk.screen.note(target);
            return Ok(());
        }
        if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
            return Err(Failure::usage(
                "nothing was changed",
                format!("{target}, and there is no terminal to ask on"),
                "the same with --yes, or with --dry-run to look first",
            ));
        }
        let expected = if count > TYPED_ABOVE {
            say(&format!("{target}\nType the number {} to go on: ", grouped(count)));
            vec![count.to_string(), grouped(count)]
        } else {
            say(&format!("{target}\nGo on? [y/N] "));
            vec!["y".to_owned(), "yes".to_owned()]
        };
        let mut answer = String::new();
        io::stdin().read_line(&mut answer)?;
        if expected.contains(&answer.trim().to_lowercase()) {
            return Ok(());
        }
        Err(Failure::told(
            Ended::Usage,
            "nothing was changed",
            "you did not say yes",
            "--dry-run shows what would happen without a question",
        ))
    }
}
