//! One stage at work: the memory between its nodes, and the walk over them.

use std::sync::atomic::{AtomicU64, Ordering};

use strata_kernels::ops::{Add, Embed, Scale};
use strata_kernels::{Backend, DType, Ragged, Result, Tensor};
use strata_layers::graph::{Run, ValueId};
use strata_layers::{Context, LayerState, Scratch};

use super::head::LOGIT_ROWS;
use super::liveness::{Buffers, crossing};
use super::network::{Input, Stage};
use super::{Point, Step, Watch};
use crate::state_store::StageState;
use crate::trace::{Part, Trace};

/// Lanes made so far, to tell their memory apart.
static LANES: AtomicU64 = AtomicU64::new(0);

/// Who looks on while nodes run.
#[derive(Default)]
pub(super) struct Onlookers<'a, 'b> {
    pub watch: Option<&'a mut Watch<'b>>,
    pub trace: Option<&'a mut Trace>,
}

impl Onlookers<'_, '_> {
    /// A part of a step is done.
    pub fn lap(&mut self, part: Part) {
        if let Some(trace) = &mut self.trace {
            trace.lap(part);
        }
    }
}

/// One stage at work.
pub(super) struct Lane {
    pub stage: Stage,
    pub id: u64,
    pub activations: DType,
    /// One row of memory for each buffer.
    buffers: Vec<Tensor>,
    /// The buffer that holds each value.
    buffer_of: Vec<usize>,
    /// The values that the stage before hands over.
    received: Vec<ValueId>,
    pub scratch: Scratch,
    /// What the layer that runs reads beside the stream.
    operands: Vec<Tensor>,
    prefix_ids: Vec<u32>,
    empty: LayerState,
    /// For logits, in the stage that makes them.
    pub end: Option<End>,
}

/// Where logits are made.
pub(super) struct End {
    pub picked: Tensor,
    pub logits: Tensor,
    /// (rows, 1) I32: the likeliest tokens of a step.
    pub likeliest: Tensor,
}

impl Lane {
    /// Memory for steps of up to `max_rows` rows.
    pub fn new(stage: Stage, activations: DType, max_rows: usize) -> Result<Self> {
        let (graph, backend) = (&stage.graph, &stage.backend);
        let Buffers { of, widths } = Buffers::new(graph, stage.nodes.clone());
        let buffers = widths
            .iter()
            .map(|width| backend.alloc(DType::F32, 1, width * max_rows))
            .collect::<Result<_>>()?;
        let end = || {
            Ok(End {
                picked: backend.alloc(DType::F32, LOGIT_ROWS, graph.d_model)?,
                logits: backend.alloc(DType::F32, LOGIT_ROWS, graph.vocab)?,
                likeliest: backend.alloc(DType::I32, max_rows, 1)?,
            })
        };
        Ok(Lane {
            id: LANES.fetch_add(1, Ordering::Relaxed),
            activations,
            buffers,
            buffer_of: of,
            received: match stage.nodes.start {
                0 => Vec::new(),
                start => crossing(graph, start),
            },
            scratch: Scratch::default(),
            operands: Vec::new(),
            prefix_ids: Vec::new(),
            empty: LayerState::default(),
            end: stage.head.is_some().then(end).transpose()?,
            stage,
        })
    }

    /// Number of buffers that the values between nodes take turns in.
    pub fn buffers(&self) -> usize {
        self.buffers.len()
    }

    /// Bytes of activations and scratch, beside weights and state.
    pub fn buffer_bytes(&self) -> usize {
        let buffers: usize = self.buffers.iter().map(Tensor::bytes).sum();
        // The host has as many for what it reads.
        let likeliest = self.end.as_ref().map_or(0, |e| 2 * e.likeliest.bytes());
        buffers + likeliest + self.scratch.bytes() + self.fixed_bytes()
    }

    /// Those of them that do not grow with the rows of a step: for logits.
    pub fn fixed_bytes(&self) -> usize {
        let end = self.end.as_ref();
        end.map_or(0, |e| e.picked.bytes() + 2 * e.logits.bytes())
    }

    /// Takes over what the stage before leaves.
    pub fn receive(&mut self, before: &Lane, rows: usize) -> Result<()> {
        for value in &self.received {
            let from = before.value(*value, rows);
            let (own, other) = (&*self.stage.backend, &*before.stage.backend);
            own.receive(&from, other, &mut self.value(*value, rows))?;
        }
        Ok(())
    }

    /// The first value of a step, where the stage makes it, and all nodes of the stage.
    pub fn run(
        &mut self,
        step: &Step<'_>,
        state: &mut StageState,
        onlookers: &mut Onlookers<'_, '_>,
    ) -> Result<()> {
        let rows = step.tokens.len();
        if self.stage.input.is_some() {
            self.embed(step, rows)?;
            onlookers.lap(Part::Embedding);
            if let Some(watch) = &mut onlookers.watch {
                self.tell(0, rows, &mut **watch)?;
            }
        }
        self.nodes(step.ragged, rows, state, onlookers)
    }

