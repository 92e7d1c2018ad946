//! What the parts of steps take, beside what the machine could do.
//!
//! Time is taken between the nodes of the graph, so it is what a backend needs that has done an operation when it
//! returns: the CPU. A device that only starts them would show the starting; [`Trace`] is not for it. Steps in which
//! some sequence has several rows count as prefill, the others as decoding. The bytes and operations of a part are
//! those of [`crate::estimate::work`]: activations, norms and what is elementwise are not among them, which is why a
//! part of these alone has no share of a limit. What is chosen from logits is timed with the output matrix.

use std::sync::Arc;
use std::time::{Duration, Instant};

use strata_kernels::{KvType, Span};

use crate::estimate::{Work, work};
use crate::load::Limits;
use crate::runner::Network;

/// A part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Rows of the embedding.
    Embedding,
    /// A node of the graph, by its place.
    Node(usize),
    /// The output matrix, and the choice of tokens.
    Head,
}

/// Steps of one kind.
#[derive(Debug, Clone, Default)]
struct Phase {
    steps: u64,
    rows: u64,
    /// The embedding, all nodes, the head.
    parts: Vec<(Duration, Work)>,
}

/// Gathers times. See the top of this file.
pub struct Trace {
    network: Arc<Network>,
    kv_dtype: KvType,
    /// Prefill, decoding.
    phases: [Phase; 2],
    now: usize,
    last: Instant,
    rows: Vec<(usize, usize)>,
}

/// One line of a report.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// The node as the plan names it: `blocks.3.mamba1`; `embed`, `head`.
    pub name: String,
    /// How many parts it sums up.
    pub parts: usize,
    /// Seconds of all steps.
    pub seconds: f64,
    /// Of all steps.
    pub work: Work,
}

impl Line {
    /// The least seconds that the limits allow, over those it took; none where it moves and multiplies nothing.
    pub fn share_of_limit(&self, limits: &Limits) -> Option<f64> {
        let over = |amount: f64, limit: f64| if limit > 0.0 { amount / limit } else { 0.0 };
        let bytes = over(self.work.bytes, limits.bytes_per_second);
        let least = bytes.max(over(self.work.flops, limits.flops_per_second));
        (least > 0.0 && self.seconds > 0.0).then(|| least / self.seconds)
    }
}

/// What steps of one kind took.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// `prefill` or `decode`.
    pub name: &'static str,
    /// How many.
    pub steps: u64,
    /// Their rows.
    pub rows: u64,
    /// Nodes of one kind together, the longest first.
    pub kinds: Vec<Line>,
    /// Every part, the longest first.
    pub parts: Vec<Line>,
}

impl Report {
    /// Seconds of all parts.
    pub fn seconds(&self) -> f64 {
        self.parts.iter().map(|p| p.seconds).sum()
    }
}

impl Trace {
    /// For a network whose keys and values are kept as `kv_dtype`.
    pub fn new(network: Arc<Network>, kv_dtype: KvType) -> Self {
        let parts = vec![(Duration::ZERO, Work::default()); network.graph.nodes.len() + 2];
        let phase = Phase {
            parts,
            ..Phase::default()
        };
        Trace {
            network,
            kv_dtype,
            phases: [phase.clone(), phase],
            now: 0,
            last: Instant::now(),
            rows: Vec::new(),
        }
    }

    /// A step begins, of whose rows so many want logits.
    pub(crate) fn begin(&mut self, spans: &[Span], logits: usize) {
        self.now = usize::from(spans.iter().all(|s| s.len == 1));
        self.rows.clear();
        self.rows.extend(spans.iter().map(|s| (s.position, s.len)));
        let (network, phase) = (&self.network, &mut self.phases[self.now]);
        let rows: usize = spans.iter().map(|s| s.len).sum();
        phase.steps += 1;
        phase.rows += rows as u64;
        let graph = &network.graph;
        for (node, (_, done)) in graph.nodes.iter().zip(&mut phase.parts[1..]) {
            let bytes = |path: &str| network.bytes_of(path);
            let more = work(graph, node, &self.rows, &bytes, self.kv_dtype);
            *done = done.and(more);
        }
        let table = network.bytes_of("embed");
        let head = if graph.tied {
            table
        } else {
            network.bytes_of("head")
        };
        let (first, last) = (0, phase.parts.len() - 1);
        let read = table as f64 * rows as f64 / graph.vocab.max(1) as f64;
        let looked_up = Work {
            flops: 0.0,
            bytes: read,
        };
        phase.parts[first].1 = phase.parts[first].1.and(looked_up);
        if logits > 0 {
            let product = Work::product(logits, graph.vocab * graph.d_model, head);
            phase.parts[last].1 = phase.parts[last].1.and(product);
        }
        self.last = Instant::now();
    }

