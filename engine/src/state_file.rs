//! Snapshots as files: safetensors, with the tokens, the pages' keys and values, the slot, and the
//! hashes of plan and weights, by which a file for another model is refused.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use strata_kernels::{DType, Tensor};

use crate::ids::TokenId;
use crate::session::{self, Engine, Snapshot, SnapshotId};

/// The version of the format.
const FORMAT: &str = "strata-state 1";
/// Longest header that is read: a thousand layers need a tenth of it.
const MAX_HEADER: u64 = 16 << 20;

/// What a state belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    /// Hash of the plan, less its name.
    pub plan: String,
    /// Hash of all weights.
    pub weights: String,
}

/// What can go wrong with a state file.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum Error {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path}: {why}; read the document again to make a new state file")]
    Damaged { path: PathBuf, why: String },
    #[error(
        "{path}: the state belongs to another {what}: it has {found}, this model has {expected}"
    )]
    OtherModel {
        path: PathBuf,
        what: &'static str,
        found: String,
        expected: String,
    },
    #[error("{path}: {tokens} tokens do not fit a context of {context}; give a larger --context")]
    TooLong {
        path: PathBuf,
        tokens: usize,
        context: usize,
    },
    #[error(transparent)]
    Engine(#[from] session::Error),
    #[error(transparent)]
    Kernel(#[from] strata_kernels::Error),
}

/// One tensor of the file: its name, its type and shape, and where it comes from or goes.
struct Part {
    name: String,
    dtype: DType,
    shape: [usize; 2],
    source: Source,
}

enum Source {
    /// Part of the slot, by place.
    Slot(usize),
    /// Rows of pages.
    Pages(Tensor),
}

impl Part {
    fn bytes(&self) -> usize {
        self.shape[0] * self.shape[1] * self.dtype.size()
    }
}

/// The parts that a state of `tokens` tokens has in this engine, in the order of the file.
fn parts(engine: &Engine, tokens: usize) -> Vec<Part> {
    let graph = &engine.network().graph;
    let mut slots = 0;
    let part = |p: crate::state_store::StatePart<'_>| {
        let name = format!("{}.{}", graph.nodes[p.node].name, p.name);
        if p.paged {
            let shape = [tokens, p.shape[1]];
            let source = Source::Pages(p.tensor.clone());
            return Part {
                name,
                dtype: p.tensor.dtype(),
                shape,
                source,
            };
        }
        slots += 1;
        Part {
            name,
            dtype: DType::F32,
            shape: p.shape,
            source: Source::Slot(slots - 1),
        }
    };
    engine.store().parts().map(part).collect()
}

/// Writes a snapshot to `path`, beside it first.
pub fn save(
    engine: &Engine,
    id: SnapshotId,
    fingerprint: &Fingerprint,
    path: &Path,
) -> Result<(), Error> {
    let snapshot = engine.get(id)?;
    let parts = parts(engine, snapshot.tokens.len());
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}.part", std::process::id()));
    let beside = PathBuf::from(beside);
    let io = |source| Error::Io {
        path: path.into(),
        source,
    };
    let written = File::create(&beside)
        .and_then(|file| write(engine, snapshot, fingerprint, &parts, BufWriter::new(file)))
        .and_then(|()| std::fs::rename(&beside, path));
    written.map_err(|error| {
        let _ = std::fs::remove_file(&beside);
        io(error)
    })
}

fn write(
    engine: &Engine,
    snapshot: &Snapshot,
    fingerprint: &Fingerprint,
    parts: &[Part],
    mut to: BufWriter<File>,
) -> io::Result<()> {
    let mut header = Map::new();
    header.insert(
        "__metadata__".into(),
        json!({
            "format": FORMAT,
            "plan": fingerprint.plan,
            "weights": fingerprint.weights,
            "activations": engine.network().activations.to_string(),
        }),
    );
    let mut end = 0;
    let mut entry = |name: &str, dtype: &str, shape: Value, bytes: usize| {
        let offsets = [end, end + bytes];
        end += bytes;
        header.insert(
            name.into(),
            json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}),
        );
    };
    // `U32` is a type of the format since 2023.
    let tokens = snapshot.tokens.len();
    entry("tokens", "U32", json!([tokens]), 4 * tokens);
    for part in parts {
        entry(
            &part.name,
            &part.dtype.to_string(),
            json!(part.shape),
            part.bytes(),
        );
    }
    let mut text = serde_json::to_vec(&header).map_err(io::Error::other)?;
    text.resize(text.len().next_multiple_of(8), b' ');
    to.write_all(&(text.len() as u64).to_le_bytes())?;
    to.write_all(&text)?;
    for token in &snapshot.tokens {
        to.write_all(&token.to_le_bytes())?;
    }
    let backend = engine.store().backend();
    let mut row = Vec::new();
    let mut bytes = Vec::new();
    let mut put = |tensor: &Tensor| -> io::Result<()> {
        row.resize(tensor.rows() * tensor.cols(), 0.0);
        backend.read(tensor, &mut row).map_err(io::Error::other)?;
        bytes.clear();
        encode(&row, tensor.dtype(), &mut bytes);
        to.write_all(&bytes)
    };
    let page_size = engine.config().page_size;
    for part in parts {
        match &part.source {
            Source::Slot(i) => put(&snapshot.slot[*i])?,
            Source::Pages(pages) => {
                for (i, page) in snapshot.pages.iter().enumerate() {
                    let first = page.0 as usize * page_size;
                    let len = page_size.min(tokens - i * page_size);
                    put(&pages.row_range(first..first + len))?;
                }
            }
        }
    }
    to.flush()?;
    to.into_inner()
        .map_err(io::IntoInnerError::into_error)?
        .sync_all()
}

