//! One pass over the headers of a tar: where each member's bytes lie, and every trouble of its structure.
//!
//! Field parsing is the `tar` crate's; the walk is our own because samples are read at random later (so offsets are
//! needed) and because disagreeing PAX and ustar sizes have to be refused, which no reader of the crate reports.

use std::fs::File;
use std::path::Path;

use crate::error::{DataError, Result, ShardFault};
use crate::files::read_exact_at;

const BLOCK: u64 = 512;
/// Largest PAX or GNU long-name record that is read into memory.
const MAX_EXTENSION: u64 = 1 << 20;
/// Headers of small members lie close together; reading this much at once saves most system calls.
const WINDOW: usize = 32 * 1024;

/// A regular file in a tar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawMember {
    /// Path inside the tar; bytes that are not UTF-8 are replaced.
    pub name: String,
    /// Offset of its first byte in the tar.
    pub offset: u64,
    /// Its size in bytes.
    pub size: u64,
}

/// What a scan of one tar found.
#[derive(Debug, Clone)]
pub struct TarScan {
    /// Regular files in order, up to the first fault.
    pub members: Vec<RawMember>,
    /// The fault that ended the scan, if any.
    pub fault: Option<ShardFault>,
    /// BLAKE3 of every header block in order: changes with names, sizes, times and order.
    pub digest: blake3::Hash,
}

/// Scans the tar at `path`.
///
/// # Errors
/// [`DataError::Read`] when the file cannot be read; faults of the content are in [`TarScan::fault`].
pub fn scan_tar(path: &Path) -> Result<TarScan> {
    let file = File::open(path).map_err(|e| DataError::read(path, e))?;
    let meta = file.metadata().map_err(|e| DataError::read(path, e))?;
    if !meta.is_file() {
        return Err(DataError::read(path, std::io::Error::other("not a regular file")));
    }
    let mut source = Source { file: &file, len: meta.len(), window: Vec::new(), start: 0 };
    let mut scan = TarScan { members: Vec::new(), fault: None, digest: blake3::Hasher::new().finalize() };
    let mut hasher = blake3::Hasher::new();
    match walk(&mut source, &mut scan.members, &mut hasher) {
        Ok(()) => {}
        Err(Stop::Fault(fault)) => scan.fault = Some(fault),
        Err(Stop::Io(e)) => return Err(DataError::read(path, e)),
    }
    scan.digest = hasher.finalize();
    Ok(scan)
}

enum Stop {
    Fault(ShardFault),
    Io(std::io::Error),
}

impl From<ShardFault> for Stop {
    fn from(fault: ShardFault) -> Self {
        Self::Fault(fault)
    }
}

struct Source<'a> {
    file: &'a File,
    len: u64,
    window: Vec<u8>,
    start: u64,
}

impl Source<'_> {
    /// `n` bytes at `offset`; the caller has checked that they lie inside the file.
    fn bytes(&mut self, offset: u64, n: usize) -> Result<&[u8], Stop> {
        let inside = offset >= self.start && offset - self.start + n as u64 <= self.window.len() as u64;
        if !inside {
            let left = usize::try_from(self.len - offset).unwrap_or(usize::MAX);
            self.window.resize(n.max(WINDOW.min(left)), 0);
            read_exact_at(self.file, &mut self.window, offset).map_err(Stop::Io)?;
            self.start = offset;
        }
        let at = (offset - self.start) as usize;
        Ok(&self.window[at..at + n])
    }
}

/// Extensions that stand before a member and apply to it.
#[derive(Default)]
struct Pending {
    pax_path: Option<String>,
    pax_size: Option<u64>,
    gnu_name: Option<String>,
}

