//! Lists of shards: brace expansion, directories in CLIP_benchmark's layout, `nshards.txt`.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{DataError, Result};

/// Most strings one pattern may expand to; a typo such as `{0..99999999999}` is an error, not a full memory.
pub const MAX_EXPANSION: usize = 1_000_000;

/// File name that holds the number of shards of a split.
pub const NSHARDS: &str = "nshards.txt";

/// Expands the braces of a shard pattern: `{00000..00099}` (zero-padded to the wider end), `{0..9}`, `{a,b}`, any
/// number of them, not nested. Without braces the pattern is returned as it is.
///
/// # Errors
/// [`DataError::Braces`] for an unclosed, nested or empty brace, a descending range, or too many results.
pub fn expand_braces(pattern: &str) -> Result<Vec<String>> {
    let fail = |reason: String| DataError::Braces { pattern: pattern.to_owned(), reason };
    let mut expanded = vec![String::new()];
    let mut rest = pattern;
    loop {
        let Some(open) = rest.find(['{', '}']) else {
            expanded.iter_mut().for_each(|s| s.push_str(rest));
            return Ok(expanded);
        };
        if rest[open..].starts_with('}') {
            return Err(fail("`}` without `{`".into()));
        }
        let after = &rest[open + 1..];
        let close = after.find(['{', '}']).ok_or_else(|| fail("`{` is not closed".into()))?;
        if after[close..].starts_with('{') {
            return Err(fail("braces inside braces are not supported".into()));
        }
        let choices = alternatives(&after[..close]).map_err(fail)?;
        if expanded.len().saturating_mul(choices.len()) > MAX_EXPANSION {
            return Err(fail(format!("expands to more than {MAX_EXPANSION} names")));
        }
        let literal = &rest[..open];
        expanded =
            expanded.iter().flat_map(|prefix| choices.iter().map(move |c| format!("{prefix}{literal}{c}"))).collect();
        rest = &after[close + 1..];
    }
}

/// What stands between two braces: `a..b` or `a,b,c`.
fn alternatives(body: &str) -> Result<Vec<String>, String> {
    if let Some((first, last)) = body.split_once("..") {
        let number = |text: &str| {
            if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
                return Err(format!("`{{{body}}}`: `{text}` is not a number"));
            }
            text.parse::<u64>().map_err(|_| format!("`{{{body}}}`: `{text}` is too large"))
        };
        let (low, high) = (number(first)?, number(last)?);
        if low > high {
            return Err(format!("`{{{body}}}`: {low} is above {high}"));
        }
        if high - low >= MAX_EXPANSION as u64 {
            return Err(format!("`{{{body}}}` names more than {MAX_EXPANSION} files"));
        }
        let padded = |text: &str| text.len() > 1 && text.starts_with('0');
        let width = if padded(first) || padded(last) { first.len().max(last.len()) } else { 0 };
        return Ok((low..=high).map(|n| format!("{n:0width$}")).collect());
    }
    if body.contains(',') {
        return Ok(body.split(',').map(str::to_owned).collect());
    }
    Err(format!("`{{{body}}}`: expected a range `{{0..9}}` or a list `{{a,b}}`"))
}

/// The shards that patterns name, in the order given, each checked to be there.
///
/// A pattern is a file, a brace pattern, a split directory with `nshards.txt` (CLIP_benchmark's layout), or a
/// directory of `*.tar` files (sorted by name).
///
/// # Errors
/// [`DataError::MissingShards`] with every missing file, [`DataError::NoShards`], [`DataError::Braces`],
/// [`DataError::BadNshards`].
pub fn list_shards<S: AsRef<str>>(patterns: &[S]) -> Result<Vec<PathBuf>> {
    let mut shards = Vec::new();
    for pattern in patterns {
        let pattern = pattern.as_ref();
        // A directory whose own name holds braces is taken literally.
        let path = Path::new(pattern);
        if path.is_dir() {
            shards.extend(directory_shards(path)?);
        } else {
            shards.extend(expand_braces(pattern)?.into_iter().map(PathBuf::from));
        }
    }
    if shards.is_empty() {
        return Err(DataError::NoShards("the list of shards is empty".into()));
    }
    require_files(&shards)?;
    Ok(shards)
}

