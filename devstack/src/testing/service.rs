use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::Signal;
use uuid::Uuid;

use super::report;
use crate::process::{Lifetime, Process};

/// A binary of the workspace as `cargo build --workspace` left it beside the running test.
pub fn binary(name: &str) -> anyhow::Result<PathBuf> {
    let test = std::env::current_exe().context("find the running test")?;
    // target/<profile>/deps/<test>
    let profile = test
        .parent()
        .and_then(Path::parent)
        .context("a test runs in target/<profile>/deps")?;
    let path = profile.join(name);
    if !path.is_file() {
        bail!(
            "{} is not built: run `./dev test`, or `cargo build --workspace`",
            path.display()
        );
    }
    Ok(path)
}

/// A service process under test. It dies with the test process, and when this value is dropped; when the test fails,
/// the end of its log is shown.
pub struct Service {
    process: Process,
}

impl Service {
    /// Starts `binary` with `args` and, on top of the test's own environment, `env`.
    pub fn spawn(binary: &Path, args: &[&str], env: &[(&str, &str)]) -> anyhow::Result<Self> {
        let name = binary
            .file_name()
            .context("the binary has a file name")?
            .to_string_lossy()
            .into_owned();
        let log = std::env::temp_dir().join(format!("{name}-{}.log", Uuid::now_v7().simple()));
        let mut command = Command::new(binary);
        command.args(args).envs(env.iter().copied());
        let process = Process::spawn(&name, command, &log, Lifetime::Bound)?;
        Ok(Self { process })
    }

    pub fn pid(&self) -> i32 {
        self.process.identity().pid
    }

    /// Everything it wrote so far.
    pub fn log(&self) -> anyhow::Result<String> {
        let bytes = std::fs::read(self.process.log()).context("read the service's log")?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// `None` while it runs.
    pub fn exited(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        self.process.exited()
    }

    /// Waits until a GET of `url` answers 200. Errors when the process ends or `deadline` passes, with the end of the
    /// log and the last answer.
    pub async fn wait_ready(&mut self, url: &str, deadline: Duration) -> anyhow::Result<()> {
        crate::health::wait_until_ready(&mut self.process, url, deadline).await
    }

    /// Waits for its end. Errors when `deadline` passes.
    pub async fn wait(&mut self, deadline: Duration) -> anyhow::Result<ExitStatus> {
        tokio::time::timeout(deadline, self.process.wait())
            .await
            .with_context(|| format!("{} did not end within {deadline:?}", self.process.name()))?
    }

    /// SIGTERM, then waits for its end. Errors when it did not drain within `deadline`; it is killed then.
    pub async fn terminate(&mut self, deadline: Duration) -> anyhow::Result<ExitStatus> {
        let start = Instant::now();
        self.process.signal(Signal::SIGTERM)?;
        match self.wait(deadline).await {
            Ok(status) => Ok(status),
            Err(error) => {
                self.process.kill()?;
                Err(error.context(format!("SIGTERM {:?} ago", start.elapsed())))
            }
        }
    }

    /// SIGKILL, and reaps it.
    pub fn kill9(&mut self) -> anyhow::Result<()> {
        self.process.kill()
    }

    pub fn sigstop(&mut self) -> anyhow::Result<()> {
        self.process.signal(Signal::SIGSTOP)
    }

    pub fn sigcont(&mut self) -> anyhow::Result<()> {
        self.process.signal(Signal::SIGCONT)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let ended = match self.process.exited() {
            Ok(None) => "ran until the test ended".to_owned(),
            Ok(Some(status)) => format!("had ended: {status}"),
            Err(error) => format!("{error:#}"),
        };
        if let Err(error) = self.process.kill() {
            report(&format!("could not kill {}: {error:#}", self.process.name()));
        }
        if std::thread::panicking() {
            report(&format!(
                "{} {ended}; end of its log {}:\n{}",
                self.process.name(),
                self.process.log().display(),
                self.process.log_tail(40)
            ));
        } else if let Err(error) = std::fs::remove_file(self.process.log()) {
            report(&format!("could not remove {}: {error}", self.process.log().display()));
        }
    }
}
