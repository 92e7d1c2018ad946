//! From a plan to its graph: names are resolved, the width of the stream is followed through every
//! step, and each layer gets the path of its weights and the path of its state. All that is wrong is
//! reported together.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::graph::{Graph, Node, NodeId, Run, ValueId};
use crate::layer::LayerSpec;
use crate::param::{MAX_SIZE, list_of};
use crate::plan::{Named, Plan, Step, StepKind};
use crate::state::{Pages, StateSpec};
use crate::weights::WeightSpec;
use crate::yaml::{Faults, Mark};

/// Most nodes of a graph.
const MAX_NODES: usize = 200_000;
/// Most steps that a plan may unfold to, those of shared chains counted at every use: a chain that
/// uses another twice, and so on, doubles with each.
const MAX_STEPS: usize = 1_000_000;
/// Most elements of a weight, and of what a layer keeps for a sequence or a token. The bytes of all of
/// them together then fit 64 bits; the largest matrix of a published model has a hundredth of it.
const MAX_ELEMENTS: usize = 1 << 40;
/// Most weights of all layers together. A hundred layers of 512 experts have 153,600.
const MAX_WEIGHTS: usize = 1_000_000;

/// Most elements of all weights together, places that share weights counted each: far above any model,
/// far below where sums of bytes overflow.
const MAX_TOTAL: u128 = 1 << 48;

/// See [`Graph::lower`].
pub(crate) fn lower(plan: &Plan, file: &str) -> Result<Graph, Faults> {
    let mut lower = Lower {
        plan,
        faults: Faults::new(file),
        nodes: Vec::new(),
        widths: vec![plan.d_model],
        ends: Vec::new(),
        specs: BTreeMap::new(),
        wanted: 0,
        elements: (2 * plan.vocab as u128 + plan.embed.prefix as u128) * plan.d_model as u128,
        walked: 0,
        kept: BTreeMap::new(),
        pages: BTreeMap::new(),
    };
    let last = lower.stack();
    let Lower {
        faults,
        nodes,
        widths,
        ends,
        ..
    } = lower;
    faults.or(last.map(|last| Graph {
        nodes,
        widths,
        vocab: plan.vocab,
        image: plan.image.clone(),
        logit_bias: plan.head.bias,
        d_model: plan.d_model,
        tied: plan.head.tie,
        embed_scale: plan.embed.scale,
        prefix: plan.embed.prefix,
        logit_scale: plan.head.scale,
        stack: ends,
        last,
    }))
}

struct Lower<'a> {
    plan: &'a Plan,
    faults: Faults,
    nodes: Vec<Node>,
    widths: Vec<usize>,
    /// The stream behind each place so far; meant for stacks without a fault.
    ends: Vec<ValueId>,
    /// What has been asked for under each path: two uses of one path must ask for the same.
    specs: BTreeMap<String, Vec<WeightSpec>>,
    /// Number of weights so far.
    wanted: usize,
    /// Elements of their weights so far, and of the embedding.
    elements: u128,
    /// Number of steps so far.
    walked: usize,
    /// Values that all later blocks may name.
    kept: BTreeMap<&'a str, ValueId>,
    /// Nodes whose keys and values later layers may read, and the widths of those.
    pages: BTreeMap<String, (NodeId, Pages)>,
}

/// A chain of steps that is being lowered.
struct Chain<'a> {
    /// Where its state is.
    state: String,
    /// Where its weights are.
    weights: String,
    /// Where the weights of `own` steps are: with the block, also in a shared chain.
    own: String,
    /// Names in reach.
    names: BTreeMap<String, ValueId>,
    /// The layers so far, by the path of their weights, to find two of one name.
    layers: BTreeMap<String, Mark>,
    /// Joints and uses so far, for their nodes' names.
    counts: BTreeMap<&'static str, usize>,
    /// The shared chains that this one is part of.
    inside: Vec<&'a str>,
}

