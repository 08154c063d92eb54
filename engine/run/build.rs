//! Digests the sources of the crates that decide results, so that a result in the store is never taken for one of
//! another version of the code.

use std::fs;
use std::path::{Path, PathBuf};

/// FNV-1a, 64 bits twice with different offsets: a build script must not need a dependency for a digest that only
/// has to tell versions of our own code apart.
struct Digest([u64; 2]);

impl Digest {
    fn feed(&mut self, bytes: &[u8]) {
        for state in &mut self.0 {
            for &byte in bytes {
                *state = (*state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
            }
            *state ^= bytes.len() as u64;
        }
    }
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs" || e == "toml") {
            found.push(path);
        }
    }
}

fn digest(roots: &[PathBuf]) -> String {
    let mut files = Vec::new();
    for root in roots {
        println!("cargo:rerun-if-changed={}", root.display());
        sources(root, &mut files);
    }
    files.sort();
    let mut digest = Digest([0xcbf2_9ce4_8422_2325, 0x6c62_272e_07bb_0142]);
    for file in files {
        digest.feed(file.file_name().unwrap_or_default().as_encoded_bytes());
        digest.feed(&fs::read(&file).unwrap_or_default());
    }
    format!("{:016x}{:016x}", digest.0[0], digest.0[1])
}

fn main() {
    let engine = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default()).join("..");
    let compute: Vec<PathBuf> = ["cpu", "graph", "models", "data", "train", "eval"]
        .iter()
        .map(|name| engine.join(name).join("src"))
        .chain([engine.join("run/src/stages")])
        .collect();
    let report = [engine.join("run/src/report"), engine.join("run/src/draw")];
    println!("cargo:rustc-env=MCPIPE_COMPUTE_DIGEST={}", digest(&compute));
    println!("cargo:rustc-env=MCPIPE_REPORT_DIGEST={}", digest(&report));
}
