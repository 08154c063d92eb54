//! Small file helpers: positioned reads, atomic writes.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::error::{DataError, Result};

/// Reads exactly `buf.len()` bytes at `offset` without moving a shared cursor.
#[cfg(unix)]
pub(crate) fn read_exact_at(file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buf, offset)
}

/// Reads exactly `buf.len()` bytes at `offset`.
#[cfg(windows)]
pub(crate) fn read_exact_at(file: &File, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !buf.is_empty() {
        match file.seek_read(buf, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                buf = &mut buf[n..];
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Writes a file so that a reader sees the old content or the new, never a part: temporary name, fsync, rename.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let temporary = path.with_file_name(format!(".{name}.tmp-{}", std::process::id()));
    let written = File::create(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    if let Err(e) = written {
        // The first error is the one to report; a temporary file that cannot be removed is harmless.
        let _ = fs::remove_file(&temporary);
        return Err(DataError::write(path, e));
    }
    sync_directory(path.parent().unwrap_or(Path::new(".")));
    Ok(())
}

/// Makes a rename in `dir` durable where the system allows it (Windows has no such call).
pub(crate) fn sync_directory(dir: &Path) {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    if let Ok(handle) = File::open(dir) {
        let _ = handle.sync_all();
    }
}

/// A directory that is removed on drop unless [`Self::keep_as`] gave it its final name.
pub(crate) struct TemporaryDir {
    path: PathBuf,
    armed: bool,
}

impl TemporaryDir {
    /// Creates a hidden directory beside `target`, whose parents are made when missing.
    pub(crate) fn beside(target: &Path) -> Result<Self> {
        let parent = match target.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).map_err(|e| DataError::write(parent, e))?;
        let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let path = parent.join(format!(".{name}.tmp-{}", std::process::id()));
        if path.exists() {
            // Left by a process of the same id that was killed.
            fs::remove_dir_all(&path).map_err(|e| DataError::write(&path, e))?;
        }
        fs::create_dir(&path).map_err(|e| DataError::write(&path, e))?;
        Ok(Self { path, armed: true })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Renames the directory to `target`.
    pub(crate) fn keep_as(mut self, target: &Path) -> Result<()> {
        fs::rename(&self.path, target).map_err(|e| DataError::write(target, e))?;
        self.armed = false;
        sync_directory(target.parent().unwrap_or(Path::new(".")));
        Ok(())
    }
}

impl Drop for TemporaryDir {
    fn drop(&mut self) {
        if self.armed {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}
