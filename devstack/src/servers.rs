//! The server programs of every stack: PostgreSQL and Kafka.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};

use crate::cache::Entry;
use crate::failure::{Exit, Failure};
use crate::prerequisites::{self, Tool};
use crate::process;
use crate::progress::Progress;

/// Names both artifacts and their versions.
const POM: &str = include_str!("../pom.xml");
const UNPACK_DEADLINE: Duration = Duration::from_secs(120);

/// Where the programs of PostgreSQL and Kafka are.
#[derive(Debug, Clone)]
pub struct Servers {
    dir: PathBuf,
}

impl Servers {
    /// The programs if they are in the cache, complete.
    pub fn cached() -> anyhow::Result<Option<Self>> {
        Ok(entry()?.cached()?.map(|dir| Self { dir }))
    }

    /// The programs, fetched through Maven first when the cache does not have them; what the fetch itself needs is
    /// found or installed, its messages in `log`.
    pub async fn ensure(log: &Path, progress: &Progress) -> anyhow::Result<Self> {
        if let Some(servers) = Self::cached()? {
            return Ok(servers);
        }
        prerequisites::ensure(&Tool::FOR_FETCH, log, progress).await?;
        let step = progress.step("fetching PostgreSQL and Kafka through Maven");
        let platform = format!("-Dpostgres.platform={}", platform()?);
        let dir = entry()?
            .fetch(&[platform], unpack_postgres)
            .await
            .context("fetch PostgreSQL and Kafka through Maven")?;
        step.done("PostgreSQL and Kafka are in the cache");
        Ok(Self { dir })
    }

    /// Holds `postgres/` and `kafka/`.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A program of PostgreSQL: `initdb`, `pg_ctl` or `postgres`.
    pub fn postgres(&self, program: &str) -> PathBuf {
        self.dir.join("postgres/bin").join(program)
    }

    /// The class path of Kafka, for `java -cp`.
    pub fn kafka_classpath(&self) -> String {
        self.dir.join("kafka/*").to_string_lossy().into_owned()
    }
}

fn entry() -> anyhow::Result<Entry> {
    Ok(Entry::new(&format!("servers-{}", platform()?), POM))
}

/// The classifier of the PostgreSQL artifact for this machine.
fn platform() -> anyhow::Result<&'static str> {
    match (std::env::consts::OS, std::env::consts::ARCH) {
        ("linux", "x86_64") => Ok("linux-amd64"),
        ("linux", "aarch64") => Ok("linux-arm64v8"),
        ("macos", "x86_64") => Ok("darwin-amd64"),
        ("macos", "aarch64") => Ok("darwin-arm64v8"),
        (os, arch) => Err(Failure::new(
            Exit::Dependency,
            format!("there is no packaged PostgreSQL for {os} on {arch}"),
            "start PostgreSQL 18 and Kafka 4 yourself and set DATABASE_URL and KAFKA_BROKERS",
        )
        .into()),
    }
}

/// The artifact wraps a tar archive compressed with xz.
async fn unpack_postgres(staging: &Path) -> anyhow::Result<()> {
    let wrapped = staging.join("postgres-archive");
    let archive = fs::read_dir(&wrapped)
        .with_context(|| format!("list {}", wrapped.display()))?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "txz"));
    let Some(archive) = archive else {
        bail!("the PostgreSQL artifact holds no .txz archive");
    };
    let target = staging.join("postgres");
    fs::create_dir(&target).context("create the PostgreSQL directory")?;
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--xz", "--no-same-owner", "--file"])
        .arg(&archive)
        .arg("--directory")
        .arg(&target);
    process::run("tar", tar, &staging.join("tar.log"), UNPACK_DEADLINE)
        .await
        .context("unpack PostgreSQL")?;
    // Another account runs the server when the caller is root, whatever the caller's umask is.
    let mut chmod = Command::new("chmod");
    chmod.args(["-R", "a+rX"]).arg(staging);
    process::run("chmod", chmod, &staging.join("tar.log"), UNPACK_DEADLINE)
        .await
        .context("make PostgreSQL readable")?;
    fs::remove_dir_all(&wrapped).context("remove the archive")?;
    Ok(())
}
