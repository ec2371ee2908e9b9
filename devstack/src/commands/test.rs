use std::fmt;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use devstack::cache;
use devstack::failure::{Exit, Failure};
use devstack::place::{Place, repository_root};
use devstack::prerequisites::{self, Tool};
use devstack::process::ProcessIdentity;
use devstack::progress::{Progress, seconds};
use devstack::servers::Servers;
use devstack::stack::{Stack, StackOptions};
use devstack::testing::{KAFKA_BROKERS, ROLE_PASSWORD, TEST_DATABASE_URL};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::{Signals, down};

const POLL: Duration = Duration::from_millis(50);
/// For the last lines after cargo's end.
const OUTPUT_DEADLINE: Duration = Duration::from_secs(10);

/// Of directories left by runs that were killed.
const NAME_PREFIX: &str = "test-";

/// Check format and lints, build, and run every test on fresh servers of its own.
#[derive(Debug, clap::Args)]
#[command(before_help = "\
Examples:
  ./dev test                              the whole suite at a size that fits CI
  ./dev test --full                       the same with the long fault runs
  ./dev test -- -p outbox restart         cargo test's own arguments: some tests of one crate
  ./dev test --full --release -- -p e2e g4_complete -- --nocapture
                                          with the services as they are deployed, for a test that prints times")]
pub(crate) struct TestArgs {
    /// Run the long fault tests at their full length (sets E2E_FULL=1).
    #[arg(long)]
    full: bool,
    /// Build and run in the release profile, as the services are deployed. Not for the whole suite: services that are deployed have
    /// no crash points, and the tests of those would be missing.
    #[arg(long)]
    release: bool,
    /// For `cargo test`, in place of `--workspace`; format and lints are not checked then.
    #[arg(last = true, value_name = "CARGO TEST ARGUMENTS")]
    cargo_args: Vec<String>,
}

pub(crate) async fn run(args: &TestArgs) -> anyhow::Result<Exit> {
    if args.release && args.cargo_args.is_empty() {
        return Err(Failure::new(
            Exit::Usage,
            "--release is not for the whole suite: services that are deployed have no crash points to test",
            "./dev test --release -- -p e2e g4_complete -- --nocapture",
        )
        .into());
    }
    let start = Instant::now();
    let mut signals = Signals::listen()?;
    let progress = Progress::on_stderr();
    let root = repository_root()?;
    remove_remains(&root)?;
    let place = Place::new(&root, &format!("{NAME_PREFIX}{}", std::process::id()))?;
    let mut stack = None;
    let mut record = Record::default();
    let outcome = tokio::select! {
        outcome = start_and_test(args, &place, &progress, &mut stack, &mut record) => outcome,
        exit = signals.next() => Ok(Outcome::Stopped(exit)),
    };
    if let Some(stack) = stack {
        tokio::select! {
            stopped = stack.stop(&progress) => stopped?,
            // The stack is dropped with its future, and kills what still runs.
            _ = signals.next() => progress.note("killed everything at once"),
        }
    }
    match outcome {
        Ok(outcome) => {
            down::purge(&place)?;
            let (line, exit) = outcome.report();
            let text = format!("\n{record}./dev test: {line} in {}\n", seconds(start.elapsed()));
            io::stdout().write_all(text.as_bytes())?;
            Ok(exit)
        }
        // The servers' logs may say why.
        Err(error) => Err(error.context(format!("./dev test failed after {}", seconds(start.elapsed())))),
    }
}

/// What the closing lines say of the steps that ended.
#[derive(Default)]
struct Record {
    /// The `test result:` lines of `cargo test`, one for each binary that held a test.
    results: Vec<String>,
    took: Vec<(&'static str, Duration)>,
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for result in &self.results {
            writeln!(f, "{result}")?;
        }
        let took: Vec<String> = self
            .took
            .iter()
            .map(|(step, took)| format!("{step} {}", seconds(*took)))
            .collect();
        if took.is_empty() {
            return Ok(());
        }
        writeln!(f, "{}", took.join(", "))
    }
}

enum Outcome {
    Passed,
    /// The first step that failed; its code is passed on.
    Failed {
        step: &'static str,
        status: ExitStatus,
    },
    Stopped(Exit),
}

impl Outcome {
    fn report(&self) -> (String, Exit) {
        match self {
            Self::Passed => ("everything passed".to_owned(), Exit::Done),
            Self::Failed { step, status } => {
                let code = status.code().and_then(|code| u8::try_from(code).ok());
                (format!("{step} failed ({status})"), Exit::Passed(code.unwrap_or(1)))
            }
            Self::Stopped(exit) => ("stopped".to_owned(), *exit),
        }
    }
}

