//! One PostgreSQL server on 127.0.0.1, with everything a logical replication consumer needs.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::Signal;
use sqlx::{Connection, PgConnection};

use crate::account::Account;
use crate::failure::{Exit, Failure};
use crate::process::{self, Lifetime, Process, Stop};
use crate::servers::Servers;

/// The superuser, who owns the databases and applies migrations.
pub const SUPERUSER: &str = "postgres";

/// Beside the defaults. `fsync` and `synchronous_commit` stay on: a stack that loses commits proves nothing.
const SETTINGS: [(&str, &str); 13] = [
    ("listen_addresses", "127.0.0.1"),
    // A socket path under a deep checkout exceeds the 107 bytes that a socket address holds.
    ("unix_socket_directories", ""),
    ("fsync", "on"),
    ("wal_level", "logical"),
    ("max_wal_senders", "20"),
    ("max_replication_slots", "20"),
    ("max_connections", "300"),
    ("shared_buffers", "256MB"),
    ("wal_sender_timeout", "30s"),
    // An abandoned slot is invalidated before it fills the disk.
    ("max_slot_wal_keep_size", "4GB"),
    ("track_commit_timestamp", "on"),
    ("log_line_prefix", "%m [%p] %u@%d "),
    ("timezone", "UTC"),
];

const INITDB_DEADLINE: Duration = Duration::from_secs(300);
const READY_DEADLINE: Duration = Duration::from_secs(180);
const STOP_DEADLINE: Duration = Duration::from_secs(30);
const DROP_DEADLINE: Duration = Duration::from_secs(3);

/// What a server is started with; the same values start it again on the same data.
#[derive(Debug, Clone)]
pub struct PostgresOptions {
    /// Holds `data/`; created when missing. Must be reachable for the account of the server.
    pub dir: PathBuf,
    /// TCP port on 127.0.0.1.
    pub port: u16,
    /// Of the superuser; fixed when the data directory is created.
    pub password: String,
    /// Standard output and error of the server are appended here.
    pub log: PathBuf,
    pub lifetime: Lifetime,
    /// Server settings beside the usual ones, and stronger.
    pub settings: Vec<(&'static str, &'static str)>,
}

#[derive(Debug)]
pub struct Postgres {
    servers: Servers,
    options: PostgresOptions,
    account: Account,
    process: Option<Process>,
}

impl Postgres {
    /// Creates the data directory when there is none, starts the server and waits until it answers a query.
    ///
    /// Errors when the server ends or does not answer in time, with the end of its log.
    pub async fn start(servers: &Servers, options: PostgresOptions) -> anyhow::Result<Self> {
        let mut server = Self {
            servers: servers.clone(),
            options,
            account: Account::for_server()?,
            process: None,
        };
        server.init_data().await?;
        server.start_again().await?;
        Ok(server)
    }

    /// `postgres://…/<database>` for the superuser.
    pub fn url(&self, database: &str) -> String {
        self.url_for(SUPERUSER, &self.options.password, database)
    }

    pub fn url_for(&self, role: &str, password: &str, database: &str) -> String {
        format!(
            "postgres://{role}:{password}@127.0.0.1:{}/{database}",
            self.options.port
        )
    }

    pub fn port(&self) -> u16 {
        self.options.port
    }

    /// `None` while stopped.
    pub fn process(&mut self) -> Option<&mut Process> {
        self.process.as_mut()
    }

