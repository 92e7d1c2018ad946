//! Walks the graph on its devices: a ragged batch in, logits out.
//!
//! There is one notion, the stage: a device with some of the nodes and their state. Stages follow each other, and what
//! crosses is found by liveness; or they are ranks, each with a part of every layer, at work side by side.

mod head;
mod image;
mod lane;
mod liveness;
mod network;

use std::sync::Arc;

use strata_kernels::{Ragged, Rank, Result};

pub use self::head::Row;
use self::lane::{Lane, Onlookers};
pub use self::liveness::crossing;
pub(crate) use self::network::Place;
pub use self::network::{Network, Placed, Stage};
use crate::estimate::Allocated;
use crate::state_store::{StageState, StateStore};
use crate::trace::{Part, Trace};

/// What one step runs: rows of several sequences, and which of them want logits.
pub struct Step<'a> {
    /// Token of each row.
    pub tokens: &'a [u32],
    /// Which rows belong to which sequence.
    pub ragged: Ragged<'a>,
    /// Rows whose logits are wanted, ascending.
    pub logits: &'a [usize],
}

impl Step<'_> {
    /// Whether every sequence has one row, a token of the vocabulary, and wants its logits: a step that
    /// comes again for as long as they run.
    fn is_decode(&self, vocab: usize) -> bool {
        let rows = self.tokens.len();
        self.ragged.spans.len() == rows
            && self.logits.len() == rows
            && self.tokens.iter().all(|t| (*t as usize) < vocab)
    }
}

/// A place of the stream that can be watched while a network runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Point {
    /// Before the first block: rows of the embedding, scaled if the plan says so.
    Embedding,
    /// Behind a place of the stack, counted from 0.
    Block(usize),
    /// Behind the last norm: what the output matrix multiplies.
    Norm,
}

/// Told the stream at each [`Point`] as it is computed: all rows of the step, (rows, D).
pub type Watch<'a> = dyn FnMut(Point, &[f32]) + 'a;

/// Runs steps of a network, with the state of its sequences and the memory between its nodes.
pub struct Runner {
    network: Arc<Network>,
    /// The state of all sequences.
    pub state: StateStore,
    lanes: Vec<Lane>,
    /// Times of the parts of steps, while somebody wants them.
    pub(crate) trace: Option<Box<Trace>>,
    host_logits: Vec<f32>,
    host_likeliest: Vec<f32>,
    max_rows: usize,
    /// Rows of the largest step so far.
    most_rows: usize,
}

/// What a stage does of a step.
type Work<'a> =
    dyn Fn(&mut Lane, &mut StageState, &mut Onlookers<'_, '_>) -> Result<()> + Sync + 'a;

impl Runner {
    /// Memory for steps of up to `max_rows` rows.
    pub fn new(network: Arc<Network>, state: StateStore, max_rows: usize) -> Result<Self> {
        let lane = |stage: &Stage| Lane::new(stage.clone(), network.activations, max_rows);
        Ok(Runner {
            state,
            lanes: network.stages.iter().map(lane).collect::<Result<_>>()?,
            trace: None,
            host_logits: vec![0.0; head::LOGIT_ROWS * network.graph.vocab],
            host_likeliest: vec![0.0; max_rows],
            max_rows,
            most_rows: 0,
            network,
        })
    }

    /// The network that runs.
    pub fn network(&self) -> &Arc<Network> {
        &self.network
    }

    /// Most rows of a step.
    pub fn max_rows(&self) -> usize {
        self.max_rows
    }

    /// Rows of the largest step so far.
    pub fn most_rows(&self) -> usize {
        self.most_rows
    }

    /// Number of buffers that the values between nodes take turns in, of all stages.
    pub fn buffers(&self) -> usize {
        self.lanes.iter().map(Lane::buffers).sum()
    }

    /// All that it holds now, of each stage.
    pub fn allocated_by_stage(&self) -> Vec<Allocated> {
        let lanes = self.lanes.iter().zip(self.state.bytes());
        lanes
            .map(|(lane, (kv, state))| Allocated {
                weights: lane.stage.weight_bytes,
                kv,
                state,
                buffers: lane.buffer_bytes() as u64,
            })
            .collect()
    }

    /// All that it holds now.
    pub fn allocated(&self) -> Allocated {
        let stages = self.allocated_by_stage().into_iter();
        stages.fold(Allocated::default(), Allocated::and)
    }

    /// Bytes of activations and scratch, beside weights and state.
    pub fn buffer_bytes(&self) -> usize {
        self.lanes.iter().map(Lane::buffer_bytes).sum()
    }

