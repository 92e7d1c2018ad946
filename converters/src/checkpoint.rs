//! Checkpoints: the tensors of a model's files, mapped and checked, whatever form the files have.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use strata_kernels::tensor::HostBytes;
use strata_kernels::{Format, HostTensor};
use strata_layers::Mark;

use crate::error::{Error, Result};
use crate::files::{ModelFiles, is_plain};
use crate::report::Report;
use crate::safetensors;

/// Kinds of faults.
pub(crate) const FILES: &str = "faulty files";
pub(crate) const TENSORS: &str = "faulty tensors";

const ONE_FILE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// One tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type, in the format's words: `BF16`, `F8_E4M3`.
    pub dtype: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// The file it is in.
    pub shard: String,
    /// Its bytes within the file.
    pub range: Range<usize>,
}

/// The tensors of a model's files.
pub struct Checkpoint {
    label: String,
    shards: BTreeMap<String, Arc<dyn HostBytes>>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (tensors, shards) = (self.tensors.len(), self.shards.len());
        write!(
            f,
            "Checkpoint({}: {tensors} tensors in {shards} files)",
            self.label
        )
    }
}

impl Checkpoint {
    /// Reads the headers of `model.safetensors`, of the shards that its index names, or of the only
    /// `*.safetensors` there is. Those of a GGUF file were read when it was opened.
    pub fn open(files: &ModelFiles) -> Result<Self> {
        if let Some(gguf) = files.gguf() {
            return Ok(Checkpoint {
                label: files.name().into(),
                shards: gguf.shards().clone(),
                tensors: gguf.tensors().clone(),
            });
        }
        let mut report = Report::new(files.name());
        let mut checkpoint = Checkpoint {
            label: files.name().into(),
            shards: BTreeMap::new(),
            tensors: BTreeMap::new(),
        };
        let index = if files.exists(ONE_FILE) {
            None
        } else {
            files.text(INDEX)?
        };
        match index {
            Some(text) => {
                let index: Index = serde_json::from_str(&text)
                    .map_err(|e| Error::file(files.label(INDEX), e.to_string()))?;
                checkpoint.add_shards(files, index.weight_map, &mut report);
            }
            None => checkpoint.add(files, &only_file(files)?, &mut report),
        }
        report.finish()?;
        Ok(checkpoint)
    }

    fn add_shards(
        &mut self,
        files: &ModelFiles,
        index: BTreeMap<String, String>,
        report: &mut Report,
    ) {
        let mut fault = |message: String| report.add(FILES, Mark::default(), message);
        if index.is_empty() {
            fault(format!("{INDEX} names no tensor"));
        }
        let mut readable = BTreeSet::new();
        for shard in index.values().collect::<BTreeSet<_>>() {
            if !is_plain(shard) {
                fault(format!("{INDEX}: {shard:?} is no plain file name"));
            } else if !files.exists(shard) {
                fault(format!("{INDEX} names {shard}, which is not there"));
            } else {
                readable.insert(shard);
            }
        }
        readable.iter().for_each(|s| self.add(files, s, report));

        // A file that could not be read has its fault already.
        let open = index
            .iter()
            .filter(|(_, shard)| self.shards.contains_key(*shard));
        for (name, shard) in open {
            let found = match self.tensors.get(name) {
                Some(info) if info.shard == *shard => continue,
                Some(info) => format!("it is in {}", info.shard),
                None => "it is not there".into(),
            };
            let message = format!("{INDEX} says that {name:?} is in {shard}, but {found}");
            report.add(TENSORS, Mark::default(), message);
        }
    }

    /// Takes the tensors of one file, or reports why not.
    fn add(&mut self, files: &ModelFiles, shard: &str, report: &mut Report) {
        let bytes = match files.map(shard) {
            Ok(bytes) => bytes,
            Err(why) => return report.add(FILES, Mark::default(), why.to_string()),
        };
        let Some(tensors) = safetensors::read(shard, bytes.bytes(), report) else {
            return;
        };
        for (name, mut info) in tensors {
            if let Some(other) = self.tensors.get(&name) {
                let message = format!("tensor {name:?} is in {} and in {shard}", other.shard);
                report.add(TENSORS, Mark::default(), message);
                continue;
            }
            info.shard = shard.into();
            self.tensors.insert(name, info);
        }
        self.shards.insert(shard.into(), bytes);
    }

    /// Its name for messages.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors
            .iter()
            .map(|(name, info)| (name.as_str(), info))
    }

    /// What is known about a tensor.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Bytes of all tensors together.
    pub fn bytes(&self) -> usize {
        self.tensors.values().map(|t| t.range.len()).sum()
    }

    /// A tensor's bytes as its file has them, whatever their type: who holds them, and which they are.
    pub fn stored(&self, name: &str) -> Result<(Arc<dyn HostBytes>, Range<usize>)> {
        let info = self
            .get(name)
            .ok_or_else(|| Error::file(&self.label, format!("there is no tensor {name:?}")))?;
        let bytes = self
            .shards
            .get(&info.shard)
            .ok_or_else(|| Error::file(&info.shard, "the file of this tensor is not open"))?;
        Ok((bytes.clone(), info.range.clone()))
    }

    /// A view of a tensor's elements; nothing is read yet.
    pub fn tensor(&self, name: &str) -> Result<HostTensor> {
        let info = self
            .get(name)
            .ok_or_else(|| Error::file(&self.label, format!("there is no tensor {name:?}")))?;
        let format = info
            .runs_as()
            .map_err(|why| Error::file(&info.shard, format!("tensor {name:?}: {why}")))?;
        let bytes = self
            .shards
            .get(&info.shard)
            .ok_or_else(|| Error::file(&info.shard, "the file of this tensor is not open"))?;
        let view = HostTensor::new(format, &info.shape, bytes.clone(), info.range.clone())?;
        Ok(view)
    }
}

impl TensorInfo {
    /// The format that its bytes run as.
    pub fn runs_as(&self) -> std::result::Result<Format, String> {
        Format::named(&self.dtype.to_lowercase()).ok_or_else(|| {
            format!(
                "unsupported element type {}; F32, F16 and BF16 are read, of GGUF files also blocks",
                self.dtype
            )
        })
    }
}

/// The name of the only file with weights.
fn only_file(files: &ModelFiles) -> Result<String> {
    if files.exists(ONE_FILE) {
        return Ok(ONE_FILE.into());
    }
    let names = files.list()?;
    let ending =
        |end: &str| -> Vec<&String> { names.iter().filter(|n| n.ends_with(end)).collect() };
    match &ending(".safetensors")[..] {
        [only] => Ok(only.to_string()),
        [] => {
            let other: Vec<_> = [".bin", ".pt", ".pth", ".gguf"]
                .into_iter()
                .flat_map(ending)
                .collect();
            let hint = match other.first() {
                Some(name) => {
                    format!("; {name} is of a kind that is not read: convert it to safetensors")
                }
                None => String::new(),
            };
            Err(Error::file(
                files.name(),
                format!("there is no {ONE_FILE}{hint}"),
            ))
        }
        several => {
            let list: Vec<&str> = several.iter().take(8).map(|n| n.as_str()).collect();
            let why = format!(
                "there is neither {ONE_FILE} nor {INDEX}, and more than one other: {}",
                list.join(", ")
            );
            Err(Error::file(files.name(), why))
        }
    }
}

#[derive(serde::Deserialize)]
struct Index {
    /// The file of each tensor.
    weight_map: BTreeMap<String, String>,
}
