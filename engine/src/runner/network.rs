//! A graph with its weights on one device or several.

use std::cell::RefCell;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use strata_kernels::{Backend, DType, Format, Matrix, Rank, Result, Tensor};
use strata_layers::graph::{Graph, Node, NodeId, Run};
use strata_layers::{Init, Layer, WeightSource, WeightSpec, Weights};

/// A graph with its weights on its devices. Shared by all that run it.
#[derive(Clone)]
pub struct Network {
    /// The nodes, as if there were one device.
    pub graph: Arc<Graph>,
    /// The first device.
    pub backend: Arc<dyn Backend>,
    /// What matrix products round their inputs to: F32 or BF16.
    pub activations: DType,
    /// Bytes of all weights in the form they run in, those of mapped files among them.
    pub weight_bytes: u64,
    /// What each device runs.
    pub stages: Vec<Stage>,
    /// Bytes of each weight, by its path.
    bytes: Arc<BTreeMap<String, u64>>,
    /// The paths of the weights that lie at each place of memory.
    paths: Arc<BTreeMap<Place, Vec<String>>>,
    /// The formats that matrices are stored in.
    formats: Arc<Vec<Format>>,
}

/// What one device runs: some nodes of the graph; or with others a part of all of them.
#[derive(Clone)]
pub struct Stage {
    /// The device.
    pub backend: Arc<dyn Backend>,
    /// The graph: of a rank, of the parts of layers that are its own.
    pub graph: Arc<Graph>,
    /// The nodes that it runs.
    pub nodes: Range<NodeId>,
    /// Its place among the devices that run all nodes together.
    pub rank: Option<Rank>,
    /// Bytes of its weights.
    pub weight_bytes: u64,
    /// By node; none where a node is no layer, or not of this stage.
    pub(super) layers: Arc<Vec<Option<Box<dyn Layer>>>>,
    /// Where the first value comes from, in a stage that begins with it.
    pub(super) input: Option<Input>,
    /// The output matrix and its bias, in the stage that ends with it.
    pub(super) head: Option<(Matrix, Option<Tensor>)>,
}

/// Where a stage is to be.
pub struct Placed<'a> {
    /// The device.
    pub backend: Arc<dyn Backend>,
    /// Its weights, on that device.
    pub source: &'a dyn WeightSource,
    /// The graph, or a rank's part of it.
    pub graph: Arc<Graph>,
    /// The nodes that it runs.
    pub nodes: Range<NodeId>,
    /// Its place among the devices that run all nodes together.
    pub rank: Option<Rank>,
}

/// What tells matrices apart: see [`Matrix::place`].
pub(crate) type Place = (usize, usize, usize);

/// Where the first value comes from.
#[derive(Clone)]
#[allow(clippy::large_enum_variant)] // there is one of them, and it holds views
pub(super) enum Input {
    /// Rows of a table, and those of the prefix.
    Tokens(Matrix, Option<Matrix>),
    /// Patches of an image.
    Image(Arc<PatchEmbed>),
}

pub(super) struct PatchEmbed {
    pub w: Matrix,
    pub bias: Tensor,
    pub class_token: Tensor,
    pub positions: Tensor, // (tokens, D)
}

impl Network {
    /// Builds every layer with the weights of `source`, on one device.
    pub fn build(
        graph: Graph,
        source: &dyn WeightSource,
        backend: Arc<dyn Backend>,
        activations: DType,
    ) -> Result<Self> {
        let graph = Arc::new(graph);
        let whole = Placed {
            backend,
            source,
            nodes: 0..graph.nodes.len(),
            graph: graph.clone(),
            rank: None,
        };
        Network::over(graph, vec![whole], activations)
    }

    /// Builds every stage on its device. Stages follow each other, or each is a rank of all.
    pub fn over(graph: Arc<Graph>, places: Vec<Placed<'_>>, activations: DType) -> Result<Self> {
        let (mut bytes, mut paths, mut formats) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        let mut stages = Vec::new();
        for place in places {
            let counting = Counting {
                source: place.source,
                counted: RefCell::default(),
                seen: RefCell::default(),
                paths: RefCell::new(std::mem::take(&mut paths)),
                formats: RefCell::new(std::mem::take(&mut formats)),
            };
            let mut stage = Stage::build(place, &counting)?;
            let counted = counting.counted.take();
            stage.weight_bytes = counted.values().sum();
            for (path, count) in counted {
                // Ranks have parts of a weight; stages each the whole.
                let known = bytes.entry(path).or_insert(0);
                *known = match stage.rank {
                    Some(_) => *known + count,
                    None => count,
                };
            }
            (paths, formats) = (counting.paths.take(), counting.formats.take());
            stages.push(stage);
        }
        Ok(Network {
            graph,
            backend: stages[0].backend.clone(),
            activations,
            weight_bytes: stages.iter().map(|s| s.weight_bytes).sum(),
            stages,
            bytes: Arc::new(bytes),
            paths: Arc::new(paths),
            formats: Arc::new(formats),
        })
    }

