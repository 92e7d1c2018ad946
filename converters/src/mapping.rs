//! Which tensor of a checkpoint each weight of a plan is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use strata_kernels::{Format, HostTensor};
use strata_layers::graph::GraphWeight;
use strata_layers::param::list_of;
use strata_layers::{Faults, Mark, Plan};

use crate::card::Card;
use crate::cards;
use crate::checkpoint::{Checkpoint, TensorInfo};
use crate::error::{Error, Result};
use crate::report::Report;
use crate::tensor_map::{Source, TensorMap};

/// Where the plan is from: this decides what tensors without a place in it mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The card made it for this checkpoint: every tensor must have its place.
    Card,
    /// Somebody wrote or changed it: blocks and layers that it does not name were dropped.
    Edited,
}

/// The weights of a plan, each with its tensor.
#[derive(Debug)]
pub struct Mapping {
    checkpoint: Arc<Checkpoint>,
    rows: Vec<Row>,
    places: BTreeMap<String, usize>,
    drawn: Vec<GraphWeight>,
    notes: Vec<String>,
}

/// One weight.
#[derive(Debug)]
pub struct Row {
    /// Its path in the plan.
    pub path: String,
    /// What it is made from.
    pub source: Source,
    /// Its shape.
    pub shape: Vec<usize>,
    /// How its elements are handed out.
    pub format: Format,
    /// Bytes of its elements.
    pub bytes: usize,
    /// The file of its tensor.
    pub shard: String,
}

/// The paths of the two matrices that may be one.
const EMBED: &str = "embed";
const HEAD: &str = "head";

impl Mapping {
    /// Finds every weight, and checks its shape; no element is read. Without a card the tensors have
    /// our names. All weights that are missing or have another shape, and all tensors that are left
    /// over, are reported together.
    pub fn resolve(
        card: Option<&Card>,
        weights: &[GraphWeight],
        checkpoint: Arc<Checkpoint>,
        origin: Origin,
    ) -> std::result::Result<Mapping, Faults> {
        let identity = TensorMap::identity();
        let map = card.map_or(&identity, Card::tensors);
        let file = card.map_or(checkpoint.label(), Card::file).to_string();
        let mut resolve = Resolve {
            map,
            edited: origin == Origin::Edited,
            checkpoint: &checkpoint,
            used: BTreeSet::new(),
            rows: Vec::new(),
            report: Report::new(&file),
            misshapen_layers: BTreeSet::new(),
            notes: Vec::new(),
        };
        let (drawn, stored): (Vec<_>, Vec<_>) = weights
            .iter()
            .partition(|w| strata_layers::plan::is_new(&w.path));
        stored.iter().for_each(|w| resolve.weight(w));
        if !weights.iter().any(|w| w.path == HEAD) {
            resolve.tied_head();
        }
        resolve.left_over(weights, origin);
        if !resolve.report.is_empty() && card.is_some() {
            resolve.other_family();
        }
        let Resolve {
            rows,
            report,
            notes,
            ..
        } = resolve;
        report.finish()?;
        let places = rows
            .iter()
            .enumerate()
            .map(|(i, row)| (row.path.clone(), i))
            .collect();
        Ok(Mapping {
            checkpoint,
            rows,
            places,
            drawn: drawn.into_iter().cloned().collect(),
            notes,
        })
    }

    /// The elements of a weight: a view of the mapped file, or a small tensor computed from it.
    pub fn load(&self, path: &str) -> Result<HostTensor> {
        let row = self.places.get(path).and_then(|i| self.rows.get(*i));
        let row = row.ok_or_else(|| {
            let why = format!("the plan has no weight `{path}`");
            Error::file(self.checkpoint.label(), why)
        })?;
        row.source.load(&self.checkpoint)
    }

    /// All weights, in the order of the plan.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// The weights of new blocks, which are in no checkpoint.
    pub fn drawn(&self) -> &[GraphWeight] {
        &self.drawn
    }

    /// What is worth telling, and no fault: blocks that were dropped, a second copy of the embedding.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Adds to what is worth telling.
    pub fn add_notes(&mut self, notes: impl IntoIterator<Item = String>) {
        self.notes.extend(notes);
    }

    /// The tensors behind it.
    pub fn checkpoint(&self) -> &Arc<Checkpoint> {
        &self.checkpoint
    }
}

/// Gives a tied plan an output matrix of its own if the checkpoint has one that is not the embedding:
/// some configs say "tied" of models that are not. Says so when it does. For plans that a card made; in
/// a plan that somebody wrote, `tie` means what it says.
pub fn untie(card: Option<&Card>, plan: &mut Plan, checkpoint: &Checkpoint) -> Option<String> {
    let identity = TensorMap::identity();
    let map = card.map_or(&identity, Card::tensors);
    let (name, same) = separate_head(map, checkpoint)?;
    if !plan.head.tie || same {
        return None;
    }
    plan.head.tie = false;
    Some(format!(
        "the config says that the output matrix is the embedding, but {name} differs from it and is used"
    ))
}