fn directory_shards(dir: &Path) -> Result<Vec<PathBuf>> {
    if dir.join(NSHARDS).is_file() {
        let count = read_nshards(dir)?;
        return Ok((0..count).map(|i| dir.join(format!("{i}.tar"))).collect());
    }
    let tars = tar_files(dir)?;
    if tars.is_empty() {
        return Err(DataError::NoShards(format!("{} holds no .tar file", dir.display())));
    }
    Ok(tars)
}

/// The `*.tar` files of a directory, sorted by name.
///
/// # Errors
/// [`DataError::Read`] when the directory cannot be listed.
pub fn tar_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut tars = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| DataError::read(dir, e))? {
        let path = entry.map_err(|e| DataError::read(dir, e))?.path();
        if path.extension().is_some_and(|e| e == "tar") && path.is_file() {
            tars.push(path);
        }
    }
    tars.sort();
    Ok(tars)
}

fn require_files(shards: &[PathBuf]) -> Result<()> {
    let missing: Vec<PathBuf> = shards.iter().filter(|p| !p.is_file()).cloned().collect();
    if missing.is_empty() { Ok(()) } else { Err(DataError::MissingShards { total: shards.len(), missing }) }
}

/// Shards `0.tar`, `1.tar`, ... of a split directory in CLIP_benchmark's layout, as many as its `nshards.txt` says.
///
/// # Errors
/// [`DataError::MissingNshards`], [`DataError::BadNshards`], [`DataError::MissingShards`].
pub fn split_shards(split: &Path) -> Result<Vec<PathBuf>> {
    let count = read_nshards(split)?;
    let shards: Vec<PathBuf> = (0..count).map(|i| split.join(format!("{i}.tar"))).collect();
    require_files(&shards)?;
    Ok(shards)
}

fn read_nshards(split: &Path) -> Result<usize> {
    let path = split.join(NSHARDS);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(DataError::MissingNshards { path });
        }
        Err(e) => return Err(DataError::read(&path, e)),
    };
    let text = String::from_utf8_lossy(&bytes);
    match text.trim().parse::<usize>() {
        Ok(count) if (1..=MAX_EXPANSION).contains(&count) => Ok(count),
        _ => Err(DataError::BadNshards { path, found: text.trim().chars().take(40).collect() }),
    }
}

/// Writes `nshards.txt` of every split of `dir`: of `dir` itself when it holds tar files, else of each of its
/// directories that does. Returns each split with its number of shards.
///
/// # Errors
/// [`DataError::NoShards`] when there is no tar file, [`DataError::MissingShards`] when the numbers have a gap,
/// [`DataError::NoShards`] when the names are not the unpadded `0.tar`, `1.tar`, ..., [`DataError::Write`].
pub fn index(dir: &Path) -> Result<Vec<(PathBuf, usize)>> {
    let mut splits = Vec::new();
    if !tar_files(dir)?.is_empty() {
        splits.push(dir.to_owned());
    } else {
        for entry in fs::read_dir(dir).map_err(|e| DataError::read(dir, e))? {
            let path = entry.map_err(|e| DataError::read(dir, e))?.path();
            if path.is_dir() && !tar_files(&path)?.is_empty() {
                splits.push(path);
            }
        }
        splits.sort();
    }
    if splits.is_empty() {
        return Err(DataError::NoShards(format!("{} and its directories hold no .tar file", dir.display())));
    }
    // All splits are looked at before the first file is written.
    let counted = splits
        .into_iter()
        .map(|split| numbered_shards(&split).map(|count| (split, count)))
        .collect::<Result<Vec<_>>>()?;
    for (split, count) in &counted {
        crate::files::write_atomic(&split.join(NSHARDS), format!("{count}\n").as_bytes())?;
    }
    Ok(counted)
}

