//! State files, read: nothing in them is believed before it was checked against the file itself, and nothing is
//! allocated by a number that was not.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};
use strata_kernels::tensor::HostBytes;
use strata_kernels::{DType, Format, HostTensor, KvType};

use super::{Error, FORMAT, Fingerprint, MAX_HEADER, Source, parts};
use crate::ids::TokenId;
use crate::load::map_file;
use crate::session::{Engine, State};

/// A mapped file, whose header is sound.
pub struct StateFile {
    path: PathBuf,
    map: Arc<dyn HostBytes>,
    metadata: Map<String, Value>,
    /// By name, the tokens not among them.
    tensors: BTreeMap<String, Stored>,
    tokens: Range<usize>,
    snapshots: Vec<usize>,
}

/// One tensor: its bytes lie within the file and are as many as its shape says.
struct Stored {
    dtype: String,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// One entry of a safetensors header.
#[derive(serde::Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

impl Entry {
    /// Bytes of its elements, if that is a number.
    fn bytes(&self) -> Option<u64> {
        let size = match self.dtype.as_str() {
            "U8" | "I8" | "BOOL" => 1,
            "F16" | "BF16" | "I16" | "U16" => 2,
            "F32" | "I32" | "U32" => 4,
            _ => 8,
        };
        let sizes = self.shape.iter().map(|n| *n as u64);
        sizes.chain([size]).try_fold(1_u64, u64::checked_mul)
    }
}

impl StateFile {
    /// Maps a file and reads its header.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let map = map_file(path).map_err(|source| Error::Io {
            path: path.into(),
            source,
        })?;
        StateFile::of(path, map).map_err(|why| Error::Damaged {
            path: path.into(),
            why,
        })
    }

    fn of(path: &Path, map: Arc<dyn HostBytes>) -> Result<Self, String> {
        let bytes = map.bytes();
        let size = bytes.len() as u64;
        let Some((length, rest)) = bytes.split_first_chunk() else {
            return Err(format!("the file has {size} bytes only"));
        };
        let length = u64::from_le_bytes(*length);
        if length > MAX_HEADER || length > rest.len() as u64 {
            return Err(format!("a header of {length} bytes in a file of {size}"));
        }
        let (text, data) = rest.split_at(length as usize);
        let mut header: Map<String, Value> =
            serde_json::from_slice(text).map_err(|e| format!("the header is no JSON: {e}"))?;
        let Some(Value::Object(metadata)) = header.remove("__metadata__") else {
            return Err("the header has no __metadata__: this is no state file".into());
        };
        let says = |key: &str| {
            metadata
                .get(key)
                .and_then(Value::as_str)
                .unwrap_or("nothing")
        };
        if says("format") != FORMAT {
            let format = shorten(says("format"));
            return Err(format!(
                "its format is {format:?}, this program reads {FORMAT:?}"
            ));
        }

        let start = 8 + length as usize;
        let mut tensors = BTreeMap::new();
        let mut end = 0;
        for (name, value) in header {
            let known = shorten(&name);
            let entry: Entry =
                serde_json::from_value(value).map_err(|e| format!("tensor {known}: {e}"))?;
            let [from, to] = entry.data_offsets;
            let expected = entry.bytes().ok_or_else(|| {
                format!(
                    "tensor {known} of shape {:?} is beyond all sizes",
                    entry.shape
                )
            })?;
            if from > to || to - from != expected || to > data.len() as u64 {
                return Err(format!(
                    "tensor {known} lies at bytes {from} to {to} of {}, expected {expected} bytes: the file was cut off, or is none of ours",
                    data.len()
                ));
            }
            end = end.max(to);
            let stored = Stored {
                dtype: entry.dtype,
                shape: entry.shape,
                range: start + from as usize..start + to as usize,
            };
            tensors.insert(name, stored);
        }
        if end != data.len() as u64 {
            let more = data.len() as u64 - end;
            return Err(format!("{more} bytes at its end belong to nothing"));
        }
        let tokens = tensors.remove("tokens").ok_or("there are no tokens")?;
        let count = match tokens.shape[..] {
            [count] if count > 0 && tokens.dtype == "U32" => count,
            _ => return Err("its tokens are no list of U32".into()),
        };
        let snapshots: Option<Vec<usize>> = says("snapshots")
            .split(',')
            .map(|n| n.parse().ok().filter(|n| (1..=count).contains(n)))
            .collect();
        let snapshots = snapshots
            .filter(|s| s.last() == Some(&count) && s.is_sorted_by(|a, b| a < b))
            .ok_or_else(|| {
                let found = shorten(says("snapshots"));
                format!("its snapshots are {found:?}, expected ascending numbers up to {count}")
            })?;
        Ok(StateFile {
            path: path.into(),
            metadata,
            tensors,
            tokens: tokens.range,
            snapshots,
            map,
        })
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.map.bytes().len() as u64
    }

    /// A text of its metadata.
    pub fn says(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).and_then(Value::as_str)
    }

    /// The model whose states these are.
    pub fn fingerprint(&self) -> Fingerprint {
        let text = |key| self.says(key).unwrap_or("nothing").to_string();
        Fingerprint {
            plan: text("plan"),
            weights: text("weights"),
        }
    }

    /// All tokens, those of the model's prefix first.
    pub fn tokens(&self) -> Vec<TokenId> {
        let bytes = &self.map.bytes()[self.tokens.clone()];
        let ids = bytes.as_chunks().0.iter();
        ids.map(|b| u32::from_le_bytes(*b)).collect()
    }

    /// How many tokens there are.
    pub fn len(&self) -> usize {
        self.tokens.len() / 4
    }

    /// Never: a file without tokens is refused.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// After how many tokens there are states, ascending; the last after all.
    pub fn snapshots(&self) -> &[usize] {
        &self.snapshots
    }

    /// Bytes of slots, and of keys and values.
    pub fn parts_bytes(&self) -> (u64, u64) {
        let sum = |dimensions: usize| {
            let of = |t: &&Stored| t.shape.len() == dimensions;
            let tensors = self.tensors.values().filter(of);
            tensors.map(|t| t.range.len() as u64).sum()
        };
        (sum(3), sum(2))
    }

    /// How keys and values are kept, if there are any, of a type that is known.
    pub fn kv_type(&self) -> Option<KvType> {
        let pages = self.tensors.values().find(|t| t.shape.len() == 2)?;
        KvType::ALL
            .into_iter()
            .find(|kv| kv.dtype().to_string() == pages.dtype)
    }

    /// Whether these are states of a model, or of which they are.
    pub fn belongs(&self, activations: DType, fingerprint: &Fingerprint) -> Result<(), Error> {
        let activations = activations.to_string();
        for (key, what, expected) in [
            ("plan", "plan", &fingerprint.plan),
            ("weights", "set of weights", &fingerprint.weights),
            ("activations", "compute type", &activations),
        ] {
            let found = self.says(key).unwrap_or("nothing");
            if found != *expected {
                return Err(Error::OtherModel {
                    path: self.path.clone(),
                    what,
                    found: shorten(found),
                    expected: expected.clone(),
                });
            }
        }
        Ok(())
    }

    /// Whether `engine` can go on from these states, or why not. There may be more tokens than its context has.
    pub fn fits(&self, engine: &Engine, fingerprint: &Fingerprint) -> Result<(), Error> {
        self.belongs(engine.network().activations, fingerprint)?;
        let expected = engine.config().kv_dtype;
        if let Some(found) = self.kv_type().filter(|found| *found != expected) {
            return Err(Error::OtherKv {
                path: self.path.clone(),
                found,
                expected,
            });
        }
        self.check(engine).map_err(|why| Error::Damaged {
            path: self.path.clone(),
            why,
        })
    }

    /// Whether a sequence of `engine` may have all these tokens.
    pub fn is_short_enough(&self, engine: &Engine) -> Result<(), Error> {
        let graph = &engine.network().graph;
        let (context, prefix, tokens) = (engine.config().context, graph.prefix, self.len());
        if tokens > context.saturating_add(prefix) {
            return Err(Error::TooLong {
                path: self.path.clone(),
                tokens: tokens - prefix,
                context,
            });
        }
        Ok(())
    }

    /// Whether there is every part, and nothing else.
    fn check(&self, engine: &Engine) -> Result<(), String> {
        let parts = parts(engine);
        for part in &parts {
            let name = &part.name;
            let Some(found) = self.tensors.get(name) else {
                return Err(format!("tensor {name} is missing"));
            };
            let shape = part.shape(self.len(), self.snapshots.len());
            let dtype = part.dtype.to_string();
            if found.dtype != dtype || found.shape != shape {
                return Err(format!(
                    "tensor {name} is {} {:?}, expected {dtype} {shape:?}",
                    found.dtype, found.shape
                ));
            }
        }
        let known = |name: &String| parts.iter().any(|p| p.name == *name);
        if let Some(name) = self.tensors.keys().find(|n| !known(n)) {
            return Err(format!("tensor {} belongs to no layer", shorten(name)));
        }
        let graph = &engine.network().graph;
        let (vocab, prefix) = (graph.vocab, graph.prefix);
        let tokens = self.tokens();
        // The prefix stands first, and nowhere else.
        let misplaced = |(i, id): &(usize, &TokenId)| {
            let id = **id as usize;
            if *i < prefix {
                id != vocab + i
            } else {
                id >= vocab
            }
        };
        match tokens.iter().enumerate().find(misplaced) {
            None => Ok(()),
            Some((i, id)) => Err(format!(
                "token id {id} at position {i} is outside the vocabulary of {vocab}"
            )),
        }
    }

    /// The state after so many tokens as its snapshot `index` has. The file fits the engine.
    pub(crate) fn restore(&self, engine: &mut Engine, index: usize) -> Result<State, Error> {
        let tokens = self.snapshots[index];
        let pages = engine.alloc_pages(tokens)?;
        let mut state = State {
            tokens,
            pages,
            slot: Vec::new(),
        };
        match self.fill(engine, index, &mut state) {
            Ok(()) => Ok(state),
            Err(error) => {
                engine.release(&state.pages);
                Err(error)
            }
        }
    }

    fn fill(&self, engine: &Engine, index: usize, state: &mut State) -> Result<(), Error> {
        let page_size = engine.config().page_size;
        let mut numbers = Vec::new();
        for part in parts(engine) {
            let (stored, backend) = (&self.tensors[&part.name], &part.backend);
            match &part.source {
                Source::Slot(_, [rows, cols]) => {
                    let each = rows * cols * part.dtype.size();
                    let start = stored.range.start + index * each;
                    let view = self.view(part.dtype, 1, rows * cols, start..start + each)?;
                    let mut own = backend.alloc(DType::F32, 1, rows * cols)?;
                    backend.copy(&backend.upload(&view, 1, rows * cols)?, &mut own)?;
                    state.slot.push(own);
                }
                Source::Pages(store) => {
                    let (cols, start) = (store.cols(), stored.range.start);
                    let bytes = start..start + state.tokens * cols * part.dtype.size();
                    let pages = state.pages.iter().enumerate().map(|(i, page)| {
                        let from = i * page_size..((i + 1) * page_size).min(state.tokens);
                        let first = page.0 as usize * page_size;
                        let to = store.row_range(first..first + from.len());
                        (from, to)
                    });
                    if part.dtype == DType::U8 {
                        // No weight is of this type, and none can be uploaded.
                        let bytes = &self.map.bytes()[bytes];
                        for (from, mut to) in pages {
                            let from = &bytes[from.start * cols..from.end * cols];
                            numbers.clear();
                            numbers.extend(from.iter().copied().map(f32::from));
                            backend.write(&numbers, &mut to)?;
                        }
                        continue;
                    }
                    let view = self.view(part.dtype, state.tokens, cols, bytes)?;
                    let rows = backend.upload(&view, state.tokens, cols)?;
                    for (from, mut to) in pages {
                        backend.copy(&rows.row_range(from), &mut to)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn view(
        &self,
        dtype: DType,
        rows: usize,
        cols: usize,
        range: Range<usize>,
    ) -> Result<HostTensor, Error> {
        let format = Format::from(dtype);
        Ok(HostTensor::new(
            format,
            &[rows, cols],
            self.map.clone(),
            range,
        )?)
    }

    /// The bytes of a slot's part in snapshot `index`.
    pub(super) fn slot_part(&self, name: &str, index: usize) -> &[u8] {
        let stored = &self.tensors[name];
        let each = stored.range.len() / self.snapshots.len();
        let start = stored.range.start + index * each;
        &self.map.bytes()[start..start + each]
    }
}

/// A text of a file, for a message.
fn shorten(text: &str) -> String {
    let mut short: String = text.chars().take(60).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}