impl Chain<'_> {
    fn node_name(&mut self, kind: &'static str) -> String {
        let count = self.counts.entry(kind).or_insert(0);
        *count += 1;
        match *count {
            1 => format!("{}.{kind}", self.state),
            n => format!("{}.{kind}{n}", self.state),
        }
    }
}

impl<'a> Lower<'a> {
    fn stack(&mut self) -> Option<ValueId> {
        let plan = self.plan;
        for (kind, list) in [("block", &plan.blocks), ("shared chain", &plan.shared)] {
            let mut seen = BTreeSet::new();
            for named in list {
                if !seen.insert(&named.name) {
                    self.faults.add(
                        named.at,
                        format!("a second {kind} is named `{}`", named.name),
                    );
                }
            }
        }
        if self.elements > MAX_TOTAL {
            let (vocab, d_model) = (plan.vocab, plan.d_model);
            let message = format!("`vocab` {vocab} and `d_model` {d_model} are too large together");
            self.faults.add(Mark::default(), message);
            return None;
        }
        // The first of a name counts: a second has its fault.
        let blocks: BTreeMap<&str, &Named> = (plan.blocks.iter().rev())
            .map(|b| (b.name.as_str(), b))
            .collect();
        let mut x = Some(0);
        // A faulty block is lowered once: its faults would be the same at every place.
        let mut faulty: BTreeSet<&str> = BTreeSet::new();
        for (i, place) in plan.stack.iter().enumerate() {
            let Some(&block) = blocks.get(place.block.as_str()) else {
                let known = list_of(plan.blocks.iter().map(|b| b.name.as_str()));
                let message = format!("there is no block `{}`; there are {known}", place.block);
                self.faults.add(place.at, message);
                continue;
            };
            if faulty.contains(block.name.as_str()) {
                continue;
            }
            let mut chain = Chain {
                state: format!("blocks.{i}"),
                weights: format!("blocks.{}", place.weights.path(i)),
                own: format!("blocks.{}", place.weights.path(i)),
                names: BTreeMap::from([("x0".into(), 0)]),
                layers: BTreeMap::new(),
                counts: BTreeMap::new(),
                inside: Vec::new(),
            };
            let before = self.faults.list().len();
            // After a fault the stream goes on with its usual width, so that the rest is checked.
            let out = self.steps(&block.steps, x.unwrap_or(0), &mut chain);
            if let Some(out) = out
                && self.widths[out] != plan.d_model
            {
                let (found, expected) = (self.widths[out], plan.d_model);
                let message = format!(
                    "block `{}` ends with width {found}, d_model is {expected}",
                    block.name
                );
                self.faults.add(block.at, message);
            }
            if self.faults.list().len() > before {
                faulty.insert(&block.name);
            }
            x = out.filter(|v| self.widths[*v] == plan.d_model);
            self.ends.extend(x);
            if self.is_too_large() {
                let message = format!(
                    "here the plan passes {MAX_NODES} layers, or {MAX_STEPS} steps with those of shared chains at every use"
                );
                self.faults.add(place.at, message);
                return None;
            }
        }
        let used: BTreeSet<&str> = plan.stack.iter().map(|p| p.block.as_str()).collect();
        for named in &plan.blocks {
            if !used.contains(named.name.as_str()) {
                self.faults.add(
                    named.at,
                    format!("block `{}` is not in the stack", named.name),
                );
            }
        }
        let spec = Arc::new(plan.head.norm.clone()) as Arc<dyn LayerSpec>;
        let output = self.value(plan.d_model);
        let run = Run::Layer {
            spec,
            weights: "head.norm".into(),
        };
        self.nodes.push(Node {
            name: "head.norm".into(),
            run,
            inputs: vec![x?],
            output,
            state: StateSpec::default(),
            pages_of: None,
        });
        Some(output)
    }

    fn value(&mut self, width: usize) -> ValueId {
        self.widths.push(width);
        self.widths.len() - 1
    }

