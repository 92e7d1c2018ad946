//! The engine: requests in, tokens out. It owns the state of all sequences, and their snapshots.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use strata_kernels::ops::Likeliest;
use strata_kernels::{DType, Ragged, Span, Tensor};

use crate::batch::{Batch, Logits};
pub use crate::engine_config::{DEFAULT_CHUNK, DEFAULT_PAGE, EngineConfig};
use crate::estimate::Allocated;
use crate::ids::{PageId, SeqId, SlotId, TokenId};
use crate::runner::{self, Network, Point, Row, Runner};
use crate::sampler::{SampleError, Sampled, Sampler, SamplingFaults, SamplingParams};
use crate::scheduler::{BadConfig, Event, ForkRefused, Refused, Scheduler, SchedulerConfig, Step};
use crate::sequence::{Limits, Reason, Sequence, SequenceRequest};
use crate::state_store::{StateSize, StateStore};

/// What someone wants generated.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// The tokens to begin with.
    pub prompt: Vec<TokenId>,
    /// Most tokens to generate; with 0 the prompt is computed and nothing is sampled.
    pub max_tokens: usize,
    /// Tokens that end the generation.
    pub stop: Vec<TokenId>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Whether the logits of every prompt row are wanted.
    pub prompt_logits: bool,
}

/// What happened in a step.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// A sequence has a new token.
    Token {
        /// The sequence.
        id: SeqId,
        /// The token.
        sampled: Sampled,
    },
    /// A sequence is at its end. Its state is kept until it is removed or the memory is needed.
    Finished {
        /// The sequence.
        id: SeqId,
        /// Why.
        reason: Reason,
    },
}

/// Told the sequence, the position and the logits of a row.
type Observe<'a> = dyn FnMut(SeqId, usize, &[f32]) + 'a;

/// Rows of the stream of one sequence, at one point of the network.
#[derive(Debug, Clone, Copy)]
pub struct Watched<'a> {
    /// The sequence.
    pub id: SeqId,
    /// Where in the network.
    pub point: Point,
    /// The position of the first row.
    pub position: usize,
    /// (rows, D), in the order of positions.
    pub rows: &'a [f32],
}

