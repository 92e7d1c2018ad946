//! Any loaded checkpoint as a GGUF file that llama.cpp loads.
//!
//! The card's section `gguf` is read backwards: `tensors` says what each weight is in such a file, and all
//! weights of one tensor make it; `metadata` says what of the config becomes a key. Before an element is
//! written the header is read again, and must give the same plan and a place for every weight: what
//! GGUF cannot say is refused, not lost.
//!
//! Where such files have weights that hold what a config says apart, as factors, the card's `folded` says
//! what the config of the file is, and it is that plan which must come out.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use strata_kernels::{Format, HostTensor};
use strata_layers::graph::GraphWeight;
use strata_layers::{Graph, Plan, Role};

use super::Gguf;
use super::builder::Builder;
use super::original::{self, CONFIG};
use super::vocabulary;
use crate::card::Card;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::files::ModelFiles;
use crate::mapping::{Mapping, Origin, Row};
use crate::published::{self, Step};
use crate::tensor_map::Source;
use crate::write::{self, Content, Part, Progress, Target};

/// Tensors begin at multiples of so many bytes.
const ALIGN: u64 = 32;
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
    let plan = &held(input)?;
    let weights = Graph::lower(plan, input.card.file())?.weights();
    let theirs = input.card.for_writing(input.config)?;
    let (targets, formats) = targets(input, &theirs, &weights, options)?;
    let mut written = Written {
        tensors: targets.len(),
        notes: input.card.notes(input.config)?,
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
    let text = match input.files.gguf() {
        None => input.files.text("config.json")?,
        Some(_) => None,
    };
    header.text(CONFIG, &text.unwrap_or_else(|| input.config.json()));
    header.text(DTYPES, &dtypes(input, &weights, &formats));
    written.kept = original::keep(input.mapping, &theirs, &formats, &mut header)?;
    for target in &targets {
        header.tensor(target, ALIGN)?;
    }
    let header = header.finish(ALIGN);
    let mut total = header.len() as u64;
    for target in &targets {
        total += target.bytes()?.next_multiple_of(ALIGN);
    }
    written.bytes = total;
    check(input, plan, &weights, &header, total)
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

/// The plan of the file: the model's, without what the card says that the weights hold.
fn held(input: &Input<'_>) -> Result<Plan> {
    let Some(folded) = input.card.folded(input.config)? else {
        return Ok(input.plan.clone());
    };
    let mut plan = input.card.plan(&folded, &input.plan.name)?;
    // The checkpoint may have said so.
    plan.head.tie &= input.plan.head.tie;
    Ok(plan)
}

/// Whether products with it are exact.
fn is_power_of_two(factor: f64) -> bool {
    factor.is_normal() && factor.to_bits() & ((1 << 52) - 1) == 0
}

/// The tensors of the file, put together from weights, and what each weight is stored as.
fn targets(
    input: &Input<'_>,
    theirs: &Card,
    weights: &[GraphWeight],
    options: &Options<'_>,
) -> Result<(Vec<Target>, BTreeMap<String, Format>)> {
    let mut formats = BTreeMap::new();
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
            // A head of its own may be needed where it was the embedding.
            let row = rows.get(weight.path.as_str());
            let tied = || rows.get("embed").filter(|_| weight.path == "head");
            let Some(row) = row.or_else(tied) else {
                // What the card says that a file must have: a bias that adds nothing.
                if !weight.path.ends_with(".bias") {
                    let why = format!("{} has no tensor", weight.path);
                    return Err(Error::file(theirs.file(), why));
                }
                runs.push((None, run.elements.clone(), None));
                continue;
            };
            let same = stored.is_none_or(|s| s == row.format);
            stored = Some(if same { row.format } else { Format::F32 });
            runs.push((
                Some(row.source.clone()),
                run.elements.clone(),
                Step::times(run.times),
            ));
        }
        let mut stored = stored.unwrap_or(Format::F32);
        // Products of BF16 with powers of two are BF16; others need more.
        let each = |run: &published::Run| is_power_of_two(run.times);
        if runs.iter().any(|r| r.2.is_some())
            && !(stored == Format::BF16 && made.runs.iter().all(each))
        {
            stored = Format::F32;
        }
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
        for run in &made.runs {
            formats.insert(weights[run.weight].path.clone(), format);
        }
        let columns = made.runs.iter().map(|run| importance[run.weight].clone());
        let columns: Vec<_> = columns.collect();
        let (checkpoint, undo) = (input.mapping.checkpoint().clone(), made.undo);
        let target = Target::made(name, made.shape, format, move || {
            let mut opened: Vec<Part> = Vec::new();
            let mut last: Option<(String, HostTensor)> = None;
            for (source, elements, change) in &runs {
                let Some(source) = source else {
                    let zeros = HostTensor::from_f32(&[elements.end], &vec![0.0; elements.end])?;
                    opened.push((zeros, elements.clone()).into());
                    continue;
                };
                // Rows in another order are many runs of one tensor.
                let shown = source.to_string();
                let tensor = match &last {
                    Some((name, tensor)) if *name == shown => tensor.clone(),
                    _ => source.load(&checkpoint)?,
                };
                last = Some((shown, tensor.clone()));
                opened.push(Part {
                    tensor,
                    elements: elements.clone(),
                    change: *change,
                });
            }
            let undo = undo.clone();
            Ok(Content::Made { runs: opened, undo })
        });
        targets.push(target.weighing(columns));
    }
    Ok((targets, formats))
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
    wanted: &Plan,
    weights: &[GraphWeight],
    header: &[u8],
    total: u64,
) -> std::result::Result<(), String> {
    let total = usize::try_from(total).map_err(|_| "the file is too large".to_string())?;
    let gguf = Gguf::of_header(header, total).map_err(|e| e.to_string())?;
    let config = input.card.config_of(&gguf).map_err(|e| e.to_string())?;
    let plan = input
        .card
        .plan(&config, &wanted.name)
        .map_err(|e| e.to_string())?;
    // What no file says, and nothing runs by.
    let plan = Plan {
        init_std: wanted.init_std,
        context: wanted.context,
        ..plan
    };
    if plan != *wanted {
        let (ours, theirs) = (wanted.print(), plan.print());
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

/// The element types of tensors that become F32 without anybody's wish.
fn dtypes(
    input: &Input<'_>,
    weights: &[GraphWeight],
    formats: &BTreeMap<String, Format>,
) -> String {
    let is_small = |w: &&GraphWeight| w.spec.role == Role::Vector || w.path.ends_with(".router");
    let small = weights.iter().filter(is_small);
    let mut small: BTreeSet<&str> = small.map(|w| w.path.as_str()).collect();
    // Matrices become F32 for a factor's sake, or because it was asked for: either way no bit is lost.
    let wide = formats.iter().filter(|(_, f)| **f == Format::F32);
    small.extend(wide.map(|(path, _)| path.as_str()));
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