    fn is_too_large(&self) -> bool {
        self.nodes.len() > MAX_NODES || self.walked > MAX_STEPS
    }

    fn steps(&mut self, steps: &'a [Step], x: ValueId, chain: &mut Chain<'a>) -> Option<ValueId> {
        let mut x = Some(x);
        let mut whole = true;
        for step in steps {
            if self.is_too_large() {
                return None;
            }
            self.walked += 1;
            let before = x.unwrap_or(0);
            x = self.step(step, before, chain);
            if x.is_none() {
                whole = false;
                x = Some(before);
            }
        }
        x.filter(|_| whole)
    }

    fn step(&mut self, step: &'a Step, x: ValueId, chain: &mut Chain<'a>) -> Option<ValueId> {
        match &step.kind {
            StepKind::Residual(steps) => {
                let y = self.steps(steps, x, chain)?;
                self.add(step.at, "residual", x, y, chain)
            }
            StepKind::Parallel(branches) => {
                let ends: Vec<_> = branches.iter().map(|b| self.steps(b, x, chain)).collect();
                let ends: Vec<ValueId> = ends.into_iter().collect::<Option<_>>()?;
                let (first, rest) = ends.split_first().expect("`parallel` has a branch");
                rest.iter()
                    .try_fold(*first, |a, b| self.add(step.at, "parallel", a, *b, chain))
            }
            StepKind::Let(name, steps) => {
                let value = self.steps(steps, x, chain);
                // Named even after a fault, so that its users are not faulted too.
                chain.names.insert(name.clone(), value.unwrap_or(x));
                value.and(Some(x))
            }
            StepKind::Keep(name, steps) => {
                let value = self.steps(steps, x, chain);
                self.kept.insert(name, value.unwrap_or(x));
                value.and(Some(x))
            }
            StepKind::Own(steps) => {
                let own = chain.own.clone();
                let shared = std::mem::replace(&mut chain.weights, own);
                let value = self.steps(steps, x, chain);
                chain.weights = shared;
                value
            }
            StepKind::Concat(names) => {
                let inputs: Vec<_> = names
                    .iter()
                    .map(|n| self.named(step.at, n, x, chain))
                    .collect();
                let inputs: Vec<ValueId> = inputs.into_iter().collect::<Option<_>>()?;
                if let [one] = inputs[..] {
                    return Some(one);
                }
                // No sum overflows: each width is at most MAX_SIZE, and a file holds few names.
                let width: usize = inputs.iter().map(|v| self.widths[*v]).sum();
                if width > MAX_SIZE {
                    let message = format!("`concat` makes width {width}, more than {MAX_SIZE}");
                    self.faults.add(step.at, message);
                    return None;
                }
                let output = self.value(width);
                let name = chain.node_name("concat");
                self.nodes.push(Node {
                    name,
                    run: Run::Concat,
                    inputs,
                    output,
                    state: StateSpec::default(),
                    pages_of: None,
                });
                Some(output)
            }
            StepKind::Add(name) => {
                let other = self.named(step.at, name, x, chain)?;
                self.add(step.at, "add", x, other, chain)
            }
            StepKind::Use(name) => self.shared(step.at, name, x, chain),
            StepKind::Layer(spec) => self.layer(step.at, spec, x, chain),
        }
    }

    fn named(&mut self, at: Mark, name: &str, x: ValueId, chain: &Chain<'a>) -> Option<ValueId> {
        if name == "x" {
            return Some(x);
        }
        let found = chain.names.get(name).or(self.kept.get(name)).copied();
        if found.is_none() {
            let local = chain.names.keys().map(String::as_str);
            let known = list_of(
                std::iter::once("x")
                    .chain(local)
                    .chain(self.kept.keys().copied()),
            );
            self.faults.add(
                at,
                format!("nothing is named `{name}` here; there are {known}"),
            );
        }
        found
    }

