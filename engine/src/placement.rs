//! Which device runs what: whole blocks to stages, by bytes and by the memory there is.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use strata_kernels::KvType;
use strata_layers::graph::{Graph, Node, NodeId, Run, ValueId};
use strata_layers::{Cut, Init, Of, Role, WeightSpec};

/// What takes memory when nodes are placed.
pub struct Sizes<'a> {
    /// Bytes of the weight at a path, or of a part of it of this shape, in the form it runs in.
    pub weight: &'a dyn Fn(&str, &[usize]) -> u64,
    /// How keys and values are kept.
    pub kv: KvType,
    /// Tokens of all sequences together.
    pub tokens: u64,
    /// Slots of all sequences.
    pub slots: u64,
}

/// What some nodes take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Taken {
    /// Bytes of weights, each once.
    pub weights: u64,
    /// Bytes of keys and values.
    pub kv: u64,
    /// Bytes of fixed-size state.
    pub state: u64,
}

impl Taken {
    /// All together.
    pub fn total(&self) -> u64 {
        self.weights + self.kv + self.state
    }
}

/// Sums up nodes from one on.
struct Sum<'a> {
    graph: &'a Graph,
    sizes: &'a Sizes<'a>,
    seen: HashSet<String>,
    taken: Taken,
}

impl<'a> Sum<'a> {
    /// Nodes from `start` on; with those of the first comes the embedding.
    fn new(graph: &'a Graph, sizes: &'a Sizes<'a>, start: NodeId) -> Self {
        let (seen, taken) = (HashSet::new(), Taken::default());
        let mut sum = Sum {
            graph,
            sizes,
            seen,
            taken,
        };
        if start == 0 {
            match &graph.image {
                Some(image) => {
                    for want in image.weights(graph.d_model) {
                        sum.weight(want.path("image"), &want);
                    }
                }
                None => {
                    sum.table("embed", graph.vocab);
                    if graph.prefix > 0 {
                        sum.table("embed.prefix", graph.prefix);
                    }
                }
            }
        }
        sum
    }

    fn weight(&mut self, path: String, spec: &WeightSpec) {
        // All zeros of a shape are one, as far as they are stored alike.
        let bytes = (self.sizes.weight)(&path, &spec.shape);
        let known = match (&spec.cut, spec.role) {
            (Some(Cut::Zeros), Role::Matrix) => format!("zeros {bytes} {:?}", spec.shape),
            _ => path,
        };
        if self.seen.insert(known) {
            self.taken.weights += bytes;
        }
    }

    fn table(&mut self, path: &str, rows: usize) {
        let spec = WeightSpec::matrix("", rows, self.graph.d_model);
        self.weight(path.into(), &spec);
    }

    fn node(&mut self, node: &Node) {
        if let Run::Layer { spec, weights } = &node.run {
            for want in spec.weights(&self.graph.widths_of(node)) {
                self.weight(want.path(weights), &want);
            }
        }
        let slot: usize = node.state.slot.iter().map(|p| p.elements() * 4).sum();
        let token = node.state.pages.map_or(0, |p| p.bytes(self.sizes.kv));
        self.taken.state += slot as u64 * self.sizes.slots;
        self.taken.kv += token as u64 * self.sizes.tokens;
    }

    /// The output matrix.
    fn head(&mut self) {
        let path = if self.graph.tied { "embed" } else { "head" };
        self.table(path, self.graph.vocab);
        if self.graph.logit_bias {
            let bias = WeightSpec::vector("bias", &[self.graph.vocab], Init::Constant(0.0));
            self.weight("head.bias".into(), &bias);
        }
    }
}

/// How several devices share a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Parallel {
    /// As a pipeline, which every model can be.
    #[default]
    Auto,
    /// Each device has some of the blocks, and hands what comes of them to the next.
    Pipeline,
    /// Each device has a part of every layer: heads, channels, inner widths. They sum up what comes of them.
    Tensor,
    /// The same with experts whole, some on each device.
    Expert,
}

/// What one device runs.
#[derive(Clone)]
pub struct Spot {
    /// The graph, or a rank's share of it.
    pub graph: Arc<Graph>,
    /// The nodes of it.
    pub nodes: Range<NodeId>,
    /// Which of the ranks it is, where all run all nodes.
    pub rank: Option<Of>,
}

impl Spot {
    /// What it takes: with the first node the embedding, with the last the output matrix, which of ranks the first has.
    pub fn taken(&self, sizes: &Sizes<'_>) -> Taken {
        let (graph, nodes) = (&*self.graph, self.nodes.clone());
        let mut sum = Sum::new(graph, sizes, nodes.start);
        graph.nodes[nodes.clone()].iter().for_each(|n| sum.node(n));
        if nodes.end == graph.nodes.len() && self.rank.is_none_or(|r| r.index == 0) {
            sum.head();
        }
        sum.taken
    }

