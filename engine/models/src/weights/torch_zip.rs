//! The zip archive that `torch.save` writes: `NAME/data.pkl` and `NAME/data/KEY`, all stored without compression, so
//! that every storage can be read where it lies. Format: PKWARE's APPNOTE, with its 64-bit extension.
//!
//! Checksums of members are not compared: PyTorch can be told not to compute them
//! (`torch.serialization.set_crc32_options`), and its own reader ignores them.

use std::collections::HashMap;

/// Bytes of the members of an archive, by name.
#[derive(Debug)]
pub(super) struct Archive<'a> {
    members: HashMap<&'a str, (usize, usize)>,
}

const END: &[u8] = b"PK\x05\x06";
const END_64: &[u8] = b"PK\x06\x06";
const LOCATOR_64: &[u8] = b"PK\x06\x07";
const ENTRY: &[u8] = b"PK\x01\x02";
const LOCAL: &[u8] = b"PK\x03\x04";
/// Length of the end record without its comment, and of the greatest comment.
const END_LEN: usize = 22;
const COMMENT: usize = 0xffff;

/// `N` little-endian bytes at `at`.
fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<u64, String> {
    let mut le = [0; 8];
    let held = at.checked_add(N).and_then(|end| bytes.get(at..end));
    le[..N].copy_from_slice(held.ok_or_else(|| format!("the archive ends before byte {at}"))?);
    Ok(u64::from_le_bytes(le))
}

fn place<const N: usize>(bytes: &[u8], at: usize) -> Result<usize, String> {
    let n = number::<N>(bytes, at)?;
    usize::try_from(n).map_err(|_| format!("byte {at}: {n} is no place in the file"))
}

/// Where the directory starts and how many entries it has.
fn directory(file: &[u8]) -> Result<(usize, usize), String> {
    let lowest = file.len().saturating_sub(END_LEN + COMMENT);
    let end = (lowest..=file.len().saturating_sub(END_LEN))
        .rev()
        .find(|&at| file[at..].starts_with(END))
        .ok_or("the archive's directory is missing: the file is cut off")?;
    let (entries, start) = (place::<2>(file, end + 10)?, place::<4>(file, end + 16)?);
    let locator = end.checked_sub(20).filter(|&at| file[at..].starts_with(LOCATOR_64));
    let Some(locator) = locator else { return Ok((start, entries)) };
    let end = place::<8>(file, locator + 8)?;
    if !file.get(end..).is_some_and(|rest| rest.starts_with(END_64)) {
        return Err(format!("byte {end}: the archive's 64-bit directory is missing"));
    }
    Ok((place::<8>(file, end + 48)?, place::<8>(file, end + 32)?))
}

impl<'a> Archive<'a> {
    /// Reads the directory of an archive.
    ///
    /// # Errors
    /// A damaged archive, or one with compressed or encrypted members.
    pub fn open(file: &'a [u8]) -> Result<Archive<'a>, String> {
        let (mut at, entries) = directory(file)?;
        let mut members = HashMap::new();
        for _ in 0..entries {
            if !file.get(at..).is_some_and(|rest| rest.starts_with(ENTRY)) {
                return Err(format!("byte {at}: an entry of the archive's directory is missing"));
            }
            let (flags, method) = (place::<2>(file, at + 8)?, place::<2>(file, at + 10)?);
            let (mut packed, mut size) = (number::<4>(file, at + 20)?, number::<4>(file, at + 24)?);
            let lengths = (place::<2>(file, at + 28)?, place::<2>(file, at + 30)?, place::<2>(file, at + 32)?);
            let mut local = number::<4>(file, at + 42)?;
            let name_at = at + 46;
            let (extra_at, next) = (name_at + lengths.0, name_at + lengths.0 + lengths.1 + lengths.2);
            let name = file.get(name_at..extra_at).and_then(|b| std::str::from_utf8(b).ok());
            let name = name.ok_or_else(|| format!("byte {name_at}: a member's name is no text"))?;
            wide(file, extra_at, extra_at + lengths.1, [&mut size, &mut packed, &mut local])?;
            if flags & 1 != 0 || method != 0 || packed != size {
                return Err(format!(
                    "member `{}` is compressed or encrypted; torch.save stores as is",
                    name.escape_debug()
                ));
            }
            let damaged = || format!("member `{}` lies outside the file", name.escape_debug());
            let local = usize::try_from(local).map_err(|_| damaged())?;
            if !file.get(local..).is_some_and(|rest| rest.starts_with(LOCAL)) {
                return Err(damaged());
            }
            // The local header has a name and extra fields of its own lengths.
            let start = local + 30 + place::<2>(file, local + 26)? + place::<2>(file, local + 28)?;
            let end = usize::try_from(size).ok().and_then(|size| start.checked_add(size));
            let end = end.filter(|&end| end <= file.len()).ok_or_else(damaged)?;
            if members.insert(name, (start, end)).is_some() {
                return Err(format!("member `{}` is there twice", name.escape_debug()));
            }
            at = next;
        }
        Ok(Archive { members })
    }

    /// First byte and end of a member.
    pub fn member(&self, name: &str) -> Option<(usize, usize)> {
        self.members.get(name).copied()
    }

    /// The folder of the pickle, with its slash; empty where it lies at the top.
    pub fn folder(&self) -> Option<&'a str> {
        let mut folders: Vec<&str> = self.members.keys().filter_map(|name| name.strip_suffix("data.pkl")).collect();
        folders.retain(|folder| folder.is_empty() || folder.ends_with('/'));
        folders.into_iter().min_by_key(|folder| (folder.len(), *folder))
    }
}

/// Replaces the 32-bit values that are full by those of the 64-bit extra field, which holds them in this order.
fn wide(file: &[u8], mut at: usize, end: usize, values: [&mut u64; 3]) -> Result<(), String> {
    while at + 4 <= end {
        let (id, len) = (number::<2>(file, at)?, place::<2>(file, at + 2)?);
        at += 4;
        if id == 1 {
            let mut from = at;
            for value in values {
                if *value == 0xffff_ffff && from + 8 <= (at + len).min(end) {
                    *value = number::<8>(file, from)?;
                    from += 8;
                }
            }
            return Ok(());
        }
        at += len;
    }
    Ok(())
}
