//! Writes the table of kernel sources, so that a new file in `kernels/` needs no line elsewhere.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let manifest = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from).unwrap_or_default();
    let folder = manifest.join("../../kernels").canonicalize()?;
    println!("cargo::rerun-if-changed={}", folder.display());
    let mut paths: Vec<PathBuf> = fs::read_dir(&folder)?.map(|e| Ok(e?.path())).collect::<io::Result<_>>()?;
    paths.sort();
    let mut text = String::new();
    for (table, ending) in [("HEADERS", "cuh"), ("FILES", "cu")] {
        let _ = writeln!(text, "const {table}: &[(&str, &str)] = &[");
        for path in paths.iter().filter(|p| p.extension().is_some_and(|e| e == ending)) {
            let name = path.file_name().unwrap_or_default();
            let _ = writeln!(text, "    ({name:?}, include_str!({path:?})),");
        }
        text.push_str("];\n");
    }
    let out = env::var_os("OUT_DIR").unwrap_or_default();
    fs::write(Path::new(&out).join("kernels.rs"), text)
}