    /// Bytes that one token adds to its pages, kept as `kv`.
    pub fn page_bytes(&self, kv: KvType) -> u64 {
        let nodes = self.graph.nodes[self.nodes.clone()].iter();
        nodes
            .filter_map(|n| n.state.pages)
            .map(|p| p.bytes(kv) as u64)
            .sum()
    }

    /// Bytes of fixed-size state that one sequence has in it.
    pub fn slot_bytes(&self) -> u64 {
        let parts = self.graph.nodes[self.nodes.clone()]
            .iter()
            .flat_map(|n| &n.state.slot);
        parts.map(|p| 4 * p.elements() as u64).sum()
    }

    /// Its blocks, the first and the one behind the last, by their places in the stack.
    pub fn blocks(&self) -> Range<usize> {
        let end = |value: &ValueId| {
            let made = self.graph.nodes.iter().position(|n| n.output == *value);
            made.map_or(0, |node| node + 1)
        };
        let ends: Vec<NodeId> = self.graph.stack.iter().map(end).collect();
        let before = |at: NodeId| ends.iter().filter(|end| **end <= at).count();
        before(self.nodes.start)..before(self.nodes.end)
    }
}

/// Gives every device its part. `rooms` as in [`cut`].
pub fn spots(
    graph: &Arc<Graph>,
    parallel: Parallel,
    rooms: &[Option<u64>],
    sizes: &Sizes<'_>,
) -> Result<Vec<Spot>, String> {
    let count = rooms.len();
    if count == 1 || matches!(parallel, Parallel::Auto | Parallel::Pipeline) {
        let spot = |nodes| Spot {
            graph: graph.clone(),
            nodes,
            rank: None,
        };
        return Ok(cut(graph, sizes, rooms)?.into_iter().map(spot).collect());
    }
    let experts = parallel == Parallel::Expert;
    if experts && !graph.nodes.iter().any(has_experts) {
        return Err("--parallel expert: the model has no experts; use tensor or pipeline".into());
    }
    let rank = |index| {
        let rank = Of {
            index,
            count,
            experts,
        };
        let share = graph.share(rank).map_err(|faults| {
            format!(
                "{}; name fewer devices, or use --parallel pipeline",
                faults.join("; ")
            )
        })?;
        Ok(Spot {
            nodes: 0..share.nodes.len(),
            graph: Arc::new(share),
            rank: Some(rank),
        })
    };
    (0..count).map(rank).collect()
}

/// Whether a token goes through a choice of its matrices only.
fn has_experts(node: &Node) -> bool {
    !experts_of(node).is_empty()
}

/// The paths of the matrices of which a token goes through a choice only.
fn experts_of(node: &Node) -> Vec<String> {
    let Run::Layer { spec, weights } = &node.run else {
        return Vec::new();
    };
    // Which matrices they are does not depend on widths.
    let wanted = spec.weights(&[1, 1, 1, 1, 1]).into_iter();
    wanted
        .filter(|w| w.role == Role::Matrix && spec.share_used(w) < 1.0)
        .map(|w| w.path(weights))
        .collect()
}

/// The paths of all experts' matrices.
pub fn experts(graph: &Graph) -> HashSet<String> {
    graph.nodes.iter().flat_map(experts_of).collect()
}

/// The nodes behind which the graph can be cut: the last of each place of the stack, but where a later node reads the
/// keys and values of an earlier one. The last is the graph's end.
fn borders(graph: &Graph) -> Vec<NodeId> {
    let mut ends: Vec<NodeId> = graph
        .stack
        .iter()
        .filter_map(|value| graph.nodes.iter().position(|n| n.output == *value))
        .map(|last| last + 1)
        .filter(|at| {
            let later = &graph.nodes[*at..];
            later.iter().all(|n| n.pages_of.is_none_or(|of| of >= *at))
        })
        .collect();
    ends.dedup();
    // What follows the last block goes with it.
    ends.pop();
    ends.push(graph.nodes.len());
    ends
}

/// Of a device's memory, what is left free: for what its libraries take.
pub const SPARE: f64 = 0.05;

