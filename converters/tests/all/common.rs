//! Folders of files that tests write, and a source of chance.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use strata_converters::ModelFiles;

/// The files of a golden.
pub fn golden(name: &str) -> ModelFiles {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    ModelFiles::open(&root.join(name)).unwrap()
}

/// A folder that vanishes with its owner.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("strata-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.0.join(name), bytes).unwrap();
    }

    pub fn files(&self) -> ModelFiles {
        ModelFiles::open(&self.0).unwrap()
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A safetensors file with this header and so many bytes behind it.
pub fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend((0..data).map(|i| i as u8));
    bytes
}

/// A safetensors file of F32 tensors, of which every element is `fill`.
pub fn tensors(list: &[(String, Vec<usize>)], fill: f32) -> Vec<u8> {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for (name, shape) in list {
        let start = data.len();
        for _ in 0..shape.iter().product() {
            data.extend(fill.to_le_bytes());
        }
        let end = data.len();
        entries.push(format!(
            "{name:?}:{{\"dtype\":\"F32\",\"shape\":{shape:?},\"data_offsets\":[{start},{end}]}}"
        ));
    }
    let mut bytes = file(&format!("{{{}}}", entries.join(",")), 0);
    bytes.extend(data);
    bytes
}

/// xorshift64*.
pub struct Chance(pub u64);

impl Chance {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n.max(1)
    }

    /// Changes, drops or repeats a few bytes.
    pub fn spoil(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..1 + self.below(4) {
            let at = self.below(bytes.len());
            match self.below(5) {
                0 if !bytes.is_empty() => drop(bytes.remove(at)),
                1 => bytes.insert(at, b"0123456789{}[]\",:=-*&"[self.below(21)]),
                2 => bytes.truncate(at + bytes.len() / 2),
                3 => {
                    let end = (at + 1 + self.below(12)).min(bytes.len());
                    let again = bytes[at.min(end)..end].to_vec();
                    let to = self.below(bytes.len());
                    bytes.splice(to..to, again);
                }
                _ => {
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= 1 << self.below(8);
                    }
                }
            }
        }
    }
}
