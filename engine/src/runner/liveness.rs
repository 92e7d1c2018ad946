//! Which values live where: what crosses from one stage to the next, and the buffers that they take turns in.

use std::ops::Range;

use strata_layers::graph::{Graph, NodeId, ValueId};

/// The last node that reads each value; the output matrix reads behind all of them.
fn last_reads(graph: &Graph) -> Vec<NodeId> {
    let mut last = vec![0; graph.widths.len()];
    for (i, node) in graph.nodes.iter().enumerate() {
        node.inputs.iter().for_each(|v| last[*v] = i);
    }
    last[graph.last] = usize::MAX;
    last
}

/// The values that are there before node `at` and are read by it or later ones: the stream, and what was kept under
/// a name.
pub fn crossing(graph: &Graph, at: NodeId) -> Vec<ValueId> {
    let last = last_reads(graph);
    let made = graph.nodes[..at].iter().map(|n| n.output);
    std::iter::once(0)
        .chain(made)
        .filter(|v| last[*v] >= at)
        .collect()
}

/// Buffers for the values of some nodes.
pub struct Buffers {
    /// The buffer of each value; of one that no node here reads or writes, none that there is.
    pub of: Vec<usize>,
    /// Width of each buffer.
    pub widths: Vec<usize>,
}

impl Buffers {
    /// Gives values buffers: a buffer is free again once its value has been read for the last time. However deep
    /// the model, a stack of residual blocks takes three or four.
    pub fn new(graph: &Graph, nodes: Range<NodeId>) -> Buffers {
        let last_read = last_reads(graph);
        let mut of = vec![usize::MAX; graph.widths.len()];
        let mut widths: Vec<usize> = Vec::new();
        let mut free: Vec<usize> = Vec::new();
        for value in crossing(graph, nodes.start) {
            of[value] = widths.len();
            widths.push(graph.widths[value]);
        }
        for i in nodes {
            let node = &graph.nodes[i];
            let buffer = free.pop().unwrap_or_else(|| {
                widths.push(0);
                widths.len() - 1
            });
            of[node.output] = buffer;
            widths[buffer] = widths[buffer].max(graph.widths[node.output]);
            let mut done: Vec<ValueId> = node.inputs.clone();
            done.sort_unstable();
            done.dedup();
            for value in done.into_iter().filter(|v| last_read[*v] == i) {
                free.push(of[value]);
            }
            // A value that nobody reads (a `let` without use) is free at once.
            if last_read[node.output] <= i {
                free.push(buffer);
            }
        }
        Buffers { of, widths }
    }
}
