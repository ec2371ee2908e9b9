//! Child processes: started in their own process group with a log file, identified so that a reused process id is
//! never signalled, stopped within a deadline, and (for tests) never outliving their parent.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

const POLL: Duration = Duration::from_millis(20);

/// A process that is told apart from a later one with the same number by the time it started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    pub pid: i32,
    started: String,
}

impl ProcessIdentity {
    /// `None` when there is no such process, or only its unreaped remains.
    pub fn of(pid: i32) -> Option<Self> {
        let started = start_time(pid)?;
        Some(Self { pid, started })
    }

    pub fn of_self() -> Option<Self> {
        Self::of(i32::try_from(std::process::id()).ok()?)
    }

    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }

    /// Signals the process if it is still the same one. A process that ended in between is no error.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        if !self.is_alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("send {signal} to process {}", self.pid)),
        }
    }

    /// Sends `signal`, waits up to `deadline`, then SIGKILL. For processes that are not our children.
    pub async fn stop(&self, signal: Signal, deadline: Duration) -> anyhow::Result<Stop> {
        self.signal(signal)?;
        if self.gone_within(deadline).await {
            return Ok(Stop::Clean);
        }
        self.signal(Signal::SIGKILL)?;
        if self.gone_within(Duration::from_secs(10)).await {
            return Ok(Stop::Killed);
        }
        bail!("process {} is still there after SIGKILL", self.pid)
    }

    async fn gone_within(&self, deadline: Duration) -> bool {
        let end = Instant::now() + deadline;
        while self.is_alive() {
            if Instant::now() >= end {
                return false;
            }
            tokio::time::sleep(POLL).await;
        }
        true
    }
}

/// Field 22 of `/proc/<pid>/stat`: clock ticks between boot and the start of the process.
#[cfg(target_os = "linux")]
fn start_time(pid: i32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in field 2 may hold spaces and parentheses, so count from the last one.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18).map(str::to_owned)
}

#[cfg(not(target_os = "linux"))]
fn start_time(pid: i32) -> Option<String> {
    let output = Command::new("ps")
        .args(["-o", "state=,lstart=", "-p", &pid.to_string()])
        .output()
        .ok()?;
    let line = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let (state, started) = line.split_once(char::is_whitespace)?;
    (!state.starts_with('Z')).then(|| started.trim().to_owned())
}

/// What happens to a child when this process is killed. (A child whose handle is dropped is killed in either case.)
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lifetime {
    /// It goes on; this file says which process it is, for `./dev down` to find.
    Recorded(PathBuf),
    /// It is killed as well.
    Bound,
}

/// How a process ended that was asked to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// By itself, within the deadline.
    Clean,
    /// It had to be killed.
    Killed,
}

/// A running child with its log file.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    identity: ProcessIdentity,
    log: PathBuf,
    leash: Leash,
}

#[derive(Debug)]
enum Leash {
    Record(PathBuf),
    Watchdog(Watchdog),
    /// Reaped: nothing is left of it.
    Ended,
}

