//! NumPy's array files (`.npy`): https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html.

use std::fs;
use std::path::Path;

use mcpipe_models::weights::{Element, write_atomic};

use crate::error::RunError;

const MAGIC: &[u8] = b"\x93NUMPY";
/// What stands before the values is a multiple of this long.
const ALIGN: usize = 64;

/// Writes `values` of a shape as little-endian single precision in row-major order (version 1.0), whole or not at all.
///
/// # Errors
/// The file can't be written.
pub fn write(path: &Path, shape: &[usize], values: &[f32]) -> Result<(), RunError> {
    let header = header(shape);
    Ok(write_atomic(path, |file| {
        file.write_all(&header)?;
        let mut bytes = Vec::new();
        // In parts, so that the bytes don't stand in memory a second time.
        for part in values.chunks(1 << 16) {
            bytes.clear();
            bytes.extend(part.iter().flat_map(|v| v.to_le_bytes()));
            file.write_all(&bytes)?;
        }
        Ok(())
    })?)
}

fn header(shape: &[usize]) -> Vec<u8> {
    let sizes = shape.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    // Python's tuple of one has a comma.
    let comma = if shape.len() == 1 { "," } else { "" };
    let mut dict = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({sizes}{comma}), }}");
    let before = MAGIC.len() + 4;
    let padded = (before + dict.len() + 1).next_multiple_of(ALIGN);
    dict.extend(std::iter::repeat_n(' ', padded - before - dict.len() - 1));
    dict.push('\n');
    let mut bytes = MAGIC.to_vec();
    bytes.extend([1, 0]);
    bytes.extend((dict.len() as u16).to_le_bytes());
    bytes.extend(dict.bytes());
    bytes
}

/// Reads shape and values of an array in half, single or double precision, rounded to single.
///
/// # Errors
/// A file that can't be read, is damaged, or holds something else.
pub fn read(path: &Path) -> Result<(Vec<usize>, Vec<f32>), RunError> {
    let bytes = fs::read(path).map_err(|e| RunError::read(path, e))?;
    parse(&bytes).map_err(|reason| RunError::Usage(format!("{}: {reason}", path.display())))
}

fn parse(bytes: &[u8]) -> Result<(Vec<usize>, Vec<f32>), String> {
    let rest = bytes.strip_prefix(MAGIC).ok_or("not an npy file")?;
    let cut = || "damaged: it ends inside its header".to_owned();
    let (length, rest) = match rest {
        [1, _, a, b, rest @ ..] => (usize::from(u16::from_le_bytes([*a, *b])), rest),
        [2 | 3, _, a, b, c, d, rest @ ..] => (u32::from_le_bytes([*a, *b, *c, *d]) as usize, rest),
        [1..=3, ..] | [] => return Err(cut()),
        [version, ..] => return Err(format!("npy version {version} is not read")),
    };
    let (header, data) = rest.split_at_checked(length).ok_or_else(cut)?;
    let header = String::from_utf8_lossy(header);
    let missing = |key: &str| format!("damaged: its header has no `{key}`");
    let descr = value(&header, "descr").and_then(quoted).ok_or_else(|| missing("descr"))?;
    let element = match descr {
        "<f2" => Element::F16,
        "<f4" => Element::F32,
        "<f8" => Element::F64,
        other => return Err(format!("holds `{other}`; little-endian `<f4`, `<f2` and `<f8` are read")),
    };
    match value(&header, "fortran_order") {
        Some(order) if order.starts_with("False") => {}
        Some(_) => return Err("is in column-major order; save `numpy.ascontiguousarray` of it".into()),
        None => return Err(missing("fortran_order")),
    }
    let shape = value(&header, "shape").and_then(tuple).ok_or_else(|| missing("shape"))?;
    let expected = shape.iter().try_fold(element.width(), |all, &size| all.checked_mul(size));
    if expected != Some(data.len()) {
        return Err(format!("damaged: {} bytes are no `{descr}` of shape {shape:?}", data.len()));
    }
    let values = element.decode(data).ok_or_else(|| missing("descr"))?;
    Ok((shape, values))
}

/// What follows a key of the header's dictionary.
fn value<'a>(header: &'a str, key: &str) -> Option<&'a str> {
    let quoted = [format!("'{key}'"), format!("\"{key}\"")];
    let rest = quoted.iter().find_map(|key| header.split_once(key.as_str()))?.1;
    Some(rest.trim_start().strip_prefix(':')?.trim_start())
}

fn quoted(text: &str) -> Option<&str> {
    let quote = text.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    text[1..].split_once(quote).map(|(inner, _)| inner)
}

fn tuple(text: &str) -> Option<Vec<usize>> {
    let (inner, _) = text.strip_prefix('(')?.split_once(')')?;
    inner.split(',').map(str::trim).filter(|size| !size.is_empty()).map(|size| size.parse().ok()).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a panic is how a test fails
mod tests {
    use super::*;

    fn file(descr: &str, order: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let dict = format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}\n");
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((dict.len() as u16).to_le_bytes());
        bytes.extend(dict.bytes());
        bytes.extend(data);
        bytes
    }

    #[test]
    fn what_is_written_is_as_numpy_writes_it() {
        // numpy.save of numpy.zeros((2, 3), 'f4'), up to the values.
        let mut expected =
            b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }".to_vec();
        expected.resize(127, b' ');
        expected.push(b'\n');
        assert_eq!(header(&[2, 3]), expected);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.npy");
        let values = [1.5, -2.0, f32::MIN_POSITIVE, 0.1, 3.0, f32::MAX];
        write(&path, &[3, 2], &values).unwrap();
        assert_eq!(read(&path).unwrap(), (vec![3, 2], values.to_vec()));
    }

    #[test]
    fn halves_and_doubles_are_read() {
        let halves = file("<f2", "False", "(2,)", &[0x00, 0x3c, 0x00, 0xc1]);
        assert_eq!(parse(&halves).unwrap(), (vec![2], vec![1.0, -2.5]));
        let double = file("<f8", "False", "()", &0.1f64.to_le_bytes());
        assert_eq!(parse(&double).unwrap(), (vec![], vec![0.1]));
    }

    #[test]
    fn what_can_not_be_read_is_said() {
        let refused = |bytes: &[u8], word: &str| {
            let error = parse(bytes).unwrap_err();
            assert!(error.contains(word), "{error}");
        };
        refused(b"PK", "not an npy");
        refused(b"\x93NUMPY\x01\x00\xff", "inside its header");
        refused(b"\x93NUMPY\x09\x00\x00\x00", "version 9");
        refused(&file(">f4", "False", "(1,)", &[0; 4]), "`>f4`");
        refused(&file("<f4", "True", "(1,)", &[0; 4]), "column-major");
        refused(&file("<f4", "False", "(2,)", &[0; 4]), "4 bytes");
        refused(&file("<f4", "False", "(18446744073709551615, 18446744073709551615)", &[0; 4]), "4 bytes");
    }
}