    /// Those of them that do not grow with the rows of a step, of each stage: for logits.
    pub fn fixed_bytes(&self) -> Vec<usize> {
        self.lanes.iter().map(Lane::fixed_bytes).collect()
    }

    /// Runs one step. `sink` gets the row number and the logits of every row that asked for them,
    /// in order.
    pub fn forward(&mut self, step: &Step<'_>, sink: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        self.forward_watched(step, None, sink)
    }

    /// As [`Runner::forward`]; `watch` is told the stream on its way. Nothing is read back, and nothing
    /// takes longer, without one.
    pub fn forward_watched(
        &mut self,
        step: &Step<'_>,
        watch: Option<&mut Watch<'_>>,
        sink: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()> {
        let rows = self.begin(step);
        if watch.is_some() || !step.is_decode(self.network.graph.vocab) {
            self.all(rows, watch, &|lane, state, onlookers| {
                lane.run(step, state, onlookers)
            })?;
            return self.head(step.logits, rows, 0, sink);
        }
        let first = &step.logits[..rows.min(head::LOGIT_ROWS)];
        self.all(rows, None, &|lane, state, onlookers| {
            lane.repeat(step, false, &mut |lane| {
                lane.run(step, state, onlookers)?;
                if lane.end.is_some() {
                    lane.project(first, rows)?;
                }
                Ok(())
            })
        })?;
        self.head(step.logits, rows, first.len(), sink)
    }

    /// The rows of a step that begins.
    fn begin(&mut self, step: &Step<'_>) -> usize {
        let rows = step.tokens.len();
        assert!(
            rows > 0 && rows <= self.max_rows,
            "{rows} rows, at most {}",
            self.max_rows
        );
        self.most_rows = self.most_rows.max(rows);
        if let Some(trace) = &mut self.trace {
            trace.begin(step.ragged.spans, step.logits.len());
        }
        rows
    }

    /// Has every stage do its work: one after the other, each handed what the one before leaves; or, of ranks, all
    /// of them at once, a thread each. Who watches sees all stages, and the first rank.
    fn all(&mut self, rows: usize, watch: Option<&mut Watch<'_>>, work: &Work<'_>) -> Result<()> {
        let trace = self.trace.as_deref_mut();
        let mut onlookers = Onlookers { watch, trace };
        let states = &mut self.state.stages;
        if self.network.is_split() {
            return together(&mut self.lanes, states, &mut onlookers, work);
        }
        for (i, state) in states.iter_mut().enumerate() {
            let (before, lanes) = self.lanes.split_at_mut(i);
            if let Some(before) = before.last() {
                lanes[0].receive(before, rows)?;
            }
            work(&mut lanes[0], state, &mut onlookers)?;
        }
        Ok(())
    }

    /// The stage that makes logits.
    fn end(&mut self) -> &mut Lane {
        let end = self.lanes.iter_mut().find(|lane| lane.end.is_some());
        end.expect("some stage has the output matrix")
    }

    /// A part of a step is done.
    fn lap(&mut self, part: Part) {
        if let Some(trace) = &mut self.trace {
            trace.lap(part);
        }
    }
}

/// All ranks at once, the first in this thread. What one fails with is told, not that others missed it.
fn together(
    lanes: &mut [Lane],
    states: &mut [StageState],
    onlookers: &mut Onlookers<'_, '_>,
    work: &Work<'_>,
) -> Result<()> {
    /// Also when work panics: nobody must wait for this rank then.
    struct Leaving(Rank);
    impl Drop for Leaving {
        fn drop(&mut self) {
            self.0.leave();
        }
    }
    let run = |lane: &mut Lane, state: &mut StageState, onlookers: &mut Onlookers<'_, '_>| {
        let leaving = lane.stage.rank.clone().map(Leaving);
        let done = work(lane, state, onlookers);
        if done.is_ok() {
            std::mem::forget(leaving);
        }
        done
    };
    if let Some(rank) = &lanes[0].stage.rank {
        rank.begin();
    }
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let mut pairs = lanes.iter_mut().zip(states);
        let first = pairs.next();
        let others: Vec<_> = pairs
            .map(|(lane, state)| scope.spawn(|| run(lane, state, &mut Onlookers::default())))
            .collect();
        let first = first.map(|(lane, state)| run(lane, state, onlookers));
        let joined = others.into_iter().map(|thread| match thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        first.into_iter().chain(joined).collect()
    });
    let faults = results.into_iter().filter_map(Result::err);
    match faults.min_by_key(Rank::is_gone) {
        None => Ok(()),
        Some(fault) => Err(fault),
    }
}
