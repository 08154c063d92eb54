//! Content hashes of stages.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde_json::Value;

/// Digest of the sources that decide what a training, an evaluation or a made data set comes to.
pub const COMPUTE_DIGEST: &str = env!("MCPIPE_COMPUTE_DIGEST");
/// Digest of the sources that decide what the report looks like.
pub const REPORT_DIGEST: &str = env!("MCPIPE_REPORT_DIGEST");

/// Version of the code as the lock file records it: the crate's version and the digest of the computing sources.
pub fn code_version() -> String {
    format!("{}+{}", env!("CARGO_PKG_VERSION"), &COMPUTE_DIGEST[..12])
}

/// Content hash of a stage: BLAKE3 over everything that its result depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct StageHash(blake3::Hash);

impl StageHash {
    /// The hash in the length used for folder names: 80 bits, far beyond chance collisions of one store.
    pub fn short(&self) -> String {
        self.0.to_hex()[..20].to_owned()
    }

    /// The whole hash in hexadecimal.
    pub fn hex(&self) -> String {
        self.0.to_hex().to_string()
    }

    pub(crate) fn of(feed: impl FnOnce(&mut Canonical)) -> Self {
        let mut canonical = Canonical(blake3::Hasher::new());
        feed(&mut canonical);
        Self(canonical.0.finalize())
    }
}

impl fmt::Debug for StageHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.short())
    }
}

/// Feeds values to a hasher so that different values never give the same bytes: each is led by its kind and length.
pub(crate) struct Canonical(blake3::Hasher);

impl Canonical {
    fn tag(&mut self, kind: u8, len: usize) {
        self.0.update(&[kind]);
        self.0.update(&(len as u64).to_le_bytes());
    }

    pub(crate) fn text(&mut self, text: &str) {
        self.tag(b's', text.len());
        self.0.update(text.as_bytes());
    }

    pub(crate) fn hash(&mut self, hash: &StageHash) {
        self.tag(b'h', 32);
        self.0.update(hash.0.as_bytes());
    }

    /// JSON with the keys of objects in sorted order, so that the order of lines in the file does not matter.
    pub(crate) fn json(&mut self, value: &Value) {
        match value {
            Value::Null => self.tag(b'0', 0),
            Value::Bool(b) => self.tag(b'b', usize::from(*b)),
            Value::Number(n) => {
                let text = n.to_string();
                self.tag(b'n', text.len());
                self.0.update(text.as_bytes());
            }
            Value::String(text) => self.text(text),
            Value::Array(items) => {
                self.tag(b'[', items.len());
                items.iter().for_each(|item| self.json(item));
            }
            Value::Object(map) => {
                let mut keys: Vec<&String> = map.keys().collect();
                keys.sort_unstable();
                self.tag(b'{', keys.len());
                for key in keys {
                    self.text(key);
                    self.json(&map[key]);
                }
            }
        }
    }
}

/// BLAKE3 of a file's bytes, and their number.
///
/// # Errors
/// The file can't be read.
pub fn file_digest(path: &Path) -> io::Result<(String, u64)> {
    let mut file = File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 18];
    let mut bytes = 0;
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok((hasher.finalize().to_hex().to_string(), bytes));
        }
        bytes += n as u64;
        hasher.update(&buffer[..n]);
    }
}

/// What tells one state of a file from another without reading it: its absolute path, size and time of change.
///
/// # Errors
/// The file is not there.
pub(crate) fn file_identity(path: &Path) -> io::Result<Value> {
    let meta = std::fs::metadata(path)?;
    let changed =
        meta.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok()).map_or(0, |t| t.as_nanos());
    let path = std::path::absolute(path)?;
    Ok(serde_json::json!([path.to_string_lossy(), meta.len(), changed.to_string()]))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(value: Value) -> StageHash {
        StageHash::of(|h| h.json(&value))
    }

    #[test]
    fn order_of_keys_does_not_matter_but_structure_does() {
        assert_eq!(of(json!({"a": 1, "b": 2})), of(json!({"b": 2, "a": 1})));
        assert_ne!(of(json!(["ab", "c"])), of(json!(["a", "bc"])));
        assert_ne!(of(json!([1, [2]])), of(json!([[1], 2])));
        assert_ne!(of(json!("1")), of(json!(1)));
        assert_ne!(of(json!(null)), of(json!(false)));
    }
}