/// Number of shards of a split whose tar files are named `0.tar` to `n-1.tar` without a gap.
fn numbered_shards(split: &Path) -> Result<usize> {
    let mut numbers = Vec::new();
    for tar in tar_files(split)? {
        let stem = tar.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        match stem.parse::<usize>() {
            Ok(n) if n < MAX_EXPANSION && n.to_string() == stem => numbers.push(n),
            _ => {
                return Err(DataError::NoShards(format!(
                    "{} is not named like a shard of an evaluation set (0.tar, 1.tar, ... without padding)",
                    tar.display()
                )));
            }
        }
    }
    let count = numbers.iter().max().map_or(0, |n| n + 1);
    let present: std::collections::HashSet<usize> = numbers.into_iter().collect();
    let missing: Vec<PathBuf> =
        (0..count).filter(|n| !present.contains(n)).map(|n| split.join(format!("{n}.tar"))).collect();
    if missing.is_empty() { Ok(count) } else { Err(DataError::MissingShards { total: count, missing }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expand(pattern: &str) -> Vec<String> {
        expand_braces(pattern).unwrap_or_else(|e| panic!("{e}"))
    }

    fn reason(pattern: &str) -> String {
        match expand_braces(pattern) {
            Err(DataError::Braces { reason, .. }) => reason,
            other => panic!("{pattern}: {other:?}"),
        }
    }

    #[test]
    fn braces() {
        assert_eq!(expand("a.tar"), ["a.tar"]);
        assert_eq!(expand("x/{0..2}.tar"), ["x/0.tar", "x/1.tar", "x/2.tar"]);
        assert_eq!(expand("{008..010}"), ["008", "009", "010"]);
        assert_eq!(expand("{8..10}"), ["8", "9", "10"]);
        assert_eq!(expand("{0..0}"), ["0"]);
        assert_eq!(expand("{00000..00099}.tar").len(), 100);
        assert_eq!(expand("{a,b}/{0..1}"), ["a/0", "a/1", "b/0", "b/1"]);
        assert_eq!(expand("{a,}x"), ["ax", "x"]);
        assert_eq!(expand("ü{1,2}é"), ["ü1é", "ü2é"]);
    }

    #[test]
    fn braces_rejected() {
        assert_eq!(reason("{0..1"), "`{` is not closed");
        assert_eq!(reason("0..1}"), "`}` without `{`");
        assert!(reason("{a,{b,c}}").contains("inside"));
        assert!(reason("{}").contains("expected a range"));
        assert!(reason("{abc}").contains("expected a range"));
        assert!(reason("{0..x}").contains("`x` is not a number"));
        assert!(reason("{-1..3}").contains("not a number"));
        assert!(reason("{5..3}").contains("above"));
        assert!(reason("{0..99999999999}").contains("more than"));
        assert!(reason("{0..999999999999999999999999}").contains("too large"));
        assert!(reason("{0..9999}{0..9999}").contains("more than"));
    }

    #[test]
    fn missing_shards_are_all_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("1.tar"), b"").unwrap();
        let pattern = format!("{}/{{0..3}}.tar", dir.path().display());
        match list_shards(&[pattern]) {
            Err(DataError::MissingShards { total: 4, missing }) => {
                let names: Vec<_> = missing.iter().map(|p| p.file_name().unwrap().to_owned()).collect();
                assert_eq!(names, ["0.tar", "2.tar", "3.tar"]);
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(list_shards::<&str>(&[]), Err(DataError::NoShards(_))));
    }

    #[test]
    fn directories() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        assert!(matches!(list_shards(&[path]), Err(DataError::NoShards(_))));
        for i in 0..12 {
            fs::write(dir.path().join(format!("{i}.tar")), b"").unwrap();
        }
        assert_eq!(list_shards(&[path]).unwrap().len(), 12);
        assert!(matches!(split_shards(dir.path()), Err(DataError::MissingNshards { .. })));
        for bad in ["", "x", "0", "-3", "1 2"] {
            fs::write(dir.path().join(NSHARDS), bad).unwrap();
            assert!(matches!(split_shards(dir.path()), Err(DataError::BadNshards { .. })), "{bad}");
        }
        assert_eq!(index(dir.path()).unwrap()[0].1, 12);
        let shards = split_shards(dir.path()).unwrap();
        assert!(shards[10].ends_with("10.tar"));
        assert_eq!(list_shards(&[path]).unwrap(), shards);
        fs::remove_file(dir.path().join("3.tar")).unwrap();
        assert!(matches!(split_shards(dir.path()), Err(DataError::MissingShards { .. })));
        assert!(matches!(index(dir.path()), Err(DataError::MissingShards { .. })));
        fs::write(dir.path().join("00003.tar"), b"").unwrap();
        assert!(matches!(index(dir.path()), Err(DataError::NoShards(_))));
    }
}
