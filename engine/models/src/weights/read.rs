//! Reading weight files of every kind, recognised by content.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use memmap2::Mmap;
use safetensors::tensor::SafeTensors;

use super::element::Element;
use super::rules::Slots;
use super::slot::Slot;
use super::torch::{Contents, Problem, read_legacy, read_zip};
use super::write::CHECKSUM_KEY;
use super::{WeightsError, apple, hugging_face};

/// A weight file, opened and checked: safetensors, or PyTorch's zip archives and older pickles, each also gzipped.
/// Tensor names are without wrappers (`module.`, `_orig_mod.`), in timm's and open_clip's form where the file is in
/// Apple's or in that of Hugging Face's `CLIPModel`; names that no model reads (`num_batches_tracked`, `position_ids`) are left out.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    data: Data,
    source: Source,
    metadata: HashMap<String, String>,
    tensors: Slots,
    counters: Slots,
}

/// How a file holds its weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The file's form.
    pub container: Container,
    /// Whether it is gzipped.
    pub gzipped: bool,
    /// Keys under which the state dict lies in what was pickled, outermost first.
    pub wrappers: Vec<String>,
    /// What wrapping modules had put before or into the names.
    pub prefixes: Vec<&'static str>,
    /// Whose names the file has, where they were turned into timm's and open_clip's.
    pub names_of: Option<&'static str>,
}

/// The form of a weight file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// safetensors.
    Safetensors,
    /// The zip archive of `torch.save`.
    TorchZip,
    /// Pickles one after the other, as `torch.save` wrote before release 1.6.
    TorchLegacy,
}

impl fmt::Display for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Container::Safetensors => "safetensors",
            Container::TorchZip => "PyTorch zip archive",
            Container::TorchLegacy => "PyTorch pickles (before 1.6)",
        })
    }
}

#[derive(Debug)]
enum Data {
    Map(Mmap),
    Unpacked(Vec<u8>),
}

impl Deref for Data {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Data::Map(map) => map,
            Data::Unpacked(bytes) => bytes,
        }
    }
}

/// A gzipped file may unpack to this, and to so many times its length more. Weights hardly shrink at all; deflate at
/// its best shrinks a thousandfold.
const UNPACKED: u64 = 256 << 20;
const UNPACKED_TIMES: u64 = 64;

/// What wrapping modules add to names.
const PREFIX: &str = "module.";
const INFIX: &str = "_orig_mod.";

/// A name without what wrappers add to it.
fn unwrapped(name: &str) -> String {
    let mut name = name.replace(INFIX, "");
    while let Some(rest) = name.strip_prefix(PREFIX) {
        name = rest.to_owned();
    }
    name
}

fn last_segment(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or_default()
}

impl Checkpoint {
    /// Opens a weight file. Its kind is known by its content; where it carries mcpipe's checksum, that is verified.
    ///
    /// # Errors
    /// A file that can't be read, is of another kind, is damaged, or would have code executed.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let kind = |message: String| WeightsError::Kind { path: path.to_owned(), message };
        let corrupt = |message: String| WeightsError::Corrupt { path: path.to_owned(), message };
        let file = File::open(path).map_err(WeightsError::io(path, "can't open"))?;
        let meta = file.metadata().map_err(WeightsError::io(path, "can't read"))?;
        if meta.is_dir() {
            return Err(kind("is a directory, not a weight file".into()));
        }
        if meta.len() == 0 {
            return Err(corrupt("the file is empty".into()));
        }
        // SAFETY: the map is only read. Files are replaced by rename, never rewritten in place, so the bytes under the
        // map stay; a foreign process that truncates the file would end this one with SIGBUS, as for any mapped file.
        let map = unsafe { Mmap::map(&file) }.map_err(WeightsError::io(path, "can't map"))?;
        let gzipped = map.starts_with(b"\x1f\x8b");
        let data = if gzipped { Data::Unpacked(unpack(&map).map_err(corrupt)?) } else { Data::Map(map) };
        let mut metadata = HashMap::new();
        let (container, contents) = if data.starts_with(b"PK") {
            (Container::TorchZip, read_zip(&data))
        } else if is_pickle(&data) {
            (Container::TorchLegacy, read_legacy(&data))
        } else if data.get(257..262) == Some(b"ustar") {
            return Err(kind("is a tar archive; torch.save wrote such before 0.1.12, and they are not read".into()));
        } else {
            (Container::Safetensors, read_safetensors(&data, &mut metadata))
        };
        let Contents { tensors, wrappers } = contents.map_err(|problem| match problem {
            Problem::Kind(message) => kind(message),
            Problem::Corrupt(message) => corrupt(message),
            Problem::Refused(message) => WeightsError::Refused { path: path.to_owned(), message },
        })?;
        let mut prefixes = Vec::new();
        for (prefix, found) in [
            (PREFIX, tensors.keys().any(|name| name.starts_with(PREFIX))),
            (INFIX, tensors.keys().any(|name| name.contains(INFIX))),
        ] {
            if found {
                prefixes.push(prefix);
            }
        }
        let mut slots = Slots::new();
        for (name, slot) in tensors {
            let short = unwrapped(&name);
            if last_segment(&short) != "position_ids" && slots.insert(short.clone(), slot).is_some() {
                return Err(corrupt(format!("two tensors are called `{short}` once wrappers are stripped")));
            }
        }
        let mut names_of = None;
        if apple::is_apple(&slots) {
            names_of = Some("Apple's MobileCLIP");
            slots = apple::from_apple(slots).map_err(corrupt)?;
        } else if hugging_face::is_clip(&slots) {
            names_of = Some("Hugging Face's CLIPModel");
            slots = hugging_face::from_clip(slots).map_err(corrupt)?;
        } else if hugging_face::is_bert(&slots) {
            names_of = Some("Hugging Face's BertModel");
            slots = hugging_face::from_bert(slots).map_err(corrupt)?;
        }
        let (counters, tensors) = slots.into_iter().partition(|(name, _)| last_segment(name) == "num_batches_tracked");
        let source = Source { container, gzipped, wrappers, prefixes, names_of };
        Ok(Checkpoint { path: path.to_owned(), data, source, metadata, tensors, counters })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How the file holds its weights.
    pub fn source(&self) -> &Source {
        &self.source
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

    /// Element type of a tensor.
    pub fn element(&self, name: &str) -> Option<Element> {
        self.tensors.get(name).map(|t| t.element)
    }

    /// Batches that batch norms have seen, by the counter's name (`….num_batches_tracked`).
    pub(super) fn counters(&self) -> impl Iterator<Item = (&str, i64)> {
        self.counters.iter().filter_map(|(name, slot)| {
            let bytes = slot.bytes(&self.data);
            Some((name.as_str(), i64::from_le_bytes(*bytes.first_chunk::<8>()?)))
        })
    }

    /// Elements of a tensor as they are in the file, side by side.
    pub(super) fn bytes(&self, name: &str) -> Option<std::borrow::Cow<'_, [u8]>> {
        self.tensors.get(name).map(|slot| slot.bytes(&self.data))
    }