/// What can go wrong in an engine.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum Error {
    #[error(transparent)]
    Kernel(#[from] strata_kernels::Error),
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error(transparent)]
    Fork(#[from] ForkRefused),
    #[error(transparent)]
    Sampling(#[from] SamplingFaults),
    #[error(transparent)]
    Sample(#[from] SampleError),
    #[error(transparent)]
    Config(#[from] BadConfig),
    #[error("token id {token} at position {position} is outside the vocabulary of {vocab}")]
    TokenOutside {
        token: TokenId,
        position: usize,
        vocab: usize,
    },
    #[error("this model reads images, not text; use `strata classify`")]
    ReadsImages,
    #[error("{what} need {bytes} bytes, more than this machine can address")]
    TooLarge { what: &'static str, bytes: u128 },
    #[error("sequence {0:?} has no state: it has not run yet, or its state was given to another")]
    NoState(SeqId),
    #[error("there is no snapshot {0:?}")]
    NoSnapshot(SnapshotId),
    #[error(
        "the prompt leaves the snapshot at token {position}: it has {found}, the snapshot {expected}"
    )]
    Diverged {
        position: usize,
        found: String,
        expected: TokenId,
    },
    #[error("no slot is free for a restored sequence: {running} sequences are running")]
    NoSlot { running: usize },
    #[error("no page is free for {tokens} restored tokens")]
    NoPages { tokens: usize },
}

/// Names a snapshot of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SnapshotId(u64);

/// The state of a sequence after some of its tokens: pages, shared with whoever else has them, and a
/// copy of its slot.
pub(crate) struct Snapshot {
    pub tokens: Vec<TokenId>,
    pub pages: Vec<PageId>,
    /// (1, elements) of each part of a slot, in the order of the store.
    pub slot: Vec<Tensor>,
}

/// A network with its sequences.
pub struct Engine {
    runner: Runner,
    scheduler: Scheduler,
    config: EngineConfig,
    samplers: BTreeMap<SeqId, Sampler>,
    snapshots: BTreeMap<SnapshotId, Snapshot>,
    next_snapshot: u64,
    outputs: Vec<Output>,
    // Filled anew for every step; they keep their memory.
    batch: Batch,
    spans: Vec<Span>,
    page_table: Vec<u32>,
    logit_rows: Vec<usize>,
    tokens: Vec<(SeqId, TokenId)>,
    events: Vec<Event>,
}

impl Engine {
    /// An engine for `network`. State is reserved here and committed as it is used.
    pub fn new(network: Arc<Network>, config: EngineConfig) -> Result<Self, Error> {
        let pages = config.pages(network.graph.prefix);
        Engine::with_pages(network, config, pages)
    }

    /// As [`Engine::new`], with a given number of pages for all sequences together.
    pub fn with_pages(
        network: Arc<Network>,
        config: EngineConfig,
        pages: usize,
    ) -> Result<Self, Error> {
        let graph = &network.graph;
        if graph.image.is_some() {
            return Err(Error::ReadsImages);
        }
        let has_pages = graph.page_elements_per_token() > 0;
        let has_slots = graph.slot_bytes() > 0;
        let pages = if has_pages { pages } else { 0 };
        let slots = if has_slots { config.slots() } else { 0 };
        let narrow = |what, n: usize, each: usize| {
            let bytes = n as u128 * each as u128;
            let small = u32::try_from(n).ok().filter(|_| bytes < 1 << 46);
            small.ok_or(Error::TooLarge { what, bytes })
        };
        let page_bytes =
            config.page_size * graph.page_elements_per_token() * config.kv_dtype.size();
        let page_count = narrow("keys and values", pages, page_bytes)?;
        let slot_count = narrow("slots", slots, graph.slot_bytes())?;
        let scheduler = Scheduler::new(SchedulerConfig {
            page_size: config.page_size as u32,
            pages: has_pages.then_some(page_count),
            slots: has_slots.then_some(slot_count),
            token_budget: config.token_budget,
            max_sequences: config.max_sequences,
            chunk: config.chunk,
            context: config.context.saturating_add(graph.prefix),
        })?;
        let size = StateSize {
            page_size: config.page_size,
            pages,
            slots,
            kv_dtype: config.kv_dtype,
        };
        let store = StateStore::new(graph, size, network.backend.clone())?;
        let runner = Runner::new(network.clone(), store, config.token_budget)?;
        Ok(Engine {
            runner,
            scheduler,
            config,
            samplers: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            next_snapshot: 0,
            outputs: Vec::new(),
            batch: Batch::new(),
            spans: Vec::new(),
            page_table: Vec::new(),
            logit_rows: Vec::new(),
            tokens: Vec::new(),
            events: Vec::new(),
        })
    }

    /// What it holds now, and the rows of its largest step so far.
    pub fn allocated(&self) -> (Allocated, usize) {
        (self.runner.allocated(), self.runner.most_rows())
    }

    /// The network that runs.
    pub fn network(&self) -> &Arc<Network> {
        self.runner.network()
    }

    /// The sizes it works within.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// How many tokens of a sequence's own have been computed, until it is removed.
    pub fn computed(&self, id: SeqId) -> usize {
        let computed = self.sequence(id).map_or(0, |s| s.computed);
        computed.saturating_sub(self.prefix().len())
    }

    /// The ids that stand before the tokens of every sequence. Nobody outside sees them.
    fn prefix(&self) -> Range<TokenId> {
        let graph = &self.network().graph;
        graph.vocab as TokenId..(graph.vocab + graph.prefix) as TokenId
    }

    /// A sequence, until it is removed. Its tokens begin with the model's prefix, if that has one.
    pub fn sequence(&self, id: SeqId) -> Option<&Sequence> {
        self.scheduler.sequence(id)
    }

    /// How often a sequence's state was taken for an older one.
    pub fn preemptions(&self) -> u64 {
        self.scheduler.preemptions()
    }

    /// Bytes of activations and scratch, beside weights and state.
    pub fn buffer_bytes(&self) -> usize {
        self.runner.buffer_bytes()
    }

    /// Takes a request on.
    pub fn submit(&mut self, request: Request) -> Result<SeqId, Error> {
        let (sequence, sampler) = self.accept(request)?;
        let id = self.scheduler.submit(sequence)?;
        self.samplers.insert(id, sampler);
        Ok(id)
    }

    fn accept(&self, request: Request) -> Result<(SequenceRequest, Sampler), Error> {
        let vocab = self.network().graph.vocab;
        if let Some((position, token)) = request
            .prompt
            .iter()
            .copied()
            .enumerate()
            .find(|(_, t)| *t as usize >= vocab)
        {
            return Err(Error::TokenOutside {
                token,
                position,
                vocab,
            });
        }
        let sampler = Sampler::new(request.sampling, vocab)?;
        let limits = Limits {
            max_tokens: request.max_tokens,
            stop: request.stop,
        };
        let prompt_logits = request.prompt_logits;
        let mut prompt = request.prompt;
        // A prompt without a token is refused further on, also behind a prefix.
        if !prompt.is_empty() {
            prompt.splice(0..0, self.prefix());
        }
        let sequence = SequenceRequest {
            prompt,
            limits,
            prompt_logits,
            cut: None,
        };
        Ok((sequence, sampler))
    }

    /// A second sequence with the tokens and the state of `id`, sampled by `sampling` from here on.
    pub fn fork(&mut self, id: SeqId, sampling: SamplingParams) -> Result<SeqId, Error> {
        let sampler = Sampler::new(sampling, self.network().graph.vocab)?;
        let fork = self.scheduler.fork(id)?;
        if let Some((from, to)) = fork.copy {
            self.runner
                .state
                .copy_slot(from.0 as usize, to.0 as usize)?;
        }
        self.samplers.insert(fork.id, sampler);
        Ok(fork.id)
    }

    /// Ends a sequence, for instance at a stop string. False if it is at its end already.
    pub fn finish(&mut self, id: SeqId, reason: Reason) -> bool {
        self.scheduler.finish(id, reason)
    }

    /// Forgets a sequence, whatever it is doing.
    pub fn remove(&mut self, id: SeqId) -> bool {
        self.samplers.remove(&id);
        self.scheduler.remove(id)
    }

    /// Runs one step; what came of it is in [`Engine::outputs`]. False when there is nothing to do.
    /// `observe` gets the sequence, the position and the logits of every row that computed some: those
    /// that choose a token, and prompt rows that asked for them.
    pub fn step(&mut self, observe: &mut dyn FnMut(SeqId, usize, &[f32])) -> Result<bool, Error> {
        self.step_with(None, Some(observe))
    }

    /// As [`Engine::step`], with nobody to see logits. Where all that is asked of them is which is the largest,
    /// they stay on the device.
    pub fn advance(&mut self) -> Result<bool, Error> {
        self.step_with(None, None)
    }

    /// As [`Engine::step`]; `watch` gets the stream of every sequence at every point, as it is computed.
    pub fn step_watched(
        &mut self,
        watch: &mut dyn FnMut(Watched<'_>),
        observe: &mut dyn FnMut(SeqId, usize, &[f32]),
    ) -> Result<bool, Error> {
        self.step_with(Some(watch), Some(observe))
    }

    fn step_with(
        &mut self,
        watch: Option<&mut dyn FnMut(Watched<'_>)>,
        observe: Option<&mut Observe<'_>>,
    ) -> Result<bool, Error> {
        self.outputs.clear();
        match self.scheduler.next(&mut self.batch) {
            Step::Idle => return Ok(false),
            Step::Short(wanted) => {
                // Only snapshots hold pages outside the scheduler. Their owner must drop some.
                let tokens = wanted.pages * self.config.page_size;
                return Err(Error::NoPages { tokens });
            }
            Step::Run => {}
        }
        match self.run(watch, observe) {
            Ok(()) => {
                self.scheduler
                    .done(&self.batch, &self.tokens, &mut self.events);
                // Tokens are in `outputs` already, with their log-probabilities.
                for event in self.events.drain(..) {
                    if let Event::Finished { id, reason } = event {
                        self.outputs.push(Output::Finished { id, reason });
                    }
                }
                Ok(true)
            }
            Err(error) => {
                self.outputs.clear();
                self.scheduler.failed(&self.batch, &mut self.events);
                self.events.clear();
                Err(error)
            }
        }
    }

    /// What came of the last step: tokens in the order of the batch, then ends.
    pub fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    /// Runs the batch and samples.
    fn run(
        &mut self,
        watch: Option<&mut dyn FnMut(Watched<'_>)>,
        mut observe: Option<&mut Observe<'_>>,
    ) -> Result<(), Error> {
        let prefix = self.prefix().len();
        let Engine {
            runner,
            scheduler,
            batch,
            spans,
            page_table,
            logit_rows,
            ..
        } = self;
        for (from, to) in &batch.copies {
            runner.state.copy_page(from.0 as usize, to.0 as usize)?;
        }
        for slot in &batch.clear {
            runner.state.clear_slot(slot.0 as usize)?;
        }
        page_table.clear();
        page_table.reserve(batch.pages.capacity());
        page_table.extend(batch.pages.iter().map(|p| p.0));
        spans.clear();
        logit_rows.clear();
        for span in &batch.spans {
            spans.push(Span {
                start: span.start,
                len: span.len,
                position: span.position,
                slot: span.slot.map_or(0, |s| s.0 as usize),
                pages: span.pages.clone(),
            });
            let end = span.start + span.len;
            match span.logits {
                Logits::None => {}
                Logits::Last => logit_rows.push(end - 1),
                Logits::All => {
                    let hidden = prefix.saturating_sub(span.position).min(span.len);
                    logit_rows.extend(span.start + hidden..end);
                }
            }
        }
        let page_size = self.config.page_size;
        let step = runner::Step {
            tokens: &batch.tokens,
            ragged: Ragged {
                spans,
                page_table,
                page_size,
            },
            logits: logit_rows,
        };

        self.tokens.clear();
        let (samplers, tokens, outputs) = (&mut self.samplers, &mut self.tokens, &mut self.outputs);
        let mut at = 0;
        let mut failed = None;
        let graph = &runner.network().graph;
        let blind = watch.is_none() && observe.is_none() && graph.vocab <= Likeliest::MOST;
        let likeliest = blind
            && batch.spans.iter().all(|span| match span.logits {
                Logits::None => true,
                Logits::Last => {
                    let sampler = samplers.get(&span.seq);
                    span.sample && sampler.is_some_and(Sampler::takes_likeliest)
                }
                Logits::All => false,
            });
        let d_model = graph.d_model;
        let mut spread = watch.map(|watch| {
            |point, rows: &[f32]| {
                for span in &batch.spans {
                    let hidden = prefix.saturating_sub(span.position).min(span.len);
                    let shown = span.start + hidden..span.start + span.len;
                    if !shown.is_empty() {
                        watch(Watched {
                            id: span.seq,
                            point,
                            position: span.position + hidden - prefix,
                            rows: &rows[shown.start * d_model..shown.end * d_model],
                        });
                    }
                }
            }
        });
        let watch = spread.as_mut().map(|w| w as &mut runner::Watch<'_>);
        let mut sink = |row, of: Row<'_>| {
            while batch.spans[at].start + batch.spans[at].len <= row {
                at += 1;
            }
            let span = &batch.spans[at];
            if let (Some(observe), Row::Logits(logits)) = (&mut observe, of) {
                observe(span.seq, span.position + row - span.start - prefix, logits);
            }
            if !span.sample || row + 1 < span.start + span.len || failed.is_some() {
                return;
            }
            let sequence = scheduler
                .sequence(span.seq)
                .expect("a sequence of the batch exists");
            let sampler = samplers
                .get_mut(&span.seq)
                .expect("every sequence has a sampler");
            let (prompt, generated) = sequence.tokens.split_at(sequence.prompt_len);
            let sampled = match of {
                Row::Logits(logits) => sampler.sample(logits, &prompt[prefix..], generated),
                Row::Likeliest(token) => Ok(Sampled::plain(token)),
            };
            match sampled {
                Ok(sampled) => {
                    tokens.push((span.seq, sampled.token));
                    outputs.push(Output::Token {
                        id: span.seq,
                        sampled,
                    });
                }
                Err(error) => failed = Some(error),
            }
        };
        if likeliest {
            runner.likeliest(&step, &mut sink)?;
        } else {
            runner.forward_watched(&step, watch, &mut |row, logits| {
                sink(row, Row::Logits(logits));
            })?;
        }
        failed.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Keeps the state of a sequence as it is now, between two steps.
    pub fn snapshot(&mut self, id: SeqId) -> Result<SnapshotId, Error> {
        let sequence = self.scheduler.sequence(id).ok_or(Error::NoState(id))?;
        if !sequence.holds_state() {
            return Err(Error::NoState(id));
        }
        let tokens = sequence.tokens[..sequence.computed].to_vec();
        let (pages, slot) = (sequence.pages.clone(), sequence.slot);
        let mut copy = Vec::new();
        if let Some(slot) = slot {
            let row = slot.0 as usize;
            let backend = self.runner.state.backend().clone();
            for part in self.runner.state.parts().filter(|p| !p.paged) {
                let mut own = backend.alloc(DType::F32, 1, part.tensor.cols())?;
                backend.copy(&part.tensor.row_range(row..row + 1), &mut own)?;
                copy.push(own);
            }
        }
        if let Some(pool) = self.scheduler.pages_mut() {
            pages.iter().for_each(|p| pool.retain(*p));
        }
        Ok(self.keep(Snapshot {
            tokens,
            pages,
            slot: copy,
        }))
    }

    pub(crate) fn keep(&mut self, snapshot: Snapshot) -> SnapshotId {
        let id = SnapshotId(self.next_snapshot);
        self.next_snapshot += 1;
        self.snapshots.insert(id, snapshot);
        id
    }

    /// The tokens whose state a snapshot holds.
    pub fn snapshot_tokens(&self, id: SnapshotId) -> Result<&[TokenId], Error> {
        let tokens = &self.get(id)?.tokens;
        Ok(&tokens[self.prefix().len().min(tokens.len())..])
    }

    pub(crate) fn get(&self, id: SnapshotId) -> Result<&Snapshot, Error> {
        self.snapshots.get(&id).ok_or(Error::NoSnapshot(id))
    }

    /// Takes a request on whose prompt begins with the tokens of a snapshot and goes on by at least
    /// one: those are not computed again. The snapshot stays as it is.
    pub fn restore(&mut self, id: SnapshotId, request: Request) -> Result<SeqId, Error> {
        let snapshot = self.get(id)?;
        let (prompt, tokens) = (&request.prompt, self.snapshot_tokens(id)?);
        if let Some(position) = (0..tokens.len()).find(|i| prompt.get(*i) != Some(&tokens[*i])) {
            let found = prompt
                .get(position)
                .map_or("no token".into(), |t| format!("token {t}"));
            let expected = tokens[position];
            return Err(Error::Diverged {
                position,
                found,
                expected,
            });
        }
        let (computed, pages) = (snapshot.tokens.len(), snapshot.pages.clone());
        let (sequence, sampler) = self.accept(request)?;
        let slot = if snapshot.slot.is_empty() {
            None
        } else {
            Some(self.fill_slot(id)?)
        };
        if let Some(pool) = self.scheduler.pages_mut() {
            pages.iter().for_each(|p| pool.retain(*p));
        }
        match self.scheduler.adopt(sequence, computed, &pages, slot) {
            Ok(seq) => {
                self.samplers.insert(seq, sampler);
                Ok(seq)
            }
            Err(refused) => {
                self.release(&pages);
                if let (Some(pool), Some(slot)) = (self.scheduler.slots_mut(), slot) {
                    pool.release(slot);
                }
                Err(refused.into())
            }
        }
    }

    /// A new slot with the contents of a snapshot's.
    fn fill_slot(&mut self, id: SnapshotId) -> Result<SlotId, Error> {
        let running = self.scheduler.running().count();
        let pool = self
            .scheduler
            .slots_mut()
            .expect("a snapshot with a slot comes from a pool");
        let slot = pool.alloc().ok_or(Error::NoSlot { running })?;
        let row = slot.0 as usize;
        let parts = self.runner.state.parts().filter(|p| !p.paged);
        for (part, own) in parts.zip(&self.snapshots[&id].slot) {
            let mut to = part.tensor.row_range(row..row + 1);
            self.runner.state.backend().copy(own, &mut to)?;
        }
        Ok(slot)
    }

    /// Forgets a snapshot.
    pub fn drop_snapshot(&mut self, id: SnapshotId) -> Result<(), Error> {
        let snapshot = self.snapshots.remove(&id).ok_or(Error::NoSnapshot(id))?;
        self.release(&snapshot.pages);
        Ok(())
    }

    pub(crate) fn release(&mut self, pages: &[PageId]) {
        if let Some(pool) = self.scheduler.pages_mut() {
            for page in pages {
                pool.release(*page);
            }
        }
    }

    /// New pages for `tokens` tokens, held by the caller.
    pub(crate) fn alloc_pages(&mut self, tokens: usize) -> Result<Vec<PageId>, Error> {
        let count = tokens.div_ceil(self.config.page_size);
        let Some(pool) = self.scheduler.pages_mut() else {
            return Ok(Vec::new());
        };
        if pool.free() < count {
            return Err(Error::NoPages { tokens });
        }
        Ok((0..count)
            .map(|_| pool.alloc().expect("as many are free"))
            .collect())
    }

    /// The memory behind all state.
    pub(crate) fn store(&self) -> &StateStore {
        &self.runner.state
    }
}
