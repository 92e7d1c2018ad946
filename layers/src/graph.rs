//! What a plan lowers to: a flat list of nodes in running order.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use strata_kernels::KvType;

use crate::image::Image;
use crate::layer::{LayerSpec, Reach};
use crate::lower;
use crate::plan::Plan;
use crate::share::Of;
use crate::state::StateSpec;
use crate::weights::{Init, Role, WeightSpec};
use crate::yaml::Faults;

/// A node's place in [`Graph::nodes`].
pub type NodeId = usize;
/// A value's place in [`Graph::widths`]; value 0 is the embedding.
pub type ValueId = usize;

/// What runs.
#[derive(Debug, Clone)]
pub struct Graph {
    /// In running order.
    pub nodes: Vec<Node>,
    /// Width of each value.
    pub widths: Vec<usize>,
    /// Number of token ids, or of classes.
    pub vocab: usize,
    /// What is read instead of tokens.
    pub image: Option<Image>,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Whether the output matrix is the embedding.
    pub tied: bool,
    /// Multiplies the embedding's rows.
    pub embed_scale: Option<f64>,
    /// Learned rows before the tokens of every sequence; as ids they come behind the vocabulary.
    pub prefix: usize,
    /// Multiplies the logits.
    pub logit_scale: Option<f64>,
    /// Whether the logits have a bias.
    pub logit_bias: bool,
    /// The stream behind each place of the stack, in the order of the places. Two are one value where a
    /// block leaves the stream as it is.
    pub stack: Vec<ValueId>,
    /// The value that the output matrix multiplies.
    pub last: ValueId,
}

/// One operation of the graph.
#[derive(Debug, Clone)]
pub struct Node {
    /// Where it stands in the plan, and the name of its state: `blocks.3.mamba1`.
    pub name: String,
    /// What it does.
    pub run: Run,
    /// The values it reads: the stream, then a layer's operands.
    pub inputs: Vec<ValueId>,
    /// The value it writes.
    pub output: ValueId,
    /// The state it keeps for every sequence.
    pub state: StateSpec,
    /// The earlier node whose keys and values it reads, when they are not its own.
    pub pages_of: Option<NodeId>,
}

/// What a node does.
#[derive(Debug, Clone)]
pub enum Run {
    /// A layer.
    Layer {
        /// Its parameters.
        spec: Arc<dyn LayerSpec>,
        /// Where its weights are: `blocks.3.mamba1`, `shared.s0.mlp`.
        weights: String,
    },
    /// The sum of two inputs.
    Add,
    /// All inputs side by side.
    Concat,
}

/// One weight of a graph: its path and what it is.
#[derive(Debug, Clone, PartialEq)]
pub struct GraphWeight {
    /// The full path.
    pub path: String,
    /// Shape, role and initialisation.
    pub spec: WeightSpec,
}

impl Graph {
    /// Lowers a plan. `file` is its name for messages.
    pub fn lower(plan: &Plan, file: &str) -> Result<Graph, Faults> {
        lower::lower(plan, file)
    }

    /// All weights, each once, in the order in which they are first used.
    pub fn weights(&self) -> Vec<GraphWeight> {
        let mut seen = BTreeMap::new();
        let mut list = Vec::new();
        let mut add = |path: String, spec: WeightSpec| {
            if seen.insert(path.clone(), ()).is_none() {
                list.push(GraphWeight { path, spec });
            }
        };
        let table = |rows| WeightSpec {
            role: Role::Table,
            ..WeightSpec::matrix("", rows, self.d_model)
        };
        match &self.image {
            Some(image) => {
                for want in image.weights(self.d_model) {
                    add(want.path("image"), want);
                }
            }
            None => {
                add("embed".into(), table(self.vocab));
                if self.prefix > 0 {
                    add("embed.prefix".into(), table(self.prefix));
                }
            }
        }
        for node in &self.nodes {
            if let Run::Layer { spec, weights } = &node.run {
                for want in spec.weights(&self.widths_of(node)) {
                    add(want.path(weights), want);
                }
            }
        }
        if !self.tied {
            add(
                "head".into(),
                WeightSpec::matrix("", self.vocab, self.d_model),
            );
        }
        if self.logit_bias {
            let bias = WeightSpec::vector("bias", &[self.vocab], Init::Constant(0.0));
            add(bias.path("head"), bias);
        }
        list
    }

    /// What one of several ranks runs: its share of each layer that has shares, and all of the others. Which layers
    /// cannot have so many, if there are any.
    pub fn share(&self, rank: Of) -> Result<Graph, Vec<String>> {
        let (mut graph, mut faults) = (self.clone(), Vec::new());
        for (i, node) in self.nodes.iter().enumerate() {
            let Run::Layer { spec, weights } = &node.run else {
                continue;
            };
            let widths = self.widths_of(node);
            match spec.share(&widths, rank) {
                None => {}
                Some(Err(why)) => faults.push(format!("{}: {why}", node.name)),
                Some(Ok(share)) => {
                    let (spec, weights) = (share.spec(), weights.clone());
                    graph.nodes[i].state = spec.state(&widths);
                    graph.nodes[i].run = Run::Layer { spec, weights };
                }
            }
        }
        if faults.is_empty() {
            Ok(graph)
        } else {
            Err(faults)
        }
    }