impl Process {
    /// Starts `command` in a process group of its own (a Ctrl-C at the terminal reaches only us, who stop it in
    /// order), without standard input, its output appended to `log`.
    pub fn spawn(name: &str, mut command: Command, log: &Path, lifetime: Lifetime) -> anyhow::Result<Self> {
        let output = open_log(log)?;
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("duplicate the log handle")?)
            .stderr(output)
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {name} ({program})"))?;
        let pid = child.id().cast_signed();
        // A child that has already ended is reported by `exited`, with its log.
        let identity = ProcessIdentity::of(pid).unwrap_or(ProcessIdentity {
            pid,
            started: String::new(),
        });
        let leash = match Leash::attach(&identity, lifetime) {
            Ok(leash) => leash,
            Err(error) => {
                child.kill().context("kill a child that cannot be held")?;
                return Err(error);
            }
        };
        Ok(Self {
            name: name.to_owned(),
            child,
            identity,
            log: log.to_owned(),
            leash,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn identity(&self) -> &ProcessIdentity {
        &self.identity
    }

    pub fn log(&self) -> &Path {
        &self.log
    }

    pub fn exited(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("wait for {}", self.name))
    }

    /// The exit status, waited for without limit; bound it from outside.
    pub async fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        loop {
            if let Some(status) = self.exited()? {
                return Ok(status);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Errors when it has already ended and was reaped: its number may belong to somebody else.
    pub fn signal(&mut self, signal: Signal) -> anyhow::Result<()> {
        if let Some(status) = self.exited()? {
            bail!("{} has already ended: {status}", self.name);
        }
        kill(Pid::from_raw(self.identity.pid), signal).with_context(|| format!("send {signal} to {}", self.name))
    }

    /// Sends `signal`, waits up to `deadline`, then kills. One that has already ended counts as clean.
    pub async fn stop(&mut self, signal: Signal, deadline: Duration) -> anyhow::Result<Stop> {
        let mut stop = Stop::Clean;
        if self.exited()?.is_none() {
            self.signal(signal)?;
            match tokio::time::timeout(deadline, self.wait()).await {
                Ok(status) => drop(status?),
                Err(_) => stop = Stop::Killed,
            }
        }
        self.kill()?;
        Ok(stop)
    }

    /// SIGKILL to the whole group, and reaps the child. Harmless when it has already ended.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        if self.exited()?.is_none() {
            match killpg(Pid::from_raw(self.identity.pid), Signal::SIGKILL) {
                Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                Err(error) => return Err(error).with_context(|| format!("kill {}", self.name)),
            }
            self.child.wait().with_context(|| format!("wait for {}", self.name))?;
        }
        std::mem::replace(&mut self.leash, Leash::Ended).detach()
    }

    /// The last lines of the log.
    pub fn log_tail(&self, lines: usize) -> String {
        log_tail(&self.log, lines)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Nobody is left to tell; the watchdog or `./dev down` kills what this could not.
        self.kill().ok();
    }
}

impl Leash {
    fn attach(identity: &ProcessIdentity, lifetime: Lifetime) -> anyhow::Result<Self> {
        match lifetime {
            Lifetime::Recorded(path) => {
                let record = serde_json::to_vec(identity).context("encode the process record")?;
                fs::write(&path, record).with_context(|| format!("write {}", path.display()))?;
                Ok(Self::Record(path))
            }
            Lifetime::Bound => Ok(Self::Watchdog(
                Watchdog::over(identity.pid).context("start the watchdog")?,
            )),
        }
    }

    fn detach(self) -> anyhow::Result<()> {
        match self {
            Self::Record(path) => match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(error).with_context(|| format!("remove {}", path.display()))
                }
                _ => Ok(()),
            },
            Self::Watchdog(watchdog) => {
                watchdog.dismiss();
                Ok(())
            }
            Self::Ended => Ok(()),
        }
    }
}

/// A shell that waits on a pipe whose other end we hold. When we end, however we end, the pipe closes and it kills the
/// child's process group. PR_SET_PDEATHSIG is not used: it fires when the *thread* that spawned the child ends, and
/// test threads and runtime workers come and go.
#[derive(Debug)]
struct Watchdog {
    shell: Child,
    pipe: ChildStdin,
}

