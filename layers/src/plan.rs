//! The layer plan: a model as data, all numbers literal.
//!
//! A model is a *stack* of *blocks*; a block is a list of *steps*; a step is a layer or one of eight
//! joints. See `model-cards/README.md` for the language on a page.

use std::fmt;
use std::sync::Arc;

use crate::attend::Attend;
use crate::attention::Attention;
use crate::conv1d::Conv1d;
use crate::differential::Differential;
use crate::gate::{Activate, Gate};
use crate::image::Image;
use crate::layer::LayerSpec;
use crate::linear::Linear;
use crate::mamba1::Mamba1;
use crate::mamba2::Mamba2;
use crate::mamba3::Mamba3;
use crate::mlp::Mlp;
use crate::moe::Moe;
use crate::norm::Norm;
use crate::param::{Check, Fields, Param, list_of, mismatch};
use crate::params;
use crate::repeat::Repeat;
use crate::reverse::Reverse;
use crate::rope::RopeLayer;
use crate::s4d::S4d;
use crate::scale::Scale;
use crate::selective_scan::SelectiveScan;
use crate::slice::Slice;
use crate::ssd_scan::SsdScan;
use crate::yaml::{self, Entry, Faults, Mark, Node, Value};

/// The version of the plan language.
const VERSION: usize = 1;

/// Most blocks in a stack, and most steps in a plan.
const MAX_BLOCKS: usize = 10_000;

/// A model as data.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// What it is called.
    pub name: String,
    /// Number of token ids; of classes when the model reads images.
    pub vocab: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Most tokens of a sequence that the model was made for.
    pub context: usize,
    /// Standard deviation of matrices drawn at random.
    pub init_std: f64,
    /// The token embedding.
    pub embed: Embed,
    /// What is read instead of tokens, by a model of images.
    pub image: Option<Image>,
    /// Chains whose weights several places use.
    pub shared: Vec<Named>,
    /// The kinds of blocks.
    pub blocks: Vec<Named>,
    /// The blocks that run, in order.
    pub stack: Vec<Place>,
    /// From the last block to logits.
    pub head: Head,
}

/// A list of steps and its name.
#[derive(Debug, Clone)]
pub struct Named {
    /// The name.
    pub name: String,
    /// The steps.
    pub steps: Vec<Step>,
    /// Where it stands.
    pub at: Mark,
}

impl PartialEq for Named {
    fn eq(&self, other: &Self) -> bool {
        (&self.name, &self.steps) == (&other.name, &other.steps)
    }
}

/// One entry of the stack.
#[derive(Debug, Clone)]
pub struct Place {
    /// Name of the block that runs here.
    pub block: String,
    /// Which of the checkpoint's blocks the weights are. It stays with a block that is moved; a block
    /// given twice has one set of weights and two states.
    pub weights: Origin,
    /// Where it stands.
    pub at: Mark,
}

impl PartialEq for Place {
    fn eq(&self, other: &Self) -> bool {
        (&self.block, &self.weights) == (&other.block, &other.weights)
    }
}

/// Where a block's weights are from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A block of the checkpoint: the `3` of `blocks.3`.
    Block(usize),
    /// The mean of several: `3+7`.
    Mean(Vec<usize>),
    /// Nowhere: they are drawn. Each place has its own.
    New,
}

impl Origin {
    /// What stands behind `blocks.` in the paths of the weights of the block at `place`.
    pub fn path(&self, place: usize) -> String {
        match self {
            Origin::New => format!("{NEW}{place}"),
            other => other.to_string(),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Block(n) => write!(f, "{n}"),
            Origin::Mean(blocks) => {
                let numbers: Vec<String> = blocks.iter().map(ToString::to_string).collect();
                f.write_str(&numbers.join("+"))
            }
            Origin::New => f.write_str(NEW),
        }
    }
}

/// The word for weights that are drawn.
const NEW: &str = "new";
/// Most blocks whose mean is taken.
const MAX_MEAN: usize = 64;