/// The tensor of an output matrix if there is one beside the embedding, and whether the two are equal.
fn separate_head(map: &TensorMap, checkpoint: &Checkpoint) -> Option<(String, bool)> {
    let tensor = |path| {
        let sources = map.find(path).sources.into_iter();
        sources
            .map(|s| s.tensor().to_string())
            .find(|name| checkpoint.get(name).is_some())
    };
    let (head, embed) = (tensor(HEAD)?, tensor(EMBED)?);
    let same = match (checkpoint.tensor(&head), checkpoint.tensor(&embed)) {
        (Ok(a), Ok(b)) => (a.format(), a.shape(), a.bytes()) == (b.format(), b.shape(), b.bytes()),
        _ => false,
    };
    Some((head, same))
}

/// Kinds of faults.
const MISSING: &str = "missing weights";
const MISSHAPEN: &str = "weights of another shape";
const UNREADABLE: &str = "tensors that cannot be read";
const LEFT_OVER: &str = "tensors that are left over";
const HINTS: &str = "hints";

struct Resolve<'a> {
    map: &'a TensorMap,
    /// Whether somebody wrote the plan.
    edited: bool,
    checkpoint: &'a Checkpoint,
    used: BTreeSet<String>,
    rows: Vec<Row>,
    report: Report,
    misshapen_layers: BTreeSet<String>,
    notes: Vec<String>,
}

impl Resolve<'_> {
    fn weight(&mut self, want: &GraphWeight) {
        let path = &want.path;
        let found = self.map.find(path);
        let at = found.at;
        let sources = match self.edited {
            true => self.map.find_edited(path).sources,
            false => found.sources.clone(),
        };
        let there = sources.iter().find_map(|s| {
            let mut tensors = s.tensors().into_iter().map(|t| self.checkpoint.get(t));
            let first = tensors.next()??;
            tensors.all(|t| t.is_some()).then_some((s, first))
        });
        let Some((source, info)) = there else {
            let names: Vec<&str> = found.sources.iter().map(Source::tensor).collect();
            let why = match &names[..] {
                [] => "no line of `tensors` names it".to_string(),
                names => format!("there is no tensor {}", names.join(" nor ")),
            };
            let hint = match path.as_str() {
                HEAD => "; if the output matrix is the embedding, say `tie: true`",
                _ => "",
            };
            let message = format!("{path} is missing: {why}{hint}");
            return self.report.add(MISSING, at, message);
        };
        let tensors = source.tensors().into_iter();
        self.used.extend(tensors.map(ToString::to_string));
        let expected = shown(&want.spec.shape);
        let place = format!("{}, tensor {source}", info.shard);
        match source.shape(self.checkpoint) {
            Ok(shape) if shape == want.spec.shape => {}
            other => {
                let found = match &other {
                    Ok(shape) => format!("found {} in {place}", shown(shape)),
                    Err(why) => format!("but {why} in {place}"),
                };
                let hint = other
                    .map(|s| router_hint(path, &want.spec.shape, &s))
                    .unwrap_or_default();
                self.misshapen_layers.insert(layer(path));
                let message = format!("{path} wants {expected}, {found}{hint}");
                return self.report.add(MISSHAPEN, at, message);
            }
        }
        match info.runs_as() {
            Ok(stored) => {
                let format = if source.widens() { Format::F32 } else { stored };
                self.rows.push(Row {
                    path: path.clone(),
                    source: source.clone(),
                    shape: want.spec.shape.clone(),
                    format,
                    bytes: format.bytes_of(&want.spec.shape).unwrap_or(0),
                    shard: info.shard.clone(),
                });
            }
            Err(why) => {
                let tensor = source.tensor();
                let message = format!("{path}: {why}, in {}, tensor {tensor}", info.shard);
                self.report.add(UNREADABLE, at, message);
            }
        }
    }

    /// A tied plan may have a second copy of the embedding in its files, but no other matrix.
    fn tied_head(&mut self) {
        let Some((name, same)) = separate_head(self.map, self.checkpoint) else {
            return;
        };
        self.used.insert(name.clone());
        if same {
            self.notes
                .push(format!("{name} equals the embedding, and is not used"));
        } else {
            let message = format!(
                "the plan says `tie: true`, but {name} differs from the embedding; say `tie: false`"
            );
            self.report.add(MISSHAPEN, self.map.find(HEAD).at, message);
        }
    }

    /// Adds which cards know the names of all tensors, where this one does not: a config may be another
    /// model's.
    fn other_family(&mut self) {
        let known = |map: &TensorMap| {
            let mut names = self.checkpoint.tensors().map(|(name, _)| name);
            names.all(|name| map.weight_of(name).is_some() || map.ignores(name))
        };
        if known(self.map) {
            return;
        }
        let others: Vec<&str> = cards::all()
            .iter()
            .filter(|c| known(c.tensors()))
            .map(Card::family)
            .collect();
        if !others.is_empty() {
            let message = format!(
                "the tensors are named as those of {}: is config.json another model's?",
                list_of(others)
            );
            self.report.add(HINTS, Mark::default(), message);
        }
    }

    /// The tensors that no weight is made from and that should have been used.
    fn left_over(&mut self, weights: &[GraphWeight], origin: Origin) {
        let layers: BTreeSet<String> = weights.iter().map(|w| layer(&w.path)).collect();
        let blocks: BTreeSet<usize> = weights.iter().filter_map(|w| block(&w.path)).collect();
        let mut dropped_blocks: BTreeMap<usize, usize> = BTreeMap::new();
        let mut dropped_layers: BTreeMap<String, usize> = BTreeMap::new();
        for (name, info) in self.checkpoint.tensors() {
            if self.used.contains(name) || self.map.ignores(name) {
                continue;
            }
            let weight = self.map.weight_of(name);
            let of_block = self.map.block_of(name).filter(|b| !blocks.contains(b));
            let of_layer = weight.as_ref().map(|(path, _)| layer(path));
            if of_layer
                .as_ref()
                .is_some_and(|l| self.misshapen_layers.contains(l))
            {
                // It would only repeat that the layer is another.
                continue;
            }
            match (origin, of_block, of_layer) {
                (Origin::Edited, Some(block), _) => {
                    *dropped_blocks.entry(block).or_default() += 1;
                }
                (Origin::Edited, None, Some(layer)) if !layers.contains(&layer) => {
                    *dropped_layers.entry(layer).or_default() += 1;
                }
                _ => {
                    let (at, message) = unused(name, info, weight, of_block);
                    self.report.add(LEFT_OVER, at, message);
                }
            }
        }
        if !dropped_blocks.is_empty() {
            let numbers = ranges(dropped_blocks.keys().copied());
            let tensors: usize = dropped_blocks.values().sum();
            self.notes.push(format!(
                "the plan leaves out the checkpoint's blocks {numbers} ({tensors} tensors)"
            ));
        }
        for (layer, tensors) in dropped_layers {
            self.notes
                .push(format!("the plan leaves out {layer} ({tensors} tensors)"));
        }
    }
}