impl Watchdog {
    fn over(group: i32) -> io::Result<Self> {
        // No `--` before the number: dash's own kill takes it for a process.
        let mut shell = Command::new("/bin/sh")
            .args(["-c", "read -r dismissed || kill -KILL \"-$1\"", "watchdog"])
            .arg(group.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        let pipe = shell
            .stdin
            .take()
            .ok_or_else(|| io::Error::other("no pipe to the watchdog"))?;
        Ok(Self { shell, pipe })
    }

    /// Lets the watchdog end without a kill, after the child was reaped.
    fn dismiss(mut self) {
        // A watchdog that somebody else killed leaves nothing to do.
        self.pipe.write_all(b"dismissed\n").ok();
        drop(self.pipe);
        self.shell.wait().ok();
    }
}

/// Runs `command` to its end with its output in `log`; an error carries the end of the log. Killed when the future is
/// dropped.
pub async fn run(name: &str, command: Command, log: &Path, deadline: Duration) -> anyhow::Result<()> {
    let mut process = Process::spawn(name, command, log, Lifetime::Bound)?;
    let status = tokio::time::timeout(deadline, process.wait()).await.with_context(|| {
        format!(
            "{name} did not end within {} s; log: {}",
            deadline.as_secs(),
            log.display()
        )
    })??;
    if !status.success() {
        bail!(
            "{name} failed ({status}); end of {}:\n{}",
            log.display(),
            process.log_tail(20)
        );
    }
    process.kill()
}

fn open_log(log: &Path) -> anyhow::Result<File> {
    if let Some(dir) = log.parent() {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("open the log {}", log.display()))
}

/// The last lines of a log file that may be large.
pub fn log_tail(log: &Path, lines: usize) -> String {
    const WINDOW: u64 = 64 * 1024;
    let read = || -> io::Result<String> {
        let mut file = File::open(log)?;
        let start = file.metadata()?.len().saturating_sub(WINDOW);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes);
        let mut last: Vec<&str> = text.lines().rev().take(lines).collect();
        last.reverse();
        Ok(last.join("\n"))
    };
    read().unwrap_or_else(|error| format!("(no log: {error})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    #[tokio::test]
    async fn a_process_that_ignores_the_signal_is_killed_after_the_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let script = "trap '' TERM; echo ready; while :; do sleep 0.05; done";
        let mut process = Process::spawn("stubborn", shell(script), &log, Lifetime::Bound).unwrap();
        let identity = process.identity().clone();
        while !process.log_tail(1).contains("ready") {
            tokio::time::sleep(POLL).await;
        }
        let stop = process.stop(Signal::SIGTERM, Duration::from_millis(200)).await.unwrap();
        assert_eq!(stop, Stop::Killed);
        assert!(!identity.is_alive());
    }

    #[tokio::test]
    async fn a_record_exists_exactly_while_the_process_may_run() {
        let dir = tempfile::tempdir().unwrap();
        let record = dir.path().join("record");
        let lifetime = Lifetime::Recorded(record.clone());
        let process = Process::spawn("sleeper", shell("sleep 60"), &dir.path().join("log"), lifetime).unwrap();
        let recorded: ProcessIdentity = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
        assert_eq!(&recorded, process.identity());
        assert!(recorded.is_alive());
        drop(process);
        assert!(!record.exists());
        assert!(!recorded.is_alive());
    }

    #[tokio::test]
    async fn a_watchdog_kills_the_group_when_its_pipe_closes() {
        let dir = tempfile::tempdir().unwrap();
        let lifetime = Lifetime::Recorded(dir.path().join("record"));
        let mut process = Process::spawn("sleeper", shell("sleep 60"), &dir.path().join("log"), lifetime).unwrap();
        let watchdog = Watchdog::over(process.identity().pid).unwrap();
        // What the kernel does when we are killed.
        drop(watchdog.pipe);
        let status = tokio::time::timeout(Duration::from_secs(10), process.wait())
            .await
            .unwrap()
            .unwrap();
        assert!(!status.success());
        let mut shell = watchdog.shell;
        shell.wait().unwrap();
    }

    #[tokio::test]
    async fn a_failed_run_shows_the_end_of_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let command = shell("echo the reason; exit 7");
        let error = run("job", command, &dir.path().join("log"), Duration::from_secs(10))
            .await
            .unwrap_err();
        assert!(error.to_string().contains("the reason"), "{error}");
    }

    #[test]
    fn another_process_with_the_same_number_is_not_taken_for_it() {
        let mut identity = ProcessIdentity::of_self().unwrap();
        assert!(identity.is_alive());
        identity.started.push('0');
        assert!(!identity.is_alive());
    }
}
