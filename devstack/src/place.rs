//! Where a stack lives: `.devstack/<name>/` under the repository root.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::Context;
use sha2::{Digest, Sha256};

use crate::account::Account;
use crate::failure::{Exit, Failure};

/// The parts of a stack, in the order in which they start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Postgres,
    Kafka,
    /// Only where Debezium is the relay.
    Debezium,
    Logistics,
    Commerce,
}

impl Part {
    pub const ALL: [Self; 5] = [
        Self::Postgres,
        Self::Kafka,
        Self::Debezium,
        Self::Logistics,
        Self::Commerce,
    ];

    /// As in addresses, logs and `status --json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::Kafka => "kafka",
            Self::Debezium => "debezium",
            Self::Logistics => "logistics-svc",
            Self::Commerce => "commerce-consumer",
        }
    }
}

/// The directory of one stack.
#[derive(Debug, Clone)]
pub struct Place {
    root: PathBuf,
    name: String,
}

/// Proof that no other command works on the stack. Held on the directory itself, so no lock file stays behind, and
/// released by the kernel however the holder ends.
#[derive(Debug)]
pub struct StackLock {
    _dir: File,
}

impl Place {
    /// Errors when `name` does not do as a directory name.
    pub fn new(root: &Path, name: &str) -> Result<Self, Failure> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || name.len() > 40 || !name.chars().all(allowed) {
            return Err(Failure::new(
                Exit::Usage,
                format!("`{name}` cannot name a stack"),
                "use 1 to 40 letters, digits, `-` and `_`",
            ));
        }
        Ok(Self {
            root: root.to_owned(),
            name: name.to_owned(),
        })
    }

    /// Every stack under `root`, running or not.
    pub fn all(root: &Path) -> anyhow::Result<Vec<Self>> {
        let entries = match fs::read_dir(root.join(".devstack")) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).context("list the stacks"),
        };
        let mut places = Vec::new();
        for entry in entries {
            let name = entry
                .context("list the stacks")?
                .file_name()
                .to_string_lossy()
                .into_owned();
            places.extend(Self::new(root, &name));
        }
        Ok(places)
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn dir(&self) -> PathBuf {
        self.root.join(".devstack").join(&self.name)
    }

    pub fn log(&self, name: &str) -> PathBuf {
        self.dir().join("logs").join(format!("{name}.log"))
    }

    /// Exists while the part runs, and says which process it is.
    pub fn record(&self, part: Part) -> PathBuf {
        self.dir().join(format!("{}.process", part.name()))
    }

    pub fn state_file(&self) -> PathBuf {
        self.dir().join("state.json")
    }

    pub fn create(&self) -> anyhow::Result<()> {
        let dir = self.dir();
        fs::create_dir_all(dir.join("logs")).with_context(|| format!("create {}", dir.display()))
    }

    /// `None` when another command holds it.
    pub fn try_lock(&self) -> anyhow::Result<Option<StackLock>> {
        let path = self.dir();
        let dir = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        match dir.try_lock() {
            Ok(()) => Ok(Some(StackLock { _dir: dir })),
            Err(fs::TryLockError::WouldBlock) => Ok(None),
            Err(fs::TryLockError::Error(error)) => Err(error).with_context(|| format!("lock {}", path.display())),
        }
    }

    /// Where the servers keep their data: in the stack's directory, unless the account of the PostgreSQL server cannot
    /// enter it (a checkout under `/root`).
    pub fn choose_data_dir(&self, account: &Account) -> PathBuf {
        if account.can_enter(&self.dir()) {
            return self.dir().join("data");
        }
        let id: String = Sha256::digest(self.root.as_os_str().as_encoded_bytes())[..4]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        PathBuf::from("/var/lib/outbox-devstack").join(format!("{id}-{}", self.name))
    }
}

/// The repository root: `$DEVSTACK_ROOT`, which `./dev` sets, or the nearest parent of the working directory that
/// holds this crate.
pub fn repository_root() -> anyhow::Result<PathBuf> {
    if let Some(root) = std::env::var_os("DEVSTACK_ROOT") {
        return Ok(PathBuf::from(root));
    }
    let here = std::env::current_dir().context("find the working directory")?;
    here.ancestors()
        .find(|dir| dir.join("devstack/pom.xml").is_file())
        .map(Path::to_owned)
        .ok_or_else(|| {
            Failure::new(
                Exit::Usage,
                "this is not inside the repository",
                "cd into it, then ./dev",
            )
            .into()
        })
}
