//! Samples of a list of shards: a table of member offsets made by one scan of the headers, and reads of one sample.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use crate::error::{DataError, Result, SampleFault};
use crate::files::read_exact_at;
use crate::tar_scan::{RawMember, TarScan, scan_tar};

/// Largest caption that is read, in bytes. No text tower looks at more than a page.
pub const MAX_CAPTION_BYTES: u64 = 64 * 1024;
const MAX_JSON_BYTES: u64 = 16 << 20;
const MAX_CLASS_BYTES: u64 = 64;
/// Largest encoded image, in bytes.
pub(crate) const MAX_IMAGE_BYTES: u64 = 1 << 30;

/// What a member is, by its extension (everything after the first dot of the file name, lower case).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemberKind {
    /// `jpg`, `jpeg`, `png`, `webp`; the decoder goes by the bytes, not by the name.
    Image,
    /// `txt`: the caption, or captions one a line.
    Text,
    /// `cls`: the class index.
    Class,
    /// `json`: metadata.
    Json,
    /// Any other extension.
    Other(Arc<str>),
}

impl MemberKind {
    fn of(extension: &str) -> Self {
        match extension {
            "jpg" | "jpeg" | "png" | "webp" => Self::Image,
            "txt" => Self::Text,
            "cls" => Self::Class,
            "json" => Self::Json,
            other => Self::Other(other.into()),
        }
    }
}

/// Where a member's bytes lie in its shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// What it is.
    pub kind: MemberKind,
    /// Offset in the shard, bytes.
    pub offset: u64,
    /// Size in bytes.
    pub size: u64,
}

/// One usable sample: its shard, its key, its members.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Index into [`SampleSet::shards`].
    pub shard: u32,
    /// Path in the tar up to the first dot of the file name.
    pub key: Box<str>,
    /// Its members in the order of the tar.
    pub members: Box<[Member]>,
}

impl Entry {
    fn find(&self, kind: &MemberKind) -> Option<&Member> {
        self.members.iter().find(|m| m.kind == *kind)
    }

    /// Whether a caption stands beside the image.
    pub fn has_text(&self) -> bool {
        self.find(&MemberKind::Text).is_some()
    }

    /// Whether a class index stands beside the image.
    pub fn has_class(&self) -> bool {
        self.find(&MemberKind::Class).is_some()
    }
}

/// A sample whose place in its shard makes it unusable.
#[derive(Debug, Clone)]
pub struct BadEntry {
    /// Index into [`SampleSet::shards`].
    pub shard: u32,
    /// The sample's key.
    pub key: String,
    /// What is wrong.
    pub fault: SampleFault,
}

/// The samples of one shard.
#[derive(Debug)]
pub(crate) struct ShardSamples {
    pub(crate) entries: Vec<Entry>,
    pub(crate) bad: Vec<BadEntry>,
    pub(crate) scan: TarScan,
}

/// Every sample of a list of shards, in the order of the shards.
///
/// Memory: about 100 bytes a sample and 32 a member.
#[derive(Debug)]
pub struct SampleSet {
    shards: Vec<PathBuf>,
    entries: Vec<Entry>,
    bad: Vec<BadEntry>,
    fingerprint: blake3::Hash,
}

impl SampleSet {
    /// Scans the headers of every shard (shards in parallel).
    ///
    /// Samples with a fault of their own are listed in [`Self::bad`]; a shard whose structure is damaged is an error,
    /// since nobody can say how many samples it hides.
    ///
    /// # Errors
    /// [`DataError::Read`], [`DataError::Shard`].
    pub fn open(shards: Vec<PathBuf>) -> Result<Self> {
        let scanned: Vec<Result<ShardSamples>> =
            shards.par_iter().enumerate().map(|(i, path)| scan_shard(i as u32, path)).collect();
        let mut set =
            Self { shards, entries: Vec::new(), bad: Vec::new(), fingerprint: blake3::Hasher::new().finalize() };
        let mut hasher = blake3::Hasher::new();
        for (result, path) in scanned.into_iter().zip(&set.shards) {
            let shard = result?;
            if let Some(fault) = shard.scan.fault {
                return Err(DataError::shard(path, fault));
            }
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            hasher.update(&(name.len() as u64).to_le_bytes());
            hasher.update(name.as_bytes());
            hasher.update(shard.scan.digest.as_bytes());
            set.entries.extend(shard.entries);
            set.bad.extend(shard.bad);
        }
        set.fingerprint = hasher.finalize();
        Ok(set)
    }

    /// The samples of one scanned shard; a fault of its structure is the caller's to report.
    pub(crate) fn of_shard(path: &Path, shard: ShardSamples) -> Self {
        Self { shards: vec![path.to_owned()], entries: shard.entries, bad: shard.bad, fingerprint: shard.scan.digest }
    }

    /// Number of usable samples.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no usable sample.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The shards, in order.
    pub fn shards(&self) -> &[PathBuf] {
        &self.shards
    }

    /// The usable samples, in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The samples that their place in the tar makes unusable, in order.
    pub fn bad(&self) -> &[BadEntry] {
        &self.bad
    }

