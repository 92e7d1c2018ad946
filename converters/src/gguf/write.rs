//! Any loaded checkpoint as a GGUF file that llama.cpp loads.
//!
//! The card's section `gguf` is read backwards: `tensors` says what each weight is in such a file, and all
//! weights of one tensor make it; `metadata` says what of the config becomes a key. Before an element is
//! written the header is read again, and must give the same plan and a place for every weight: what
//! GGUF cannot say is refused, not lost.
//!
//! What is computed on the way in and cannot be computed back exactly, as A_log from A, is kept beside:
//! where an element would come out otherwise, its place and its bits. llama.cpp ignores such keys.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use strata_kernels::{Format, HostTensor};
use strata_layers::graph::GraphWeight;
use strata_layers::{Graph, Plan, Role};

use super::Gguf;
use super::builder::Builder;
use super::vocabulary;
use crate::card::Card;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::files::ModelFiles;
use crate::mapping::{Mapping, Origin, Row};
use crate::published;
use crate::tensor_map::Source;
use crate::transforms::Undo;
use crate::write::{self, Content, Progress, Target};

/// Tensors begin at multiples of so many bytes.
const ALIGN: u64 = 32;
/// Before our own keys.
const OWN: &str = "strata";
/// The key of the element types that small tensors had, by the names that the family publishes: JSON.
pub const DTYPES: &str = "strata.dtypes";

/// What is written.
pub struct Input<'a> {
    /// The model's files, for its tokenizer.
    pub files: &'a ModelFiles,
    /// The card of its config.json.
    pub card: &'a Card,
    /// The config.
    pub config: &'a Config,
    /// The plan that the card made of it.
    pub plan: &'a Plan,
    /// Its weights.
    pub mapping: &'a Mapping,
}

/// The format of a weight's tensor; none keeps what it has.
pub type Choose<'a> = dyn Fn(&GraphWeight) -> Option<Format> + 'a;

/// How much the columns of a weight count when it is quantised, by its path.
pub type Weigh<'a> = dyn Fn(&str) -> Option<Arc<[f32]>> + 'a;

/// How it is written.
pub struct Options<'a> {
    /// The formats of matrices. A tensor of several weights has that of the first.
    pub choose: &'a Choose<'a>,
    /// How much columns count.
    pub weigh: &'a Weigh<'a>,
    /// Threads that make tensors.
    pub threads: usize,
    /// Replaces a file that is there.
    pub force: bool,
}

/// What was written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Written {
    /// Tensors.
    pub tensors: usize,
    /// Bytes of the file.
    pub bytes: u64,
    /// Elements that are kept beside, as they cannot be computed back.
    pub kept: usize,
    /// What is worth knowing.
    pub notes: Vec<String>,
}

