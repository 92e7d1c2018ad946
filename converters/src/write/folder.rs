//! A model's folder that is whole or not there: it is filled under another name and renamed at the end.

use std::fs;
use std::path::{Path, PathBuf};

use super::stream::beside;
use crate::error::{Error, Result};

/// What may be done to make room.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Replace what is there, and begin anew what was begun.
    pub force: bool,
}

/// A folder that is being filled.
pub struct Folder {
    path: PathBuf,
    partial: PathBuf,
    force: bool,
}

/// Says in an unfinished folder what it will be.
const NOTE: &str = ".conversion";

impl Folder {
    /// Begins to fill `path`, or goes on where an earlier run of the same `identity` was stopped. Fails if
    /// there is something at `path`, or something else half-done beside it, unless forced.
    pub fn begin(path: &Path, identity: &str, options: Options) -> Result<Folder> {
        if path.file_name().is_none() {
            let why = "is no name for a new folder";
            return Err(Error::file(path.display().to_string(), why));
        }
        let folder = Folder {
            path: path.into(),
            partial: beside(path, "partial"),
            force: options.force,
        };
        folder.check_target()?;
        let found = fs::read_to_string(folder.path_of(NOTE)).ok();
        if folder.partial.exists() && found.as_deref() != Some(identity) {
            if !options.force {
                let why = "is an unfinished conversion of something else, or with other options; remove it, or give --force";
                return Err(Error::file(folder.partial.display().to_string(), why));
            }
            remove_files(&folder.partial)?;
        }
        fs::create_dir_all(&folder.partial).map_err(refused(&folder.partial))?;
        let note = folder.path_of(NOTE);
        fs::write(&note, identity).map_err(refused(&note))?;
        Ok(folder)
    }

    /// Where a file is while the folder is filled.
    pub fn path_of(&self, name: &str) -> PathBuf {
        self.partial.join(name)
    }

    /// Whether an earlier run has finished a file.
    pub fn has(&self, name: &str) -> bool {
        self.path_of(name).is_file()
    }

    /// A small file.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path_of(name);
        fs::write(&path, bytes).map_err(refused(&path))
    }

    /// Gives the folder its name.
    pub fn finish(self) -> Result<()> {
        self.check_target()?;
        let note = self.path_of(NOTE);
        fs::remove_file(&note).map_err(refused(&note))?;
        if self.path.exists() {
            remove_files(&self.path)?;
        }
        fs::rename(&self.partial, &self.path).map_err(refused(&self.path))
    }

    /// Only what was asked for is replaced, and only a folder of files.
    fn check_target(&self) -> Result<()> {
        let label = self.path.display().to_string();
        if fs::symlink_metadata(&self.path).is_err() {
            return Ok(());
        }
        if !self.force {
            return Err(Error::file(label, "exists already; --force replaces it"));
        }
        if !self.path.is_dir() || self.path.is_symlink() {
            return Err(Error::file(
                label,
                "is no folder, and is not replaced by one",
            ));
        }
        let entries = fs::read_dir(&self.path).map_err(refused(&self.path))?;
        for entry in entries {
            let entry = entry.map_err(refused(&self.path))?;
            if entry.path().is_dir() && !entry.path().is_symlink() {
                let name = entry.file_name().to_string_lossy().into_owned();
                let why = format!("holds a folder, {name}: it is no model, and is not replaced");
                return Err(Error::file(label, why));
            }
        }
        Ok(())
    }
}

/// Removes a folder of files, and nothing deeper.
fn remove_files(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(refused(folder))? {
        let path = entry.map_err(refused(folder))?.path();
        fs::remove_file(&path).map_err(refused(&path))?;
    }
    fs::remove_dir(folder).map_err(refused(folder))
}

fn refused(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let file = path.display().to_string();
    move |source| Error::Write { file, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_there_when_it_is_whole() {
        let room = std::env::temp_dir().join(format!("strata-folder-{}", std::process::id()));
        let path = room.join("model");
        let begin = |identity: &str, force| Folder::begin(&path, identity, Options { force });
        let folder = begin("one", false).unwrap();
        folder.write("a", b"1").unwrap();
        assert!(!path.exists());
        // Killed here; the same goes on, another does not.
        drop(folder);
        assert!(begin("one", false).unwrap().has("a"));
        let error = begin("two", false).err().unwrap().to_string();
        assert!(error.contains("unfinished"), "{error}");
        assert!(!begin("two", true).unwrap().has("a"));
        begin("two", false).unwrap().finish().unwrap();
        assert!(path.is_dir() && !path.join(NOTE).exists());
        let error = begin("two", false).err().unwrap().to_string();
        assert!(error.contains("--force"), "{error}");
        // What is no model is not removed.
        fs::create_dir(path.join("deep")).unwrap();
        let error = begin("two", true).err().unwrap().to_string();
        assert!(error.contains("holds a folder"), "{error}");
        fs::remove_dir_all(room).unwrap();
    }
}
