use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use devstack::{
    failure::{Exit, Failure},
    place::Place,
    process::{self, Lifetime, Process},
    progress::Progress,
};
use nix::{sys::signal::Signal, unistd::Uid};

const INSTALL_DEADLINE: Duration = Duration::from_secs(15 * 60);
const ENGINE_DEADLINE: Duration = Duration::from_secs(60);
const STOP_DEADLINE: Duration = Duration::from_secs(60);
/// One that cannot be reached is noticed sooner.
const PULL_DEADLINE: Duration = Duration::from_secs(10 * 60);
const POLL: Duration = Duration::from_millis(200);

/// Docker's command line, which reaches an engine. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Docker {
    /// For `DOCKER_HOST`, of an engine of the check's own.
    host: Option<String>,
    compose: &'static [&'static str],
    log: PathBuf,
    /// Images that were not there before.
    made: Arc<Mutex<Vec<String>>>,
}

/// A `dockerd` for the time of the check.
pub(crate) struct Engine {
    process: Process,
    /// Images and containers.
    data: PathBuf,
    /// Sockets and mounts; short, because a socket's path has at most 107 bytes.
    run: PathBuf,
}

impl Docker {
    /// Uses an engine that answers; otherwise starts one in `slot`, and installs what it needs, as far as the caller may.
    ///
    /// # Errors
    /// If there is no engine and none can be started.
    pub(crate) async fn find_or_start(
        place: &Place,
        slot: &mut Option<Engine>,
        progress: &Progress,
    ) -> anyhow::Result<Self> {
        let log = place.log("docker");
        let mut missing: Vec<&str> = Vec::new();
        if !answers("docker", &["--version"]) {
            missing.extend(["docker.io", "docker-cli"]);
        }
        if compose().is_none() {
            missing.push("docker-compose");
        }
        install(&missing, &log, progress).await?;
        let mut docker = Self {
            host: None,
            compose: compose().ok_or_else(|| absent("Docker Compose is missing"))?,
            log,
            made: Arc::default(),
        };
        if docker.quiet(&["version"]).await? {
            progress.note("✓ a Docker engine answers");
            return Ok(docker);
        }
        let step = progress.step("starting a Docker engine");
        if !answers("dockerd", &["--version"]) || !answers("iptables", &["--version"]) {
            install(&["docker.io", "iptables"], &docker.log, progress).await?;
        }
        let engine = slot.insert(Engine::spawn(&place.dir().join("docker"), &docker.log)?);
        docker.host = Some(engine.host());
        let end = Instant::now() + ENGINE_DEADLINE;
        while !docker.quiet(&["version"]).await? {
            if Instant::now() > end || engine.process.exited()?.is_some() {
                return Err(Failure::new(
                    Exit::Dependency,
                    format!("the Docker engine did not start:\n{}", engine.process.log_tail(10)),
                    "start one yourself, and set DOCKER_HOST if it is not in the usual place",
                )
                .into());
            }
            tokio::time::sleep(POLL).await;
        }
        step.done("a Docker engine of the check's own");
        Ok(docker)
    }