/// Writes a GGUF file: under another name, then renamed. A run that was stopped is gone on with by the same
/// call. Memory is bounded by the pieces under way.
pub fn write(
    to: &Path,
    input: &Input<'_>,
    options: &Options<'_>,
    progress: &mut dyn Progress,
) -> Result<Written> {
    let label = to.display().to_string();
    if to.exists() && !options.force {
        return Err(Error::file(
            label,
            "is there already; give another name, or --force",
        ));
    }
    let fault = |why: String| Error::file(label.clone(), why);
    let weights = Graph::lower(input.plan, input.card.file())?.weights();
    let theirs = input.card.for_writing(input.config)?;
    let targets = targets(input, &theirs, &weights, options)?;
    let mut written = Written {
        tensors: targets.len(),
        ..Written::default()
    };

    let mut header = Builder::default();
    let architecture = input.card.metadata(input.config, &weights, &mut header)?;
    header.text("general.name", &input.plan.name);
    header.uint("general.quantization_version", 2);
    header.uint("general.file_type", file_type(&targets));
    let vocab = input.plan.vocab;
    if let Some(note) = vocabulary::write(input.files, vocab, &architecture, &mut header)? {
        written.notes.push(note);
    }
    header.text(&format!("{OWN}.config"), &input.config.json());
    header.text(DTYPES, &dtypes(input, &weights));
    written.kept = keep(input, &mut header)?;
    for target in &targets {
        header.tensor(target, ALIGN)?;
    }
    let header = header.finish(ALIGN);
    let mut total = header.len() as u64;
    for target in &targets {
        total += target.bytes()?.next_multiple_of(ALIGN);
    }
    written.bytes = total;
    check(input, &weights, &header, total)
        .map_err(|why| fault(format!("a GGUF file cannot say what this model is: {why}")))?;

    progress.begin(total);
    let all: Vec<&Target> = targets.iter().collect();
    let file = write::File {
        path: to,
        header: &header,
        targets: &all,
        align: ALIGN,
    };
    let mut identity = fnv(&header, 0xcbf2_9ce4_8422_2325);
    for target in &targets {
        identity = target
            .importance()
            .fold(identity, |hash, w| fnv(&w.to_le_bytes(), hash));
    }
    for (_, info) in input.mapping.checkpoint().tensors() {
        if let Ok((bytes, changed)) = input.files.stamp(&info.shard) {
            identity = fnv(&bytes.to_le_bytes(), identity);
            identity = fnv(&changed.to_le_bytes(), identity);
        }
    }
    write::write(&file, identity, options.threads, progress)?;
    Ok(written)
}

/// FNV-1a: tells files of one conversion from those of another.
fn fnv(bytes: &[u8], start: u64) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(start, step)
}

/// The tensors of the file, put together from weights.
fn targets(
    input: &Input<'_>,
    theirs: &Card,
    weights: &[GraphWeight],
    options: &Options<'_>,
) -> Result<Vec<Target>> {
    // Of each weight once, however many runs it has.
    let importance: Vec<Option<Arc<[f32]>>> = weights
        .iter()
        .map(|weight| (options.weigh)(&weight.path))
        .collect();
    let mut sources: Vec<(Source, Vec<usize>)> = Vec::new();
    for weight in weights {
        let found = theirs
            .tensors()
            .find(&weight.path)
            .sources
            .into_iter()
            .next();
        let source = found.ok_or_else(|| {
            let why = format!("the section `gguf` has no name for {}", weight.path);
            Error::file(theirs.file(), why)
        })?;
        sources.push((source, weight.spec.shape.clone()));
    }
    let rows: BTreeMap<&str, &Row> = input
        .mapping
        .rows()
        .iter()
        .map(|row| (row.path.as_str(), row))
        .collect();
    let mut targets = Vec::new();
    for (name, made) in published::assemble(&sources, |_| None) {
        let made = made.map_err(|why| Error::file(theirs.file(), format!("{name}: {why}")))?;
        let mut runs = Vec::new();
        let mut stored: Option<Format> = None;
        let mut small = made.shape.len() < 2;
        for run in &made.runs {
            let weight = &weights[run.weight];
            small |= weight.spec.role == Role::Vector || weight.path.ends_with(".router");
            let row = rows.get(weight.path.as_str()).ok_or_else(|| {
                Error::file(theirs.file(), format!("{} has no tensor", weight.path))
            })?;
            let same = stored.is_none_or(|s| s == row.format);
            stored = Some(if same { row.format } else { Format::F32 });
            runs.push((row.source.clone(), run.elements.clone()));
        }
        let stored = stored.unwrap_or(Format::F32);
        let wanted = if small {
            Format::F32
        } else {
            let first = made.runs.first().map(|run| &weights[run.weight]);
            first.and_then(options.choose).unwrap_or(stored)
        };
        // Rows that are no whole blocks stay as they are, which is never coarser.
        let fits = wanted.bytes_of(&made.shape).is_some();
        let format = match (fits, stored.dtype()) {
            (true, _) => wanted,
            (false, Some(_)) => stored,
            (false, None) => Format::F32,
        };
        let columns = made.runs.iter().map(|run| importance[run.weight].clone());
        let columns: Vec<_> = columns.collect();
        let (checkpoint, undo) = (input.mapping.checkpoint().clone(), made.undo);
        let target = Target::made(name, made.shape, format, move || {
            let mut opened: Vec<(HostTensor, Range<usize>)> = Vec::new();
            let mut last: Option<(String, HostTensor)> = None;
            for (source, elements) in &runs {
                // Rows in another order are many runs of one tensor.
                let shown = source.to_string();
                let tensor = match &last {
                    Some((name, tensor)) if *name == shown => tensor.clone(),
                    _ => source.load(&checkpoint)?,
                };
                last = Some((shown, tensor.clone()));
                opened.push((tensor, elements.clone()));
            }
            let undo = undo.clone();
            Ok(Content::Made { runs: opened, undo })
        });
        targets.push(target.weighing(columns));
    }
    Ok(targets)
}