    /// Starts a stopped or killed server on the same port and data, and waits until it answers.
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        if let Some(mut old) = self.process.take() {
            old.kill()?;
        }
        let url = self.url("postgres");
        let end = Instant::now() + READY_DEADLINE;
        loop {
            let process = self.process.insert(self.spawn()?);
            match wait_until_ready(process, &url, end).await? {
                Start::Ready => return Ok(()),
                // After a kill of the postmaster its children hold the shared memory until they notice.
                Start::Ended if Instant::now() < end && still_in_use(process) => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Start::Ended => bail!(
                    "PostgreSQL ended while starting; end of {}:\n{}",
                    process.log().display(),
                    process.log_tail(20)
                ),
            }
        }
    }

    /// Fast stop: transactions are rolled back, WAL senders drained, a checkpoint written.
    pub async fn stop_fast(&mut self) -> anyhow::Result<Stop> {
        self.stop(Signal::SIGINT).await
    }

    /// Immediate stop: no checkpoint, the next start recovers from the WAL as after a crash.
    pub async fn stop_immediate(&mut self) -> anyhow::Result<Stop> {
        self.stop(Signal::SIGQUIT).await
    }

    /// `kill -9` of the postmaster.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        match self.process.take() {
            Some(mut process) => process.kill(),
            None => Ok(()),
        }
    }

    async fn stop(&mut self, signal: Signal) -> anyhow::Result<Stop> {
        match self.process.take() {
            Some(mut process) => process.stop(signal, STOP_DEADLINE).await,
            None => Ok(Stop::Clean),
        }
    }

    /// The data directory.
    pub fn data(&self) -> PathBuf {
        self.options.dir.join("data")
    }

    /// Built under another name and renamed, so that an interrupted initdb leaves no half directory in use.
    async fn init_data(&self) -> anyhow::Result<()> {
        if self.data().exists() {
            return Ok(());
        }
        let dir = &self.options.dir;
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        self.account.own(dir)?;
        if !self.account.can_enter(dir) {
            return Err(Failure::new(
                Exit::Usage,
                format!("the account of the PostgreSQL server cannot enter {}", dir.display()),
                "choose a directory whose parents are open to other accounts",
            )
            .into());
        }
        let unfinished = dir.join("data.unfinished");
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished).context("remove an unfinished data directory")?;
        }
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&unfinished)
            .context("create the data directory")?;
        self.account.own(&unfinished)?;

        let password_file = dir.join("password");
        self.write_secret(&password_file, &self.options.password)?;
        let mut initdb = Command::new(self.servers.postgres("initdb"));
        initdb
            .current_dir(dir)
            .arg("--pgdata")
            .arg(&unfinished)
            .args(["--username", SUPERUSER, "--auth", "scram-sha-256", "--encoding", "UTF8"])
            .args([
                "--locale",
                "C",
                "--locale-provider",
                "builtin",
                "--builtin-locale",
                "C.UTF-8",
            ])
            .arg("--no-instructions")
            .arg("--pwfile")
            .arg(&password_file);
        self.account.apply(&mut initdb);
        let done = process::run("initdb", initdb, &self.options.log, INITDB_DEADLINE).await;
        fs::remove_file(&password_file).context("remove the password file")?;
        done?;
        fs::rename(&unfinished, self.data()).context("put the data directory in place")
    }

    fn write_secret(&self, path: &Path, secret: &str) -> anyhow::Result<()> {
        use std::io::Write;
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)
            .with_context(|| format!("create {}", path.display()))?;
        file.write_all(secret.as_bytes()).context("write the password file")?;
        self.account.own(path)
    }

    fn spawn(&self) -> anyhow::Result<Process> {
        let mut command = Command::new(self.servers.postgres("postgres"));
        command.current_dir(&self.options.dir).arg("-D").arg(self.data());
        command.arg("-c").arg(format!("port={}", self.options.port));
        for (name, value) in SETTINGS.iter().chain(&self.options.settings) {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        self.account.apply(&mut command);
        Process::spawn("postgres", command, &self.options.log, self.options.lifetime.clone())
    }
}

impl Drop for Postgres {
    /// An immediate stop first: a killed postmaster leaves its shared memory segment in the kernel.
    fn drop(&mut self) {
        let Some(process) = &mut self.process else { return };
        // An error means that it has ended; the process's own drop reaps it.
        if process.signal(Signal::SIGQUIT).is_err() {
            return;
        }
        let end = Instant::now() + DROP_DEADLINE;
        while Instant::now() < end && matches!(process.exited(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

async fn wait_until_ready(process: &mut Process, url: &str, end: Instant) -> anyhow::Result<Start> {
    loop {
        if process.exited()?.is_some() {
            return Ok(Start::Ended);
        }
        match PgConnection::connect(url).await {
            Ok(connection) => {
                connection.close().await.context("close the probing connection")?;
                return Ok(Start::Ready);
            }
            Err(error) if is_wrong_password(&error) => {
                return Err(anyhow::Error::new(error).context(Failure::new(
                    Exit::Failed,
                    "PostgreSQL does not take the superuser's password: its data is of an earlier stack",
                    "./dev up --fresh deletes the data, or put back the state.json that belongs to it",
                )));
            }
            Err(error) if Instant::now() >= end => {
                return Err(error).with_context(|| {
                    format!(
                        "PostgreSQL did not answer within {} s; end of {}:\n{}",
                        READY_DEADLINE.as_secs(),
                        process.log().display(),
                        process.log_tail(20),
                    )
                });
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(30)).await,
        }
    }
}

enum Start {
    Ready,
    Ended,
}

fn is_wrong_password(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    code.as_deref() == Some("28P01")
}

fn still_in_use(process: &Process) -> bool {
    let tail = process.log_tail(5);
    tail.contains("is still in use") || tail.contains("another server") || tail.contains("lock file \"postmaster.pid\"")
}
