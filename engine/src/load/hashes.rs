//! Hashes of weights that were computed before: whoever asks about a document again need not wait until gigabytes are
//! read once more.
//!
//! A hash is known by what the system says of the files (device, inode, size, times of change of contents and of
//! entry), by how each weight is made from them, and by the program's version. The time of an entry's change is the
//! system's own: no program can set it back, and a file that is renamed to another's place gets a new one. A file that
//! changed within the last seconds has no known hash, since it may change again within the same tick of the clock.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use strata_converters::ModelFiles;
use strata_converters::mapping::{Mapping, Row};
use strata_kernels::cuda::KernelCache;
use xxhash_rust::xxh3::xxh3_128;

use super::Result;
use super::device::Folder;

/// Files that changed later than so long before they were opened are read.
const SETTLED: Duration = Duration::from_secs(3);

/// The files of a model as they were before they were opened, and the folder of hashes.
pub(super) struct Hashes {
    folder: Folder,
    paths: Vec<PathBuf>,
    stamps: String,
}

impl Hashes {
    /// None if the system does not say enough of the files, or they are too young.
    pub fn of(folder: &Path, files: &ModelFiles) -> Option<Self> {
        let paths = files.paths().ok()?;
        let now = SystemTime::now().checked_sub(SETTLED)?;
        let stamps = stamps(&paths, now)?;
        Some(Hashes {
            folder: Folder(folder.into()),
            paths,
            stamps,
        })
    }

    /// The hash of the weights of `mapping` under a recipe, known or computed by `compute`.
    pub fn get_or(
        &self,
        mapping: &Mapping,
        recipe: &str,
        compute: impl FnOnce() -> Result<u128>,
    ) -> Result<u128> {
        // By their words: what a transform's code is called within the process is another each time.
        let row = |r: &Row| format!("{} {:?} {} {}\n", r.path, r.shape, r.format, r.source);
        let rows: String = mapping.rows().iter().map(row).collect();
        let version = env!("CARGO_PKG_VERSION");
        let all = format!("{version}\n{}{rows}{recipe}", self.stamps);
        let key = format!("{:032x}", xxh3_128(all.as_bytes()));
        let known = self.folder.load(&key);
        if let Some(known) = known.and_then(|bytes| bytes.try_into().ok()) {
            return Ok(u128::from_le_bytes(known));
        }
        let hash = compute()?;
        // What was changed while it was read is not known.
        if stamps(&self.paths, SystemTime::now()).as_ref() == Some(&self.stamps) {
            self.folder.store(&key, &hash.to_le_bytes());
        }
        Ok(hash)
    }
}

/// What the system says of files, none of which changed after `before`.
#[cfg(unix)]
fn stamps(paths: &[PathBuf], before: SystemTime) -> Option<String> {
    use std::os::unix::fs::MetadataExt;
    let before = before
        .duration_since(SystemTime::UNIX_EPOCH)
        .ok()?
        .as_secs();
    let mut stamps = String::new();
    for path in paths {
        let file = std::fs::metadata(path).ok()?;
        if u64::try_from(file.ctime()).ok()? > before {
            return None;
        }
        stamps += &format!(
            "{} {} {} {}.{} {}.{}\n",
            file.dev(),
            file.ino(),
            file.size(),
            file.mtime(),
            file.mtime_nsec(),
            file.ctime(),
            file.ctime_nsec()
        );
    }
    (!paths.is_empty()).then_some(stamps)
}

/// Other systems say no time that programs cannot set.
#[cfg(not(unix))]
fn stamps(_paths: &[PathBuf], _before: SystemTime) -> Option<String> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn young_changed_and_missing_files_are_not_known() {
        let folder = std::env::temp_dir().join(format!("strata-hashes-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let paths = vec![folder.join("a"), folder.join("b")];
        std::fs::write(&paths[0], "one").unwrap();
        assert_eq!(stamps(&paths, SystemTime::now()), None, "b is missing");
        std::fs::write(&paths[1], "two").unwrap();
        let now = SystemTime::now();
        assert_eq!(stamps(&paths, now - SETTLED), None, "both are young");
        let first = stamps(&paths, now).unwrap();
        assert_eq!(stamps(&paths, now), Some(first.clone()));
        // As long as before, and its own time set back.
        std::thread::sleep(Duration::from_millis(30));
        let modified = std::fs::metadata(&paths[0]).unwrap().modified().unwrap();
        std::fs::write(&paths[0], "eno").unwrap();
        let file = std::fs::File::options()
            .write(true)
            .open(&paths[0])
            .unwrap();
        file.set_modified(modified).unwrap();
        drop(file);
        let later = SystemTime::now() + SETTLED;
        assert_ne!(stamps(&paths, later).unwrap(), first);
        assert_eq!(
            stamps(&[], later),
            None,
            "of bundled files nothing is known"
        );
        std::fs::remove_dir_all(folder).unwrap();
    }
}