/// Whether a weight belongs to a block whose weights are drawn.
pub fn is_new(path: &str) -> bool {
    path.strip_prefix("blocks.")
        .is_some_and(|rest| rest.starts_with(NEW))
}

/// The weights whose mean the weight at `path` is; none if it is a weight of its own.
pub fn merged(path: &str) -> Option<Vec<String>> {
    let (blocks, rest) = path.strip_prefix("blocks.")?.split_once('.')?;
    let each = || blocks.split('+');
    (each().count() > 1).then(|| each().map(|n| format!("blocks.{n}.{rest}")).collect())
}

/// A step and where it stands.
#[derive(Debug, Clone)]
pub struct Step {
    /// What it does.
    pub kind: StepKind,
    /// Where it stands.
    pub at: Mark,
}

impl PartialEq for Step {
    fn eq(&self, other: &Self) -> bool {
        write_step(self) == write_step(other)
    }
}

/// What a step does with the stream `x`.
#[derive(Debug, Clone)]
pub enum StepKind {
    /// `x + steps(x)`.
    Residual(Vec<Step>),
    /// Each branch on the same `x`, then summed.
    Parallel(Vec<Vec<Step>>),
    /// Computes from `x`, keeps the result under a name; `x` is unchanged.
    Let(String, Vec<Step>),
    /// As `Let`, and all later blocks see the name too.
    Keep(String, Vec<Step>),
    /// Steps whose weights belong to the block, though the chain be shared.
    Own(Vec<Step>),
    /// Joins named values side by side; `x` is the stream and `x0` the embedding.
    Concat(Vec<String>),
    /// Adds a named value to `x`.
    Add(String),
    /// Runs a shared chain.
    Use(String),
    /// A layer.
    Layer(Arc<dyn LayerSpec>),
}

params! {
    /// The token embedding.
    pub struct Embed as "embed" {
        /// Multiplies the rows.
        scale: Option<f64> = None,
        /// So many learned rows stand before the tokens of every sequence. Positions count them; no one
        /// sees their logits.
        prefix: usize = 0,
    }
}

const NO_EMBED: Embed = Embed {
    scale: None,
    prefix: 0,
};

/// Longest prefix: every sequence begins with it.
const MAX_PREFIX: usize = 65_536;

impl Check for Embed {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        if self.prefix > MAX_PREFIX {
            let message = format!("`prefix` is {}; it may be {MAX_PREFIX}", self.prefix);
            faults.add(fields.at("prefix"), message);
        }
    }
}

params! {
    /// From the last block to logits.
    pub struct Head as "head" {
        /// The last norm.
        norm: Norm,
        /// Whether the output matrix is the embedding.
        tie: bool,
        /// Multiplies the logits.
        scale: Option<f64> = None,
        /// Whether a bias is added to the logits.
        bias: bool = false,
    }
}

impl Check for Head {}

/// The kinds of layers: a new one adds a line here.
type ReadLayer = fn(&Node, &mut Faults) -> Option<Arc<dyn LayerSpec>>;
const LAYERS: &[(&str, ReadLayer)] = &[
    ("norm", layer::<Norm>),
    ("attention", layer::<Attention>),
    ("mamba1", layer::<Mamba1>),
    ("mamba2", layer::<Mamba2>),
    ("mamba3", layer::<Mamba3>),
    ("mlp", layer::<Mlp>),
    ("moe", layer::<Moe>),
    ("linear", layer::<Linear>),
    ("scale", layer::<Scale>),
    ("slice", layer::<Slice>),
    ("repeat", layer::<Repeat>),
    ("reverse", layer::<Reverse>),
    ("activate", layer::<Activate>),
    ("gate", layer::<Gate>),
    ("conv1d", layer::<Conv1d>),
    ("selective_scan", layer::<SelectiveScan>),
    ("ssd_scan", layer::<SsdScan>),
    ("s4d", layer::<S4d>),
    ("rope", layer::<RopeLayer>),
    ("attend", layer::<Attend>),
    ("differential", layer::<Differential>),
];
const JOINTS: [&str; 8] = [
    "residual", "parallel", "let", "keep", "concat", "add", "use", "own",
];

