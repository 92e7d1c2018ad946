//! Directories for tests.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// A directory that goes away with its value.
pub struct Directory(PathBuf);

impl Directory {
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

/// A new directory holding `files` as (name, text).
pub fn directory(files: &[(&str, &str)]) -> Directory {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let name = format!(
        "strata-test-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    );
    let path = std::env::temp_dir().join(name);
    std::fs::create_dir_all(&path).expect("a directory for a test");
    for (name, text) in files {
        std::fs::write(path.join(name), text).expect("a file for a test");
    }
    Directory(path)
}
