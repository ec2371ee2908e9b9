//! The contract, held against committed files: bytes on the wire, JSON Schemas, names.
#![allow(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]

mod headers;
mod schemas;
mod wire_format;

use std::path::{Path, PathBuf};

/// Compares with a committed file; `UPDATE_CONTRACT=1` writes it instead. A published payload's bytes never change: a
/// difference here means a new version of the event, not a new file.
fn assert_committed(folder: &str, name: &str, actual: &str) {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), folder, name].iter().collect();
    if std::env::var_os("UPDATE_CONTRACT").is_some() {
        std::fs::write(&path, actual).unwrap();
    }
    assert_eq!(
        read(&path),
        actual,
        "{} differs from what this build writes",
        path.display()
    );
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