fn layer<L: Param + LayerSpec + 'static>(
    node: &Node,
    faults: &mut Faults,
) -> Option<Arc<dyn LayerSpec>> {
    L::read(node, faults).map(|l| Arc::new(l) as Arc<dyn LayerSpec>)
}

/// The names of all kinds of layers.
pub fn layer_kinds() -> impl Iterator<Item = &'static str> {
    LAYERS.iter().map(|(name, _)| *name)
}

impl Plan {
    /// Reads a plan file. `file` is its name for messages.
    pub fn parse(text: &str, file: &str) -> Result<Plan, Faults> {
        Plan::from_node(&yaml::parse(text, file)?, file)
    }

    /// Reads a plan from a tree: a file's, or one that a card made.
    pub fn from_node(node: &Node, file: &str) -> Result<Plan, Faults> {
        let mut faults = Faults::new(file);
        let plan = read_plan(node, &mut faults);
        faults.or(plan)
    }

    /// The plan as YAML, which reads back as the same plan.
    pub fn print(&self) -> String {
        yaml::print(&self.write())
    }

    fn write(&self) -> Node {
        let named = |list: &[Named]| -> Value {
            let entry = |n: &Named| Entry {
                key: n.name.clone(),
                at: Mark::default(),
                value: write_steps(&n.steps).into(),
            };
            if list.is_empty() {
                Value::Null
            } else {
                Value::Map(list.iter().map(entry).collect())
            }
        };
        let place = |p: &Place| Value::Text(format!("{}@{}", p.block, p.weights)).into();
        Node::map([
            ("plan", VERSION.write()),
            ("name", self.name.write()),
            ("vocab", self.vocab.write()),
            ("d_model", self.d_model.write()),
            ("context", self.context.write()),
            ("init_std", self.init_std.write()),
            ("embed", Param::write(&self.embed)),
            ("image", self.image.write()),
            ("shared", named(&self.shared)),
            ("blocks", named(&self.blocks)),
            ("stack", Value::List(self.stack.iter().map(place).collect())),
            ("head", Param::write(&self.head)),
        ])
        .into()
    }
}

fn read_plan(node: &Node, faults: &mut Faults) -> Option<Plan> {
    let mut fields = Fields::of(node, "a plan", faults)?;
    let version = fields.required::<usize>("plan", faults);
    if let Some(version) = version.filter(|v| *v != VERSION) {
        let at = fields.at("plan");
        faults.add(
            at,
            format!("plan version {version}; this program reads version {VERSION}"),
        );
    }
    let name = fields.required("name", faults);
    let vocab = fields.required("vocab", faults);
    let d_model = fields.required("d_model", faults);
    let context = fields.required("context", faults);
    let init_std = fields.optional("init_std", 0.02, faults);
    if init_std.is_some_and(|std: f64| std < 0.0) {
        let at = fields.at("init_std");
        faults.add(at, "`init_std` is a standard deviation: 0 or more");
    }
    let embed = fields.optional("embed", NO_EMBED, faults);
    let image = fields.optional("image", None::<Image>, faults);
    let shared = fields
        .node("shared")
        .map(|n| read_named(n, "shared", faults));
    let blocks = match fields.node("blocks") {
        Some(node) => read_named(node, "blocks", faults),
        None => {
            faults.add(node.at, "a plan needs `blocks`");
            None
        }
    };
    let stack = match fields.node("stack") {
        Some(node) => read_stack(node, faults),
        None => {
            faults.add(node.at, "a plan needs `stack`");
            None
        }
    };
    let head = fields.required("head", faults);
    fields.finish(faults);
    let sizes = [
        ("vocab", vocab.unwrap_or(1)),
        ("d_model", d_model.unwrap_or(1)),
        ("context", context.unwrap_or(1)),
    ];
    fields.positive(&sizes, faults);
    let (image, head): (Option<Image>, Head) = (image?, head?);
    if let Some(image) = &image {
        let (tokens, context) = (image.tokens(), context.unwrap_or(image.tokens()));
        if tokens != context {
            let at = fields.at("context");
            faults.add(
                at,
                format!("`context` is {context}, and an image has {tokens} tokens"),
            );
        }
        if head.tie {
            let at = fields.at("head");
            faults.add(
                at,
                "`tie` is true, but a model of images has no embedding to share",
            );
        }
    }
    Some(Plan {
        name: name?,
        vocab: vocab?,
        d_model: d_model?,
        context: context?,
        init_std: init_std?,
        embed: embed?,
        image,
        shared: shared.unwrap_or(Some(Vec::new()))?,
        blocks: blocks?,
        stack: stack?,
        head,
    })
}