    /// Values of a tensor, widened or rounded to `f32`; none if the file lacks it.
    ///
    /// # Errors
    /// An element type that is no floating-point one.
    pub fn values(&self, name: &str) -> Result<Option<Vec<f32>>, WeightsError> {
        let Some(slot) = self.tensors.get(name) else { return Ok(None) };
        let values = slot.element.decode(&slot.bytes(&self.data));
        values.map(Some).ok_or_else(|| WeightsError::Dtype {
            path: self.path.clone(),
            name: name.to_owned(),
            dtype: slot.element.to_string(),
        })
    }
}

/// Whether a file starts as a pickle of protocol 2 or later does. A safetensors file whose header has such a length
/// shows the header's brace behind it.
fn is_pickle(file: &[u8]) -> bool {
    file.first() == Some(&0x80) && file.get(1).is_some_and(|p| (2..=5).contains(p)) && file.get(8) != Some(&b'{')
}

fn unpack(packed: &[u8]) -> Result<Vec<u8>, String> {
    let most = UNPACKED + UNPACKED_TIMES * packed.len() as u64;
    let mut bytes = Vec::new();
    let mut reader = MultiGzDecoder::new(packed).take(most + 1);
    reader.read_to_end(&mut bytes).map_err(|e| format!("gzip: {e}"))?;
    if bytes.len() as u64 > most {
        return Err(format!("gzip: it unpacks to over {most} bytes from {}", packed.len()));
    }
    Ok(bytes)
}

fn read_safetensors(file: &[u8], metadata: &mut HashMap<String, String>) -> Result<Contents, Problem> {
    let corrupt = |message: String| Problem::Corrupt(format!("not a whole safetensors file: {message}"));
    // The header, an object in JSON, comes behind its length.
    if file.get(8).is_some_and(|&b| b != b'{') {
        return Err(Problem::Kind("is no weight file: neither safetensors nor a PyTorch checkpoint".into()));
    }
    let (header, info) = SafeTensors::read_metadata(file).map_err(|e| corrupt(e.to_string()))?;
    let data = 8 + header;
    if data + info.data_len() != file.len() {
        return Err(corrupt(format!("{} bytes are there, {} are declared", file.len(), data + info.data_len())));
    }
    *metadata = info.metadata().clone().unwrap_or_default();
    if let Some(expected) = metadata.get(CHECKSUM_KEY)
        && *expected != blake3::hash(&file[data..]).to_hex().to_string()
    {
        return Err(corrupt("its checksum does not match its content".into()));
    }
    let mut tensors = BTreeMap::new();
    for (name, t) in info.tensors() {
        let Some(element) = Element::of(t.dtype) else {
            return Err(Problem::Kind(format!("holds `{name}` of type {:?}, which is not read", t.dtype)));
        };
        tensors.insert(name, Slot::plain(element, t.shape.clone(), data + t.data_offsets.0));
    }
    Ok(Contents { tensors, wrappers: Vec::new() })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::*;

    #[test]
    fn wrappers_are_stripped() {
        assert_eq!(unwrapped("module._orig_mod.visual.conv1.weight"), "visual.conv1.weight");
        assert_eq!(unwrapped("_orig_mod.module.a"), "a");
        assert_eq!(unwrapped("a.module.b"), "a.module.b");
    }

    #[test]
    fn gzip_bombs_are_refused() {
        use std::io::Write;
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        let zeros = vec![0; 1 << 20];
        for _ in 0..(UNPACKED >> 20) + 64 {
            packer.write_all(&zeros).unwrap();
        }
        let packed = packer.finish().unwrap();
        assert!(unpack(&packed).unwrap_err().contains("unpacks to over"));
    }
}
