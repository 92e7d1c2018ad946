//! The files of a model: a folder on disk, bytes inside the binary, or a GGUF file and what it stands for.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use strata_kernels::tensor::HostBytes;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::gguf::{self, Gguf};

/// Most bytes of a text file. The largest that models have are tokenizers, of some 30 MB.
const MAX_TEXT: u64 = 256 << 20;

/// A named set of files.
#[derive(Debug, Clone)]
pub struct ModelFiles {
    label: String,
    source: Source,
    /// The one file with weights that was named.
    weights: Option<String>,
}

#[derive(Debug, Clone)]
enum Source {
    Folder(PathBuf),
    Bundled(&'static [(&'static str, &'static [u8])]),
    Gguf(Arc<Gguf>),
}

impl ModelFiles {
    /// The files of a folder.
    pub fn open(folder: &Path) -> Result<Self> {
        let label = folder.display().to_string();
        let metadata = fs::metadata(folder).map_err(|source| Error::Read {
            file: label.clone(),
            source,
        })?;
        if !metadata.is_dir() {
            let why = "a folder with config.json and the weights is expected, not a file";
            return Err(Error::file(label, why));
        }
        let files = ModelFiles {
            label,
            source: Source::Folder(folder.into()),
            weights: None,
        };
        // One whose only weights are a GGUF file is that file.
        let names = files.list()?;
        let weights = |n: &&String| {
            [".safetensors", ".bin", ".pt", ".pth"]
                .iter()
                .any(|e| n.ends_with(e))
        };
        if names.iter().any(|n| weights(&n)) {
            return Ok(files);
        }
        match gguf::only_file(&names) {
            Ok(None) => Ok(files),
            Ok(Some(name)) => ModelFiles::gguf_file(&folder.join(name)),
            Err(why) => Err(Error::file(files.label, why)),
        }
    }

    /// A GGUF file, or the set of files that it belongs to.
    pub fn gguf_file(path: &Path) -> Result<Self> {
        Ok(ModelFiles::of_gguf(Gguf::open(path)?))
    }

    pub(crate) fn of_gguf(gguf: Gguf) -> Self {
        ModelFiles {
            label: gguf.label().into(),
            source: Source::Gguf(Arc::new(gguf)),
            weights: None,
        }
    }

    /// The GGUF file, if it is one.
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.source {
            Source::Gguf(gguf) => Some(gguf),
            Source::Folder(_) | Source::Bundled(_) => None,
        }
    }

    /// The files of the folder that a file with weights lies in: of all weights there, it alone counts.
    pub fn beside(file: &Path) -> Result<Self> {
        let folder = match file.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        let name = file.file_name().and_then(|n| n.to_str()).ok_or_else(|| {
            Error::file(file.display().to_string(), "the file's name is not UTF-8")
        })?;
        let files = ModelFiles::open(folder)?;
        Ok(ModelFiles {
            weights: Some(name.into()),
            ..files
        })
    }

    /// The one file with weights that was named, if one was.
    pub fn weights(&self) -> Option<&str> {
        self.weights.as_deref()
    }

    /// Files that the binary holds; `label` stands for their folder in messages.
    pub fn bundled(label: &str, files: &'static [(&'static str, &'static [u8])]) -> Self {
        ModelFiles {
            label: label.into(),
            source: Source::Bundled(files),
            weights: None,
        }
    }

    /// The folder, if there is one.
    pub fn folder(&self) -> Option<&Path> {
        match &self.source {
            Source::Folder(folder) => Some(folder),
            Source::Bundled(_) | Source::Gguf(_) => None,
        }
    }

    /// Where its files lie on disk: all of a folder, and all of a GGUF set; none of bundled ones.
    pub fn paths(&self) -> Result<Vec<PathBuf>> {
        let folder = match &self.source {
            Source::Folder(folder) => Some(folder.as_path()),
            Source::Gguf(gguf) => gguf.folder(),
            Source::Bundled(_) => None,
        };
        let Some(folder) = folder else {
            return Ok(Vec::new());
        };
        let names = self.list()?.into_iter();
        Ok(names.map(|name| folder.join(name)).collect())
    }

