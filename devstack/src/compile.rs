//! The services, built by cargo.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Deserialize;

use crate::process::{Lifetime, Process};
use crate::progress::{Progress, Step};
use crate::services::Binaries;

const POLL: Duration = Duration::from_millis(150);
const DEADLINE: Duration = Duration::from_secs(60 * 60);

/// Builds both services of the workspace in `root`; cargo's messages go to `log`.
pub async fn services(root: &Path, release: bool, log: &Path, progress: &Progress) -> anyhow::Result<Binaries> {
    let step = progress.step("building the services");
    let messages = build(root, &["logistics-svc", "commerce-consumer"], release, log, &step).await?;
    step.done("services built");
    Ok(Binaries {
        logistics: messages.executable("logistics-svc")?,
        commerce: messages.executable("commerce-consumer")?,
    })
}

/// Builds one binary of the workspace in `root`; cargo's messages go to `log`.
pub async fn binary(root: &Path, name: &str, log: &Path, progress: &Progress) -> anyhow::Result<PathBuf> {
    let step = progress.step(format!("building {name}"));
    let messages = build(root, &[name], false, log, &step).await?;
    step.done(&format!("{name} built"));
    messages.executable(name)
}

/// The whole workspace is selected, as `./dev` itself and the tests do: the same choice of features, so that no
/// dependency is compiled twice.
async fn build(root: &Path, names: &[&str], release: bool, log: &Path, step: &Step) -> anyhow::Result<Messages> {
    if log.exists() {
        fs::remove_file(log).context("remove the log of the last build")?;
    }
    let mut cargo = Command::new("cargo");
    cargo
        .current_dir(root)
        .args(["build", "--workspace", "--message-format", "json-render-diagnostics"])
        .args(names.iter().flat_map(|name| ["--bin", name]));
    if release {
        cargo.arg("--release");
    }
    let mut process = Process::spawn("cargo build", cargo, log, Lifetime::Bound)?;
    let mut messages = Messages::default();
    let built = async {
        loop {
            let exited = process.exited()?;
            // After the look at the process, so that its last messages are read.
            messages.read(log)?;
            if let Some(crate_name) = &messages.last {
                step.detail(format!("{} crates, last {crate_name}", messages.crates));
            }
            if let Some(status) = exited {
                return anyhow::Ok(status);
            }
            tokio::time::sleep(POLL).await;
        }
    };
    let status = tokio::time::timeout(DEADLINE, built)
        .await
        .context("cargo build did not end")??;
    process.kill()?;
    if !status.success() {
        let text = fs::read_to_string(log).context("read the log of the build")?;
        let human: Vec<&str> = text.lines().filter(|line| !line.starts_with('{')).collect();
        bail!("{} does not build:\n{}", names.join(", "), human.join("\n"));
    }
    Ok(messages)
}

/// What cargo has said so far.
#[derive(Default)]
struct Messages {
    read: u64,
    crates: usize,
    last: Option<String>,
    executables: HashMap<String, PathBuf>,
}

#[derive(Deserialize)]
struct Message {
    target: Option<Target>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

impl Messages {
    fn read(&mut self, log: &Path) -> anyhow::Result<()> {
        use std::io::{Seek, SeekFrom};
        let mut file = File::open(log).context("open the log of the build")?;
        file.seek(SeekFrom::Start(self.read))
            .context("read the log of the build")?;
        let mut lines = BufReader::new(file);
        loop {
            let mut line = String::new();
            let bytes = lines.read_line(&mut line).context("read the log of the build")?;
            // A line without its end is still being written.
            if bytes == 0 || !line.ends_with('\n') {
                return Ok(());
            }
            self.read += bytes as u64;
            self.hear(&line);
        }
    }

    fn hear(&mut self, line: &str) {
        if !line.starts_with("{\"reason\":\"compiler-artifact\"") {
            return;
        }
        let Ok(Message {
            target: Some(target),
            executable,
        }) = serde_json::from_str(line)
        else {
            return;
        };
        self.crates += 1;
        if let Some(executable) = executable {
            self.executables.insert(target.name.clone(), executable);
        }
        self.last = Some(target.name);
    }

    fn executable(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.executables.get(name).cloned();
        path.with_context(|| format!("cargo built no binary `{name}`"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_executables_are_taken_from_cargos_messages() {
        let mut messages = Messages::default();
        messages.hear("   Compiling logistics-svc v0.0.0\n");
        messages.hear(r#"{"reason":"compiler-artifact","target":{"name":"serde"},"executable":null}"#);
        messages.hear(r#"{"reason":"compiler-artifact","target":{"name":"logistics-svc"},"executable":"/t/a"}"#);
        messages.hear(r#"{"reason":"build-finished","success":true}"#);
        assert_eq!(messages.crates, 2);
        assert!(messages.executable("commerce-consumer").is_err());
        messages.hear(r#"{"reason":"compiler-artifact","target":{"name":"commerce-consumer"},"executable":"/t/b"}"#);
        assert_eq!(messages.executable("commerce-consumer").unwrap(), PathBuf::from("/t/b"));
    }
}
