//! The sizes an engine works within.

use strata_kernels::{Backend, KvType};
use strata_layers::{Graph, Reach};

use crate::scheduler::Chunk;

/// The sizes an engine works within.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Most tokens of a sequence, prompt and generated.
    pub context: usize,
    /// Most sequences that run at once.
    pub max_sequences: usize,
    /// Most rows of a step.
    pub token_budget: usize,
    /// How prompts are cut.
    pub chunk: Chunk,
    /// Tokens of a page.
    pub page_size: usize,
    /// How keys and values are kept.
    pub kv_dtype: KvType,
    /// Most tokens of a sequence that are guessed ahead in a step (see [`crate::lookup`]); 0 for none.
    pub lookup: usize,
    /// What attention sees of a sequence, where pages of the rest are given back: see [`Graph::reach`].
    pub reach: Option<Reach>,
}

/// Most rows of a prompt that are computed together, unless someone asks for more: enough that weights are
/// read once for many rows.
pub const DEFAULT_CHUNK: usize = 512;
/// Most bytes that the activations of a chunk take, unless someone asks for more rows.
const ACTIVATION_BYTES: usize = 160 << 20;
const DEVICE_ACTIVATION_BYTES: usize = 4 << 30;
/// Tokens of a page: keys and values of a page are some tens of kilobytes in published models.
pub const DEFAULT_PAGE: usize = 64;

impl EngineConfig {
    /// For `sequences` at a time of up to `context` tokens each.
    pub fn new(context: usize, sequences: usize, kv: impl Into<KvType>) -> Self {
        EngineConfig {
            context,
            max_sequences: sequences,
            token_budget: DEFAULT_CHUNK + sequences - 1,
            chunk: Chunk::AtMost(DEFAULT_CHUNK),
            page_size: DEFAULT_PAGE,
            kv_dtype: kv.into(),
            lookup: 0,
            reach: None,
        }
    }

    /// The same with pages given back that no layer of `graph` sees any more, so that a sequence has no more than a
    /// window's and a step's, however long it is. Prompts then go on from states of exactly their tokens only.
    pub fn giving_back(self, graph: &Graph) -> Self {
        EngineConfig {
            reach: graph.reach(),
            ..self
        }
    }

    /// The same with up to `tokens` guessed ahead, which takes a second slot for each.
    pub fn with_lookup(self, tokens: usize) -> Self {
        EngineConfig {
            lookup: tokens,
            ..self
        }
    }

    /// The same with chunks of as many rows as fit a modest memory, at `bytes_per_row` of activations.
    pub fn with_row_bytes(self, bytes_per_row: usize) -> Self {
        self.with_rows(ACTIVATION_BYTES, DEFAULT_CHUNK, bytes_per_row)
    }

    /// The same with chunks of as many rows as are worth taking at once on a device.
    pub fn for_device(self, device: &dyn Backend, bytes_per_row: usize) -> Self {
        match device.prompt_rows() {
            0..=DEFAULT_CHUNK => self.with_row_bytes(bytes_per_row),
            rows => self.with_most_rows(rows, bytes_per_row),
        }
    }

    /// The same with chunks of up to so many rows, as a device takes them.
    pub fn with_most_rows(self, rows: usize, bytes_per_row: usize) -> Self {
        self.with_rows(DEVICE_ACTIVATION_BYTES, rows, bytes_per_row)
    }

    fn with_rows(self, most_bytes: usize, most_rows: usize, bytes_per_row: usize) -> Self {
        let rows = (most_bytes / bytes_per_row.max(1)).clamp(16, most_rows) / 16 * 16;
        let token_budget = rows + self.max_sequences - 1;
        EngineConfig {
            chunk: Chunk::AtMost(rows),
            token_budget,
            ..self
        }
    }

    /// The same with prompts cut at multiples of `chunk` exactly.
    pub fn with_chunk(self, chunk: usize) -> Self {
        let token_budget = chunk + self.max_sequences - 1;
        EngineConfig {
            chunk: Chunk::Every(chunk),
            token_budget,
            ..self
        }
    }

    /// Pages that hold the context of all sequences, or what is seen of it at once where others are given back, with
    /// a prefix before it and one to spare for each.
    pub fn pages(&self, prefix: usize) -> usize {
        let pages = |tokens: usize| tokens.div_ceil(self.page_size);
        let all = pages(self.context.saturating_add(prefix));
        let most = self.reach.map_or(all, |r| {
            // Of either run the first page may be seen in part.
            let seen = r.window.saturating_add(self.token_budget);
            all.min(pages(r.keep_first) + pages(seen) + 2)
        });
        self.max_sequences * (most + 1)
    }

    /// Bytes of a page of all attention layers of `graph`.
    pub fn page_bytes(&self, graph: &Graph) -> usize {
        self.page_size * graph.page_bytes_per_token(self.kv_dtype)
    }

    /// Slots that sequences own: one each, and one for a sequence that is being restored.
    pub fn owned_slots(&self) -> usize {
        self.max_sequences + 1
    }

    /// All slots: those, and where guesses are made a copy of each.
    pub fn slots(&self) -> usize {
        self.owned_slots() * if self.lookup > 0 { 2 } else { 1 }
    }
}