    /// The name of the set, for messages.
    pub fn name(&self) -> &str {
        &self.label
    }

    /// A file's name for messages.
    pub fn label(&self, name: &str) -> String {
        format!("{}/{name}", self.label.trim_end_matches('/'))
    }

    /// Whether there is a file of this name.
    pub fn exists(&self, name: &str) -> bool {
        match &self.source {
            Source::Folder(folder) => is_plain(name) && folder.join(name).is_file(),
            Source::Bundled(files) => files.iter().any(|(n, _)| *n == name),
            Source::Gguf(gguf) => gguf.shards().contains_key(name) || self.stands_for(gguf, name),
        }
    }

    /// Whether a GGUF file's metadata says what a text file would.
    fn stands_for(&self, gguf: &Gguf, name: &str) -> bool {
        name == "config.json" || gguf.file(name).is_some()
    }

    /// A file's size and time of change, in nanoseconds: another pair is another file.
    pub fn stamp(&self, name: &str) -> Result<(u64, u128)> {
        match &self.source {
            Source::Folder(folder) => {
                let metadata = fs::metadata(folder.join(name)).map_err(|source| Error::Read {
                    file: self.label(name),
                    source,
                })?;
                let changed = metadata.modified().ok();
                let since = changed.and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
                Ok((metadata.len(), since.map_or(0, |t| t.as_nanos())))
            }
            Source::Bundled(_) => Ok((self.bundle(name)?.len() as u64, 0)),
            Source::Gguf(_) => Ok((self.map(name)?.bytes().len() as u64, 0)),
        }
    }

    /// The names of all files, sorted. Names that are not UTF-8 are left out.
    pub fn list(&self) -> Result<Vec<String>> {
        let mut names = match &self.source {
            Source::Folder(folder) => {
                let read = |source| Error::Read {
                    file: self.label.clone(),
                    source,
                };
                let mut names = Vec::new();
                for entry in fs::read_dir(folder).map_err(read)? {
                    names.extend(entry.map_err(read)?.file_name().into_string().ok());
                }
                names.retain(|n| self.exists(n));
                names
            }
            Source::Bundled(files) => files.iter().map(|(n, _)| n.to_string()).collect(),
            Source::Gguf(gguf) => gguf.shards().keys().cloned().collect(),
        };
        names.sort();
        Ok(names)
    }

    /// A text file, if there is one of this name.
    pub fn text(&self, name: &str) -> Result<Option<String>> {
        if !self.exists(name) {
            return Ok(None);
        }
        let bytes = match &self.source {
            Source::Folder(folder) => self.read(&folder.join(name), name)?,
            Source::Bundled(_) => self.bundle(name)?.to_vec(),
            Source::Gguf(gguf) => match gguf.file(name) {
                Some(text) => return Ok(Some(text.into())),
                None if name == "config.json" => return Ok(Some(Config::open(self)?.json())),
                None => return Err(Error::file(self.label(name), "is no text")),
            },
        };
        let text = String::from_utf8(bytes).map_err(|e| {
            let at = e.utf8_error().valid_up_to();
            Error::file(self.label(name), format!("byte {at} is not UTF-8"))
        })?;
        Ok(Some(text))
    }

    /// The bytes of a file, read when they are touched.
    pub fn map(&self, name: &str) -> Result<Arc<dyn HostBytes>> {
        match &self.source {
            Source::Folder(folder) => {
                if !is_plain(name) {
                    return Err(Error::file(self.label(name), "is no plain file name"));
                }
                let map = map_file(&folder.join(name)).map_err(|source| Error::Read {
                    file: self.label(name),
                    source,
                })?;
                Ok(map)
            }
            Source::Bundled(_) => Ok(Arc::new(Bundled(self.bundle(name)?))),
            Source::Gguf(gguf) => gguf
                .shards()
                .get(name)
                .cloned()
                .ok_or_else(|| Error::file(self.label(name), "there is no such file")),
        }
    }

