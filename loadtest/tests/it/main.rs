//! The built program against real servers. A test asserts the accounting and what a caller sees, never a time.

use std::{
    path::Path,
    process::{Command, Output},
};

use anyhow::Context;
use serde_json::Value;

mod complete;
mod drain;
mod latency;
mod usage;

/// On the servers of the run; the result is read from its file.
fn loadtest(args: &[&str], output: &Path) -> anyhow::Result<(Output, Value)> {
    let run = Command::new(env!("CARGO_BIN_EXE_loadtest"))
        .args(args)
        .args(["--servers", "environment", "--partitions", "3", "--output"])
        .arg(output)
        .output()
        .context("run loadtest")?;
    let stderr = String::from_utf8_lossy(&run.stderr);
    let file = std::fs::read(output).with_context(|| format!("no result; {}\n{stderr}", run.status))?;
    Ok((run, serde_json::from_slice(&file)?))
}
