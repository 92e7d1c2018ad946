//! What a plan costs: bytes of weights, of state and of buffers, and operations a token. Nothing is
//! allocated to know it.

use std::collections::BTreeMap;

use strata_kernels::KvType;
use strata_layers::graph::{GraphWeight, Node, Run};
use strata_layers::{Graph, LayerSpec, Role, WeightSpec};

use crate::footprint::Footprint;
use crate::recipe::Storage;
use crate::session::EngineConfig;

/// What a plan costs.
#[derive(Debug, Clone, PartialEq)]
pub struct Estimate {
    /// Number of weights.
    pub weights: usize,
    /// Their elements.
    pub parameters: u64,
    /// Elements of the weights that one token meets.
    pub active_parameters: u64,
    /// Elements of further tensors of the checkpoint, which do not run and are not loaded.
    pub unused_parameters: u64,
    /// Number of those tensors.
    pub unused_tensors: u64,
    /// Bytes of all weights.
    pub weight_bytes: u64,
    /// Bytes of keys and values that a token adds.
    pub kv_bytes_per_token: u64,
    /// Bytes of fixed-size state of a sequence.
    pub state_bytes_per_sequence: u64,
    /// Bytes of the pages for all sequences and their whole context.
    pub kv_bytes: u64,
    /// Bytes of the slots for all sequences.
    pub state_bytes: u64,
    /// Bytes of activations and scratch.
    pub buffer_bytes: u64,
    /// Operations of the matrix products, convolutions, scans and attention that a token goes through
    /// when it is the first of its sequence.
    pub flops_per_token: f64,
    /// The same for the last token of the context.
    pub flops_at_context: f64,
    /// Bytes of matrices, keys, values and state that decoding reads for one token of one sequence at
    /// the end of the context.
    pub decode_bytes: u64,
}

impl Estimate {
    /// All bytes together.
    pub fn total_bytes(&self) -> u64 {
        self.weight_bytes + self.kv_bytes + self.state_bytes + self.buffer_bytes
    }
}

/// Elements of the matrices of all layers that one token is multiplied with; those of its logits are
/// not among them.
pub fn multiplied(graph: &Graph) -> f64 {
    layers(graph)
        .flat_map(|(widths, spec)| matrices(&widths, spec))
        .map(|(w, share)| w.elements() as f64 * share)
        .sum()
}

/// Whether a token is multiplied with some of a layer's matrices only.
pub fn picks_experts(graph: &Graph) -> bool {
    let mut matrices = layers(graph).flat_map(|(widths, spec)| matrices(&widths, spec));
    matrices.any(|(_, share)| share < 1.0)
}

/// The matrices of a layer, and the share of each that one token is multiplied with.
fn matrices(widths: &[usize], spec: &dyn LayerSpec) -> Vec<(WeightSpec, f64)> {
    let wanted = spec.weights(widths).into_iter();
    wanted
        .filter(|w| w.role == Role::Matrix)
        .map(|w| {
            let share = spec.share_used(&w);
            (w, share)
        })
        .collect()
}

/// What a part of a step does: the same products, scans, states, keys and values that [`estimate`] adds up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Work {
    /// Operations.
    pub flops: f64,
    /// Bytes of matrices, keys, values and states that are read, and of states that are written.
    pub bytes: f64,
}

impl Work {
    /// A product of `rows` rows with a matrix of so many elements and bytes.
    pub fn product(rows: usize, elements: usize, bytes: u64) -> Work {
        Work {
            flops: 2.0 * rows as f64 * elements as f64,
            bytes: bytes as f64,
        }
    }

    /// One and another.
    pub fn and(self, other: Work) -> Work {
        Work {
            flops: self.flops + other.flops,
            bytes: self.bytes + other.bytes,
        }
    }
}

/// What a node does in a step over `rows`: the position of the first row and the number of rows of each sequence.
/// `bytes` are those of the weight at a path; keys and values are kept as `kv`.
pub fn work(
    graph: &Graph,
    node: &Node,
    rows: &[(usize, usize)],
    bytes: &dyn Fn(&str) -> u64,
    kv: KvType,
) -> Work {
    let Run::Layer { spec, weights } = &node.run else {
        return Work::default();
    };
    let widths = graph.widths_of(node);
    let all: usize = rows.iter().map(|(_, len)| len).sum();
    let mut work = Work::default();
    for (matrix, share) in matrices(&widths, &**spec) {
        let product = Work::product(all, matrix.elements(), bytes(&matrix.path(weights)));
        work.flops += product.flops * share;
        // Of experts that rows choose evenly, those that some row chose.
        work.bytes += product.bytes * (1.0 - (1.0 - share).powi(all as i32));
    }
    let pages = node
        .pages_of
        .map_or(node, |of| &graph.nodes[of])
        .state
        .pages;
    let slot: usize = node
        .state
        .slot
        .iter()
        .map(strata_layers::Part::elements)
        .sum();
    for (position, len) in rows {
        let positions = *position..position + len;
        work.flops += positions.map(|p| spec.other_flops(&widths, p)).sum::<f64>();
        // Rows of one sequence share what they look back on.
        let kept = pages.map_or(0, |p| p.bytes(kv)) * (position + len);
        work.bytes += (kept + 2 * 4 * slot) as f64;
    }
    work
}

