use sha2::{Digest, Sha256};

/// A client's promise that two requests with the same value are one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdempotencyKey {
    /// The operation the key belongs to, e.g. `completeShipment`.
    pub route: &'static str,
    /// 1 to 255 visible ASCII characters.
    pub value: String,
    /// SHA-256 of path and body: tells a repetition from another request under the same key.
    pub request_hash: [u8; 32],
}

impl IdempotencyKey {
    pub fn new(route: &'static str, value: String, path: &str, body: &[u8]) -> Self {
        let mut hash = Sha256::new();
        hash.update(path.as_bytes());
        // No path contains NUL: path and body cannot run into each other.
        hash.update([0]);
        hash.update(body);
        Self {
            route,
            value,
            request_hash: hash.finalize().into(),
        }
    }
}

/// An answer of the 200 class, complete enough to be given again word for word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    /// Path of what was created.
    pub location: Option<String>,
    /// JSON.
    pub body: String,
}