    pub(crate) fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new("docker");
        command.args(args).envs(self.environment());
        command
    }

    /// Of an engine of the check's own.
    pub(crate) fn host(&self) -> Option<&str> {
        self.host.as_deref()
    }

    /// `docker compose` or `docker-compose`, whichever there is.
    pub(crate) fn compose(&self) -> Command {
        let mut command = Command::new(self.compose[0]);
        command.args(&self.compose[1..]).envs(self.environment());
        command
    }

    /// Version 1 cannot wait for health by itself.
    pub(crate) fn compose_waits(&self) -> bool {
        self.compose.len() > 1
    }

    fn environment(&self) -> impl Iterator<Item = (&str, &str)> {
        let host = self.host.iter().map(|host| ("DOCKER_HOST", host.as_str()));
        host.chain([("COMPOSE_HTTP_TIMEOUT", "300")])
    }

    /// Whether the command succeeds.
    pub(crate) async fn quiet(&self, args: &[&str]) -> anyhow::Result<bool> {
        Ok(output(self.command(args)).await?.status.success())
    }

    /// Its standard output, without the last line end.
    ///
    /// # Errors
    /// If the command fails, with what it said.
    pub(crate) async fn ask(&self, args: &[&str]) -> anyhow::Result<String> {
        said(&format!("docker {}", args.join(" ")), output(self.command(args)).await?)
    }

    /// Runs to its end, with the output in the log.
    ///
    /// # Errors
    /// If the command fails, with the end of the log.
    pub(crate) async fn run(&self, what: &str, command: Command, deadline: Duration) -> anyhow::Result<()> {
        process::run(what, command, &self.log, deadline).await
    }

    /// Whether the image is there, or can be pulled.
    pub(crate) async fn has_or_pulls(&self, image: &str) -> anyhow::Result<bool> {
        if self.quiet(&["image", "inspect", image]).await? {
            return Ok(true);
        }
        let pull = self.run("docker pull", self.command(&["pull", image]), PULL_DEADLINE);
        Ok(pull.await.is_ok())
    }

    /// To be removed at the end.
    pub(crate) fn has_made(&self, image: &str) {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.push(image.to_owned());
    }

    /// Runs `promtool test rules` on the alert rules of a directory.
    ///
    /// # Errors
    /// If an alert does not fire, or fires when it should not.
    pub(crate) async fn test_rules(&self, image: &str, rules: &Path) -> anyhow::Result<()> {
        let mount = format!("{}:/rules:ro", rules.display());
        let promtool = [
            "run",
            "--rm",
            "--network=none",
            "--entrypoint=promtool",
            "--volume",
            &mount,
            image,
        ];
        let mut test = self.command(&promtool);
        test.args(["test", "rules", "/rules/alerts_test.yml"]);
        self.run("promtool test rules", test, PULL_DEADLINE).await
    }

    /// Bytes of an image.
    pub(crate) async fn size(&self, image: &str) -> anyhow::Result<u64> {
        let size = self.ask(&["image", "inspect", "--format", "{{.Size}}", image]).await?;
        size.parse().with_context(|| format!("the size of {image}: {size}"))
    }

    /// Builds from a directory, the last stage unless one is named. The packages that a build installs come by the machine's
    /// own network.
    pub(crate) async fn build(
        &self,
        image: &str,
        stage: Option<&str>,
        dockerfile: &Path,
        context: &Path,
        deadline: Duration,
    ) -> anyhow::Result<()> {
        let mut build = self.command(&["build", "--network", "host", "--tag", image]);
        for proxy in ["http_proxy", "https_proxy", "no_proxy"] {
            if std::env::var_os(proxy).is_some() {
                build.args(["--build-arg", proxy]);
            }
        }
        if let Some(stage) = stage {
            build.args(["--target", stage]);
        }
        build.arg("--file").arg(dockerfile).arg(context);
        self.run(&format!("docker build of {image}"), build, deadline).await?;
        self.has_made(image);
        Ok(())
    }

    /// Removes the images that were made.
    pub(crate) async fn remove_made(&self) -> anyhow::Result<()> {
        let made = std::mem::take(&mut *self.made.lock().unwrap_or_else(PoisonError::into_inner));
        for image in made.iter().rev() {
            self.ask(&["image", "rm", "--force", image]).await?;
        }
        Ok(())
    }
}

impl Engine {
    fn spawn(data: &Path, log: &Path) -> anyhow::Result<Self> {
        if !Uid::effective().is_root() {
            return Err(absent("no Docker engine answers").into());
        }
        let run = std::env::temp_dir().join(format!("compose-check-{}", std::process::id()));
        fs::create_dir_all(&run).with_context(|| format!("create {}", run.display()))?;
        let mut dockerd = Command::new("dockerd");
        dockerd.arg("--data-root").arg(data).arg("--exec-root").arg(&run);
        dockerd
            .arg("--pidfile")
            .arg(run.join("pid"))
            .args(["--host", &host(&run)]);
        let process = Process::spawn("dockerd", dockerd, log, Lifetime::Bound)?;
        Ok(Self {
            process,
            data: data.to_owned(),
            run,
        })
    }

