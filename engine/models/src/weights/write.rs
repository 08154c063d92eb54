//! Writing: all or nothing, the same bytes for the same tensors.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value;

use super::{Element, WeightsError};

/// Metadata key of the checksum: BLAKE3 of the tensors' bytes in file order, in hexadecimal.
pub(super) const CHECKSUM_KEY: &str = "mcpipe.blake3";

/// A tensor to be written.
#[derive(Clone, Debug)]
pub enum Entry<'a> {
    /// Shape and values.
    F32(Vec<usize>, Cow<'a, [f32]>),
    /// Shape and values.
    I64(Vec<usize>, Vec<i64>),
    /// Element type, shape and little-endian elements.
    Raw(Element, Vec<usize>, Cow<'a, [u8]>),
}

impl Entry<'_> {
    fn element(&self) -> Element {
        match self {
            Entry::F32(..) => Element::F32,
            Entry::I64(..) => Element::I64,
            Entry::Raw(element, ..) => *element,
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Entry::F32(shape, _) | Entry::I64(shape, _) | Entry::Raw(_, shape, _) => shape,
        }
    }

    fn byte_len(&self) -> usize {
        match self {
            Entry::F32(_, v) => 4 * v.len(),
            Entry::I64(_, v) => 8 * v.len(),
            Entry::Raw(_, _, bytes) => bytes.len(),
        }
    }

    /// Elements as little-endian bytes.
    fn bytes(&self) -> Cow<'_, [u8]> {
        if cfg!(target_endian = "little") {
            return Cow::Borrowed(match self {
                Entry::F32(_, v) => bytemuck::cast_slice(v),
                Entry::I64(_, v) => bytemuck::cast_slice(v),
                Entry::Raw(_, _, bytes) => bytes,
            });
        }
        Cow::Owned(match self {
            Entry::F32(_, v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Entry::I64(_, v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Entry::Raw(_, _, bytes) => bytes.to_vec(),
        })
    }
}

/// Writes `tensors` with `metadata` and a checksum as a safetensors file: to a temporary name beside it first, synced,
/// then renamed, so that the name never stands for half a file. Equal tensors and metadata give equal bytes.
///
/// # Errors
/// A tensor whose values don't fill its shape, or the file system's refusal; then no file is left behind.
pub fn write_safetensors(
    path: &Path,
    tensors: &BTreeMap<String, Entry<'_>>,
    metadata: &BTreeMap<String, String>,
) -> Result<(), WeightsError> {
    // Widest elements first, so that each tensor is aligned in the file.
    let mut order: Vec<(&String, &Entry<'_>)> = tensors.iter().collect();
    order.sort_by_key(|(_, entry)| Reverse(entry.element().width()));
    let mut hash = blake3::Hasher::new();
    for (_, entry) in &order {
        hash.update(&entry.bytes());
    }
    let mut metadata = metadata.clone();
    metadata.insert(CHECKSUM_KEY.into(), hash.finalize().to_hex().to_string());

    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), metadata.into_iter().map(|(k, v)| (k, Value::String(v))).collect());
    let mut offset = 0;
    for (name, entry) in &order {
        let (shape, end) = (entry.shape(), offset + entry.byte_len());
        let width = entry.element().width();
        if shape.iter().product::<usize>() * width != entry.byte_len() {
            return Err(WeightsError::Export(format!(
                "`{name}` holds {} bytes, which don't fill {shape:?}",
                entry.byte_len()
            )));
        }
        let info = serde_json::json!({"dtype": entry.element().name(), "shape": shape, "data_offsets": [offset, end]});
        header.insert((*name).clone(), info);
        offset = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');

    write_atomic(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        order.iter().try_for_each(|(_, entry)| file.write_all(&entry.bytes()))
    })
}

/// Writes a file through `fill`: to a temporary name in the same directory, synced, then renamed to `path`, then the
/// directory synced. After an error neither the file nor the temporary one is there (an older `path` stays as it was).
///
/// # Errors
/// What the file system or `fill` refuses.
pub fn write_atomic(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), WeightsError> {
    let temporary = temporary_name(path);
    let written = write_synced(&temporary, fill)
        .map_err(WeightsError::io(path, "can't write"))
        .and_then(|()| fs::rename(&temporary, path).map_err(WeightsError::io(path, "can't put in place")));
    if written.is_err() {
        // Best effort: the error that is reported is the one that matters.
        let _ = fs::remove_file(&temporary);
        return written;
    }
    sync_directory(path).map_err(WeightsError::io(path, "can't sync the directory of"))
}

fn temporary_name(path: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}-{}.tmp", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
    path.with_file_name(name)
}

fn write_synced(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut file = BufWriter::new(OpenOptions::new().write(true).create_new(true).open(path)?);
    fill(&mut file)?;
    file.into_inner().map_err(|e| e.into_error())?.sync_all()
}

fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if cfg!(unix) { File::open(directory)?.sync_all() } else { Ok(()) }
}