fn walk(source: &mut Source<'_>, members: &mut Vec<RawMember>, hasher: &mut blake3::Hasher) -> Result<(), Stop> {
    if source.len == 0 {
        return Err(ShardFault::Empty.into());
    }
    let magic = source.bytes(0, source.len.min(6) as usize)?;
    if let Some(kind) = compression(magic) {
        return Err(ShardFault::Compressed(kind).into());
    }
    let mut at = 0u64;
    let mut pending = Pending::default();
    let mut global_size = None;
    loop {
        if source.len - at < BLOCK {
            // Nothing after the last member, or a part of a header.
            let Some(last) = members.last() else {
                return Err(ShardFault::BadHeader {
                    offset: at,
                    reason: format!("{} bytes are too few for a tar", source.len),
                }
                .into());
            };
            return Err(ShardFault::NoEnd { member: last.name.clone(), at }.into());
        }
        let block = source.bytes(at, BLOCK as usize)?;
        if block.iter().all(|&b| b == 0) {
            return if members.is_empty() { Err(ShardFault::Empty.into()) } else { Ok(()) };
        }
        hasher.update(block);
        let header = tar::Header::from_byte_slice(block).clone();
        check_sum(&header).map_err(|reason| ShardFault::BadHeader { offset: at, reason })?;
        let ustar_size =
            header.entry_size().map_err(|e| ShardFault::BadHeader { offset: at, reason: e.to_string() })?;
        let raw_name = String::from_utf8_lossy(&header.path_bytes()).into_owned();
        let kind = header.entry_type();
        let data = at + BLOCK;
        // Links and directories carry no data whatever their size field says.
        let has_data = !matches!(
            kind,
            tar::EntryType::Link
                | tar::EntryType::Symlink
                | tar::EntryType::Directory
                | tar::EntryType::Char
                | tar::EntryType::Block
                | tar::EntryType::Fifo
        );
        let size = if has_data { ustar_size } else { 0 };
        let name = pending.pax_path.clone().or_else(|| pending.gnu_name.clone()).unwrap_or(raw_name);
        let end = data
            .checked_add(size)
            .ok_or_else(|| ShardFault::BadHeader { offset: at, reason: format!("size {size} overflows") })?;
        if kind.is_pax_local_extensions() || kind.is_pax_global_extensions() || kind.is_gnu_longname() {
            check_end(source.len, &name, end)?;
            if size > MAX_EXTENSION {
                return Err(
                    ShardFault::BadHeader { offset: at, reason: format!("extension record of {size} bytes") }.into()
                );
            }
            let record = source.bytes(data, size as usize)?.to_vec();
            hasher.update(&record);
            if kind.is_gnu_longname() {
                let text = record.split(|&b| b == 0).next().unwrap_or_default();
                pending.gnu_name = Some(String::from_utf8_lossy(text).into_owned());
            } else {
                let (path, size) =
                    pax_fields(&record).map_err(|reason| ShardFault::BadHeader { offset: data, reason })?;
                if kind.is_pax_global_extensions() {
                    global_size = size.or(global_size);
                } else {
                    pending.pax_path = path.or(pending.pax_path);
                    pending.pax_size = size.or(pending.pax_size);
                }
            }
        } else {
            if has_data
                && let Some(pax) = pending.pax_size.or(global_size)
                && pax != size
            {
                return Err(ShardFault::SizeDisagreement { member: name, pax, ustar: size }.into());
            }
            if kind.is_gnu_sparse() {
                let reason = "a GNU sparse file is not supported";
                return Err(ShardFault::Unsupported { member: name, reason }.into());
            }
            check_end(source.len, &name, end)?;
            if kind.is_file() || kind.is_contiguous() {
                members.push(RawMember { name, offset: data, size });
            }
            pending = Pending::default();
        }
        // Padding may be missing at the very end of a cut file: then `at` passes the end, and the marker is missing.
        at = end.div_ceil(BLOCK).saturating_mul(BLOCK).min(source.len);
    }
}

fn check_end(len: u64, member: &str, needs: u64) -> Result<(), ShardFault> {
    if needs > len {
        return Err(ShardFault::Truncated { member: member.to_owned(), needs, has: len });
    }
    Ok(())
}

fn compression(magic: &[u8]) -> Option<&'static str> {
    let kinds: [(&[u8], &'static str); 4] =
        [(b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"\xfd7zXZ\0", "xz"), (b"BZh", "bzip2")];
    kinds.into_iter().find(|(m, _)| magic.starts_with(m)).map(|(_, kind)| kind)
}

/// The sum of a header's bytes with its checksum field read as spaces.
fn check_sum(header: &tar::Header) -> Result<(), String> {
    let stored = header.cksum().map_err(|_| "its checksum field is not a number".to_owned())?;
    let bytes = header.as_bytes();
    let sum: u32 = bytes
        .iter()
        .enumerate()
        .map(|(i, &b)| if (148..156).contains(&i) { u32::from(b' ') } else { u32::from(b) })
        .sum();
    if sum == stored { Ok(()) } else { Err(format!("its checksum is {sum}, not {stored}")) }
}

/// `path` and `size` of a PAX record: lines of `LENGTH KEY=VALUE\n`, taken by their lengths, since a value may hold
/// line breaks.
fn pax_fields(record: &[u8]) -> Result<(Option<String>, Option<u64>), String> {
    let (mut path, mut size) = (None, None);
    let mut rest = record;
    while !rest.is_empty() {
        let (line, key, value) = pax_line(rest).ok_or("malformed PAX record")?;
        match key {
            b"path" => path = Some(String::from_utf8_lossy(value).into_owned()),
            b"size" => {
                let text = String::from_utf8_lossy(value);
                let number = text.parse().map_err(|_| format!("PAX size `{text}` is not a number"))?;
                size = Some(number);
            }
            _ => {}
        }
        rest = &rest[line..];
    }
    Ok((path, size))
}

/// Length, key and value of the first line of a PAX record.
fn pax_line(record: &[u8]) -> Option<(usize, &[u8], &[u8])> {
    let space = record.iter().take(20).position(|&b| b == b' ')?;
    let length: usize = std::str::from_utf8(&record[..space]).ok()?.parse().ok()?;
    let line = record.get(space + 1..length)?;
    let line = line.strip_suffix(b"\n")?;
    let equals = line.iter().position(|&b| b == b'=')?;
    Some((length, &line[..equals], &line[equals + 1..]))
}
