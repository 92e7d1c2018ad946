//! The engine: requests in, tokens out. It owns the state of all sequences, and their snapshots.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use strata_kernels::ops::Likeliest;
use strata_kernels::{Ragged, Span};

mod cached;
mod config;
mod error;
mod guesses;
mod readers;
mod snapshots;
mod view;

pub use config::{DEFAULT_CHUNK, DEFAULT_PAGE, EngineConfig};
pub use error::Error;
pub use snapshots::SnapshotId;
pub(crate) use snapshots::{Snapshot, State};
pub use view::{Kept, Used};

use crate::batch::{Batch, Logits};
use crate::estimate::Allocated;
use crate::ids::{SeqId, TokenId};
use crate::lookup::Lookup;
use crate::prefix_cache::Cache;
use crate::runner::{self, Network, Point, Row, Runner};
use crate::sampler::{SampleError, Sampled, Sampler, SamplingParams};
use crate::scheduler::{Event, Scheduler, SchedulerConfig, Step};
use crate::sequence::{Limits, Reason, Sequence, SequenceRequest};
use crate::state_store::{StateSize, StateStore};
use crate::trace::Trace;

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
    /// Numbers of prompt tokens after which the state is to be kept, if the engine keeps any, and given up last.
    pub marks: Vec<usize>,
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

