//! Walks the graph on one device: a ragged batch in, logits out.

mod head;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use strata_kernels::ops::{Add, Embed, Linear, Scale};
use strata_kernels::{Backend, DType, Format, Matrix, Ragged, Repeat, Result, Span, Tensor};
use strata_layers::graph::{Graph, Node, Run, ValueId};
use strata_layers::{Context, Init, Layer, LayerState, Scratch, WeightSource, WeightSpec, Weights};

use self::head::LOGIT_ROWS;
pub use self::head::Row;
use crate::estimate::Allocated;
use crate::state_store::StateStore;
use crate::trace::{Part, Trace};

/// A graph with its weights on a device. Shared by all that run it.
#[derive(Clone)]
pub struct Network {
    /// The nodes.
    pub graph: Arc<Graph>,
    /// The device.
    pub backend: Arc<dyn Backend>,
    /// What matrix products round their inputs to: F32 or BF16.
    pub activations: DType,
    /// Bytes of all weights in the form they run in, those of mapped files among them.
    pub weight_bytes: u64,
    /// Bytes of each weight, by its path.
    bytes: Arc<BTreeMap<String, u64>>,
    /// The paths of the weights that lie at each place of memory.
    paths: Arc<BTreeMap<Place, Vec<String>>>,
    /// The formats that matrices are stored in.
    formats: Arc<Vec<Format>>,
    /// By node; none where a node is no layer.
    layers: Arc<Vec<Option<Box<dyn Layer>>>>,
    input: Input,
    head: Matrix,
    head_bias: Option<Tensor>,
}

/// What tells matrices apart: see [`Matrix::place`].
pub(crate) type Place = (usize, usize, usize);

/// Where the first value comes from.
#[derive(Clone)]
#[allow(clippy::large_enum_variant)] // there is one of them, and it holds views
enum Input {
    /// Rows of a table, and those of the prefix.
    Tokens(Matrix, Option<Matrix>),
    /// Patches of an image.
    Image(Arc<PatchEmbed>),
}

struct PatchEmbed {
    w: Matrix,
    bias: Tensor,
    class_token: Tensor,
    positions: Tensor, // (tokens, D)
}

impl Network {
    /// Builds every layer with the weights of `source`.
    pub fn build(
        graph: Graph,
        source: &dyn WeightSource,
        backend: Arc<dyn Backend>,
        activations: DType,
    ) -> Result<Self> {
        let source = &Counting {
            source,
            counted: RefCell::default(),
            paths: RefCell::default(),
            formats: RefCell::default(),
        };
        let table =
            |path: &str, rows| source.matrix(path, &WeightSpec::matrix("", rows, graph.d_model));
        let input = match &graph.image {
            None => Input::Tokens(
                table("embed", graph.vocab)?,
                match graph.prefix {
                    0 => None,
                    rows => Some(table("embed.prefix", rows)?),
                },
            ),
            Some(image) => {
                let specs = image.weights(graph.d_model);
                let weights = Weights {
                    source,
                    backend: &*backend,
                    path: "image",
                    specs: &specs,
                };
                let positions = weights.values("positions")?;
                Input::Image(Arc::new(PatchEmbed {
                    w: weights.matrix("patch")?,
                    bias: weights.vector("patch.bias")?,
                    class_token: weights.vector("class_token")?,
                    positions: weights.upload(image.tokens(), graph.d_model, &positions)?,
                }))
            }
        };
        let head = match &input {
            Input::Tokens(embed, _) if graph.tied => embed.clone(),
            _ => table("head", graph.vocab)?,
        };
        let bias = WeightSpec::vector("bias", &[graph.vocab], Init::Constant(0.0));
        let weights = Weights {
            source,
            backend: &*backend,
            path: "head",
            specs: &[bias],
        };
        let head_bias = graph.logit_bias.then(|| weights.vector("bias"));
        let head_bias = head_bias.transpose()?;
        let build = |node: &Node| {
            let Run::Layer { spec, weights } = &node.run else {
                return Ok(None);
            };
            let specs = spec.weights(&graph.widths_of(node));
            let weights = Weights {
                source,
                backend: &*backend,
                path: weights,
                specs: &specs,
            };
            spec.build(&weights).map(Some)
        };
        let layers = Arc::new(graph.nodes.iter().map(build).collect::<Result<_>>()?);
        let bytes = source.counted.take();
        Ok(Network {
            graph: Arc::new(graph),
            backend,
            activations,
            weight_bytes: bytes.values().sum(),
            bytes: Arc::new(bytes),
            paths: Arc::new(source.paths.take()),
            formats: Arc::new(source.formats.take()),
            layers,
            input,
            head,
            head_bias,
        })
    }
}