    fn add(
        &mut self,
        at: Mark,
        what: &'static str,
        a: ValueId,
        b: ValueId,
        chain: &mut Chain<'a>,
    ) -> Option<ValueId> {
        let (width, other) = (self.widths[a], self.widths[b]);
        if width != other {
            self.faults
                .add(at, format!("`{what}` adds width {other} to width {width}"));
            return None;
        }
        let output = self.value(width);
        let name = chain.node_name("add");
        self.nodes.push(Node {
            name,
            run: Run::Add,
            inputs: vec![a, b],
            output,
            state: StateSpec::default(),
            pages_of: None,
        });
        Some(output)
    }

    /// The chain's weights are one, its state belongs to this place.
    fn shared(
        &mut self,
        at: Mark,
        name: &str,
        x: ValueId,
        chain: &mut Chain<'a>,
    ) -> Option<ValueId> {
        let shared: &'a [Named] = &self.plan.shared;
        let Some(named) = shared.iter().find(|s| s.name == name) else {
            let known = list_of(shared.iter().map(|s| s.name.as_str()));
            self.faults.add(
                at,
                format!("there is no shared chain `{name}`; there are {known}"),
            );
            return None;
        };
        if chain.inside.contains(&named.name.as_str()) {
            let path = chain.inside.join(" → ");
            self.faults
                .add(at, format!("`{name}` uses itself: {path} → {name}"));
            return None;
        }
        let mut inner = Chain {
            state: chain.node_name("use"),
            weights: format!("shared.{name}"),
            own: chain.own.clone(),
            names: BTreeMap::from([("x0".into(), 0)]),
            layers: BTreeMap::new(),
            counts: BTreeMap::new(),
            inside: chain
                .inside
                .iter()
                .copied()
                .chain([named.name.as_str()])
                .collect(),
        };
        self.steps(&named.steps, x, &mut inner)
    }

    fn layer(
        &mut self,
        at: Mark,
        spec: &Arc<dyn LayerSpec>,
        x: ValueId,
        chain: &mut Chain<'a>,
    ) -> Option<ValueId> {
        let operands = spec.operands();
        let operands: Vec<_> = operands
            .into_iter()
            .map(|name| self.named(at, name, x, chain))
            .collect();
        let operands: Vec<ValueId> = operands.into_iter().collect::<Option<_>>()?;
        let inputs: Vec<ValueId> = std::iter::once(x).chain(operands).collect();
        let widths: Vec<usize> = inputs.iter().map(|v| self.widths[*v]).collect();
        let d_in = widths[0];
        if let Err(why) = spec.check_widths(&widths) {
            self.faults.add(at, format!("`{}`: {why}", spec.kind()));
            return None;
        }
        if spec.sees_later_tokens() && self.plan.image.is_none() {
            let message = format!(
                "`{}` lets tokens see later ones: it is for models of images, which are read whole",
                spec.kind()
            );
            self.faults.add(at, message);
            return None;
        }
        let pages_of = match spec.reads_pages() {
            None => None,
            Some((name, pages)) => Some(self.pages_of(at, name, pages)?),
        };
        let wanted = spec.weights(&widths);
        self.wanted += wanted.len();
        if self.wanted > MAX_WEIGHTS {
            let message = format!("with this layer the plan has more than {MAX_WEIGHTS} weights");
            self.faults.add(at, message);
            return None;
        }
        let kept = spec.state(&widths);
        if let Some(what) = too_large(&wanted, &kept) {
            let message = format!("{what}, more than {MAX_ELEMENTS}");
            self.faults.add(at, message);
            return None;
        }
        let sizes = wanted.iter().map(|w| w.elements() as u128);
        self.elements = sizes.fold(self.elements, u128::saturating_add);
        if self.elements > MAX_TOTAL {
            let message =
                format!("with this layer the plan's weights have more than {MAX_TOTAL} elements");
            self.faults.add(at, message);
            return None;
        }
        let name = spec.name();
        let weights = format!("{}.{name}", chain.weights);
        let state = if wanted.is_empty() {
            chain.node_name(spec.kind())
        } else {
            if let Some(first) = chain.layers.insert(weights.clone(), at) {
                let message = format!(
                    "a second layer of this block is named `{name}` (the first is in line {}): give it a `name`, by which its weights are found",
                    first.line
                );
                self.faults.add(at, message);
                return None;
            }
            format!("{}.{name}", chain.state)
        };
        if !wanted.is_empty() {
            let before = self
                .specs
                .entry(weights.clone())
                .or_insert_with(|| wanted.clone());
            if *before != wanted {
                let message = format!(
                    "`{weights}` is used twice, and the two uses want weights of different shapes"
                );
                self.faults.add(at, message);
                return None;
            }
        }
        let output = self.value(spec.d_out(d_in));
        let run = Run::Layer {
            spec: spec.clone(),
            weights,
        };
        if let (Some(kept), Some(pages)) = (spec.keeps_pages(), kept.pages) {
            self.pages.insert(kept.into(), (self.nodes.len(), pages));
        }
        self.nodes.push(Node {
            name: state,
            run,
            inputs,
            output,
            state: kept,
            pages_of,
        });
        Some(output)
    }