    /// The first value of tokens.
    fn embed(&mut self, step: &Step<'_>, rows: usize) -> Result<()> {
        let (graph, backend) = (self.stage.graph.clone(), self.stage.backend.clone());
        let mut x = self.value(0, rows);
        let Some(by) = graph.embed_scale else {
            return self.look_up(step.tokens, &mut x);
        };
        self.scratch.reset(&*backend)?;
        let mut raw = self
            .without_state(&*backend, step.ragged)
            .take(rows, graph.d_model)?;
        self.look_up(step.tokens, &mut raw)?;
        backend.scale(Scale {
            x: &raw,
            by: by as f32,
            y: &mut x,
        })
    }

    /// Rows of the embedding; ids behind the vocabulary are rows of the prefix.
    fn look_up(&mut self, ids: &[u32], y: &mut Tensor) -> Result<()> {
        let backend = &*self.stage.backend;
        let Some(Input::Tokens(table, prefix)) = &self.stage.input else {
            panic!("a model of images was given tokens");
        };
        let Some(prefix) = prefix else {
            return backend.embed(Embed { ids, table, y });
        };
        let vocab = self.stage.graph.vocab as u32;
        let mut start = 0;
        for ids in ids.chunk_by(|a, b| (*a < vocab) == (*b < vocab)) {
            let y = &mut y.row_range(start..start + ids.len());
            start += ids.len();
            if ids[0] < vocab {
                backend.embed(Embed { ids, table, y })?;
            } else {
                self.prefix_ids.clear();
                self.prefix_ids.extend(ids.iter().map(|id| id - vocab));
                let (ids, table) = (&self.prefix_ids, prefix);
                backend.embed(Embed { ids, table, y })?;
            }
        }
        Ok(())
    }

    /// All nodes of the stage, in their order.
    pub fn nodes(
        &mut self,
        ragged: Ragged<'_>,
        rows: usize,
        state: &mut StageState,
        onlookers: &mut Onlookers<'_, '_>,
    ) -> Result<()> {
        let (graph, backend) = (self.stage.graph.clone(), self.stage.backend.clone());
        let (backend, layers) = (&*backend, self.stage.layers.clone());
        for i in self.stage.nodes.clone() {
            let node = &graph.nodes[i];
            self.scratch.reset(backend)?;
            let x = self.value(node.inputs[0], rows);
            let mut y = self.value(node.output, rows);
            match &node.run {
                Run::Layer { .. } => {
                    let layer = layers[i].as_ref().expect("every layer node was built");
                    self.operands.clear();
                    for operand in &node.inputs[1..] {
                        let operand = self.value(*operand, rows);
                        self.operands.push(operand);
                    }
                    let state = &mut state.layers[node.pages_of.unwrap_or(i)];
                    let rank = self.stage.rank.as_ref();
                    layer.forward(
                        &x,
                        &mut y,
                        &mut Context {
                            backend,
                            ragged,
                            operands: &self.operands,
                            state,
                            scratch: &mut self.scratch,
                            activations: self.activations,
                            rank,
                        },
                    )?;
                }
                Run::Add => {
                    let b = self.value(node.inputs[1], rows);
                    backend.add(Add {
                        a: &x,
                        b: &b,
                        y: &mut y,
                    })?;
                }
                Run::Concat => {
                    let mut first = 0;
                    for input in &node.inputs {
                        let part = self.value(*input, rows);
                        let mut to = y.columns(first..first + part.cols());
                        backend.copy(&part, &mut to)?;
                        first += part.cols();
                    }
                }
            }
            onlookers.lap(Part::Node(i));
            if let Some(watch) = &mut onlookers.watch {
                self.tell(node.output, rows, &mut **watch)?;
            }
        }
        Ok(())
    }

    /// Tells of a value just computed, at every point of the stream that it is. Its buffer may be another
    /// value's one node later.
    fn tell(&self, value: ValueId, rows: usize, watch: &mut Watch<'_>) -> Result<()> {
        let graph = &self.stage.graph;
        let ends = graph.stack.iter().enumerate();
        let blocks = ends.filter(|(_, end)| **end == value);
        let points: Vec<Point> = (value == 0)
            .then_some(Point::Embedding)
            .into_iter()
            .chain(blocks.map(|(i, _)| Point::Block(i)))
            .chain((value == graph.last).then_some(Point::Norm))
            .collect();
        if points.is_empty() {
            return Ok(());
        }
        let mut values = vec![0.0; rows * graph.widths[value]];
        let value = self.value(value, rows);
        self.stage.backend.read(&value, &mut values)?;
        points.into_iter().for_each(|p| watch(p, &values));
        Ok(())
    }

    /// For what is no layer of the graph.
    pub fn without_state<'a>(
        &'a mut self,
        backend: &'a dyn Backend,
        ragged: Ragged<'a>,
    ) -> Context<'a> {
        Context {
            backend,
            ragged,
            operands: &[],
            state: &mut self.empty,
            scratch: &mut self.scratch,
            activations: self.activations,
            rank: None,
        }
    }

    pub fn value(&self, value: ValueId, rows: usize) -> Tensor {
        let width = self.stage.graph.widths[value];
        self.buffers[self.buffer_of[value]]
            .columns(0..rows * width)
            .reshape(rows, width)
    }
}