async fn start_and_test(
    args: &TestArgs,
    place: &Place,
    progress: &Progress,
    slot: &mut Option<Stack>,
    record: &mut Record,
) -> anyhow::Result<Outcome> {
    let start = Instant::now();
    place.create()?;
    let lock = place
        .try_lock()?
        .context("another process took the directory of this run")?;
    let log = place.log("prepare");
    prerequisites::ensure(&[Tool::FOR_BUILD.as_slice(), &Tool::FOR_KAFKA].concat(), &log, progress).await?;
    let servers = Servers::ensure(&log, progress).await?;
    let options = StackOptions {
        for_tests: true,
        ..StackOptions::default()
    };
    let stack = slot.insert(Stack::open(place.clone(), lock, options)?);
    stack.start_servers(Some(&servers), progress).await?;
    record.took.push(("servers", start.elapsed()));

    let mut environment = vec![
        (TEST_DATABASE_URL, stack.state().maintenance_url()?),
        (ROLE_PASSWORD, stack.state().role_password.clone()),
        (KAFKA_BROKERS, stack.state().brokers()),
        ("DEVSTACK_CACHE", cache::dir()?.display().to_string()),
    ];
    if args.full {
        environment.push(("E2E_FULL", "1".to_owned()));
    }
    for step in steps(args) {
        progress.note(&format!("── cargo {}", step.join(" ")));
        let start = Instant::now();
        let status = cargo(place.root(), &step, &environment, &mut record.results).await?;
        let step = name_of(&step);
        record.took.push((step, start.elapsed()));
        if !status.success() {
            return Ok(Outcome::Failed { step, status });
        }
    }
    Ok(Outcome::Passed)
}

fn steps(args: &TestArgs) -> Vec<Vec<&str>> {
    let profile = args.release.then_some("--release");
    let mut build = vec!["build", "--workspace", "--bins"];
    build.extend(profile);
    if !args.cargo_args.is_empty() {
        let mut test = vec!["test"];
        test.extend(profile);
        test.extend(args.cargo_args.iter().map(String::as_str));
        return vec![build, test];
    }
    vec![
        vec!["fmt", "--all", "--check"],
        vec!["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"],
        // The end-to-end tests run the real binaries.
        build,
        vec!["test", "--workspace"],
    ]
}

fn name_of(step: &[&str]) -> &'static str {
    match step.first() {
        Some(&"fmt") => "cargo fmt",
        Some(&"clippy") => "cargo clippy",
        Some(&"build") => "cargo build",
        _ => "cargo test",
    }
}

/// Runs with our standard output and error, and keeps the `test result:` lines. The whole process group is killed when
/// the future is dropped.
async fn cargo(
    root: &Path,
    args: &[&str],
    environment: &[(&str, String)],
    results: &mut Vec<String>,
) -> anyhow::Result<ExitStatus> {
    let mut child = Command::new("cargo")
        .current_dir(root)
        .args(args)
        .envs(environment.iter().map(|(name, value)| (*name, value)))
        // The tests know nothing of a database that belongs to the caller.
        .env_remove("DATABASE_URL")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .context("start cargo")?;
    let output = child.stdout.take().context("no pipe from cargo")?;
    let mut cargo = Cargo(child);
    let copy = std::thread::spawn(move || copy_output(output));
    let status = loop {
        if let Some(status) = cargo.0.try_wait().context("wait for cargo")? {
            break status;
        }
        tokio::time::sleep(POLL).await;
    };
    let copied = tokio::time::timeout(OUTPUT_DEADLINE, ended(copy))
        .await
        .context("something that cargo started outlives it and holds its output")?;
    results.extend(copied.context("copy cargo's output")?);
    Ok(status)
}

/// Returns the `test result:` lines of binaries that held a test.
fn copy_output(output: ChildStdout) -> io::Result<Vec<String>> {
    let mut results = Vec::new();
    let mut output = BufReader::new(output);
    let mut line = Vec::new();
    while output.read_until(b'\n', &mut line)? > 0 {
        io::stdout().write_all(&line)?;
        let text = String::from_utf8_lossy(&line);
        if text.starts_with("test result:") && !text.contains(" 0 passed; 0 failed;") {
            results.push(text.trim_end().to_owned());
        }
        line.clear();
    }
    Ok(results)
}

async fn ended<T>(thread: JoinHandle<io::Result<T>>) -> io::Result<T> {
    while !thread.is_finished() {
        tokio::time::sleep(POLL).await;
    }
    let panicked = |_| Err(io::Error::other("the thread panicked"));
    thread.join().unwrap_or_else(panicked)
}

struct Cargo(Child);

impl Drop for Cargo {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            // An error means that it has ended in between.
            killpg(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGKILL).ok();
            self.0.wait().ok();
        }
    }
}

/// Directories of runs that were killed; their servers died with them.
fn remove_remains(root: &Path) -> anyhow::Result<()> {
    for place in Place::all(root)? {
        let Some(pid) = place.name().strip_prefix(NAME_PREFIX).and_then(|pid| pid.parse().ok()) else {
            continue;
        };
        if ProcessIdentity::of(pid).is_none() && place.try_lock()?.is_some() {
            down::purge(&place)?;
        }
    }
    Ok(())
}