fn layers(graph: &Graph) -> impl Iterator<Item = (Vec<usize>, &dyn strata_layers::LayerSpec)> {
    graph.nodes.iter().filter_map(|node| match &node.run {
        Run::Layer { spec, .. } => Some((graph.widths_of(node), &**spec)),
        Run::Add | Run::Concat => None,
    })
}

/// Operations beside matrices of all layers on a token after `position` others.
fn other_flops(graph: &Graph, position: usize) -> f64 {
    layers(graph)
        .map(|(widths, spec)| spec.other_flops(&widths, position))
        .sum()
}

/// What a graph costs under `config`, its weights stored as `storage` says. `rows` are those of the largest step.
pub fn estimate(
    graph: &Graph,
    config: &EngineConfig,
    storage: &Storage,
    footprint: &Footprint,
    rows: usize,
) -> Estimate {
    let weights = graph.weights();
    let bytes = |w: &GraphWeight| storage.of(w).bytes_of(&w.spec.shape).unwrap_or(0) as u64;
    let weight_bytes = weights.iter().map(bytes).sum();
    let parameters = weights.iter().map(|w| w.spec.elements() as u64).sum();
    let kv_bytes_per_token = graph.page_bytes_per_token(config.kv_dtype) as u64;
    let state_bytes_per_sequence = graph.slot_bytes() as u64;
    let (pages, slots) = (config.pages(graph.prefix) as u64, config.slots() as u64);
    let head = (graph.vocab * graph.d_model) as f64;
    let flops = |position| 2.0 * (multiplied(graph) + head) + other_flops(graph, position);
    let last = config.context.saturating_sub(1);
    let active = active_parameters(graph, &weights);
    Estimate {
        weights: weights.len(),
        parameters,
        active_parameters: active,
        unused_parameters: 0,
        unused_tensors: 0,
        weight_bytes,
        kv_bytes_per_token,
        state_bytes_per_sequence,
        kv_bytes: pages * config.page_size as u64 * kv_bytes_per_token,
        state_bytes: slots * state_bytes_per_sequence,
        buffer_bytes: footprint.bytes(config.token_budget, rows),
        flops_per_token: flops(0),
        flops_at_context: flops(last),
        decode_bytes: decode_bytes(graph, &weights, weight_bytes)
            + kv_bytes_per_token * config.context as u64
            + 2 * state_bytes_per_sequence,
    }
}

/// Elements of the weights that one token meets: of experts the chosen ones, of a table one row.
fn active_parameters(graph: &Graph, weights: &[GraphWeight]) -> u64 {
    let mut share: BTreeMap<String, f64> = BTreeMap::new();
    for node in &graph.nodes {
        if let Run::Layer { spec, weights } = &node.run {
            for want in spec.weights(&graph.widths_of(node)) {
                share.insert(want.path(weights), spec.share_used(&want));
            }
        }
    }
    let each = weights.iter().map(|w| {
        let share = share.get(&w.path).copied().unwrap_or(1.0);
        w.spec.elements() as f64 * share
    });
    each.sum::<f64>().round() as u64
}

/// Bytes of the matrices that decoding one token reads.
pub fn decode_bytes(graph: &Graph, weights: &[GraphWeight], weight_bytes: u64) -> u64 {
    let read = multiplied(graph) + (graph.vocab * graph.d_model) as f64;
    let all: f64 = weights
        .iter()
        .filter(|w| w.spec.role != Role::Vector)
        .map(|w| w.spec.elements() as f64)
        .sum();
    (weight_bytes as f64 * read / all.max(1.0)) as u64
}

/// What an engine truly holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Allocated {
    /// Bytes of weights, mapped files among them.
    pub weights: u64,
    /// Bytes of the pages.
    pub kv: u64,
    /// Bytes of the slots.
    pub state: u64,
    /// Bytes of activations and scratch.
    pub buffers: u64,
}

impl Allocated {
    /// One and another.
    pub fn and(self, other: Allocated) -> Allocated {
        Allocated {
            weights: self.weights + other.weights,
            kv: self.kv + other.kv,
            state: self.state + other.state,
            buffers: self.buffers + other.buffers,
        }
    }

    /// All together.
    pub fn total(&self) -> u64 {
        self.weights + self.kv + self.state + self.buffers
    }

    /// Where an estimate is further off than one part in a hundred.
    pub fn beside(&self, estimate: &Estimate) -> Option<String> {
        let parts = [
            ("weights", self.weights, estimate.weight_bytes),
            ("keys and values", self.kv, estimate.kv_bytes),
            ("state", self.state, estimate.state_bytes),
            ("buffers", self.buffers, estimate.buffer_bytes),
        ];
        let off =
            |(_, found, expected): &(&str, u64, u64)| found.abs_diff(*expected) * 100 > *expected;
        let said: Vec<String> = parts
            .iter()
            .filter(|p| off(p))
            .map(|(what, found, expected)| format!("{what}: {found} bytes, estimated {expected}"))
            .collect();
        (!said.is_empty()).then(|| said.join("; "))
    }
}
