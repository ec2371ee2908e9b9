//! The Java runtime that Kafka needs.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::failure::{Exit, Failure};

/// Kafka 4 brokers do not start on an older one.
pub const OLDEST: u32 = 17;

/// A Java runtime of version 17 or newer.
#[derive(Debug, Clone)]
pub struct Java {
    pub path: PathBuf,
    pub version: u32,
}

impl Java {
    /// `$JAVA_HOME`, then `PATH`, then the places where Linux distributions put them.
    pub fn find() -> Result<Self, Failure> {
        candidates()
            .into_iter()
            .filter_map(|path| version_of(&path).map(|version| Self { path, version }))
            .find(|java| java.version >= OLDEST)
            .ok_or_else(|| {
                Failure::new(
                    Exit::Dependency,
                    format!("there is no Java {OLDEST} or newer"),
                    "./dev doctor",
                )
            })
    }
}

fn candidates() -> Vec<PathBuf> {
    let mut found = Vec::new();
    if let Some(home) = std::env::var_os("JAVA_HOME") {
        found.push(PathBuf::from(home).join("bin/java"));
    }
    if let Some(path) = std::env::var_os("PATH") {
        found.extend(std::env::split_paths(&path).map(|dir| dir.join("java")));
    }
    if let Ok(entries) = std::fs::read_dir("/usr/lib/jvm") {
        found.extend(
            entries
                .filter_map(Result::ok)
                .map(|entry| entry.path().join("bin/java")),
        );
    }
    found.retain(|path| path.is_file());
    found
}

fn version_of(java: &Path) -> Option<u32> {
    let output = Command::new(java).arg("-version").output().ok()?;
    parse_version(&String::from_utf8_lossy(&output.stderr))
}

/// `openjdk version "17.0.15" 2025-04-15` is 17; the old form `"1.8.0_402"` is 8.
fn parse_version(text: &str) -> Option<u32> {
    let quoted = text.split('"').nth(1)?;
    let mut numbers = quoted.split(|c: char| !c.is_ascii_digit());
    match numbers.next()?.parse().ok()? {
        1 => numbers.next()?.parse().ok(),
        major => Some(major),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_read_from_old_and_new_forms() {
        assert_eq!(
            parse_version("openjdk version \"17.0.15\" 2025-04-15\nOpenJDK"),
            Some(17)
        );
        assert_eq!(parse_version("java version \"1.8.0_402\""), Some(8));
        assert_eq!(parse_version("openjdk version \"26-ea\" 2026-03-17"), Some(26));
        assert_eq!(parse_version("no java here"), None);
    }
}
