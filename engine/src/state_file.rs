//! States as files: safetensors, with the tokens, the keys and values of their pages, the slots after some of
//! them, and the hashes of plan and weights, by which a file for another model is refused.
//!
//! ```text
//! tensor                       type, shape                 what
//! NODE.PART                    F32 (snapshots, rows, cols)  a slot's part after each place of `snapshots`
//! tokens                       U32 (tokens)                those of the model's prefix first
//! NODE.keys, NODE.values       (tokens, cols)              of an attention layer; U8 of keys and values in 8 bits
//! ```
//!
//! Of ranks, which have parts of a layer's state, `@RofN` stands behind the name: such a file is for N ranks.
//!
//! `__metadata__` has texts: `format`, `plan`, `weights`, `activations`, `snapshots` (numbers of tokens, ascending;
//! the last is all), and notes of whoever wrote it. Files are mapped: what is not asked for is not read.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

mod read;
mod write;

pub use read::StateFile;
pub(crate) use write::{Content, Slots, write};

use strata_kernels::{Backend, DType, KvType, Tensor};

use crate::session::{self, Engine, Snapshot, SnapshotId};

/// The version of the format. The first had one slot, of two dimensions.
const FORMAT: &str = "strata-state 2";
/// Longest header that is read: a thousand layers need a tenth of it.
const MAX_HEADER: u64 = 4 << 20;

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
    #[error(
        "{path}: the state has keys and values in {found}, and they are kept in {expected} here; give --kv {found}"
    )]
    OtherKv {
        path: PathBuf,
        found: KvType,
        expected: KvType,
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

/// One tensor of the file: its name, its type, and where it comes from or goes.
struct Part {
    name: String,
    dtype: DType,
    source: Source,
    backend: Arc<dyn Backend>,
}

enum Source {
    /// A part of a slot, by its place among them: rows and columns.
    Slot(usize, [usize; 2]),
    /// Rows of pages, of all sequences.
    Pages(Tensor),
}

impl Part {
    fn is_slot(&self) -> bool {
        matches!(self.source, Source::Slot(..))
    }

    /// Its shape in a file of so many tokens and snapshots.
    fn shape(&self, tokens: usize, snapshots: usize) -> Vec<usize> {
        match &self.source {
            Source::Slot(_, [rows, cols]) => vec![snapshots, *rows, *cols],
            Source::Pages(pages) => vec![tokens, pages.cols()],
        }
    }
}

/// The parts that the states of this engine have, slots first: so what is of four bytes lies at multiples of four.
fn parts(engine: &Engine) -> Vec<Part> {
    let graph = &engine.network().graph;
    let mut slots = 0;
    let part = |p: crate::state_store::StatePart<'_>| {
        let of = match p.rank {
            Some((rank, count)) => format!("@{rank}of{count}"),
            None => String::new(),
        };
        let name = format!("{}.{}{of}", graph.nodes[p.node].name, p.name);
        let backend = p.backend.clone();
        if p.paged {
            return Part {
                name,
                backend,
                dtype: p.tensor.dtype(),
                source: Source::Pages(p.tensor.clone()),
            };
        }
        slots += 1;
        Part {
            name,
            backend,
            dtype: DType::F32,
            source: Source::Slot(slots - 1, p.shape),
        }
    };
    let mut parts: Vec<Part> = engine.store().parts().map(part).collect();
    parts.sort_by_key(|part| !part.is_slot());
    parts
}

/// Writes a snapshot to `path`, beside it first.
pub fn save(
    engine: &Engine,
    id: SnapshotId,
    fingerprint: &Fingerprint,
    path: &Path,
) -> Result<(), Error> {
    let Snapshot { tokens, state } = engine.get(id)?;
    let content = Content {
        tokens,
        pages: &state.pages,
        states: vec![(tokens.len(), Slots::Memory(&state.slot))],
        notes: &BTreeMap::new(),
    };
    write(engine, &content, fingerprint, path)
}

/// Reads the last state of a file into a snapshot of `engine`. Nothing is kept unless all of it is right.
pub fn load(
    engine: &mut Engine,
    fingerprint: &Fingerprint,
    path: &Path,
) -> Result<SnapshotId, Error> {
    let file = StateFile::open(path)?;
    file.fits(engine, fingerprint)?;
    file.is_short_enough(engine)?;
    let tokens = file.tokens();
    let state = file.restore(engine, file.snapshots().len() - 1)?;
    Ok(engine.keep(Snapshot { tokens, state }))
}