/// Hands weights on, counts the bytes of each once, and notes where it lies.
struct Counting<'a> {
    source: &'a dyn WeightSource,
    counted: RefCell<BTreeMap<String, u64>>,
    paths: RefCell<BTreeMap<Place, Vec<String>>>,
    formats: RefCell<Vec<Format>>,
}

impl WeightSource for Counting<'_> {
    fn matrix(&self, path: &str, spec: &WeightSpec) -> Result<Matrix> {
        let matrix = self.source.matrix(path, spec)?;
        let bytes = matrix.bytes() as u64;
        let mut formats = self.formats.borrow_mut();
        if !formats.contains(&matrix.format()) {
            formats.push(matrix.format());
        }
        if self
            .counted
            .borrow_mut()
            .insert(path.into(), bytes)
            .is_none()
        {
            let mut paths = self.paths.borrow_mut();
            paths.entry(matrix.place()).or_default().push(path.into());
        }
        Ok(matrix)
    }

    fn vector(&self, path: &str, spec: &WeightSpec) -> Result<Vec<f32>> {
        let values = self.source.vector(path, spec)?;
        let bytes = 4 * values.len() as u64;
        self.counted.borrow_mut().insert(path.into(), bytes);
        Ok(values)
    }
}

impl Network {
    /// The paths of the weights that lie at each place of memory: several where weights share it.
    pub(crate) fn paths(&self) -> &Arc<BTreeMap<Place, Vec<String>>> {
        &self.paths
    }

    /// Bytes of the weight at a path, in the form it runs in.
    pub fn bytes_of(&self, path: &str) -> u64 {
        self.bytes.get(path).copied().unwrap_or(0)
    }

    /// The formats that matrices are stored in.
    pub(crate) fn formats(&self) -> &[Format] {
        &self.formats
    }

    /// The same weights under another set of kernels of the same device.
    pub fn on(&self, backend: Arc<dyn Backend>) -> Self {
        Network {
            backend,
            ..self.clone()
        }
    }
}

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

/// Runners made so far, to tell their memory apart.
static RUNNERS: AtomicU64 = AtomicU64::new(0);

/// Runs steps of a network, with the state of its sequences and the memory between its nodes.
pub struct Runner {
    network: Arc<Network>,
    /// The state of all sequences.
    pub state: StateStore,
    /// One row of memory for each buffer.
    buffers: Vec<Tensor>,
    /// The buffer that holds each value.
    buffer_of: Vec<usize>,
    scratch: Scratch,
    /// What the layer that runs reads beside the stream.
    operands: Vec<Tensor>,
    prefix_ids: Vec<u32>,
    empty: LayerState,
    id: u64,
    /// Times of the parts of steps, while somebody wants them.
    pub(crate) trace: Option<Box<Trace>>,
    picked: Tensor,
    logits: Tensor,
    host_logits: Vec<f32>,
    /// (rows, 1) I32: the likeliest tokens of a step, and the same on the host.
    likeliest: Tensor,
    host_likeliest: Vec<f32>,
    max_rows: usize,
    /// Rows of the largest step so far.
    most_rows: usize,
}