fn read_named(node: &Node, what: &str, faults: &mut Faults) -> Option<Vec<Named>> {
    let Value::Map(entries) = &node.value else {
        return mismatch(
            node,
            &node.value,
            &format!("a mapping of names to steps for {what}"),
            faults,
        );
    };
    let named = |e: &Entry, faults: &mut Faults| {
        if e.key.is_empty() || e.key.contains(['@', '*']) {
            faults.add(
                e.at,
                format!("{:?} cannot be a name: it is empty or holds @ or *", e.key),
            );
        }
        Some(Named {
            name: e.key.clone(),
            steps: read_steps(&e.value, faults)?,
            at: e.at,
        })
    };
    let read: Vec<_> = entries.iter().map(|e| named(e, faults)).collect();
    read.into_iter().collect()
}

fn read_steps(node: &Node, faults: &mut Faults) -> Option<Vec<Step>> {
    match &node.value {
        Value::List(list) => {
            let read: Vec<_> = list.iter().map(|n| read_step(n, faults)).collect();
            let steps: Option<Vec<Vec<Step>>> = read.into_iter().collect();
            steps.map(|s| s.into_iter().flatten().collect())
        }
        // `[norm: {}, mlp: {}]` may also be written as a mapping: its order is kept.
        Value::Map(_) => read_step(node, faults),
        other => mismatch(node, other, "a list of steps", faults),
    }
}

/// The steps of one mapping, one a key.
fn read_step(node: &Node, faults: &mut Faults) -> Option<Vec<Step>> {
    let Value::Map(entries) = &node.value else {
        return mismatch(
            node,
            &node.value,
            "a step, such as `norm: {eps: 1.0e-5}`",
            faults,
        );
    };
    let read: Vec<_> = entries.iter().map(|e| read_kind(e, faults)).collect();
    let kinds: Option<Vec<Vec<Step>>> = read.into_iter().collect();
    kinds.map(|k| k.into_iter().flatten().collect())
}

fn read_kind(entry: &Entry, faults: &mut Faults) -> Option<Vec<Step>> {
    let node = &entry.value;
    let step = |kind| vec![Step { kind, at: entry.at }];
    Some(match entry.key.as_str() {
        "residual" => step(StepKind::Residual(read_steps(node, faults)?)),
        "parallel" => {
            let Value::List(list) = &node.value else {
                return mismatch(node, &node.value, "a list of branches", faults);
            };
            let read: Vec<_> = list.iter().map(|n| read_steps(n, faults)).collect();
            let branches: Vec<Vec<Step>> = read.into_iter().collect::<Option<_>>()?;
            if branches.is_empty() {
                faults.add(node.at, "`parallel` needs at least one branch");
                return None;
            }
            step(StepKind::Parallel(branches))
        }
        "own" => step(StepKind::Own(read_steps(node, faults)?)),
        key @ ("let" | "keep") => {
            let read: Vec<_> = read_named(node, key, faults)?;
            let taken = read.iter().filter(|n| n.name == "x" || n.name == "x0");
            taken.for_each(|n| faults.add(n.at, format!("`{}` has a meaning already", n.name)));
            let each = |n: Named| Step {
                at: n.at,
                kind: match key {
                    "let" => StepKind::Let(n.name, n.steps),
                    _ => StepKind::Keep(n.name, n.steps),
                },
            };
            read.into_iter().map(each).collect()
        }
        "concat" => {
            let names: Vec<String> = Param::read(node, faults)?;
            if names.is_empty() {
                faults.add(node.at, "`concat` needs at least one name");
                return None;
            }
            step(StepKind::Concat(names))
        }
        "add" => step(StepKind::Add(Param::read(node, faults)?)),
        "use" => step(StepKind::Use(Param::read(node, faults)?)),
        kind => match LAYERS.iter().find(|(name, _)| *name == kind) {
            Some((_, read)) => step(StepKind::Layer(read(node, faults)?)),
            None => {
                let known = list_of(JOINTS.into_iter().chain(layer_kinds()));
                faults.add(
                    entry.at,
                    format!("there is no step `{kind}`; there are {known}"),
                );
                return None;
            }
        },
    })
}