    /// The node that keeps keys and values under a name, if they have the widths that are wanted.
    fn pages_of(&mut self, at: Mark, name: &str, wanted: Pages) -> Option<NodeId> {
        let message = match self.pages.get(name) {
            Some((node, pages)) if *pages == wanted => return Some(*node),
            Some((node, pages)) => format!(
                "the keys and values kept as `{name}` by {} are {}, not {}",
                self.nodes[*node].name,
                heads_of(pages),
                heads_of(&wanted)
            ),
            None => format!(
                "no earlier layer keeps keys and values as `{name}`; kept are {}",
                list_of(self.pages.keys().map(String::as_str))
            ),
        };
        self.faults.add(at, message);
        None
    }
}

/// The heads of keys and values, in words.
fn heads_of(pages: &Pages) -> String {
    let Pages {
        heads,
        head_dim,
        v_head_dim,
    } = pages;
    match head_dim == v_head_dim {
        true => format!("{heads} heads of {head_dim}"),
        false => format!("{heads} heads of {head_dim} and {v_head_dim}"),
    }
}

/// A weight or a state of absurd size.
fn too_large(weights: &[WeightSpec], state: &StateSpec) -> Option<String> {
    let fits = |sizes: &[usize]| {
        let total = sizes.iter().try_fold(1, |a: usize, n| a.checked_mul(*n));
        total.is_some_and(|n| n <= MAX_ELEMENTS)
    };
    let weight = weights.iter().find(|w| !fits(&w.shape));
    let part = state.slot.iter().find(|p| !fits(&[p.rows, p.cols]));
    let pages = state.pages.filter(|p| !fits(&[p.elements()]));
    None.or(weight.map(|w| format!("its weight `{}` has {:?} elements", w.name, w.shape)))
        .or(part.map(|p| format!("its `{}` has {} × {} elements", p.name, p.rows, p.cols)))
        .or(pages.map(|p| format!("keys and values of a token have {} elements", p.elements())))
}
#[cfg(test)]
mod tests {
    use super::*;

    const ZAMBA: &str = "\
plan: 1
name: shared and parallel
vocab: 16
d_model: 8
context: 64
shared:
  s0:
    - concat: [x, x0]
    - norm: {eps: 1.0e-5}
    - attention: {heads: 2, kv_heads: 2, head_dim: 8}
    - linear: {name: narrow, d_out: 8}
    - norm: {name: ff_norm, eps: 1.0e-5}
    - mlp: {d_ff: 12, act: gelu}
blocks:
  h:
    - let: {t: [use: s0, linear: {}]}
    - residual: [add: t, norm: {eps: 1.0e-5}, mamba1: {d_inner: 16, d_state: 4, d_conv: 4, dt_rank: 2}]
  p:
    - residual:
        - norm: {eps: 1.0e-5}
        - parallel:
            - [attention: {heads: 2, kv_heads: 1, head_dim: 4}]
            - [mlp: {d_ff: 16, act: silu}, scale: {by: 0.5}]
stack: [h, p, h]
head: {norm: {eps: 1.0e-5}, tie: false}
";