    /// A part is done.
    pub(crate) fn lap(&mut self, part: Part) {
        let now = Instant::now();
        let parts = &mut self.phases[self.now].parts;
        let place = match part {
            Part::Embedding => 0,
            Part::Node(i) => i + 1,
            Part::Head => parts.len() - 1,
        };
        parts[place].0 += now - self.last;
        self.last = now;
    }

    /// What was gathered: prefill, then decoding, each if there was any.
    pub fn reports(&self) -> Vec<Report> {
        let phases = ["prefill", "decode"].into_iter().zip(&self.phases);
        let seen = phases.filter(|(_, phase)| phase.steps > 0);
        seen.map(|(name, phase)| self.report(name, phase)).collect()
    }

    fn report(&self, name: &'static str, phase: &Phase) -> Report {
        let nodes = self.network.graph.nodes.iter().map(|n| n.name.clone());
        let names = std::iter::once("embed".to_string())
            .chain(nodes)
            .chain(["head".to_string()]);
        let mut parts: Vec<Line> = names
            .zip(&phase.parts)
            .map(|(name, (time, work))| Line {
                name,
                parts: 1,
                seconds: time.as_secs_f64(),
                work: *work,
            })
            .collect();
        let mut kinds: Vec<Line> = Vec::new();
        for part in &parts {
            let kind = kind(&part.name);
            match kinds.iter_mut().find(|k| k.name == kind) {
                Some(line) => {
                    line.parts += 1;
                    line.seconds += part.seconds;
                    line.work = line.work.and(part.work);
                }
                None => kinds.push(Line {
                    name: kind.into(),
                    ..part.clone()
                }),
            }
        }
        for lines in [&mut parts, &mut kinds] {
            lines.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        }
        Report {
            name,
            steps: phase.steps,
            rows: phase.rows,
            kinds,
            parts,
        }
    }
}

/// What a node is called in every block: the name behind the block's number.
fn kind(name: &str) -> &str {
    let behind = name.split('.').skip(2).map(str::len).sum::<usize>();
    let dots = name.split('.').count().saturating_sub(3);
    match name.starts_with("blocks.") && behind > 0 {
        true => &name[name.len() - behind - dots..],
        false => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_names_behind_the_block() {
        for (name, expected) in [
            ("blocks.3.mamba1", "mamba1"),
            ("blocks.3.mamba.in.x", "mamba.in.x"),
            ("embed", "embed"),
            ("blocks.3", "blocks.3"),
            ("head.norm", "head.norm"),
        ] {
            assert_eq!(kind(name), expected);
        }
    }

    #[test]
    fn a_share_is_of_the_nearer_limit() {
        let line = |seconds, flops, bytes| Line {
            name: String::new(),
            parts: 1,
            seconds,
            work: Work { flops, bytes },
        };
        let limits = Limits {
            bytes_per_second: 10.0,
            flops_per_second: 100.0,
        };
        let cases = [
            ((2.0, 50.0, 10.0), Some(0.5)),
            ((2.0, 150.0, 10.0), Some(0.75)),
            ((2.0, 0.0, 0.0), None),
        ];
        for ((seconds, flops, bytes), expected) in cases {
            let line = line(seconds, flops, bytes);
            assert_eq!(line.share_of_limit(&limits), expected, "{line:?}");
            assert_eq!(line.share_of_limit(&Limits::default()), None);
        }
    }
}
