//! What a person is told when something fails: what failed, why, what to try, and the exit code that scripts see.

use std::fmt;

/// The exit codes of `./dev`, the same as every binary of the product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    Done,
    /// Failed while running.
    Failed,
    /// Usage or configuration error, nothing was done.
    Usage,
    /// A dependency is missing or could not be reached, nothing was done.
    Dependency,
    /// Stopped by SIGINT after a clean drain.
    Interrupted,
    /// Stopped by SIGTERM after a clean drain.
    Terminated,
    /// The code of a command that was run and failed.
    Passed(u8),
}

impl Exit {
    pub fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Dependency => 3,
            Self::Interrupted => 130,
            Self::Terminated => 143,
            Self::Passed(code) => code,
        }
    }
}

/// A failure with its advice. The cause is in the `anyhow` chain around it.
#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    /// One line: what failed and why.
    pub what: String,
    /// One line or a command: what to try.
    pub hint: String,
}

impl Failure {
    pub fn new(exit: Exit, what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            exit,
            what: what.into(),
            hint: hint.into(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Failure {}
