//! GGUF files: their tensors, the config that their metadata stands for, and their tokenizer.
//!
//! A file, or a set of files `name-00001-of-00003.gguf`, is mapped and its header checked; nothing else
//! is read. What the metadata means is said by the cards, in their section `gguf`; the tokenizer becomes
//! the text of a `tokenizer.json`, so that nothing behind it knows where it came from.

mod builder;
mod card;
pub mod original;
mod pre;
mod read;
mod tokenizer;
mod types;
mod value;
mod vocabulary;
pub mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use strata_kernels::tensor::HostBytes;
use strata_layers::yaml::{Entry, Value as Plain};
use strata_layers::{Mark, Node};

pub use card::Section;
pub(crate) use card::{find, kinds_of};
pub use types::Type;
pub use value::{Elements, Kind, Value};

use crate::checkpoint::{FILES, TENSORS, TensorInfo};
use crate::error::{Error, Result};
use crate::files;
use crate::report::Report;
use tokenizer::Texts;
use value::Items;

/// Most files of a set.
const MAX_FILES: usize = 10_000;
/// Most parts of a key of metadata that expressions see.
const MAX_PARTS: usize = 8;

/// A GGUF file, or a set of them.
pub struct Gguf {
    label: String,
    name: String,
    /// Where the files lie; none of a header alone.
    folder: Option<PathBuf>,
    shards: BTreeMap<String, Arc<dyn HostBytes>>,
    /// The file with the metadata.
    first: Arc<dyn HostBytes>,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
    texts: OnceLock<Texts>,
}

impl fmt::Debug for Gguf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (keys, tensors) = (self.metadata.len(), self.tensors.len());
        write!(f, "Gguf({}: {keys} keys, {tensors} tensors)", self.label)
    }
}

impl Gguf {
    /// Reads the header of a file, and of all files of its set. All that is wrong is reported together.
    pub fn open(path: &Path) -> Result<Self> {
        let label = path.display().to_string();
        let file = path.file_name().and_then(|n| n.to_str()).ok_or_else(|| {
            Error::file(
                label.clone(),
                "the name of the file is not UTF-8, or is none",
            )
        })?;
        let mut report = Report::new(&label);
        let names = match split_name(file) {
            Some(split) if split.count > MAX_FILES => {
                let why = format!("a set of {} files; {MAX_FILES} are read", split.count);
                return Err(Error::file(label, why));
            }
            Some(split) => (1..=split.count).map(|n| split.file(n)).collect(),
            None => vec![file.to_string()],
        };
        let mut shards: BTreeMap<String, Arc<dyn HostBytes>> = BTreeMap::new();
        let mut headers = Vec::new();
        let fault = |report: &mut Report, message: String| {
            report.add(FILES, Mark::default(), message);
        };
        for name in &names {
            let bytes = match files::map_file(&path.with_file_name(name)) {
                Ok(bytes) => bytes,
                Err(why) => {
                    fault(&mut report, format!("{name}: {why}"));
                    continue;
                }
            };
            if let Some(header) = read::read(name, bytes.bytes(), &mut report) {
                headers.push((name, header));
            }
            shards.insert(name.clone(), bytes);
        }
        let mut tensors: BTreeMap<String, TensorInfo> = BTreeMap::new();
        let mut metadata = BTreeMap::new();
        for (place, (name, header)) in headers.into_iter().enumerate() {
            let own: BTreeMap<String, Value> = header.metadata.into_iter().collect();
            let int = |key: &str| match own.get(key) {
                Some(Value::Int(n)) => Some(*n),
                _ => None,
            };
            let (count, number) = (names.len() as i64, names.iter().position(|n| n == name));
            let said = int("split.count").unwrap_or(1).max(1);
            if said != count {
                fault(
                    &mut report,
                    format!(
                        "{name}: it says that it is one of {said} files, but its name says {count}"
                    ),
                );
            } else if count > 1 && int("split.no") != number.map(|n| n as i64) {
                fault(
                    &mut report,
                    format!("{name}: it says that it is another file of its set"),
                );
            }
            for (tensor, info) in header.tensors {
                if let Some(other) = tensors.get(&tensor) {
                    let message = format!("tensor {tensor:?} is in {} and in {name}", other.shard);
                    report.add(TENSORS, Mark::default(), message);
                    continue;
                }
                tensors.insert(tensor, info);
            }
            if place == 0 {
                metadata = own;
            }
        }
        if let (Some(Value::Int(said)), true) =
            (metadata.get("split.tensors.count"), report.is_empty())
            && *said != tensors.len() as i64
        {
            let message = format!(
                "the set should have {said} tensors, but has {}",
                tensors.len()
            );
            fault(&mut report, message);
        }
        report.finish()?;
        let missing = || Error::file(label.clone(), "the set has no files");
        let first = names.first().and_then(|n| shards.get(n)).cloned();
        Ok(Gguf {
            name: split_name(file).map_or_else(|| stem(file).into(), |s| s.stem.into()),
            first: first.ok_or_else(missing)?,
            label,
            folder: path.parent().map(Path::to_path_buf),
            shards,
            metadata,
            tensors,
            texts: OnceLock::new(),
        })
    }