/// The number by which files say what most of their matrices are.
fn file_type(targets: &[Target]) -> u32 {
    let mut bytes = [
        (Format::F32, 0, 0u64),
        (Format::F16, 1, 0),
        (Format::Q4_0, 2, 0),
        (Format::Q4_1, 3, 0),
        (Format::Q8_0, 7, 0),
        (Format::Q5_0, 8, 0),
        (Format::Q5_1, 9, 0),
        (Format::Q2K, 10, 0),
        (Format::Q3K, 12, 0),
        (Format::Q4K, 15, 0),
        (Format::Q5K, 17, 0),
        (Format::Q6K, 18, 0),
        (Format::Iq4Nl, 25, 0),
        (Format::Iq4Xs, 30, 0),
        (Format::BF16, 32, 0),
    ];
    for target in targets {
        for (known, _, total) in &mut bytes {
            if Some(*known) == target.format() && target.shape.len() > 1 {
                *total += target.bytes().unwrap_or(0);
            }
        }
    }
    bytes.iter().max_by_key(|b| b.2).map_or(0, |b| b.1)
}

/// The file says the same model: the plan that its metadata gives is this one, and every weight has its
/// tensor.
fn check(
    input: &Input<'_>,
    weights: &[GraphWeight],
    header: &[u8],
    total: u64,
) -> std::result::Result<(), String> {
    let total = usize::try_from(total).map_err(|_| "the file is too large".to_string())?;
    let gguf = Gguf::of_header(header, total).map_err(|e| e.to_string())?;
    let config = input.card.config_of(&gguf).map_err(|e| e.to_string())?;
    let plan = input
        .card
        .plan(&config, &input.plan.name)
        .map_err(|e| e.to_string())?;
    // What no file says, and nothing runs by.
    let plan = Plan {
        init_std: input.plan.init_std,
        context: input.plan.context,
        ..plan
    };
    if plan != *input.plan {
        let (ours, theirs) = (input.plan.print(), plan.print());
        let differs = ours.lines().zip(theirs.lines()).find(|(a, b)| a != b);
        let (ours, theirs) = differs.unwrap_or_default();
        return Err(format!(
            "the plan has `{}`, which would become `{}`",
            ours.trim(),
            theirs.trim()
        ));
    }
    let card = input
        .card
        .for_gguf()
        .ok_or("the card knows no GGUF files")?;
    let card = card.bound(&config).map_err(|e| e.to_string())?;
    let files = ModelFiles::of_gguf(gguf);
    let checkpoint = crate::Checkpoint::open(&files).map_err(|e| e.to_string())?;
    Mapping::resolve(Some(&card), weights, checkpoint.into(), Origin::Card)
        .map_err(|e| e.to_string())?;
    Ok(())
}