/// A network with its sequences.
pub struct Engine {
    runner: Runner,
    scheduler: Scheduler,
    config: EngineConfig,
    samplers: BTreeMap<SeqId, Sampler>,
    /// Why sequences failed that did so alone.
    failures: BTreeMap<SeqId, SampleError>,
    /// Of sequences that have generated, where guesses are made.
    lookups: BTreeMap<SeqId, Lookup>,
    snapshots: BTreeMap<SnapshotId, Snapshot>,
    next_snapshot: u64,
    cache: Option<Cache>,
    outputs: Vec<Output>,
    // Filled anew for every step; they keep their memory.
    batch: Batch,
    spans: Vec<Span>,
    page_table: Vec<u32>,
    logit_rows: Vec<usize>,
    tokens: Vec<(SeqId, TokenId)>,
    events: Vec<Event>,
    guessing: Vec<SeqId>,
    guess: Vec<TokenId>,
    said: Vec<TokenId>,
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
        let page_count = narrow("keys and values", pages, config.page_bytes(graph))?;
        let slot_count = narrow("slots", slots, graph.slot_bytes())?;
        let scheduler = Scheduler::new(SchedulerConfig {
            page_size: config.page_size as u32,
            pages: has_pages.then_some(page_count),
            slots: has_slots.then_some(slot_count / (config.slots() / config.owned_slots()) as u32),
            token_budget: config.token_budget,
            max_sequences: config.max_sequences,
            chunk: config.chunk,
            context: config.context.saturating_add(graph.prefix),
            reach: config.reach,
        })?;
        let size = StateSize {
            page_size: config.page_size,
            pages,
            slots,
            kv_dtype: config.kv_dtype,
        };
        let store = StateStore::new(&network, size)?;
        let runner = Runner::new(network.clone(), store, config.token_budget)?;
        Ok(Engine {
            runner,
            scheduler,
            config,
            samplers: BTreeMap::new(),
            failures: BTreeMap::new(),
            lookups: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            next_snapshot: 0,
            cache: None,
            outputs: Vec::new(),
            batch: Batch::new(),
            spans: Vec::new(),
            page_table: Vec::new(),
            logit_rows: Vec::new(),
            tokens: Vec::new(),
            events: Vec::new(),
            guessing: Vec::new(),
            guess: Vec::new(),
            said: Vec::new(),
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

    /// Times the parts of steps from here on.
    pub fn trace(&mut self) {
        let network = self.runner.network().clone();
        let (network, kv) = (network, self.config.kv_dtype);
        self.runner.trace = Some(Box::new(Trace::new(network, kv)));
    }

    /// What the parts of steps took; none if nobody asked for it.
    pub fn traced(&self) -> Option<&Trace> {
        self.runner.trace.as_deref()
    }

    /// Takes a request on.
    pub fn submit(&mut self, mut request: Request) -> Result<SeqId, Error> {
        let marks = std::mem::take(&mut request.marks);
        let (sequence, sampler) = self.accept(request)?;
        let id = self.scheduler.submit(sequence)?;
        self.samplers.insert(id, sampler);
        if let Some(cache) = &mut self.cache
            && !marks.is_empty()
        {
            cache.marks.insert(id, marks);
        }
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
            cuts: Vec::new(),
        };
        Ok((sequence, sampler))
    }

    /// A second sequence with the tokens and the state of `id`, sampled by `sampling` from here on. What was
    /// generated must be what a constraint of `sampling` allows.
    pub fn fork(&mut self, id: SeqId, sampling: SamplingParams) -> Result<SeqId, Error> {
        let mut sampler = Sampler::new(sampling, self.network().graph.vocab)?;
        if let Some(sequence) = self.sequence(id) {
            let followed = sampler.follow(sequence.generated());
            followed.map_err(SampleError::Constraint)?;
        }
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
        let ended = self.scheduler.finish(id, reason);
        if ended && reason == Reason::Stop {
            self.keep_end(id);
        }
        ended
    }

    /// Forgets a sequence, whatever it is doing.
    pub fn remove(&mut self, id: SeqId) -> bool {
        self.samplers.remove(&id);
        self.failures.remove(&id);
        if let Some(cache) = &mut self.cache {
            cache.reuses.remove(&id);
            cache.marks.remove(&id);
            cache.awaits.remove(&id);
        }
        self.lookups.remove(&id);
        self.scheduler.remove(id)
    }

    /// Why a sequence failed in a step that was right for the others, until it is removed.
    pub fn failure(&self, id: SeqId) -> Option<&SampleError> {
        self.failures.get(&id)
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
        self.admit_with_states();
        // Who watches is told of tokens that are said, not of guesses.
        if self.config.lookup > 0 && watch.is_none() {
            self.guess();
        }
        loop {
            match self.scheduler.next(&mut self.batch) {
                Step::Idle => return Ok(false),
                Step::Short(_) if self.give_way() => {}
                Step::Short(wanted) => {
                    // Only snapshots hold pages outside the scheduler. Their owner must drop some.
                    let tokens = wanted.pages * self.config.page_size;
                    return Err(Error::NoPages { tokens });
                }
                Step::Run => break,
            }
        }
        match self.run(watch, observe) {
            Ok(()) => {
                self.scheduler
                    .done(&self.batch, &self.tokens, &mut self.events);
                self.end_failed();
                // Tokens are in `outputs` already, with their log-probabilities.
                for event in self.events.drain(..) {
                    if let Event::Finished { id, reason } = event {
                        self.outputs.push(Output::Finished { id, reason });
                    }
                }
                self.keep_of_step();
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

    /// Ends the sequences of the step that failed alone.
    fn end_failed(&mut self) {
        let reason = Reason::Failed;
        for span in &self.batch.spans {
            let id = span.seq;
            if self.failures.contains_key(&id) {
                self.scheduler.finish(id, reason);
                self.events
                    .retain(|event| !matches!(event, Event::Finished { id: of, .. } if *of == id));
                self.events.push(Event::Finished { id, reason });
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
            if let Some(slot) = span.slot.filter(|_| span.guessed > 0) {
                let copy = slot.0 as usize + self.config.owned_slots();
                runner.state.copy_slot(slot.0 as usize, copy)?;
            }
            let end = span.start + span.len;
            match span.logits {
                Logits::None => {}
                Logits::Last => logit_rows.extend(end - 1 - span.guessed..end),
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
        let (said, failures) = (&mut self.said, &mut self.failures);
        let (mut at, mut failed) = (0, None);
        // Tokens of the span that were chosen, and whether the next row follows them.
        let (mut chosen, mut follows) = (0, true);
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
                (chosen, follows) = (0, true);
            }
            let span = &batch.spans[at];
            if !follows {
                return; // behind a wrong guess
            }
            if let (Some(observe), Row::Logits(logits)) = (&mut observe, of) {
                observe(span.seq, span.position + row - span.start - prefix, logits);
            }
            let guesses = span.start + span.len - span.guessed;
            if !span.sample || row + 1 < guesses || failed.is_some() {
                return;
            }
            let sequence = scheduler
                .sequence(span.seq)
                .expect("a sequence of the batch exists");
            let sampler = samplers
                .get_mut(&span.seq)
                .expect("every sequence has a sampler");
            let (prompt, mut generated) = sequence.tokens.split_at(sequence.prompt_len);
            if chosen > 0 {
                if chosen == 1 {
                    said.clear();
                    said.extend_from_slice(generated);
                }
                said.push(batch.tokens[row]);
                generated = &said[..];
            }
            let sampled = match of {
                Row::Logits(logits) => sampler.sample(logits, &prompt[prefix..], generated),
                Row::Likeliest(token) => Ok(Sampled::plain(token)),
            };
            match sampled {
                Ok(sampled) => {
                    chosen += 1;
                    let next = batch.tokens.get(row + 1);
                    follows = next == Some(&sampled.token)
                        && !sequence.limits.stop.contains(&sampled.token);
                    tokens.push((span.seq, sampled.token));
                    outputs.push(Output::Token {
                        id: span.seq,
                        sampled,
                    });
                }
                Err(error) if error.is_of_sequence() => {
                    failures.insert(span.seq, error);
                    // Whatever it is, nobody is told of it: the scheduler counts one for each span.
                    tokens.push((span.seq, batch.tokens[row]));
                    follows = false;
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
        if let Some(error) = failed {
            return Err(error.into());
        }
        self.settle()
    }

    /// The memory behind all state.
    pub(crate) fn store(&self) -> &StateStore {
        &self.runner.state
    }
}
