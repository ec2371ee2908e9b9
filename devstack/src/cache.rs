//! Programs fetched once by the Maven client, then used from a cache without network.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use sha2::{Digest, Sha256};

use crate::account::Account;
use crate::failure::{Exit, Failure};
use crate::process;

const FETCH_DEADLINE: Duration = Duration::from_secs(20 * 60);

/// One directory of the cache, named after the content of its POM: other versions are another entry.
pub(crate) struct Entry {
    name: String,
    pom: &'static str,
}

impl Entry {
    pub(crate) fn new(kind: &str, pom: &'static str) -> Self {
        let content: String = Sha256::digest(pom.as_bytes())[..6]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Self {
            name: format!("{kind}-{content}"),
            pom,
        }
    }

    /// Its directory, if it is there and so complete.
    pub(crate) fn cached(&self) -> anyhow::Result<Option<PathBuf>> {
        let dir = dir()?.join(&self.name);
        Ok(dir.is_dir().then_some(dir))
    }

    /// Runs `mvn package` on the POM with `servers.dir` and `properties` set, then `finish` on what that has filled.
    ///
    /// Several processes may do this at once: one fetches, the others wait for it. An entry appears under its final
    /// name only when it is complete.
    pub(crate) async fn fetch(
        &self,
        properties: &[String],
        finish: impl AsyncFnOnce(&Path) -> anyhow::Result<()>,
    ) -> anyhow::Result<PathBuf> {
        let cache = dir()?;
        fs::create_dir_all(&cache).with_context(|| format!("create the cache {}", cache.display()))?;
        let _lock = lock(cache.clone()).await?;
        if let Some(dir) = self.cached()? {
            return Ok(dir);
        }
        let staging = cache.join("incomplete");
        if staging.exists() {
            fs::remove_dir_all(&staging).context("remove an earlier incomplete fetch")?;
        }
        fs::create_dir_all(&staging).context("create the staging directory")?;
        self.run_maven(&staging, properties).await?;
        finish(&staging).await?;
        let dir = cache.join(&self.name);
        fs::rename(&staging, &dir).context("publish the fetched programs in the cache")?;
        Ok(dir)
    }

    async fn run_maven(&self, staging: &Path, properties: &[String]) -> anyhow::Result<()> {
        let pom = staging.join("pom.xml");
        let mut file = File::create(&pom).context("write the POM")?;
        file.write_all(self.pom.as_bytes()).context("write the POM")?;
        let mut maven = Command::new("mvn");
        maven
            .args(["--batch-mode", "--no-transfer-progress", "--file"])
            .arg(&pom)
            .arg(format!("-Dservers.dir={}", staging.display()))
            .args(properties)
            .arg("package");
        process::run("mvn", maven, &staging.join("mvn.log"), FETCH_DEADLINE).await
    }
}

/// `$DEVSTACK_CACHE`, `$XDG_CACHE_HOME/outbox-devstack` or `~/.cache/outbox-devstack`; for root, whose home is closed
/// to the account of the server, `/var/cache/outbox-devstack`.
pub fn dir() -> anyhow::Result<PathBuf> {
    let variable = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    if let Some(dir) = variable("DEVSTACK_CACHE") {
        return std::path::absolute(&dir).with_context(|| format!("make {} absolute", dir.display()));
    }
    let user_cache = variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")));
    match (Account::for_server()?, user_cache) {
        (Account::Caller, Some(cache)) => Ok(cache.join("outbox-devstack")),
        (Account::Caller, None) => Err(Failure::new(
            Exit::Usage,
            "neither HOME nor DEVSTACK_CACHE is set, so there is no place for the servers",
            "set DEVSTACK_CACHE to a directory",
        )
        .into()),
        (account @ Account::Other(_), Some(cache)) if cache.is_dir() && account.can_enter(&cache) => {
            Ok(cache.join("outbox-devstack"))
        }
        (Account::Other(_), _) => Ok(PathBuf::from("/var/cache/outbox-devstack")),
    }
}

/// Held while the returned file is open; the lock is on the cache directory itself, so no lock file stays behind.
async fn lock(cache: PathBuf) -> anyhow::Result<File> {
    tokio::task::spawn_blocking(move || {
        let dir = File::open(&cache).with_context(|| format!("open the cache {}", cache.display()))?;
        dir.lock().context("lock the cache")?;
        Ok(dir)
    })
    .await
    .context("wait for the cache lock")?
}