fn unused(
    name: &str,
    info: &TensorInfo,
    weight: Option<(String, Mark)>,
    of_block: Option<usize>,
) -> (Mark, String) {
    let tensor = format!(
        "tensor {name:?} {} in {} is left over",
        shown(&info.shape),
        info.shard
    );
    match (weight, of_block) {
        (Some((_, at)), Some(block)) => (at, format!("{tensor}: the plan has no block {block}")),
        (Some((path, at)), None) => (at, format!("{tensor}: the plan has no {path}")),
        (None, _) => (
            Mark::default(),
            format!("{tensor}: no line of `tensors` or `ignore` names it"),
        ),
    }
}

/// Fewer experts than the router was trained for are another model, whatever the tensors say.
fn router_hint(path: &str, wants: &[usize], found: &[usize]) -> String {
    match (wants, found) {
        ([wants, ..], [found, ..]) if path.ends_with(".router") && wants != found => format!(
            ": the router chooses among {found} experts, the plan has {wants}; a plan cannot change their number"
        ),
        _ => String::new(),
    }
}

/// `(96, 64)`.
fn shown(shape: &[usize]) -> String {
    let sizes: Vec<String> = shape.iter().map(usize::to_string).collect();
    format!("({})", sizes.join(", "))
}

/// The layer of a weight: `blocks.3.moe` of `blocks.3.moe.gate.5`.
fn layer(path: &str) -> String {
    match path.split('.').collect::<Vec<_>>()[..] {
        [first @ ("blocks" | "shared"), place, layer, ..] => format!("{first}.{place}.{layer}"),
        _ => path.into(),
    }
}

/// The block of a weight.
fn block(path: &str) -> Option<usize> {
    path.strip_prefix("blocks.")?
        .split('.')
        .next()?
        .parse()
        .ok()
}

/// `0, 3 to 7`; the first few of many.
fn ranges(numbers: impl IntoIterator<Item = usize>) -> String {
    const SHOWN: usize = 20;
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for number in numbers {
        match ranges.last_mut() {
            Some((_, end)) if end.checked_add(1) == Some(number) => *end = number,
            _ => ranges.push((number, number)),
        }
    }
    let mut shown: Vec<String> = ranges
        .iter()
        .take(SHOWN)
        .map(|(start, end)| match end - start {
            0 => start.to_string(),
            _ => format!("{start} to {end}"),
        })
        .collect();
    if ranges.len() > SHOWN {
        shown.push("…".into());
    }
    shown.join(", ")
}