/// Cuts the graph into a run of whole blocks for each device, in their order, so that the fullest is as empty as can
/// be. `rooms` are free bytes, none where memory is the host's: among devices of the host blocks are split evenly; beside others
/// the host takes what those have no room for.
pub fn cut(
    graph: &Graph,
    sizes: &Sizes<'_>,
    rooms: &[Option<u64>],
) -> Result<Vec<Range<NodeId>>, String> {
    let ends = borders(graph);
    let (stages, blocks) = (rooms.len(), ends.len());
    if blocks < stages {
        let devices = format!("{stages} devices");
        return Err(match blocks {
            1 => format!(
                "the stack cannot be cut, so that {devices} are too many; name one, or use --parallel tensor"
            ),
            _ => format!(
                "the stack can be cut into {blocks} runs of blocks at most, too few for {devices}; name fewer, or use --parallel tensor"
            ),
        });
    }
    let start = |block: usize| if block == 0 { 0 } else { ends[block - 1] };
    // bytes[a][b - a]: of blocks a to b, the last among them.
    let bytes: Vec<Vec<u64>> = (0..blocks)
        .map(|a| {
            let mut sum = Sum::new(graph, sizes, start(a));
            let until = |b: usize| {
                graph.nodes[start(b)..ends[b]]
                    .iter()
                    .for_each(|n| sum.node(n));
                if b + 1 == blocks {
                    sum.head();
                }
                sum.taken.total()
            };
            (a..blocks).map(until).collect()
        })
        .collect();
    let mixed = rooms.iter().any(Option::is_some);
    let cost = |stage: usize, a: usize, b: usize| {
        let bytes = bytes[a][b - a] as f64;
        match rooms[stage] {
            None => bytes,
            Some(free) => {
                let share = bytes / (free as f64 * (1.0 - SPARE)).max(1.0);
                // Beyond its memory nothing is worse, and the host is there for it.
                if share > 1.0 && mixed {
                    1e30 * share
                } else {
                    share
                }
            }
        }
    };
    // best[b]: of the stages so far over blocks up to b, the least of the largest cost, and where the last begins.
    let mut best: Vec<(f64, usize)> = (0..blocks).map(|b| (cost(0, 0, b), 0)).collect();
    let mut begins = vec![best.iter().map(|b| b.1).collect::<Vec<_>>()];
    for stage in 1..stages {
        best = (0..blocks)
            .map(|b| {
                (stage..=b)
                    .map(|a| (best[a - 1].0.max(cost(stage, a, b)), a))
                    .min_by(|a, b| a.0.total_cmp(&b.0))
                    .unwrap_or((f64::INFINITY, b))
            })
            .collect();
        begins.push(best.iter().map(|b| b.1).collect());
    }
    let mut cuts = Vec::new();
    let mut last = blocks - 1;
    for begin in begins.iter().rev() {
        let first = begin[last];
        cuts.push(start(first)..ends[last]);
        last = first.saturating_sub(1);
    }
    cuts.reverse();
    Ok(cuts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use strata_layers::Plan;

    fn graph(blocks: usize) -> Graph {
        let text = format!(
            "\
plan: 1
name: t
vocab: 10
d_model: 8
context: 64
blocks:
  f: [residual: [norm: {{eps: 1.0e-6}}, mlp: {{d_ff: 16, act: silu}}]]
stack: [f*{blocks}]
head: {{norm: {{eps: 1.0e-6}}, tie: true}}
"
        );
        Graph::lower(&Plan::parse(&text, "t").unwrap(), "t").unwrap()
    }

    fn blocks(cuts: &[Range<NodeId>]) -> Vec<usize> {
        // Norm, network and sum; the last norm beside them.
        cuts.iter().map(|c| c.len() / 3).collect()
    }

    #[test]
    fn blocks_go_where_there_is_room() {
        let graph = graph(12);
        let weight = |path: &str, _: &[usize]| if path.contains("mlp.up") { 100 } else { 0 };
        let sizes = Sizes {
            weight: &weight,
            kv: KvType::BF16,
            tokens: 0,
            slots: 0,
        };
        let cut = |rooms: &[Option<u64>]| cut(&graph, &sizes, rooms).unwrap();
        assert_eq!(blocks(&cut(&[None, None])), [6, 6]);
        assert_eq!(blocks(&cut(&[None; 5])).iter().max(), Some(&3));
        assert_eq!(blocks(&cut(&[Some(3000), Some(1000)])), [9, 3]);
        // The host takes what is left.
        assert_eq!(blocks(&cut(&[Some(850), None])), [8, 4]);
        assert_eq!(blocks(&cut(&[None, Some(1_000_000)])), [1, 11]);
        let cuts = cut(&[None, None, None]);
        assert_eq!((cuts[0].start, cuts[2].end), (0, graph.nodes.len()));
        assert!(cuts.windows(2).all(|c| c[0].end == c[1].start));
        let spot = Spot {
            graph: Arc::new(graph),
            nodes: cuts[1].clone(),
            rank: None,
        };
        assert_eq!(spot.taken(&sizes).weights, 400);
        assert_eq!(spot.blocks(), 4..8);
    }

    #[test]
    fn more_devices_than_blocks_are_refused() {
        let sizes = Sizes {
            weight: &|_, _| 1,
            kv: KvType::BF16,
            tokens: 1,
            slots: 1,
        };
        let error = cut(&graph(2), &sizes, &[None; 3]).unwrap_err();
        assert!(error.contains("2 runs of blocks at most"), "{error}");
        let error = cut(&graph(1), &sizes, &[None; 2]).unwrap_err();
        assert!(error.contains("cannot be cut"), "{error}");
    }
}