    /// What a header says of a file that will have `total` bytes.
    pub(crate) fn of_header(header: &[u8], total: usize) -> Result<Self> {
        const NAME: &str = "written.gguf";
        let mut report = Report::new(NAME);
        let read = read::read_of(NAME, header, total, &mut report);
        report.finish()?;
        let missing = || Error::file(NAME, "the header cannot be read again");
        let read = read.ok_or_else(missing)?;
        let first: Arc<dyn HostBytes> = Arc::new(header.to_vec());
        Ok(Gguf {
            name: stem(NAME).into(),
            label: NAME.into(),
            folder: None,
            shards: BTreeMap::from([(NAME.to_string(), first.clone())]),
            first,
            metadata: read.metadata.into_iter().collect(),
            tensors: read.tensors.into_iter().collect(),
            texts: OnceLock::new(),
        })
    }

    /// Its name for messages.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The name of the file, without its ending and without its place in a set.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the files lie.
    pub(crate) fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// The files, by their names.
    pub(crate) fn shards(&self) -> &BTreeMap<String, Arc<dyn HostBytes>> {
        &self.shards
    }

    /// The tensors, by their names.
    pub(crate) fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// The value of a key.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// The text under a key.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.value(key)? {
            Value::Text(range) => std::str::from_utf8(self.first.bytes().get(range.clone())?).ok(),
            _ => None,
        }
    }

    /// The whole number under a key.
    fn int(&self, key: &str) -> Option<i64> {
        match self.value(key)? {
            Value::Int(n) => Some(*n),
            _ => None,
        }
    }

    /// The truth value under a key.
    fn truth(&self, key: &str) -> Option<bool> {
        match self.value(key)? {
            Value::Bool(b) => Some(*b),
            _ => None,
        }
    }

    /// The elements of a list.
    fn items(&self, key: &str) -> Option<(usize, Items<'_>)> {
        match self.value(key)? {
            Value::List(kind, elements) => Some((
                elements.count,
                Items::new(self.first.bytes(), *kind, elements),
            )),
            _ => None,
        }
    }

    /// What `general.architecture` says.
    pub fn architecture(&self) -> Option<&str> {
        self.text("general.architecture")
    }

    /// A text file of the model's folder that the metadata stands for: `tokenizer.json` and those beside.
    pub(crate) fn file(&self, name: &str) -> Option<&str> {
        self.texts().files.get(name).map(String::as_str)
    }

    /// Why the tokenizer cannot be used, if there is one and it cannot.
    pub fn tokenizer_fault(&self) -> Option<&str> {
        self.texts().fault.as_deref()
    }

    fn texts(&self) -> &Texts {
        self.texts.get_or_init(|| tokenizer::texts(self))
    }

    /// What expressions in cards see: the keys of the architecture without its name, as mappings in
    /// mappings; `general`; and under `tensors` the shape of each.
    pub(crate) fn node(&self) -> Node {
        let prefix = format!("{}.", self.architecture().unwrap_or_default());
        let mut tree = Tree::default();
        for (key, value) in &self.metadata {
            let path = match key.strip_prefix(&prefix) {
                Some(rest) => rest,
                None if key.starts_with("general.") => key,
                None => continue,
            };
            let parts: Vec<&str> = path.split('.').collect();
            if parts.len() <= MAX_PARTS
                && let Some(plain) = value.plain(self.first.bytes())
            {
                tree.insert(&parts, plain);
            }
        }
        let mut node = tree.node();
        if let Plain::Map(entries) = &mut node.value {
            let shape = |info: &TensorInfo| {
                let size = |n: &usize| Plain::Int(*n as i64).into();
                Plain::List(info.shape.iter().map(size).collect())
            };
            let tensors = self.tensors.iter().map(|(n, t)| entry(n, shape(t).into()));
            entries.push(entry("tensors", Plain::Map(tensors.collect()).into()));
        }
        node
    }

    /// The names of all tensors.
    pub(crate) fn names(&self) -> BTreeSet<String> {
        self.tensors.keys().cloned().collect()
    }
}