    fn host(&self) -> String {
        host(&self.run)
    }

    /// Stops it; without `cache`, its images go as well.
    pub(crate) async fn stop(mut self, cache: bool) -> anyhow::Result<()> {
        self.process.stop(Signal::SIGTERM, STOP_DEADLINE).await?;
        if !cache && self.data.exists() {
            fs::remove_dir_all(&self.data).with_context(|| format!("remove {}", self.data.display()))?;
        }
        unmount_below(&self.run)?;
        fs::remove_dir_all(&self.run).with_context(|| format!("remove {}", self.run.display()))
    }
}

/// The engine leaves the mount of its network namespace.
fn unmount_below(dir: &Path) -> anyhow::Result<()> {
    let mounts = fs::read_to_string("/proc/mounts").context("read /proc/mounts")?;
    let targets = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    for target in targets.filter(|target| Path::new(target).starts_with(dir)) {
        let unmounted = Command::new("umount").arg(target).output().context("run umount")?;
        said(&format!("umount {target}"), unmounted)?;
    }
    Ok(())
}

fn host(run: &Path) -> String {
    format!("unix://{}/docker.sock", run.display())
}

/// The end of a command, waited for on a thread that may block.
pub(crate) async fn output(mut command: Command) -> anyhow::Result<Output> {
    let what = format!("run {}", command.get_program().to_string_lossy());
    tokio::task::spawn_blocking(move || command.output())
        .await?
        .context(what)
}

/// What a command that must succeed has said.
pub(crate) fn said(what: &str, output: Output) -> anyhow::Result<String> {
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{what}: {}", error.trim());
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

fn answers(program: &str, args: &[&str]) -> bool {
    let output = Command::new(program).args(args).output();
    output.is_ok_and(|output| output.status.success())
}

fn compose() -> Option<&'static [&'static str]> {
    if answers("docker", &["compose", "version"]) {
        Some(&["docker", "compose"])
    } else if answers("docker-compose", &["version"]) {
        Some(&["docker-compose"])
    } else {
        None
    }
}

fn absent(what: &str) -> Failure {
    Failure::new(
        Exit::Dependency,
        what,
        "install Docker with Compose, or run this as root on a Debian-like system",
    )
}

/// One program of the package that has its name.
///
/// # Errors
/// If it is missing and cannot be installed.
pub(crate) async fn install_missing(package: &str, log: &Path, progress: &Progress) -> anyhow::Result<()> {
    if answers(package, &["--version"]) {
        return Ok(());
    }
    install(&[package], log, progress).await
}

/// Those of `packages` that apt knows: their names differ between releases.
///
/// # Errors
/// If the caller may not, or the installation fails.
async fn install(packages: &[&str], log: &Path, progress: &Progress) -> anyhow::Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    if !Uid::effective().is_root() || !answers("apt-get", &["--version"]) {
        return Err(absent(&format!("missing: {}", packages.join(", "))).into());
    }
    let step = progress.step(format!("installing {}", packages.join(", ")));
    let mut update = Command::new("apt-get");
    update.arg("update");
    process::run("apt-get update", update, log, INSTALL_DEADLINE).await?;
    let known = packages
        .iter()
        .filter(|package| answers("apt-cache", &["show", package]));
    let mut install = Command::new("apt-get");
    install
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["install", "-y", "--no-install-recommends"])
        .args(known);
    process::run("apt-get install", install, log, INSTALL_DEADLINE).await?;
    step.done(&format!("installed {}", packages.join(", ")));
    Ok(())
}
