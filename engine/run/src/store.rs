//! The store of results: one folder for each stage and content hash.
//!
//! A stage writes into `<stage>-<hash>.partial`. When it is done, the checksums of its files go to `done.json` in
//! the same folder and the folder is renamed to `<stage>-<hash>`: a folder without the suffix is whole. An
//! interrupted training leaves its checkpoints in the partial folder and goes on from them.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::RunError;
use crate::hash::{StageHash, file_digest};
use crate::progress::Interrupt;

const DONE: &str = "done.json";

/// The store's folder.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

/// The list of a finished stage's files, `done.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Done {
    /// The stage's kind.
    pub stage: String,
    /// The stage's whole content hash.
    pub hash: String,
    /// Seconds that it took, over all runs that it was interrupted in.
    pub seconds: f64,
    /// What came out, in a few words.
    pub summary: String,
    /// Its files, sorted by path.
    pub files: Vec<DoneFile>,
}

/// One file of a finished stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DoneFile {
    /// Path below the stage's folder, with `/`.
    pub path: String,
    /// Size in bytes.
    pub bytes: u64,
    /// BLAKE3 of the content.
    pub blake3: String,
}

/// A finished result.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Its folder.
    pub dir: PathBuf,
    /// What `done.json` says.
    pub done: Done,
}

/// The place where a stage is being computed; no other process computes the same one as long as this lives.
#[derive(Debug)]
pub struct Work {
    /// Folder to write to; it may hold the checkpoints of an interrupted training.
    pub dir: PathBuf,
    target: PathBuf,
    stage: String,
    hash: StageHash,
    _lock: File,
}

impl Store {
    /// The store in this folder, which is made when the first result is written.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The store's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn target(&self, stage: &str, hash: &StageHash) -> PathBuf {
        self.root.join(format!("{stage}-{}", hash.short()))
    }

    /// The finished result of a stage, where the store has it whole. A folder whose files do not have the recorded
    /// sizes and checksums counts as absent.
    pub fn get(&self, stage: &str, hash: &StageHash) -> Option<Stored> {
        let dir = self.target(stage, hash);
        let done: Done = serde_json::from_slice(&fs::read(dir.join(DONE)).ok()?).ok()?;
        let whole = done.hash == hash.hex()
            && done.files.iter().all(|file| {
                file_digest(&dir.join(&file.path))
                    .is_ok_and(|(digest, bytes)| bytes == file.bytes && digest == file.blake3)
            });
        if !whole {
            tracing::warn!("the stored result {} is damaged and will be made again", dir.display());
            return None;
        }
        Some(Stored { dir, done })
    }

    /// Opens the working folder of a stage. `keep` leaves what an interrupted run left there. Waits while another
    /// process computes the same stage.
    ///
    /// # Errors
    /// The store can't be written to, or an interrupt came while waiting.
    pub fn work(&self, stage: &str, hash: &StageHash, keep: bool, interrupt: &Interrupt) -> Result<Work, RunError> {
        let target = self.target(stage, hash);
        let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        fs::create_dir_all(&self.root).map_err(|e| RunError::write(&self.root, e))?;
        let lock_path = self.root.join(format!("{name}.lock"));
        let lock = File::create(&lock_path).map_err(|e| RunError::write(&lock_path, e))?;
        let mut told = false;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) => {
                    if !told {
                        tracing::info!("another mcpipe computes {name}; waiting for it");
                        told = true;
                    }
                    interrupt.check()?;
                    std::thread::sleep(Duration::from_millis(200));
                }
                Err(TryLockError::Error(e)) => return Err(RunError::write(&lock_path, e)),
            }
        }
        let dir = self.root.join(format!("{name}.partial"));
        if !keep {
            remove_dir(&dir)?;
        }
        fs::create_dir_all(&dir).map_err(|e| RunError::write(&dir, e))?;
        Ok(Work { dir, target, stage: stage.to_owned(), hash: *hash, _lock: lock })
    }
}

impl Work {
    /// Gives up the working folder: the result is there already.
    pub fn discard(self) {
        // What stays behind is overwritten by the next attempt.
        let _ = fs::remove_dir_all(&self.dir);
    }