/// An entry of a mapping made by code.
fn entry(key: &str, value: Node) -> Entry {
    Entry {
        key: key.into(),
        at: Mark::default(),
        value,
    }
}

/// Mappings in mappings.
#[derive(Default)]
struct Tree {
    value: Option<Plain>,
    below: BTreeMap<String, Tree>,
}

impl Tree {
    fn insert(&mut self, path: &[&str], value: Plain) {
        match path {
            [] => self.value = Some(value),
            [first, rest @ ..] => self
                .below
                .entry(first.to_string())
                .or_default()
                .insert(rest, value),
        }
    }

    /// A key that is also the beginning of others gives way to them.
    fn node(self) -> Node {
        match self.value {
            Some(value) if self.below.is_empty() => value.into(),
            _ => {
                let below = self.below.into_iter();
                Plain::Map(below.map(|(k, t)| entry(&k, t.node())).collect()).into()
            }
        }
    }
}

/// A file's name without its ending.
fn stem(file: &str) -> &str {
    file.strip_suffix(".gguf").unwrap_or(file)
}

/// The name of a file of a set.
struct Split<'a> {
    stem: &'a str,
    count: usize,
}

impl Split<'_> {
    fn file(&self, number: usize) -> String {
        format!("{}-{number:05}-of-{:05}.gguf", self.stem, self.count)
    }
}

/// `name-00001-of-00003.gguf`.
fn split_name(file: &str) -> Option<Split<'_>> {
    let (rest, count) = file.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| {
        let five = text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
        text.parse::<usize>().ok().filter(|_| five)
    };
    let (number, count) = (digits(number)?, digits(count)?);
    (1..=count)
        .contains(&number)
        .then_some(Split { stem, count })
}

/// The only GGUF file of a folder, the first of its set if it is one; none if there is no such file.
/// Which there are, if there are several.
pub(crate) fn only_file(names: &[String]) -> std::result::Result<Option<&String>, String> {
    let mut files: Vec<&String> = names
        .iter()
        .filter(|n| n.to_lowercase().ends_with(".gguf"))
        .collect();
    // Of a set the first file stands for all.
    files.retain(|n| split_name(n).is_none_or(|s| **n == s.file(1)));
    match files[..] {
        [] => Ok(None),
        [only] => Ok(Some(only)),
        _ => {
            let list: Vec<&str> = files.iter().take(8).map(|n| n.as_str()).collect();
            Err(format!(
                "there is more than one GGUF file; name one of {}",
                list.join(", ")
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_set_know_each_other() {
        let check = |file: &str, expected: Option<&str>| {
            let found = split_name(file).map(|s| s.file(s.count));
            assert_eq!(found.as_deref(), expected, "{file}");
        };
        check("m-00001-of-00003.gguf", Some("m-00003-of-00003.gguf"));
        check("a-b-00002-of-00002.gguf", Some("a-b-00002-of-00002.gguf"));
        check("m-00004-of-00003.gguf", None);
        check("m-1-of-3.gguf", None);
        check("m.gguf", None);
        let only = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|n| n.to_string()).collect();
            only_file(&names).map(|n| n.cloned())
        };
        assert_eq!(only(&["a.txt"]), Ok(None));
        assert_eq!(only(&["a.gguf", "b.md"]), Ok(Some("a.gguf".into())));
        let set = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"];
        assert_eq!(only(&set), Ok(Some(set[0].into())));
        assert!(
            only(&["a.gguf", "b.gguf"])
                .unwrap_err()
                .contains("a.gguf, b.gguf")
        );
    }
}