fn encode(values: &[f32], dtype: DType, to: &mut Vec<u8>) {
    for value in values {
        match dtype {
            DType::F32 => to.extend(value.to_le_bytes()),
            DType::F16 => to.extend(half::f16::from_f32(*value).to_le_bytes()),
            DType::BF16 => to.extend(half::bf16::from_f32(*value).to_le_bytes()),
            DType::I32 => to.extend((*value as i32).to_le_bytes()),
            DType::U8 => to.push(*value as u8),
        }
    }
}

fn decode(bytes: &[u8], dtype: DType, to: &mut Vec<f32>) {
    to.clear();
    match dtype {
        DType::F32 => to.extend(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b))),
        DType::F16 => {
            to.extend(
                bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|b| half::f16::from_le_bytes(*b).to_f32()),
            );
        }
        DType::BF16 => {
            to.extend(
                bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|b| half::bf16::from_le_bytes(*b).to_f32()),
            );
        }
        DType::I32 => to.extend(
            bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| i32::from_le_bytes(*b) as f32),
        ),
        DType::U8 => to.extend(bytes.iter().map(|b| f32::from(*b))),
    }
}

/// One entry of a safetensors header.
#[derive(serde::Deserialize)]
struct Stored {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// Reads a state file into a snapshot of `engine`. Nothing is kept unless all of it is right.
pub fn load(
    engine: &mut Engine,
    fingerprint: &Fingerprint,
    path: &Path,
) -> Result<SnapshotId, Error> {
    let io = |source| Error::Io {
        path: path.into(),
        source,
    };
    let damaged = |why: String| Error::Damaged {
        path: path.into(),
        why,
    };
    let mut file = File::open(path).map_err(io)?;
    let size = file.metadata().map_err(io)?.len();
    let mut length = [0; 8];
    file.read_exact(&mut length)
        .map_err(|_| damaged(format!("the file has {size} bytes only")))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER || length + 8 > size {
        return Err(damaged(format!(
            "a header of {length} bytes in a file of {size}"
        )));
    }
    let mut text = vec![0; length as usize];
    file.read_exact(&mut text).map_err(io)?;
    let mut header: BTreeMap<String, Value> = serde_json::from_slice(&text)
        .map_err(|e| damaged(format!("the header is no JSON: {e}")))?;
    let metadata = header.remove("__metadata__").unwrap_or_default();
    let says = |key: &str| {
        metadata
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or("nothing")
            .to_string()
    };
    if says("format") != FORMAT {
        let format = says("format");
        return Err(damaged(format!(
            "its format is {format:?}, this program reads {FORMAT:?}"
        )));
    }
    let activations = engine.network().activations.to_string();
    for (what, found, expected) in [
        ("plan", says("plan"), &fingerprint.plan),
        ("set of weights", says("weights"), &fingerprint.weights),
        ("compute type", says("activations"), &activations),
    ] {
        if found != *expected {
            let (path, expected) = (path.into(), expected.clone());
            return Err(Error::OtherModel {
                path,
                what,
                found,
                expected,
            });
        }
    }

    let data = 8 + length;
    let mut stored = BTreeMap::new();
    for (name, value) in header {
        let entry: Stored =
            serde_json::from_value(value).map_err(|e| damaged(format!("tensor {name}: {e}")))?;
        stored.insert(name, entry);
    }
    let tokens_entry = stored
        .remove("tokens")
        .ok_or_else(|| damaged("there are no tokens".into()))?;
    let tokens = tokens_entry.shape.first().copied().unwrap_or(0);
    let graph = &engine.network().graph;
    let (context, prefix) = (engine.config().context, graph.prefix);
    let ids_known = graph.vocab + prefix;
    if tokens == 0 || tokens_entry.dtype != "U32" || tokens_entry.shape.len() != 1 {
        return Err(damaged("its tokens are no list of U32".into()));
    }
    if tokens > context.saturating_add(prefix) {
        return Err(Error::TooLong {
            path: path.into(),
            tokens: tokens - prefix,
            context,
        });
    }

    // All that is expected is checked before anything is taken.
    let parts = parts(engine, tokens);
    let check = |name: &str, entry: &Stored, dtype: &str, shape: &[usize], bytes: usize| {
        let [start, end] = entry.data_offsets;
        if entry.dtype != dtype || entry.shape != shape {
            return Err(damaged(format!(
                "tensor {name} is {} {:?}, expected {dtype} {shape:?}",
                entry.dtype, entry.shape
            )));
        }
        if start > end || end - start != bytes as u64 || data.saturating_add(end) > size {
            return Err(damaged(format!(
                "tensor {name} lies at bytes {start} to {end} of {}, expected {bytes} bytes",
                size - data
            )));
        }
        Ok(())
    };
    check("tokens", &tokens_entry, "U32", &[tokens], 4 * tokens)?;
    let mut offsets = Vec::new();
    for part in &parts {
        let name = &part.name;
        let entry = stored
            .remove(name)
            .ok_or_else(|| damaged(format!("tensor {name} is missing")))?;
        check(
            name,
            &entry,
            &part.dtype.to_string(),
            &part.shape,
            part.bytes(),
        )?;
        offsets.push(entry.data_offsets[0]);
    }
    if let Some(name) = stored.keys().next() {
        return Err(damaged(format!("tensor {name} belongs to no layer")));
    }

    let mut at = |offset: u64, len: usize, to: &mut Vec<u8>| -> Result<(), Error> {
        to.resize(len, 0);
        file.seek(SeekFrom::Start(data + offset)).map_err(io)?;
        file.read_exact(to).map_err(io)
    };
    let mut bytes = Vec::new();
    at(tokens_entry.data_offsets[0], 4 * tokens, &mut bytes)?;
    let ids: Vec<TokenId> = bytes
        .as_chunks()
        .0
        .iter()
        .map(|b| u32::from_le_bytes(*b))
        .collect();
    if let Some(id) = ids.iter().find(|id| **id as usize >= ids_known) {
        let vocab = engine.network().graph.vocab;
        return Err(damaged(format!(
            "token id {id} is outside the vocabulary of {vocab}"
        )));
    }

    let pages = engine.alloc_pages(tokens)?;
    let mut snapshot = Snapshot {
        tokens: ids,
        pages,
        slot: Vec::new(),
    };
    let filled = fill(engine, &mut snapshot, &parts, &offsets, &mut at);
    match filled {
        Ok(()) => Ok(engine.keep(snapshot)),
        Err(error) => {
            engine.release(&snapshot.pages);
            Err(error)
        }
    }
}

type ReadAt<'a> = dyn FnMut(u64, usize, &mut Vec<u8>) -> Result<(), Error> + 'a;

fn fill(
    engine: &Engine,
    snapshot: &mut Snapshot,
    parts: &[Part],
    offsets: &[u64],
    at: &mut ReadAt<'_>,
) -> Result<(), Error> {
    let backend = engine.store().backend();
    let (tokens, page_size) = (snapshot.tokens.len(), engine.config().page_size);
    let (mut bytes, mut values) = (Vec::new(), Vec::new());
    for (part, offset) in parts.iter().zip(offsets) {
        match &part.source {
            Source::Slot(_) => {
                at(*offset, part.bytes(), &mut bytes)?;
                decode(&bytes, part.dtype, &mut values);
                let mut own = backend.alloc(DType::F32, 1, values.len())?;
                backend.write(&values, &mut own)?;
                snapshot.slot.push(own);
            }
            Source::Pages(store) => {
                let row = part.shape[1] * part.dtype.size();
                for (i, page) in snapshot.pages.iter().enumerate() {
                    let first = page.0 as usize * page_size;
                    let len = page_size.min(tokens - i * page_size);
                    at(
                        *offset + (i * page_size * row) as u64,
                        len * row,
                        &mut bytes,
                    )?;
                    decode(&bytes, part.dtype, &mut values);
                    backend.write(&values, &mut store.row_range(first..first + len))?;
                }
            }
        }
    }
    Ok(())
}