    /// Whether its stages are ranks, which run all nodes together.
    pub fn is_split(&self) -> bool {
        self.stages.iter().any(|s| s.rank.is_some())
    }

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

    /// The same weights under another set of kernels of the same device, where there is one.
    pub fn on(&self, backend: Arc<dyn Backend>) -> Self {
        let mut other = self.clone();
        for stage in &mut other.stages {
            stage.backend = backend.clone();
        }
        Network { backend, ..other }
    }
}

impl Stage {
    fn build(place: Placed<'_>, source: &dyn WeightSource) -> Result<Stage> {
        let Placed {
            backend,
            graph,
            nodes,
            rank,
            ..
        } = place;
        let (first, last) = (nodes.start == 0, nodes.end == graph.nodes.len());
        let input = first.then(|| input(&graph, source, &backend)).transpose()?;
        // Of several ranks the first makes the logits.
        let last = last && rank.as_ref().is_none_or(|r| r.index() == 0);
        let head = last.then(|| head(&graph, source, &backend, input.as_ref()));
        let build = |(i, node): (NodeId, &Node)| {
            let (Run::Layer { spec, weights }, true) = (&node.run, nodes.contains(&i)) else {
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
        let layers = graph.nodes.iter().enumerate().map(build);
        let layers = Arc::new(layers.collect::<Result<_>>()?);
        Ok(Stage {
            head: head.transpose()?,
            input,
            layers,
            backend,
            nodes,
            rank,
            graph,
            weight_bytes: 0,
        })
    }
}

fn table(graph: &Graph, source: &dyn WeightSource, path: &str, rows: usize) -> Result<Matrix> {
    source.matrix(path, &WeightSpec::matrix("", rows, graph.d_model))
}

fn input(graph: &Graph, source: &dyn WeightSource, backend: &Arc<dyn Backend>) -> Result<Input> {
    let Some(image) = &graph.image else {
        let prefix = match graph.prefix {
            0 => None,
            rows => Some(table(graph, source, "embed.prefix", rows)?),
        };
        return Ok(Input::Tokens(
            table(graph, source, "embed", graph.vocab)?,
            prefix,
        ));
    };
    let specs = image.weights(graph.d_model);
    let weights = Weights {
        source,
        backend: &**backend,
        path: "image",
        specs: &specs,
    };
    let positions = weights.values("positions")?;
    Ok(Input::Image(Arc::new(PatchEmbed {
        w: weights.matrix("patch")?,
        bias: weights.vector("patch.bias")?,
        class_token: weights.vector("class_token")?,
        positions: weights.upload(image.tokens(), graph.d_model, &positions)?,
    })))
}

/// The output matrix and its bias. Where it is the embedding, that is loaded in this stage too.
fn head(
    graph: &Graph,
    source: &dyn WeightSource,
    backend: &Arc<dyn Backend>,
    input: Option<&Input>,
) -> Result<(Matrix, Option<Tensor>)> {
    let matrix = match input {
        Some(Input::Tokens(embed, _)) if graph.tied => embed.clone(),
        None if graph.tied => table(graph, source, "embed", graph.vocab)?,
        _ => table(graph, source, "head", graph.vocab)?,
    };
    let bias = WeightSpec::vector("bias", &[graph.vocab], Init::Constant(0.0));
    let weights = Weights {
        source,
        backend: &**backend,
        path: "head",
        specs: &[bias],
    };
    let bias = graph.logit_bias.then(|| weights.vector("bias"));
    Ok((matrix, bias.transpose()?))
}

/// Hands weights on, counts the bytes of each once, and notes where it lies.
struct Counting<'a> {
    source: &'a dyn WeightSource,
    counted: RefCell<BTreeMap<String, u64>>,
    seen: RefCell<BTreeSet<Place>>,
    paths: RefCell<BTreeMap<Place, Vec<String>>>,
    formats: RefCell<Vec<Format>>,
}

impl WeightSource for Counting<'_> {
    fn matrix(&self, path: &str, spec: &WeightSpec) -> Result<Matrix> {
        let matrix = self.source.matrix(path, spec)?;
        // Of weights that are one in memory the first has the bytes.
        let new = self.seen.borrow_mut().insert(matrix.place());
        let bytes = if new { matrix.bytes() as u64 } else { 0 };
        let mut formats = self.formats.borrow_mut();
        if !formats.contains(&matrix.format()) {
            formats.push(matrix.format());
        }
        if let Entry::Vacant(entry) = self.counted.borrow_mut().entry(path.into()) {
            entry.insert(bytes);
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
