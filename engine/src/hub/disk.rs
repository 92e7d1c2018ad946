//! The cache's links, and the room on its disk.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Error, io};

/// Points `pointer` at `blob`, as the cache's other users do; a copy where links are not to be had.
pub(super) fn link(blob: &Path, pointer: &Path, depth: usize) -> Result<(), Error> {
    if let Some(folder) = pointer.parent() {
        fs::create_dir_all(folder).map_err(io(folder, "create"))?;
    }
    if fs::symlink_metadata(pointer).is_ok() {
        fs::remove_file(pointer).map_err(io(pointer, "replace"))?;
    }
    #[cfg(unix)]
    {
        let mut target: PathBuf = std::iter::repeat_n("..", depth).collect();
        target.push("blobs");
        target.push(blob.file_name().unwrap_or_default());
        if std::os::unix::fs::symlink(target, pointer).is_ok() {
            return Ok(());
        }
    }
    let _ = depth;
    fs::copy(blob, pointer)
        .map(|_| ())
        .map_err(io(pointer, "write"))
}

pub(super) fn check_space(path: &Path, need: u64, free: Option<u64>) -> Result<(), Error> {
    match free {
        Some(free) if free < need => Err(Error::Space {
            path: path.into(),
            need,
            free,
        }),
        _ => Ok(()),
    }
}

/// Bytes we may write where `path` is or will be; `None` where the system does not say.
#[cfg(unix)]
pub(crate) fn free_bytes(path: &Path) -> Option<u64> {
    let there = path.ancestors().find(|path| path.exists())?;
    let found = rustix::fs::statvfs(there).ok()?;
    found.f_bavail.checked_mul(found.f_frsize)
}

#[cfg(not(unix))]
pub(crate) fn free_bytes(_: &Path) -> Option<u64> {
    None
}