    fn lower(text: &str) -> Result<Graph, Faults> {
        Graph::lower(&Plan::parse(text, "p.yaml").unwrap(), "p.yaml")
    }

    #[test]
    fn shared_chains_have_one_set_of_weights_and_a_state_each() {
        let graph = lower(ZAMBA).unwrap();
        let attentions: Vec<&Node> = graph
            .nodes
            .iter()
            .filter(|n| n.name.ends_with("use.attention"))
            .collect();
        assert_eq!(attentions.len(), 2);
        assert_ne!(attentions[0].name, attentions[1].name);
        let paths: Vec<String> = graph.weights().into_iter().map(|w| w.path).collect();
        assert_eq!(
            paths
                .iter()
                .filter(|p| *p == "shared.s0.attention.q")
                .count(),
            1
        );
        assert!(paths.contains(&"blocks.2.linear".to_string()) && paths.contains(&"head".into()));
    }

    #[test]
    fn faults_of_wiring_come_together() {
        let broken = ZAMBA
            .replace("add: t", "add: u")
            .replace("[h, p, h]", "[h, q, p, h]")
            .replace("d_out: 8", "d_out: 9")
            .replace("name: ff_norm, ", "");
        let text = lower(&broken).unwrap_err().to_string();
        for expected in [
            "nothing is named `u` here; there are x, t and x0",
            "there is no block `q`; there are h and p",
            "a second layer of this block is named `norm`",
        ] {
            assert!(
                text.contains(expected),
                "{expected:?} is missing from\n{text}"
            );
        }
    }

    #[test]
    fn cycles_are_faults() {
        let broken = ZAMBA.replace("- concat: [x, x0]", "- use: s0");
        let text = lower(&broken).unwrap_err().to_string();
        assert!(text.contains("`s0` uses itself: s0 → s0"), "{text}");
    }

    #[test]
    fn doubling_ends_in_a_fault() {
        let plan = |shared: &str, steps: &str| {
            let text = format!(
                "plan: 1\nname: t\nvocab: 8\nd_model: 8\ncontext: 8\nshared:\n{shared}\nblocks: {{b: [{steps}]}}\nstack: [b]\nhead: {{norm: {{eps: 1.0e-5}}, tie: true}}\n"
            );
            lower(&text).unwrap_err().to_string()
        };
        // Two to the sixtieth uses of a chain of nothing.
        let mut shared = String::from("  s0: []\n");
        for i in 1..60 {
            shared += &format!("  s{i}: [use: s{0}, use: s{0}]\n", i - 1);
        }
        let text = plan(&shared, "use: s59");
        assert!(text.contains("1000000 steps"), "{text}");
        let wide = "concat: [x, x], ".repeat(70);
        let text = plan("  s: []", wide.trim_end_matches(", "));
        assert!(text.contains("`concat` makes width 2147483648"), "{text}");
    }

    #[test]
    fn absurd_sizes_are_faults() {
        let huge = ZAMBA.replace(
            "heads: 2, kv_heads: 2, head_dim: 8",
            "heads: 1073741824, kv_heads: 1, head_dim: 1073741824",
        );
        let text = lower(&huge).unwrap_err().to_string();
        assert!(text.contains("p.yaml:10:7: its weight `q` has [1152921504606846976, 16] elements, more than 1099511627776"), "{text}");
    }

    #[test]
    fn widths_must_agree() {
        let text =
            lower(&ZAMBA.replace("- linear: {name: narrow, d_out: 8}", "- scale: {by: 1.0}"))
                .unwrap_err()
                .to_string();
        assert!(text.contains("adds width"), "{text}");
    }
}