impl Runner {
    /// Memory for steps of up to `max_rows` rows.
    pub fn new(network: Arc<Network>, state: StateStore, max_rows: usize) -> Result<Self> {
        let (graph, backend) = (&network.graph, &network.backend);
        let (buffer_of, sizes) = assign_buffers(graph);
        let buffers = sizes
            .iter()
            .map(|width| backend.alloc(DType::F32, 1, width * max_rows))
            .collect::<Result<_>>()?;
        Ok(Runner {
            state,
            buffers,
            buffer_of,
            scratch: Scratch::default(),
            operands: Vec::new(),
            prefix_ids: Vec::new(),
            empty: LayerState::default(),
            id: RUNNERS.fetch_add(1, Ordering::Relaxed),
            trace: None,
            picked: backend.alloc(DType::F32, LOGIT_ROWS, graph.d_model)?,
            logits: backend.alloc(DType::F32, LOGIT_ROWS, graph.vocab)?,
            host_logits: vec![0.0; LOGIT_ROWS * graph.vocab],
            likeliest: backend.alloc(DType::I32, max_rows, 1)?,
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

    /// Number of buffers that the values between nodes take turns in.
    pub fn buffers(&self) -> usize {
        self.buffers.len()
    }

    /// All that it holds now.
    pub fn allocated(&self) -> Allocated {
        let (kv, state) = self.state.bytes();
        Allocated {
            weights: self.network.weight_bytes,
            kv,
            state,
            buffers: self.buffer_bytes() as u64,
        }
    }

    /// Bytes of activations and scratch, beside weights and state.
    pub fn buffer_bytes(&self) -> usize {
        let buffers: usize = self.buffers.iter().map(Tensor::bytes).sum();
        let likeliest = 2 * self.likeliest.bytes();
        buffers + likeliest + self.scratch.bytes() + self.fixed_bytes()
    }

    /// Those of them that do not grow with the rows of a step: for logits.
    pub fn fixed_bytes(&self) -> usize {
        self.picked.bytes() + 2 * self.logits.bytes()
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
        mut watch: Option<&mut Watch<'_>>,
        sink: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()> {
        let rows = self.begin(step);
        if watch.is_none() && step.is_decode(self.network.graph.vocab) {
            return self.decode(step, rows, sink);
        }
        self.embed(step, rows)?;
        self.lap(Part::Embedding);
        if let Some(watch) = &mut watch {
            self.tell(0, rows, &mut **watch)?;
        }
        self.nodes(step.ragged, rows, watch)?;
        self.head(step.logits, rows, 0, sink)
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

    /// As [`Runner::forward`], for a step that comes again.
    fn decode(
        &mut self,
        step: &Step<'_>,
        rows: usize,
        sink: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()> {
        let backend = self.network.backend.clone();
        let first = rows.min(LOGIT_ROWS);
        // Scratch is another when it has grown; all else is there for as long as the runner.
        let repeat = Repeat {
            key: [self.id, self.scratch.bytes() as u64],
            ids: step.tokens,
            ragged: step.ragged,
        };
        backend.repeat(&repeat, &mut || {
            self.embed(step, rows)?;
            self.lap(Part::Embedding);
            self.nodes(step.ragged, rows, None)?;
            self.project(&step.logits[..first], rows).map(|_| ())
        })?;
        self.head(step.logits, rows, first, sink)
    }

    /// Runs one image, whose state begins in slot 0 and in the first pages. `patches` are
    /// (patches, patch width), in rows from the top. Returns the logits of its class token.
    pub fn classify(&mut self, patches: &[f32]) -> Result<Vec<f32>> {
        let network = self.network.clone();
        let (graph, backend) = (&network.graph, &*network.backend);
        let (Input::Image(embed), Some(image)) = (&network.input, &graph.image) else {
            panic!("{}: no model of images", graph.vocab);
        };
        let (rows, place) = (image.tokens(), image.class_place());
        self.most_rows = self.most_rows.max(rows);
        let page_size = self.state.size().page_size;
        let page_table: Vec<u32> = (0..rows.div_ceil(page_size) as u32).collect();
        let spans = [Span {
            start: 0,
            len: rows,
            position: 0,
            slot: 0,
            pages: 0..page_table.len(),
        }];
        let ragged = Ragged {
            spans: &spans,
            page_table: &page_table,
            page_size,
        };
        if self.state.size().slots > 0 {
            self.state.clear_slot(0)?;
        }
        self.scratch.reset(backend)?;
        let mut x = self.value(0, rows);
        let cx = &mut self.context(backend, ragged, usize::MAX);
        let mut raw = cx.take(image.patches(), image.patch_width())?;
        backend.write(patches, &mut raw)?;
        let mut projected = cx.take(image.patches(), graph.d_model)?;
        backend.linear(Linear {
            x: &raw,
            w: &embed.w,
            bias: Some(&embed.bias),
            activations: network.activations,
            y: &mut projected,
        })?;
        let tokens = cx.take(rows, graph.d_model)?;
        let parts = [
            (projected.row_range(0..place), 0..place),
            (embed.class_token.clone(), place..place + 1),
            (projected.row_range(place..rows - 1), place + 1..rows),
        ];
        for (from, to) in parts.iter().filter(|(_, to)| !to.is_empty()) {
            backend.copy(from, &mut tokens.row_range(to.clone()))?;
        }
        backend.add(Add {
            a: &tokens,
            b: &embed.positions,
            y: &mut x,
        })?;
        self.nodes(ragged, rows, None)?;
        let mut logits = Vec::new();
        self.head(&[place], rows, 0, &mut |_, row| logits = row.to_vec())?;
        Ok(logits)
    }

    /// The first value of tokens.
    fn embed(&mut self, step: &Step<'_>, rows: usize) -> Result<()> {
        let network = self.network.clone();
        let (graph, backend) = (&network.graph, &*network.backend);
        let mut x = self.value(0, rows);
        let Some(by) = graph.embed_scale else {
            return self.look_up(step.tokens, &mut x);
        };
        self.scratch.reset(backend)?;
        let mut raw = self
            .context(backend, step.ragged, usize::MAX)
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
        let (network, backend) = (&self.network, &*self.network.backend);
        let Input::Tokens(table, prefix) = &network.input else {
            panic!("a model of images was given tokens");
        };
        let Some(prefix) = prefix else {
            return backend.embed(Embed { ids, table, y });
        };
        let vocab = network.graph.vocab as u32;
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

    /// All nodes, in their order.
    fn nodes(
        &mut self,
        ragged: Ragged<'_>,
        rows: usize,
        mut watch: Option<&mut Watch<'_>>,
    ) -> Result<()> {
        let network = self.network.clone();
        let (graph, backend) = (&network.graph, &*network.backend);
        for (i, node) in graph.nodes.iter().enumerate() {
            self.scratch.reset(backend)?;
            let x = self.value(node.inputs[0], rows);
            let mut y = self.value(node.output, rows);
            match &node.run {
                Run::Layer { .. } => {
                    let layer = network.layers[i]
                        .as_ref()
                        .expect("every layer node was built");
                    self.operands.clear();
                    for operand in &node.inputs[1..] {
                        let operand = self.value(*operand, rows);
                        self.operands.push(operand);
                    }
                    let state = node.pages_of.unwrap_or(i);
                    layer.forward(&x, &mut y, &mut self.context(backend, ragged, state))?;
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
            self.lap(Part::Node(i));
            if let Some(watch) = &mut watch {
                self.tell(node.output, rows, &mut **watch)?;
            }
        }
        Ok(())
    }

    /// Tells of a value just computed, at every point of the stream that it is. Its buffer may be another
    /// value's one node later.
    fn tell(&self, value: ValueId, rows: usize, watch: &mut Watch<'_>) -> Result<()> {
        let graph = &self.network.graph;
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
        self.network
            .backend
            .read(&self.value(value, rows), &mut values)?;
        points.into_iter().for_each(|p| watch(p, &values));
        Ok(())
    }

    /// A part of a step is done.
    fn lap(&mut self, part: Part) {
        if let Some(trace) = &mut self.trace {
            trace.lap(part);
        }
    }

    fn context<'a>(
        &'a mut self,
        backend: &'a dyn Backend,
        ragged: Ragged<'a>,
        state_of: usize,
    ) -> Context<'a> {
        let state = self
            .state
            .layers
            .get_mut(state_of)
            .unwrap_or(&mut self.empty);
        let activations = self.network.activations;
        Context {
            backend,
            ragged,
            operands: &self.operands,
            state,
            scratch: &mut self.scratch,
            activations,
        }
    }

    fn value(&self, value: ValueId, rows: usize) -> Tensor {
        let width = self.network.graph.widths[value];
        self.buffers[self.buffer_of[value]]
            .columns(0..rows * width)
            .reshape(rows, width)
    }
}

/// Gives values buffers: a buffer is free again once its value has been read for the last time.
/// Returns the buffer of each value and the width of each buffer. However deep the model, a stack of
/// residual blocks takes three or four.
fn assign_buffers(graph: &Graph) -> (Vec<usize>, Vec<usize>) {
    let mut last_read = vec![0; graph.widths.len()];
    for (i, node) in graph.nodes.iter().enumerate() {
        node.inputs.iter().for_each(|v| last_read[*v] = i);
    }
    last_read[graph.last] = usize::MAX;
    let mut buffer_of = vec![usize::MAX; graph.widths.len()];
    let mut widths = vec![graph.d_model];
    let mut free: Vec<usize> = Vec::new();
    buffer_of[0] = 0;
    for (i, node) in graph.nodes.iter().enumerate() {
        let buffer = free.pop().unwrap_or_else(|| {
            widths.push(0);
            widths.len() - 1
        });
        buffer_of[node.output] = buffer;
        widths[buffer] = widths[buffer].max(graph.widths[node.output]);
        let mut done: Vec<ValueId> = node.inputs.clone();
        done.sort_unstable();
        done.dedup();
        for value in done.into_iter().filter(|v| last_read[*v] == i) {
            free.push(buffer_of[value]);
        }
        // A value that nobody reads (a `let` without use) is free at once.
        if last_read[node.output] <= i {
            free.push(buffer);
        }
    }
    (buffer_of, widths)
}