    /// Declares the working folder's files the stage's whole result.
    ///
    /// # Errors
    /// A file can't be read or the folder can't be written to.
    pub fn finish(self, seconds: f64, summary: String) -> Result<Stored, RunError> {
        let mut files = Vec::new();
        list(&self.dir, &self.dir, &mut files)?;
        files.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        let done = Done { stage: self.stage.clone(), hash: self.hash.hex(), seconds, summary, files };
        write_json(&self.dir.join(DONE), &done)?;
        // A result may already stand there: a fresh run replaces it, a damaged one is put aside.
        if self.target.exists() {
            let old = self.target.with_extension("old");
            remove_dir(&old)?;
            fs::rename(&self.target, &old).map_err(|e| RunError::write(&self.target, e))?;
            fs::rename(&self.dir, &self.target).map_err(|e| RunError::write(&self.target, e))?;
            remove_dir(&old)?;
        } else {
            fs::rename(&self.dir, &self.target).map_err(|e| RunError::write(&self.target, e))?;
        }
        sync_dir(self.target.parent().unwrap_or(Path::new(".")));
        Ok(Stored { dir: self.target, done })
    }
}

fn remove_dir(dir: &Path) -> Result<(), RunError> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(RunError::write(dir, e)),
        _ => Ok(()),
    }
}

fn list(root: &Path, dir: &Path, files: &mut Vec<DoneFile>) -> Result<(), RunError> {
    for entry in fs::read_dir(dir).map_err(|e| RunError::read(dir, e))? {
        let path = entry.map_err(|e| RunError::read(dir, e))?.path();
        if path.is_dir() {
            list(root, &path, files)?;
            continue;
        }
        let (blake3, bytes) = file_digest(&path).map_err(|e| RunError::read(&path, e))?;
        let below = path.strip_prefix(root).unwrap_or(&path);
        let parts: Vec<_> = below.components().map(|c| c.as_os_str().to_string_lossy()).collect();
        if parts.join("/") != DONE {
            files.push(DoneFile { path: parts.join("/"), bytes, blake3 });
        }
    }
    Ok(())
}

/// Makes a rename durable; a file system that can't is no reason to fail.
pub(crate) fn sync_dir(dir: &Path) {
    if let Ok(dir) = File::open(dir) {
        let _ = dir.sync_all();
    }
}

/// Writes a file whole or not at all: to a temporary name beside it, synced, renamed.
///
/// # Errors
/// The folder can't be written to or the disk is full.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<(), RunError> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".tmp-{}", std::process::id()));
    let temporary = path.with_file_name(name);
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|e| {
        let _ = fs::remove_file(&temporary);
        RunError::write(path, e)
    })?;
    sync_dir(path.parent().unwrap_or(Path::new(".")));
    Ok(())
}

/// [`write_file`] of a value as indented JSON.
///
/// # Errors
/// As [`write_file`].
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), RunError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| RunError::write(path, io::Error::other(e)))?;
    text.push(b'\n');
    write_file(path, &text)
}

/// Reads a JSON file.
///
/// # Errors
/// The file is missing or does not have the expected form.
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, RunError> {
    let bytes = fs::read(path).map_err(|e| RunError::read(path, e))?;
    serde_json::from_slice(&bytes).map_err(|e| RunError::read(path, io::Error::new(io::ErrorKind::InvalidData, e)))
}

/// Puts a finished file of the store into a run directory: a hard link where the file system allows, else a copy.
///
/// # Errors
/// The target can't be written.
pub(crate) fn link_or_copy(from: &Path, to: &Path) -> Result<(), RunError> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).map_err(|e| RunError::write(parent, e))?;
    }
    match fs::remove_file(to) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(RunError::write(to, e)),
        _ => {}
    }
    if fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    fs::copy(from, to).map(drop).map_err(|e| RunError::write(to, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(text: &str) -> StageHash {
        StageHash::of(|h| h.text(text))
    }

    #[test]
    fn only_a_finished_and_undamaged_result_is_found() -> Result<(), RunError> {
        let dir = tempfile::tempdir().map_err(|e| RunError::write(Path::new("tmp"), e))?;
        let store = Store::new(dir.path().join("store"));
        let (h, interrupt) = (hash("a"), Interrupt::default());
        let work = store.work("train", &h, false, &interrupt)?;
        write_file(&work.dir.join("weights"), b"0123")?;
        assert!(store.get("train", &h).is_none());
        drop(work);
        let work = store.work("train", &h, true, &interrupt)?;
        assert!(work.dir.join("weights").exists(), "kept for resuming");
        let stored = work.finish(1.0, String::new())?;
        assert_eq!(stored.done.files.len(), 1);
        assert!(store.get("train", &h).is_some());
        assert!(store.get("train", &hash("b")).is_none());
        fs::write(stored.dir.join("weights"), b"0124").map_err(|e| RunError::write(&stored.dir, e))?;
        assert!(store.get("train", &h).is_none(), "damaged");
        let work = store.work("train", &h, false, &interrupt)?;
        write_file(&work.dir.join("weights"), b"0123")?;
        work.finish(1.0, String::new())?;
        assert!(store.get("train", &h).is_some(), "replaced");
        Ok(())
    }
}
