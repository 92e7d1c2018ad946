//! Checkpoints: the tensors of a model's files, mapped and checked, whatever form the files have.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, Weak};

use strata_kernels::tensor::HostBytes;
use strata_kernels::{Format, HostTensor};
use strata_layers::Mark;

use crate::error::{Error, Result};
use crate::files::{ModelFiles, is_plain};
use crate::quantized::{self, Wide};
use crate::report::Report;
use crate::selection::{self, Index, Selected};
use crate::{pytorch, safetensors, view};

/// Kinds of faults.
pub(crate) const FILES: &str = "faulty files";
pub(crate) const TENSORS: &str = "faulty tensors";

/// One tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type, in the format's words: `BF16`, `F8_E4M3`.
    pub dtype: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// The file it is in.
    pub shard: String,
    /// Its bytes within the file: from the first element to behind the last.
    pub range: Range<usize>,
    /// Elements from one entry of each dimension to the next, where they do not simply follow each other.
    pub strides: Option<Vec<usize>>,
    /// How its elements are computed where the bytes are smaller numbers: `dtype` is what comes out.
    pub wide: Option<Arc<Wide>>,
}

/// The tensors of a model's files.
pub struct Checkpoint {
    label: String,
    shards: BTreeMap<String, Arc<dyn HostBytes>>,
    tensors: BTreeMap<String, TensorInfo>,
    /// Of a quantised release, the tensors that its files have.
    stored: Option<BTreeMap<String, TensorInfo>>,
    notes: Vec<String>,
    widening: Vec<String>,
    /// Elements that were gathered or widened and that somebody still holds: several weights may be parts of
    /// one tensor.
    made: Mutex<BTreeMap<String, Weak<Vec<u8>>>>,
}

/// The elements of a tensor as bytes, little endian, whatever their type.
pub struct Contents {
    owner: Arc<dyn HostBytes>,
    range: Range<usize>,
}