/// The element types of tensors that become F32.
fn dtypes(input: &Input<'_>, weights: &[GraphWeight]) -> String {
    let is_small = |w: &&GraphWeight| w.spec.role == Role::Vector || w.path.ends_with(".router");
    let small = weights.iter().filter(is_small);
    let small: BTreeSet<&str> = small.map(|w| w.path.as_str()).collect();
    let mut found = serde_json::Map::new();
    for row in input
        .mapping
        .rows()
        .iter()
        .filter(|r| small.contains(r.path.as_str()))
    {
        let tensor = row.source.tensor();
        if let Some(info) = input.mapping.checkpoint().get(tensor)
            && info.dtype != "F32"
        {
            found.insert(tensor.into(), info.dtype.clone().into());
        }
    }
    serde_json::Value::Object(found).to_string()
}

/// Where an element that was computed cannot be computed back, its place and its bits. Their number.
fn keep(input: &Input<'_>, header: &mut Builder) -> Result<usize> {
    let mut kept = 0;
    for row in input.mapping.rows() {
        let Some((original, back)) = computed_back(input.mapping, &row.path, &row.source)? else {
            continue;
        };
        let original = original.to_f32();
        let each = original.iter().zip(&back).enumerate();
        let wrong: Vec<u32> = each
            .filter(|(_, (a, b))| a.to_bits() != b.to_bits())
            .flat_map(|(i, (a, _))| [i as u32, a.to_bits()])
            .collect();
        kept += wrong.len() / 2;
        if !wrong.is_empty() {
            header.uints(&format!("{OWN}.kept.{}", row.path), &wrong);
        }
    }
    Ok(kept)
}

/// Of a weight that is computed from a tensor: the tensor, and what comes of computing back.
fn computed_back(
    mapping: &Mapping,
    path: &str,
    source: &Source,
) -> Result<Option<(HostTensor, Vec<f32>)>> {
    let mut steps = Vec::new();
    let mut at = source;
    while let Source::Call(transform, inner, numbers) = at {
        match transform.undo {
            Undo::Values(undo) => steps.push((undo, numbers.first().copied().unwrap_or(0.0))),
            // Another order of the elements would be another place.
            Undo::Shape(_) => {}
            _ => return Ok(None),
        }
        at = inner;
    }
    if steps.is_empty() {
        return Ok(None);
    }
    let original = at.load(mapping.checkpoint())?;
    let back = undone(&mapping.load(path)?, &steps, original.format());
    Ok(Some((original, back)))
}

/// One step back: what it does, and its number.
type Back = (fn(f32, f64) -> f32, f64);

/// The values before some steps, rounded to the format they had.
fn undone(weight: &HostTensor, steps: &[Back], format: Format) -> Vec<f32> {
    let round = |x: f32| match format {
        Format::F16 => half::f16::from_f32(x).to_f32(),
        Format::BF16 => half::bf16::from_f32(x).to_f32(),
        _ => x,
    };
    let back = |x: &f32| round(steps.iter().fold(*x, |x, (undo, number)| undo(x, *number)));
    weight.to_f32().iter().map(back).collect()
}

/// The tensor that a weight of a GGUF file was computed from when the file was written: `source` says how,
/// `format` what it had. The same bits as the original's, as what differs is kept in the file.
pub fn original(
    gguf: &Gguf,
    path: &str,
    weight: &HostTensor,
    source: &Source,
    format: Format,
) -> Vec<f32> {
    let mut steps = Vec::new();
    let mut at = source;
    while let Source::Call(transform, inner, numbers) = at {
        if let Undo::Values(undo) = transform.undo {
            steps.push((undo, numbers.first().copied().unwrap_or(0.0)));
        }
        at = inner;
    }
    let mut values = undone(weight, &steps, format);
    let Some((_, mut items)) = gguf.items(&format!("{OWN}.kept.{path}")) else {
        return values;
    };
    let mut next = || match items.next() {
        Some(super::Value::Int(n)) => u32::try_from(n).ok(),
        _ => None,
    };
    while let (Some(place), Some(bits)) = (next(), next()) {
        if let Some(value) = values.get_mut(place as usize) {
            *value = f32::from_bits(bits);
        }
    }
    values
}