    /// Each unusable sample as an error that names shard and key.
    pub fn bad_errors(&self) -> impl Iterator<Item = DataError> + '_ {
        self.bad.iter().map(|b| DataError::sample(&self.shards[b.shard as usize], &b.key, b.fault.clone()))
    }

    /// Hash of shard names and of every tar header (member names, sizes, times), hex. Cheap: no member is read, so an
    /// edit that keeps all headers goes unseen; see [`content_hash`] for that.
    pub fn fingerprint(&self) -> String {
        self.fingerprint.to_hex().to_string()
    }

    /// `fault` of sample `index` as an error that names shard and key.
    pub fn fault(&self, index: usize, fault: SampleFault) -> DataError {
        let entry = &self.entries[index];
        DataError::sample(&self.shards[entry.shard as usize], &entry.key, fault)
    }
}

/// BLAKE3 over the names and bytes of files in order, hex. Reads everything.
///
/// # Errors
/// [`DataError::Read`].
pub fn content_hash(files: &[PathBuf]) -> Result<String> {
    let hashes: Vec<Result<blake3::Hash>> = files
        .par_iter()
        .map(|path| {
            let mut hasher = blake3::Hasher::new();
            let mut file = File::open(path).map_err(|e| DataError::read(path, e))?;
            std::io::copy(&mut file, &mut hasher).map_err(|e| DataError::read(path, e))?;
            Ok(hasher.finalize())
        })
        .collect();
    let mut all = blake3::Hasher::new();
    for (hash, path) in hashes.into_iter().zip(files) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        all.update(&(name.len() as u64).to_le_bytes());
        all.update(name.as_bytes());
        all.update(hash?.as_bytes());
    }
    Ok(all.finalize().to_hex().to_string())
}

/// Key and extension of a member's path: split at the first dot of the file name.
///
/// `None` for hidden files, for names without an extension, and for WebDataset's own `__` files: they belong to no
/// sample.
fn split_key(name: &str) -> Option<(&str, String)> {
    let name = name.strip_prefix("./").unwrap_or(name);
    let file_at = name.rfind('/').map_or(0, |i| i + 1);
    let file = &name[file_at..];
    if file.starts_with("__") {
        return None;
    }
    let dot = file.find('.').filter(|&dot| dot > 0)?;
    Some((&name[..file_at + dot], file[dot + 1..].to_ascii_lowercase()))
}

pub(crate) fn scan_shard(shard: u32, path: &Path) -> Result<ShardSamples> {
    let scan = scan_tar(path)?;
    let (entries, bad) = group(shard, &scan.members, scan.fault.is_none());
    Ok(ShardSamples { entries, bad, scan })
}

struct Group {
    key: String,
    extensions: Vec<String>,
    members: Vec<Member>,
    fault: Option<SampleFault>,
}

/// Samples of a shard's members. The last sample of a damaged shard is dropped: what it lacks is the damage's doing.
fn group(shard: u32, members: &[RawMember], whole: bool) -> (Vec<Entry>, Vec<BadEntry>) {
    let mut groups: Vec<Group> = Vec::new();
    let mut seen: HashMap<String, usize> = HashMap::new();
    for raw in members {
        let Some((key, extension)) = split_key(&raw.name) else { continue };
        let last = groups.len().wrapping_sub(1);
        let index = match groups.last() {
            Some(group) if group.key == key => last,
            _ => match seen.get(key) {
                Some(&earlier) => {
                    let fault = SampleFault::NotAdjacent { member: raw.name.clone() };
                    groups[earlier].fault.get_or_insert(fault);
                    continue;
                }
                None => {
                    seen.insert(key.to_owned(), groups.len());
                    groups.push(Group {
                        key: key.to_owned(),
                        extensions: Vec::new(),
                        members: Vec::new(),
                        fault: None,
                    });
                    groups.len() - 1
                }
            },
        };
        let group = &mut groups[index];
        if group.extensions.contains(&extension) {
            group.fault.get_or_insert(SampleFault::Duplicate(extension));
            continue;
        }
        group.members.push(Member { kind: MemberKind::of(&extension), offset: raw.offset, size: raw.size });
        group.extensions.push(extension);
    }
    if !whole {
        groups.pop();
    }
    let mut entries = Vec::with_capacity(groups.len());
    let mut bad = Vec::new();
    for group in groups {
        let images = group.members.iter().filter(|m| m.kind == MemberKind::Image).count();
        let fault = group.fault.or(match images {
            0 => Some(SampleFault::NoImage(group.extensions)),
            1 => None,
            n => Some(SampleFault::ManyImages(n)),
        });
        match fault {
            None => entries.push(Entry {
                shard,
                key: group.key.into_boxed_str(),
                members: group.members.into_boxed_slice(),
            }),
            Some(fault) => bad.push(BadEntry { shard, key: group.key, fault }),
        }
    }
    (entries, bad)
}