impl Contents {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.owner.bytes()[self.range.clone()]
    }

    /// Told that some of the bytes will not be read again soon: see [`HostBytes::forget`].
    pub fn forget(&self, range: Range<usize>) {
        let start = self.range.start;
        self.owner.forget(start + range.start..start + range.end);
    }

    /// Bytes of one's own.
    pub fn owned(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Contents {
            owner: Arc::new(bytes),
            range,
        }
    }
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
    /// Reads the headers of the files that hold the weights: `model.safetensors`, the shards that its index
    /// names, the only other `*.safetensors`; else the same of PyTorch's files. Those of a GGUF file were read
    /// when it was opened.
    pub fn open(files: &ModelFiles) -> Result<Self> {
        if let Some(gguf) = files.gguf() {
            return Ok(Checkpoint {
                label: files.name().into(),
                shards: gguf.shards().clone(),
                tensors: gguf.tensors().clone(),
                stored: None,
                notes: Vec::new(),
                widening: Vec::new(),
                made: Mutex::default(),
            });
        }
        let mut report = Report::new(files.name());
        let mut checkpoint = Checkpoint {
            label: files.name().into(),
            shards: BTreeMap::new(),
            tensors: BTreeMap::new(),
            stored: None,
            notes: Vec::new(),
            widening: Vec::new(),
            made: Mutex::default(),
        };
        match selection::select(files, &mut report)? {
            Selected::File(name) => checkpoint.add(files, &name, &mut report),
            Selected::Index(index) => checkpoint.add_shards(files, index, &mut report),
        }
        checkpoint.notes = report.take_notes();
        let stored = checkpoint.tensors.clone();
        quantized::present(
            &mut checkpoint.tensors,
            &checkpoint.shards,
            files,
            &mut report,
        );
        if checkpoint.tensors.values().any(|i| i.wide.is_some()) {
            checkpoint.stored = Some(stored);
        }
        checkpoint.widening = report.take_notes();
        report.finish()?;
        Ok(checkpoint)
    }

    fn add_shards(&mut self, files: &ModelFiles, index: Index, report: &mut Report) {
        let Index {
            name: file,
            weight_map: index,
        } = index;
        let mut fault = |message: String| report.add(FILES, Mark::default(), message);
        if index.is_empty() {
            fault(format!("{file} names no tensor"));
        }
        let mut readable = BTreeSet::new();
        for shard in index.values().collect::<BTreeSet<_>>() {
            if !is_plain(shard) {
                fault(format!("{file}: {shard:?} is no plain file name"));
            } else if !files.exists(shard) {
                fault(format!("{file} names {shard}, which is not there"));
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
            let message = format!("{file} says that {name:?} is in {shard}, but {found}");
            report.add(TENSORS, Mark::default(), message);
        }
    }

    /// Takes the tensors of one file, or reports why not.
    fn add(&mut self, files: &ModelFiles, shard: &str, report: &mut Report) {
        let bytes = match files.map(shard) {
            Ok(bytes) => bytes,
            Err(why) => return report.add(FILES, Mark::default(), why.to_string()),
        };
        let found = match pytorch::is_named(shard) {
            true => pytorch::read(shard, bytes.bytes(), report),
            false => safetensors::read(shard, bytes.bytes(), report),
        };
        let Some(tensors) = found else {
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

    /// What is worth telling, and no fault: which of several files is read, where the weights were in it.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Of a quantised release: what its matrices are stored in and run as, and what of it is not used.
    pub fn widening(&self) -> &[String] {
        &self.widening
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors
            .iter()
            .map(|(name, info)| (name.as_str(), info))
    }

    /// All tensors as the files have them, by name: of a quantised release numbers and scales.
    pub fn stored(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        let stored = self.stored.as_ref().unwrap_or(&self.tensors);
        stored.iter().map(|(name, info)| (name.as_str(), info))
    }

    /// What is known about a tensor.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Bytes of all tensors together.
    pub fn bytes(&self) -> usize {
        self.tensors.values().map(|t| t.range.len()).sum()
    }

    /// A view of a tensor's elements; nothing is read yet, unless they have to be gathered or widened.
    pub fn tensor(&self, name: &str) -> Result<HostTensor> {
        let info = self.info(name)?;
        let format = info
            .runs_as()
            .map_err(|why| Error::file(&info.shard, format!("tensor {name:?}: {why}")))?;
        let Contents { owner, range } = self.contents(name)?;
        Ok(HostTensor::new(format, &info.shape, owner, range)?)
    }

    /// The bytes of a tensor's elements in the order of their places, of whatever type they are: a view of
    /// the file, or of strided elements a copy.
    pub fn contents(&self, name: &str) -> Result<Contents> {
        self.contents_of(name, self.info(name)?)
    }

    /// The bytes of a tensor as the files have it: see [`Checkpoint::stored`].
    pub fn stored_contents(&self, name: &str) -> Result<Contents> {
        match &self.stored {
            None => self.contents(name),
            Some(stored) => {
                let info = stored.get(name).ok_or_else(|| self.missing(name))?;
                self.contents_of(name, info)
            }
        }
    }

    fn contents_of(&self, name: &str, info: &TensorInfo) -> Result<Contents> {
        let fault = |why: &str| Error::file(&info.shard, format!("tensor {name:?}: {why}"));
        let shard = self.shards.get(&info.shard);
        let owner = shard.ok_or_else(|| fault("its file is not open"))?.clone();
        if info.strides.is_none() && info.wide.is_none() {
            let range = info.range.clone();
            return Ok(Contents { owner, range });
        }
        let held = self.made.lock().ok();
        let owner = match held.and_then(|made| made.get(name)?.upgrade()) {
            Some(made) => made,
            None => {
                let made = Arc::new(self.made(info, owner.bytes()).map_err(|why| fault(&why))?);
                if let Ok(mut held) = self.made.lock() {
                    held.retain(|_, made| made.strong_count() > 0);
                    held.insert(name.into(), Arc::downgrade(&made));
                }
                made
            }
        };
        let range = 0..owner.len();
        Ok(Contents { owner, range })
    }

    /// The elements of a tensor that are not simply in its file.
    fn made(&self, info: &TensorInfo, file: &[u8]) -> std::result::Result<Vec<u8>, String> {
        let bytes = file.get(info.range.clone());
        let bytes = bytes.ok_or("it lies outside its file")?;
        match (&info.strides, &info.wide) {
            (Some(strides), _) => {
                let count = view::extent(&info.shape, strides).filter(|n| *n > 0);
                let size = bytes.len() / count.ok_or("its strides overflow")?;
                Ok(view::gather(bytes, size, &info.shape, strides))
            }
            (None, Some(wide)) => {
                let all = 0..view::elements(&info.shape).ok_or("its shape overflows")?;
                let mut out = Vec::new();
                wide.widen(bytes, &self.shards, all, info.runs_as()?, &mut out)?;
                Ok(out)
            }
            (None, None) => Ok(bytes.to_vec()),
        }
    }

    /// Elements of a tensor that is widened, appended to `to`: for who wants a piece at a time.
    pub fn widen(&self, name: &str, elements: Range<usize>, to: &mut Vec<u8>) -> Result<()> {
        let info = self.info(name)?;
        let fault = |why: &str| Error::file(&info.shard, format!("tensor {name:?}: {why}"));
        let wide = info.wide.as_ref().ok_or_else(|| fault("is not widened"))?;
        let shard = self.shards.get(&info.shard);
        let bytes = shard.and_then(|s| s.bytes().get(info.range.clone()));
        let bytes = bytes.ok_or_else(|| fault("it lies outside its file"))?;
        let format = info.runs_as().map_err(|why| fault(&why))?;
        wide.widen(bytes, &self.shards, elements, format, to)
            .map_err(|why| fault(&why))
    }

    /// Widens the weights of quantised releases to F32 instead of BF16. Those that run as they are stored,
    /// whose numbers F32 holds exactly, stay so.
    pub fn widen_to_f32(&mut self) {
        for info in self.tensors.values_mut() {
            if info.wide.as_ref().is_some_and(|w| w.by_rows().is_none()) {
                info.dtype = "F32".into();
            }
        }
    }

    /// Widens what runs as it is stored, too: to F32, or to BF16.
    pub fn widen_all(&mut self, f32s: bool) {
        for info in self.tensors.values_mut().filter(|i| i.wide.is_some()) {
            info.dtype = if f32s { "F32" } else { "BF16" }.into();
        }
    }

    /// Whether it is a quantised release.
    pub fn is_quantized(&self) -> bool {
        self.stored.is_some()
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.get(name).ok_or_else(|| self.missing(name))
    }

    fn missing(&self, name: &str) -> Error {
        Error::file(&self.label, format!("there is no tensor {name:?}"))
    }
}

impl TensorInfo {
    /// Bytes of its elements, one behind the other.
    pub fn bytes(&self) -> u64 {
        match &self.strides {
            None => self.range.len() as u64,
            Some(strides) => {
                let size = view::extent(&self.shape, strides).filter(|n| *n > 0);
                let size = size.map_or(0, |n| self.range.len() / n);
                view::elements(&self.shape).map_or(0, |n| (n * size) as u64)
            }
        }
    }

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