    fn read(&self, path: &Path, name: &str) -> Result<Vec<u8>> {
        let read = |source| Error::Read {
            file: self.label(name),
            source,
        };
        let mut bytes = Vec::new();
        let file = File::open(path).map_err(read)?;
        file.take(MAX_TEXT + 1)
            .read_to_end(&mut bytes)
            .map_err(read)?;
        if bytes.len() as u64 > MAX_TEXT {
            let why = format!("has more than the {MAX_TEXT} bytes that are read of a text file");
            return Err(Error::file(self.label(name), why));
        }
        Ok(bytes)
    }

    fn bundle(&self, name: &str) -> Result<&'static [u8]> {
        let Source::Bundled(files) = &self.source else {
            return Err(Error::file(self.label(name), "is not bundled"));
        };
        let found = files.iter().find(|(n, _)| *n == name);
        found
            .map(|(_, bytes)| *bytes)
            .ok_or_else(|| Error::file(self.label(name), "there is no such file"))
    }
}

/// Whether a name stays within its folder.
pub(crate) fn is_plain(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0'])
}

struct Bundled(&'static [u8]);

impl HostBytes for Bundled {
    fn bytes(&self) -> &[u8] {
        self.0
    }
}

struct Mapped(memmap2::Mmap);

impl HostBytes for Mapped {
    fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Pages of a file can be read again, so their memory is given back.
    #[cfg(unix)]
    #[allow(unsafe_code)]
    fn forget(&self, range: std::ops::Range<usize>) {
        const PAGE: usize = 64 << 10;
        let from = range.start.next_multiple_of(PAGE);
        let to = range.end / PAGE * PAGE;
        if from < to && to <= self.0.len() {
            // SAFETY: the map is read only and backed by a file: pages that are dropped are read again
            // when they are touched, with the same bytes. Whether the system does it matters to nobody.
            let _ = unsafe {
                self.0
                    .unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, from, to - from)
            };
        }
    }
}

/// Maps a regular file for reading. It must not be shortened while it is used.
#[allow(unsafe_code)]
pub fn map_file(path: &Path) -> std::io::Result<Arc<dyn HostBytes>> {
    // Asked first: to open a pipe would wait for its other end.
    if !fs::metadata(path)?.is_file() {
        return Err(std::io::Error::other("is no regular file"));
    }
    let file = File::open(path)?;
    if file.metadata()?.len() == 0 {
        return Ok(Arc::new(Vec::new()));
    }
    // SAFETY: the map is read only and is only ever seen as plain bytes, so what they are can break
    // nothing. Whoever runs a model must not shorten its files meanwhile: as everywhere where files
    // are mapped, that ends the process.
    let map = unsafe { memmap2::Mmap::map(&file)? };
    Ok(Arc::new(Mapped(map)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bundled_files_read_as_those_on_disk() {
        let files = ModelFiles::bundled("demo", &[("a.txt", b"text"), ("b.bin", &[0xff])]);
        assert_eq!(files.text("a.txt").unwrap().as_deref(), Some("text"));
        assert_eq!(files.text("c.txt").unwrap(), None);
        assert_eq!(files.map("b.bin").unwrap().bytes(), [0xff]);
        assert_eq!(
            files.text("b.bin").unwrap_err().to_string(),
            "demo/b.bin: byte 0 is not UTF-8"
        );
        assert_eq!(files.list().unwrap(), ["a.txt", "b.bin"]);
    }

    #[test]
    fn names_stay_in_their_folder() {
        let files = ModelFiles::open(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap();
        assert!(files.exists("Cargo.toml"));
        for name in ["../Cargo.toml", "src/lib.rs", "", ".", "..", "/etc/passwd"] {
            assert!(!files.exists(name) && files.map(name).is_err(), "{name:?}");
            assert_eq!(files.text(name).unwrap(), None, "{name:?}");
        }
        assert!(ModelFiles::open(Path::new("no/such/folder")).is_err());
    }
}