/// Open shards of one thread. Bounded, so that thousands of shards do not use up the process's file handles.
#[derive(Debug, Default)]
pub struct ShardFiles {
    open: Vec<(u32, File)>,
}

const OPEN_SHARDS: usize = 32;

impl ShardFiles {
    fn get(&mut self, set: &SampleSet, shard: u32) -> std::io::Result<&File> {
        if let Some(at) = self.open.iter().position(|(s, _)| *s == shard) {
            // Most recently used last.
            let hit = self.open.remove(at);
            self.open.push(hit);
        } else {
            if self.open.len() == OPEN_SHARDS {
                self.open.remove(0);
            }
            self.open.push((shard, File::open(&set.shards[shard as usize])?));
        }
        let last = self.open.len() - 1;
        Ok(&self.open[last].1)
    }
}

/// Reads of single members; every fault names what was wrong, the caller adds shard and key.
impl SampleSet {
    fn read_member(
        &self,
        index: usize,
        kind: &MemberKind,
        what: &'static str,
        max: u64,
        files: &mut ShardFiles,
    ) -> Result<Option<Vec<u8>>, SampleFault> {
        let entry = &self.entries[index];
        let Some(member) = entry.find(kind) else { return Ok(None) };
        if member.size > max {
            return Err(SampleFault::TextTooLarge { what, bytes: member.size, max });
        }
        let read = |e: std::io::Error| SampleFault::Read(e.to_string());
        let file = files.get(self, entry.shard).map_err(read)?;
        let mut bytes = vec![0; member.size as usize];
        read_exact_at(file, &mut bytes, member.offset).map_err(read)?;
        Ok(Some(bytes))
    }

    /// The encoded image of sample `index`.
    ///
    /// # Errors
    /// [`SampleFault::Read`], [`SampleFault::TextTooLarge`].
    pub fn read_image(&self, index: usize, files: &mut ShardFiles) -> Result<Vec<u8>, SampleFault> {
        self.read_member(index, &MemberKind::Image, "image file", MAX_IMAGE_BYTES, files)?
            .ok_or(SampleFault::NoImage(Vec::new()))
    }

    /// The text member of sample `index`, without a byte-order mark and trailing space; `None` when it has none.
    ///
    /// # Errors
    /// [`SampleFault::CaptionNotUtf8`], [`SampleFault::EmptyCaption`], [`SampleFault::TextTooLarge`],
    /// [`SampleFault::Read`].
    pub fn read_text(&self, index: usize, files: &mut ShardFiles) -> Result<Option<String>, SampleFault> {
        let kind = MemberKind::Text;
        let Some(bytes) = self.read_member(index, &kind, "caption", MAX_CAPTION_BYTES, files)? else {
            return Ok(None);
        };
        let text = String::from_utf8(bytes).map_err(|e| SampleFault::CaptionNotUtf8(e.utf8_error().valid_up_to()))?;
        let trimmed = text.trim_start_matches('\u{feff}').trim();
        if trimmed.is_empty() {
            return Err(SampleFault::EmptyCaption);
        }
        Ok(Some(trimmed.to_owned()))
    }

    /// The class index of sample `index`; `None` when it has none.
    ///
    /// # Errors
    /// [`SampleFault::BadClass`], [`SampleFault::TextTooLarge`], [`SampleFault::Read`].
    pub fn read_class(&self, index: usize, files: &mut ShardFiles) -> Result<Option<u32>, SampleFault> {
        let kind = MemberKind::Class;
        let Some(bytes) = self.read_member(index, &kind, "class index", MAX_CLASS_BYTES, files)? else {
            return Ok(None);
        };
        let text = String::from_utf8_lossy(&bytes);
        let text = text.trim();
        text.parse().map(Some).map_err(|_| SampleFault::BadClass(text.to_owned()))
    }

    /// The json member of sample `index`, parsed; `None` when it has none.
    ///
    /// # Errors
    /// [`SampleFault::BadJson`], [`SampleFault::TextTooLarge`], [`SampleFault::Read`].
    pub fn read_json(&self, index: usize, files: &mut ShardFiles) -> Result<Option<serde_json::Value>, SampleFault> {
        let Some(bytes) = self.read_member(index, &MemberKind::Json, "json", MAX_JSON_BYTES, files)? else {
            return Ok(None);
        };
        serde_json::from_slice(&bytes).map(Some).map_err(|e| SampleFault::BadJson(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys() {
        let key = |name: &str| split_key(name).map(|(k, e)| (k.to_owned(), e));
        let some = |k: &str, e: &str| Some((k.to_owned(), e.to_owned()));
        assert_eq!(key("a.jpg"), some("a", "jpg"));
        assert_eq!(key("./a.JPG"), some("a", "jpg"));
        assert_eq!(key("d.x/a.seg.png"), some("d.x/a", "seg.png"));
        assert_eq!(key("d.x/a"), None);
        assert_eq!(key(".hidden"), None);
        assert_eq!(key("d/._a.jpg"), None);
        assert_eq!(key("__meta__.json"), None);
        assert_eq!(key(""), None);
        assert_eq!(key("a."), some("a", ""));
    }
}