/// `block`, `block*count`, `block@weights` or `block*count@weights`, where weights are a number, several to
/// be averaged (`3+7`), or `new`.
fn read_stack(node: &Node, faults: &mut Faults) -> Option<Vec<Place>> {
    let Value::List(list) = &node.value else {
        return mismatch(node, &node.value, "a list of blocks", faults);
    };
    if list.is_empty() {
        faults.add(node.at, "the stack holds no block");
        return None;
    }
    let mut stack: Vec<Place> = Vec::new();
    let mut whole = true;
    for entry in list {
        let Some((block, count, weights)) = read_place(entry, faults) else {
            whole = false;
            continue;
        };
        if stack.len() + count > MAX_BLOCKS {
            faults.add(entry.at, format!("more than {MAX_BLOCKS} blocks"));
            return None;
        }
        let here = stack.len();
        let place = |i| Place {
            block: block.into(),
            weights: match &weights {
                None => Origin::Block(here + i),
                Some(Origin::Block(first)) => Origin::Block(first + i),
                Some(other) => other.clone(),
            },
            at: entry.at,
        };
        stack.extend((0..count).map(place));
    }
    whole.then_some(stack)
}

fn read_place<'a>(node: &'a Node, faults: &mut Faults) -> Option<(&'a str, usize, Option<Origin>)> {
    let expected =
        "a block's name, such as `mamba`, `mamba*4`, `mamba@3`, `mamba@3+7` or `mamba@new`";
    let Value::Text(text) = &node.value else {
        return mismatch(node, &node.value, expected, faults);
    };
    let number = |text: &str| text.parse::<usize>().ok().filter(|n| *n <= MAX_BLOCKS);
    let (rest, weights) = match text.split_once('@') {
        Some((rest, NEW)) => (rest, Some(Some(Origin::New))),
        Some((rest, weights)) => {
            let numbers: Option<Vec<usize>> = weights.split('+').map(number).collect();
            let origin = numbers.and_then(|n| match n[..] {
                [one] => Some(Origin::Block(one)),
                _ => (n.len() <= MAX_MEAN).then_some(Origin::Mean(n)),
            });
            (rest, Some(origin))
        }
        None => (text.as_str(), None),
    };
    let (block, count) = match rest.split_once('*') {
        Some((block, count)) => (block, number(count)),
        None => (rest, Some(1)),
    };
    match (count, weights) {
        (Some(count), None) if count > 0 => Some((block, count, None)),
        (Some(count), Some(Some(weights))) if count > 0 => Some((block, count, Some(weights))),
        _ => mismatch(
            node,
            &node.value,
            &format!("{expected}; numbers are at most {MAX_BLOCKS}"),
            faults,
        ),
    }
}

fn write_steps(steps: &[Step]) -> Value {
    Value::List(steps.iter().map(|s| write_step(s).into()).collect())
}

