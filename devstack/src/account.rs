//! The account the PostgreSQL server runs under. It refuses to run as root, so root hands it to an unprivileged one.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context;
use nix::unistd::{Uid, User};

use crate::failure::{Exit, Failure};

/// Existing accounts that may own the server, best first. initdb wants a name, so a bare number does not do.
const CANDIDATES: [&str; 2] = ["postgres", "nobody"];

/// Who runs the PostgreSQL server.
#[derive(Debug, Clone)]
pub enum Account {
    /// The caller, who is not root.
    Caller,
    /// The caller is root: this account instead.
    Other(User),
}

impl Account {
    /// Errors when the caller is root and no unprivileged account exists.
    pub fn for_server() -> anyhow::Result<Self> {
        if !Uid::effective().is_root() {
            return Ok(Self::Caller);
        }
        for name in CANDIDATES {
            if let Some(user) = User::from_name(name).context("read the account database")? {
                return Ok(Self::Other(user));
            }
        }
        Err(Failure::new(
            Exit::Dependency,
            "PostgreSQL does not run as root, and there is no account `postgres` or `nobody` to run it as",
            "useradd --system postgres",
        )
        .into())
    }

    /// Makes `command` run under this account.
    pub fn apply(&self, command: &mut Command) {
        if let Self::Other(user) = self {
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
    }

    /// Gives `path` to this account.
    pub fn own(&self, path: &Path) -> anyhow::Result<()> {
        match self {
            Self::Caller => Ok(()),
            Self::Other(user) => std::os::unix::fs::chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
                .with_context(|| format!("give {} to the account {}", path.display(), user.name)),
        }
    }

    /// Whether this account can enter the existing directory `dir`. Asked of the kernel, which knows about ACLs and
    /// mount options as well as mode bits.
    pub fn can_enter(&self, dir: &Path) -> bool {
        let mut probe = Command::new("/bin/sh");
        probe
            .args(["-c", "cd \"$1\"", "sh"])
            .arg(dir)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        self.apply(&mut probe);
        probe.status().is_ok_and(|status| status.success())
    }
}
