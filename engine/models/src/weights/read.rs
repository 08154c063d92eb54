//! Reading safetensors files.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, SafeTensors};

use super::WeightsError;
use super::write::CHECKSUM_KEY;

/// Extensions of pickled checkpoints.
const PICKLES: [&str; 6] = ["pt", "pth", "bin", "ckpt", "pkl", "pickle"];

/// A weight file, opened and checked. Tensor names are without wrappers (`module.`, `_orig_mod.`); names that no model
/// needs (`num_batches_tracked`, `position_ids`) are left out.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    map: Mmap,
    metadata: HashMap<String, String>,
    tensors: BTreeMap<String, Slot>,
}

#[derive(Clone, Debug)]
struct Slot {
    shape: Vec<usize>,
    dtype: Dtype,
    start: usize,
    end: usize,
}

/// A name without what wrappers add to it; none for a tensor that no model reads.
fn unwrapped(name: &str) -> Option<String> {
    let mut name = name.replace("_orig_mod.", "");
    while let Some(rest) = name.strip_prefix("module.") {
        name = rest.to_owned();
    }
    let last = name.rsplit('.').next().unwrap_or_default();
    (!matches!(last, "num_batches_tracked" | "position_ids")).then_some(name)
}

impl Checkpoint {
    /// Opens a safetensors file; where it carries mcpipe's checksum, the checksum is verified.
    ///
    /// # Errors
    /// A file that can't be read, a pickled checkpoint (`.pt`, `.pth`, `.bin`), or a damaged file.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
        if PICKLES.contains(&extension.as_str()) {
            let message = "a pickled PyTorch checkpoint is not read; convert it to safetensors, e.g. with \
                           `safetensors.torch.save_file(torch.load(FILE, weights_only=True), \"FILE.safetensors\")`";
            return Err(WeightsError::Kind { path: path.to_owned(), message: message.into() });
        }
        let file = File::open(path).map_err(WeightsError::io(path, "can't open"))?;
        let meta = file.metadata().map_err(WeightsError::io(path, "can't read"))?;
        if meta.is_dir() {
            return Err(WeightsError::Kind {
                path: path.to_owned(),
                message: "is a directory, not a weight file".into(),
            });
        }
        let corrupt = |message: String| WeightsError::Corrupt { path: path.to_owned(), message };
        if meta.len() == 0 {
            return Err(corrupt("the file is empty".into()));
        }
        // SAFETY: the map is only read. Files are replaced by rename, never rewritten in place, so the bytes under the
        // map stay; a foreign process that truncates the file would end this one with SIGBUS, as for any mapped file.
        let map = unsafe { Mmap::map(&file) }.map_err(WeightsError::io(path, "can't map"))?;
        if map.starts_with(b"PK\x03\x04") || map.starts_with(b"\x80\x02") {
            let message = "is a pickled PyTorch checkpoint by its content, not safetensors".into();
            return Err(WeightsError::Kind { path: path.to_owned(), message });
        }
        let (header, info) = SafeTensors::read_metadata(&map).map_err(|e| corrupt(e.to_string()))?;
        let data = 8 + header;
        if data + info.data_len() != map.len() {
            return Err(corrupt(format!("{} bytes are there, {} are declared", map.len(), data + info.data_len())));
        }
        let metadata = info.metadata().clone().unwrap_or_default();
        if let Some(expected) = metadata.get(CHECKSUM_KEY)
            && *expected != blake3::hash(&map[data..]).to_hex().to_string()
        {
            return Err(corrupt("its checksum does not match its content".into()));
        }
        let tensors = Self::slots(&info, data).map_err(corrupt)?;
        Ok(Checkpoint { path: path.to_owned(), map, metadata, tensors })
    }

    fn slots(info: &Metadata, data: usize) -> Result<BTreeMap<String, Slot>, String> {
        let mut tensors = BTreeMap::new();
        for (name, t) in info.tensors() {
            let Some(short) = unwrapped(&name) else { continue };
            let (start, end) = t.data_offsets;
            let slot = Slot { shape: t.shape.clone(), dtype: t.dtype, start: data + start, end: data + end };
            if tensors.insert(short.clone(), slot).is_some() {
                return Err(format!("two tensors are called `{short}` once wrappers are stripped"));
            }
        }
        Ok(tensors)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's metadata.
    pub fn metadata(&self) -> &HashMap<String, String> {
        &self.metadata
    }

    /// Tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether the file holds a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|t| t.shape.as_slice())
    }

    /// Values of a tensor, widened or rounded to `f32`; none if the file lacks it.
    ///
    /// # Errors
    /// An element type that is no floating-point one.
    pub fn values(&self, name: &str) -> Result<Option<Vec<f32>>, WeightsError> {
        let Some(slot) = self.tensors.get(name) else { return Ok(None) };
        let bytes = &self.map[slot.start..slot.end];
        let values = match slot.dtype {
            Dtype::F32 => elements(bytes, f32::from_le_bytes),
            Dtype::F64 => elements(bytes, |b| f64::from_le_bytes(b) as f32),
            Dtype::F16 => elements(bytes, |b| f16_to_f32(u16::from_le_bytes(b))),
            Dtype::BF16 => elements(bytes, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
            other => {
                return Err(WeightsError::Dtype {
                    path: self.path.clone(),
                    name: name.to_owned(),
                    dtype: format!("{other:?}"),
                });
            }
        };
        Ok(Some(values))
    }
}

fn elements<const N: usize>(bytes: &[u8], decode: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    bytes.as_chunks::<N>().0.iter().map(|&b| decode(b)).collect()
}

/// IEEE 754 half to single precision, exactly.
fn f16_to_f32(h: u16) -> f32 {
    let (sign, exponent, mantissa) = (u32::from(h >> 15) << 31, u32::from(h >> 10 & 0x1f), u32::from(h & 0x3ff));
    match exponent {
        // Subnormal: mantissa · 2⁻²⁴, exact in f32.
        0 => f32::from_bits(sign | (mantissa as f32 / 16_777_216.0).to_bits()),
        0x1f => f32::from_bits(sign | 0x7f80_0000 | mantissa << 13),
        _ => f32::from_bits(sign | (exponent + 112) << 23 | mantissa << 13),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_precision_is_exact() {
        for (bits, value) in [(0x0000, 0.0), (0x8000, -0.0), (0x3c00, 1.0), (0xc000, -2.0), (0x7bff, 65504.0)] {
            assert_eq!(f16_to_f32(bits).to_bits(), f32::to_bits(value), "{bits:#x}");
        }
        assert_eq!(f16_to_f32(0x0001), 2f32.powi(-24));
        assert_eq!(f16_to_f32(0x03ff), 1023.0 * 2f32.powi(-24));
        assert_eq!(f16_to_f32(0x0400), 2f32.powi(-14));
        assert_eq!(f16_to_f32(0xfc00), f32::NEG_INFINITY);
        assert!(f16_to_f32(0x7e00).is_nan());
    }

    #[test]
    fn wrappers_are_stripped() {
        assert_eq!(unwrapped("module._orig_mod.visual.conv1.weight").as_deref(), Some("visual.conv1.weight"));
        assert_eq!(unwrapped("_orig_mod.module.a").as_deref(), Some("a"));
        assert_eq!(unwrapped("stem.bn.num_batches_tracked"), None);
        assert_eq!(unwrapped("text_model.embeddings.position_ids"), None);
    }
}