fn write_step(step: &Step) -> Value {
    let names = |names: &[String]| Value::List(names.iter().map(|n| n.write().into()).collect());
    let (key, value) = match &step.kind {
        StepKind::Residual(steps) => ("residual", write_steps(steps)),
        StepKind::Parallel(branches) => (
            "parallel",
            Value::List(branches.iter().map(|b| write_steps(b).into()).collect()),
        ),
        StepKind::Let(name, steps) => ("let", Node::map([(name.as_str(), write_steps(steps))])),
        StepKind::Keep(name, steps) => ("keep", Node::map([(name.as_str(), write_steps(steps))])),
        StepKind::Own(steps) => ("own", write_steps(steps)),
        StepKind::Concat(of) => ("concat", names(of)),
        StepKind::Add(name) => ("add", name.write()),
        StepKind::Use(name) => ("use", name.write()),
        StepKind::Layer(layer) => (layer.kind(), layer.write()),
    };
    Node::map([(key, value)])
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) const TINY: &str = "\
plan: 1
name: tiny
vocab: 16
d_model: 8
context: 64
blocks:
  m:
    - residual:
        - norm: {eps: 1.0e-6}
        - mamba1: {d_inner: 16, d_state: 4, d_conv: 4, dt_rank: 2, inner_norm: {eps: 1.0e-6, weight: true}}
  a:
    - residual:
        - norm: {eps: 1.0e-6}
        - attention: {heads: 2, kv_heads: 1, head_dim: 4, window: 8, rope: {theta: 10000}}
    - residual: [norm: {name: ff_norm, eps: 1.0e-6}, moe: {experts: 4, top_k: 2, d_ff: 8, act: silu, router: {score: softmax, normalize: false}}]
stack: [m, a, m*2, m@0, m@0+2, m@new]
head: {norm: {eps: 1.0e-6}, tie: true}
";

    #[test]
    fn a_plan_reads_back_as_it_was_printed() {
        let plan = Plan::parse(TINY, "tiny").unwrap();
        let again =
            Plan::parse(&plan.print(), "again").unwrap_or_else(|f| panic!("{f}\n{}", plan.print()));
        assert_eq!(plan, again);
        let weights: Vec<String> = plan.stack.iter().map(|p| p.weights.to_string()).collect();
        assert_eq!(weights, ["0", "1", "2", "3", "0", "0+2", "new"]);
    }

    #[test]
    fn all_faults_come_at_once_with_their_places() {
        let broken = TINY
            .replace("vocab: 16", "vocab: sixteen")
            .replace("d_state: 4", "d_sate: 4")
            .replace("top_k: 2", "top_k: 5")
            .replace("act: silu", "act: silo")
            .replace("m*2", "m*x");
        let faults = Plan::parse(&broken, "p.yaml").unwrap_err();
        let text = faults.to_string();
        for expected in [
            "p.yaml:3:8: found \"sixteen\", expected a whole number",
            "has no `d_sate`; it takes name, d_inner, d_state",
            "mamba1 needs `d_state`",
            "found \"silo\", expected an activation: one of silu, gelu",
            "expected a block's name",
        ] {
            assert!(
                text.contains(expected),
                "{expected:?} is missing from\n{text}"
            );
        }
    }

    #[test]
    fn unknown_steps_are_named_with_the_known_ones() {
        let faults = Plan::parse(&TINY.replace("mamba1:", "mamba9:"), "p.yaml").unwrap_err();
        assert!(
            faults
                .to_string()
                .contains("no step `mamba9`; there are residual"),
            "{faults}"
        );
    }

    #[test]
    fn absurd_plans_are_faults() {
        for (from, to) in [
            ("m*2", "m*999999999999999999999"),
            ("m*2", "m*0"),
            ("vocab: 16", "vocab: 99999999999999999999"),
            ("vocab: 16", "vocab: 0"),
            ("vocab: 16", "vocab: -3"),
            ("plan: 1", "plan: 2"),
            ("eps: 1.0e-6", "eps: .nan"),
            ("[m, a, m*2, m@0, m@0+2, m@new]", "[]"),
            ("m@new", "m@newer"),
            ("m@0+2", "m@0+"),
            ("[m, a, m*2, m@0, m@0+2, m@new]", "7"),
            ("d_model: 8", "d_model: [8]"),
            ("d_model: 8", "d_model: 8\nembed: {prefix: 70000}"),
        ] {
            assert!(
                TINY.contains(from) && Plan::parse(&TINY.replace(from, to), "p").is_err(),
                "{to}"
            );
        }
    }
}