    /// The kinds of layers with matrices that every rank has whole.
    pub fn unshared(&self) -> Vec<&'static str> {
        let rank = Of {
            index: 0,
            count: 1,
            experts: false,
        };
        let kind = |node: &Node| {
            let Run::Layer { spec, .. } = &node.run else {
                return None;
            };
            let widths = self.widths_of(node);
            let large = spec.weights(&widths).iter().any(|w| w.role == Role::Matrix);
            (large && spec.share(&widths, rank).is_none()).then(|| spec.kind())
        };
        let mut kinds: Vec<_> = self.nodes.iter().filter_map(kind).collect();
        kinds.sort_unstable();
        kinds.dedup();
        kinds
    }

    /// The widths of a node's inputs.
    pub fn widths_of(&self, node: &Node) -> Vec<usize> {
        node.inputs.iter().map(|v| self.widths[*v]).collect()
    }

    /// Bytes of fixed-size state that one sequence has.
    pub fn slot_bytes(&self) -> usize {
        let parts = self.nodes.iter().flat_map(|n| &n.state.slot);
        parts.map(|p| p.elements() * 4).sum()
    }

    /// Elements that one token adds to the pages, keys and values together.
    pub fn page_elements_per_token(&self) -> usize {
        self.nodes
            .iter()
            .filter_map(|n| n.state.pages)
            .map(|p| p.elements())
            .sum()
    }

    /// Bytes that one token adds to the pages, kept as `kv`.
    pub fn page_bytes_per_token(&self, kv: KvType) -> usize {
        let pages = self.nodes.iter().filter_map(|n| n.state.pages);
        pages.map(|p| p.bytes(kv)).sum()
    }

    /// The tokens that some layer can still see, where no layer with keys and values sees all: what lies between
    /// may be given up.
    pub fn reach(&self) -> Option<Reach> {
        let attending = |n: &&Node| n.state.pages.is_some() || n.pages_of.is_some();
        let seen = self.nodes.iter().filter(attending).map(|n| match &n.run {
            Run::Layer { spec, .. } => spec.sight(),
            Run::Add | Run::Concat => None,
        });
        let all: Option<Vec<Reach>> = seen.collect();
        let wider = |a: Reach, b: Reach| Reach {
            window: a.window.max(b.window),
            keep_first: a.keep_first.max(b.keep_first),
        };
        all?.into_iter().reduce(wider)
    }

    /// The list as text: a line a node.
    pub fn print(&self) -> String {
        let mut out = String::new();
        let kind = |node: &Node| match &node.run {
            Run::Layer { spec, .. } => spec.kind(),
            Run::Add => "add",
            Run::Concat => "concat",
        };
        let mut line = |output: ValueId, kind: &str, inputs: &str, weights: &str, state: &str| {
            let call = format!("%{output:<4} = {kind:<9} ({inputs})");
            let _ = write!(
                out,
                "{call:<32} width={:<6}",
                self.widths.get(output).unwrap_or(&self.vocab)
            );
            let weights = if weights.is_empty() { "-" } else { weights };
            let _ = match state {
                "" => writeln!(out, " weights={weights}"),
                state => writeln!(out, " weights={weights:<26} state={state}"),
            };
        };
        let tokens = match self.prefix {
            0 => "tokens".to_string(),
            n => format!("{n} + tokens"),
        };
        match self.image {
            Some(_) => line(0, "image", "patches", "image", ""),
            None => line(0, "embed", &tokens, "embed", ""),
        }
        for node in &self.nodes {
            let inputs: Vec<String> = node.inputs.iter().map(|v| format!("%{v}")).collect();
            let weights = match &node.run {
                Run::Layer { spec, weights } if !spec.weights(&self.widths_of(node)).is_empty() => {
                    weights.as_str()
                }
                _ => "",
            };
            let state = &node.state;
            let mut kept: Vec<String> = state
                .slot
                .iter()
                .map(|p| format!("{}({}, {})", p.name, p.rows, p.cols))
                .collect();
            kept.extend(state.pages.map(|p| match p.keys() == p.values() {
                true => format!("pages(2, {})", p.keys()),
                false => format!("pages({} + {})", p.keys(), p.values()),
            }));
            if let Some(from) = node.pages_of {
                kept.push(format!("pages of {}", self.nodes[from].name));
            }
            line(
                node.output,
                kind(node),
                &inputs.join(", "),
                weights,
                &kept.join("+"),
            );
        }
        let head = if self.tied { "embed" } else { "head" };
        line(
            self.widths.len(),
            "linear",
            &format!("%{}", self.last),
            head,
            "",
        );
        out
    }
}
