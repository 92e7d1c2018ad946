//! From any checkpoint that is read to one that is written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use strata_converters::checkpoint::TensorInfo;
use strata_converters::mapping::Mapping;
use strata_converters::published::{self, Assembled, Run, Step};
use strata_converters::tensor_map::Source;
use strata_converters::write::{self, Content, Folder, Part, Target, safetensors};
use strata_converters::{Checkpoint, Config, ModelFiles, Origin};
use strata_kernels::{DType, Format};
use strata_layers::plan::{self, Place};
use strata_layers::{Graph, Plan, Role};
use xxhash_rust::xxh3::Xxh3;

use super::calibrate;
use super::convert_gguf::{from_gguf, to_gguf};
use super::convert_random::convert_random;
use super::convert_rows::{by_rows, declare, format, refusal};
use super::locate::{Located, PLAN, Planned, locate, mapped, planned};
use super::{Error, LoadOptions, LoadProgress, Result};
use crate::hub;
use crate::random_weights;
use crate::recipe::Recipe;

/// What other programs know a model by.
pub(super) const CONFIG: &str = "config.json";

/// What to write, and how.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// What is read.
    pub from: LoadOptions,
    /// The folder that is written.
    pub to: PathBuf,
    /// Writes a GGUF file instead of a folder of safetensors.
    pub gguf: bool,
    /// Element type of matrices; none keeps what they have.
    pub dtype: Option<DType>,
    /// Quantises matrices: in blocks for GGUF files, in int8 or fp8 for folders.
    pub quantize: Option<Recipe>,
    /// Most bytes of a file.
    pub shard_bytes: u64,
    /// Replaces what is there.
    pub force: bool,
    /// Threads that make tensors.
    pub threads: usize,
    /// Seed of blocks that are new.
    pub seed: u64,
}

/// What was written.
#[derive(Debug, Clone, Default)]
pub struct Converted {
    /// Tensors.
    pub tensors: usize,
    /// Bytes of all of them.
    pub bytes: u64,
    /// Names of the files that hold them.
    pub files: Vec<String>,
    /// What is worth knowing.
    pub notes: Vec<String>,
}

/// Writes a checkpoint. Memory is bounded by the pieces under way, whatever the model's size; what an earlier
/// run was stopped at is gone on with.
pub fn convert(
    options: &ConvertOptions,
    load: &mut dyn LoadProgress,
    progress: &mut dyn write::Progress,
) -> Result<Converted> {
    let located = locate(&options.from, load)?;
    if let Some(seed) = options.from.random {
        return convert_random(options, &located, seed, progress);
    }
    let Located::Files(files) = located else {
        return Err(Error::Input(
            "convert needs a checkpoint, not a config or a plan alone; --random SEED draws one"
                .into(),
        ));
    };
    let mut planned = planned(&options.from, &Located::Files(files.clone()))?;
    check_forms(options, &files, &planned)?;
    let edited_plan = planned.origin == Origin::Edited;
    // What nobody asks to change is written as it is stored, of quantised releases numbers and scales.
    let copies =
        !options.gguf && !edited_plan && options.dtype.is_none() && options.quantize.is_none();
    let mut checkpoint = Checkpoint::open(&files)?;
    if !copies {
        checkpoint.widen_all(options.dtype == Some(DType::F32));
    }
    let was_quantized = checkpoint.is_quantized();
    let mapping = mapped(&mut planned, checkpoint)?;
    let mut converted = Converted {
        notes: mapping.notes().to_vec(),
        ..Converted::default()
    };
    if was_quantized {
        let note = match copies {
            true => "the weights stay quantised as they are; --dtype bf16 would widen them",
            false => "the quantised weights of this release are widened",
        };
        converted.notes.push(note.into());
    }
    let sourced = LoadOptions {
        device: "cpu".into(),
        threads: Some(options.threads),
        ..options.from.clone()
    };
    let importance = calibrate::importance(
        &sourced,
        options.quantize.as_ref(),
        &planned.graph,
        &mut converted.notes,
        load,
    )?;
    if options.gguf {
        let importance = importance.as_deref();
        return to_gguf(
            options, &planned, &files, &mapping, importance, converted, progress,
        );
    }
    let mut texts = text_files(&files)?;
    if was_quantized && !copies {
        plain_config(&mut texts)?;
    }
    let mut targets = if let Some(gguf) = files.gguf() {
        let (targets, config) = from_gguf(&planned, gguf, &mapping, options.dtype)?;
        if let Some(config) = config {
            texts.insert(CONFIG.into(), config.into_bytes());
        }
        targets
    } else if edited_plan {
        let new_plan = renumbered(&planned.plan);
        let Edited {
            targets,
            only_plan_names,
        } = edited(
            &planned,
            &new_plan,
            &mapping,
            options.seed,
            &mut converted.notes,
        )?;
        // Whoever reads config.json alone sees the same model where it can say so.
        let known = planned.config.as_ref().zip(planned.card.as_ref());
        let known = known.filter(|_| !only_plan_names);
        let solved = known.and_then(|(config, card)| card.solve(config, &new_plan));
        match solved {
            Some(solved) if solved.changed.is_empty() => {}
            Some(solved) if texts.contains_key(CONFIG) => {
                let keys = solved.changed.join(", ");
                converted
                    .notes
                    .push(format!("config.json has new values of {keys}"));
                texts.insert(CONFIG.into(), solved.config.json().into_bytes());
            }
            _ => {
                if texts.contains_key(CONFIG) {
                    let note = "config.json cannot say this stack and stays as it was; plan.yaml says it, which other programs do not read";
                    converted.notes.push(note.into());
                }
                texts.insert(PLAN.into(), new_plan.print().into_bytes());
            }
        }
        targets
    } else {
        copied(&mapping, copies)?
    };
    if let Some(dtype) = options.dtype {
        if files.gguf().is_none() {
            retype(&mut targets, &planned.graph, &mapping, dtype);
        }
        if let Some(config) = texts.get_mut(CONFIG) {
            set_dtype(config, dtype);
        }
    }
    if let Some(recipe) = &options.quantize {
        let weights = planned.graph.weights();
        let (card, notes) = (planned.card.as_ref(), &mut converted.notes);
        let (made, ignored) = by_rows(targets, &weights, card, &mapping, recipe, notes)?;
        targets = made;
        let declare = |config: &mut Config| declare(config, format(recipe), &ignored);
        match change_config(&mut texts, declare)? {
            true => {}
            false => converted.notes.push(
                "there is no config.json that could tell other programs so: scales beside the matrices do".into(),
            ),
        }
    }
    let headers = |hash: &mut Xxh3| identity(&files, &mapping, hash);
    write_folder(options, &targets, texts, &headers, converted, progress)
}

/// Writes tensors and what belongs beside them. `identify` hashes what decides their elements.
pub(super) fn write_folder(
    options: &ConvertOptions,
    targets: &[Target],
    mut texts: BTreeMap<String, Vec<u8>>,
    identify: &dyn Fn(&mut Xxh3) -> Result<()>,
    mut converted: Converted,
    progress: &mut dyn write::Progress,
) -> Result<Converted> {
    converted.tensors = targets.len();
    for target in targets {
        converted.bytes += target.bytes()?;
    }
    check_space(&options.to, converted.bytes)?;
    progress.begin(converted.bytes);
    let shards = safetensors::shards(targets, options.shard_bytes)?;
    let mut hash = Xxh3::new();
    identify(&mut hash)?;
    for (name, shard) in &shards {
        hash.update(name.as_bytes());
        hash.update(&safetensors::header(shard)?);
    }
    let identity = hash.digest();
    let folder_options = write::Options {
        force: options.force,
    };
    let folder = Folder::begin(&options.to, &format!("{identity:016x}"), folder_options)?;
    for (name, shard) in &shards {
        converted.files.push(name.clone());
        let header = safetensors::header(shard)?;
        if folder.has(name) {
            let bytes = shard
                .iter()
                .map(|t| t.bytes())
                .sum::<strata_converters::error::Result<u64>>()?;
            progress.advance(bytes + header.len() as u64);
            continue;
        }
        let file = write::File {
            path: &folder.path_of(name),
            header: &header,
            targets: shard,
            align: 1,
        };
        write::write(&file, identity, options.threads, progress)?;
    }
    if shards.len() > 1 {
        texts.insert(
            "model.safetensors.index.json".into(),
            safetensors::index(&shards)?.into_bytes(),
        );
    }
    for (name, bytes) in &texts {
        folder.write(name, bytes)?;
    }
    folder.finish()?;
    Ok(converted)
}

/// Fails if what is wanted is no form that there is.
fn check_forms(options: &ConvertOptions, files: &ModelFiles, planned: &Planned) -> Result<()> {
    let edited = planned.origin == Origin::Edited;
    let from_gguf = files.gguf().is_some();
    if options.gguf {
        let mut formats = options.quantize.iter().flat_map(Recipe::formats);
        if let Some(format) = formats.find(|f| f.scales_rows()) {
            return Err(Error::Input(format!(
                "GGUF has no {format}: --quantize q8_0 is the nearest that it has; {format} is written to a folder of safetensors"
            )));
        }
        if edited {
            return Err(Error::Input(
                "a plan of one's own goes to a folder first; its GGUF file is made from there"
                    .into(),
            ));
        }
        return Ok(());
    }
    if edited && from_gguf {
        return Err(Error::Input(
            "a GGUF file goes to a folder first; a plan of one's own is applied to that".into(),
        ));
    }
    let Some(recipe) = &options.quantize else {
        return Ok(());
    };
    match refusal(recipe) {
        Some(refusal) => Err(refusal),
        None if edited || from_gguf => Err(Error::Input(format!(
            "this goes to a folder first, in the type that it has; that folder is written in {}",
            format(recipe)
        ))),
        None => Ok(()),
    }
}

/// Changes config.json, if there is one.
fn change_config(
    texts: &mut BTreeMap<String, Vec<u8>>,
    change: impl FnOnce(&mut Config) -> Result<()>,
) -> Result<bool> {
    let Some(bytes) = texts.get_mut(CONFIG) else {
        return Ok(false);
    };
    let mut config = Config::parse(&String::from_utf8_lossy(bytes), CONFIG)?;
    change(&mut config)?;
    *bytes = config.json().into_bytes();
    Ok(true)
}

/// Takes out what says that weights are quantised, once they are not.
fn plain_config(texts: &mut BTreeMap<String, Vec<u8>>) -> Result<()> {
    texts.remove("hf_quant_config.json");
    change_config(texts, |config| {
        config.remove("quantization_config");
        config.remove("compression_config");
        Ok(())
    })?;
    Ok(())
}

/// Fails unless there is room for so many bytes where `to` will be, beside those that an earlier run left.
pub(super) fn check_space(to: &Path, bytes: u64) -> Result<()> {
    let room = match to.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let begun = write::begun(to);
    match hub::free_bytes(room) {
        Some(free) if free.saturating_add(begun) < bytes => {
            let gb = |bytes: u64| bytes as f64 / 1e9;
            Err(Error::Input(format!(
                "{}: the checkpoint needs {:.2} GB more and {:.2} GB are free there",
                to.display(),
                gb(bytes.saturating_sub(begun)),
                gb(free)
            )))
        }
        _ => Ok(()),
    }
}

/// Every tensor as it is, those that feed no weight too; of quantised releases numbers and scales, or what
/// they stand for.
fn copied(mapping: &Mapping, as_stored: bool) -> Result<Vec<Target>> {
    let checkpoint = mapping.checkpoint();
    let mut tensors: Vec<_> = match as_stored {
        true => checkpoint.stored().collect(),
        false => checkpoint.tensors().collect(),
    };
    tensors.sort_by_key(|(_, info)| (info.shard.clone(), info.range.start));
    let target = |(name, info): (&str, &TensorInfo)| {
        if !as_stored {
            return stored(mapping, name, name);
        }
        let (checkpoint, tensor) = (checkpoint.clone(), name.to_string());
        let open = move || checkpoint.stored_contents(&tensor);
        let (shape, bytes) = (info.shape.clone(), info.bytes());
        Ok(Target::stored(name, shape, &info.dtype, bytes, open))
    };
    tensors.into_iter().map(target).collect()
}

/// A tensor of the checkpoint under a name of its own.
fn stored(mapping: &Mapping, tensor: &str, name: &str) -> Result<Target> {
    let checkpoint = mapping.checkpoint().clone();
    let info = checkpoint.get(tensor);
    let info = info.ok_or_else(|| Error::Input(format!("there is no tensor {tensor:?}")))?;
    if let (Some(_), Ok(format)) = (&info.wide, info.runs_as()) {
        let (shape, tensor) = (info.shape.clone(), tensor.to_string());
        let open = move || Ok(Content::Widened(checkpoint.clone(), tensor.clone()));
        return Ok(Target::made(name, shape, format, open));
    }
    let (shape, dtype, bytes) = (info.shape.clone(), info.dtype.clone(), info.bytes());
    let tensor = tensor.to_string();
    let open = move || checkpoint.contents(&tensor);
    Ok(Target::stored(name, shape, &dtype, bytes, open))
}

/// The same plan, with blocks numbered by their places.
fn renumbered(plan: &Plan) -> Plan {
    let place = |(i, place): (usize, &Place)| Place {
        weights: plan::Origin::Block(i),
        ..place.clone()
    };
    Plan {
        stack: plan.stack.iter().enumerate().map(place).collect(),
        ..plan.clone()
    }
}

/// What a plan that somebody wrote is made of.
struct Edited {
    targets: Vec<Target>,
    /// Whether some have the plan's names, which only the plan tells.
    only_plan_names: bool,
}

/// The tensors of a plan that somebody wrote, under the names that the family publishes: moved blocks are
/// renamed, merged ones averaged, new ones drawn. What the family has no name for, or one name for what
/// differs here, gets the plan's name.
fn edited(
    planned: &Planned,
    new_plan: &Plan,
    mapping: &Mapping,
    seed: u64,
    notes: &mut Vec<String>,
) -> Result<Edited> {
    let identity = strata_converters::tensor_map::TensorMap::default();
    let map = planned.card.as_ref().map_or(&identity, |c| c.tensors());
    let rows: BTreeMap<&str, &Source> = mapping
        .rows()
        .iter()
        .map(|row| (row.path.as_str(), &row.source))
        .collect();
    let graph = Graph::lower(new_plan, &planned.label)?;
    // (new tensor, old tensors), in the order of the plan; and weights that are drawn.
    let mut moved: Vec<(String, Vec<String>)> = Vec::new();
    let mut drawn: Vec<(Source, Vec<usize>)> = Vec::new();
    let mut ours: Vec<(String, String)> = Vec::new();
    for weight in graph.weights() {
        let old = old_path(&weight.path, &planned.plan);
        let sources = map.find(&weight.path).sources;
        let Some(row) = rows.get(old.as_str()) else {
            let named = sources.into_iter().next();
            let source = named.unwrap_or_else(|| {
                ours.push((weight.path.clone(), old));
                Source::Tensor(weight.path.clone())
            });
            drawn.push((source, weight.spec.shape.clone()));
            continue;
        };
        // In the same form as the checkpoint has it.
        let mut ways = map.find(&old).sources.into_iter();
        let way = ways.position(|s| s.to_string() == row.to_string());
        let named = way.and_then(|way| sources.get(way));
        // Elsewhere the family may take another part of such a tensor.
        let same_part = |s: &&Source| {
            let here = s.to_string().replace(s.tensor(), row.tensor());
            row.tensors().len() > 1 || here == row.to_string()
        };
        let name = named.filter(same_part).map(|s| s.tensor().to_string());
        let from: Vec<String> = row.tensors().into_iter().map(ToString::to_string).collect();
        let taken = name
            .as_ref()
            .and_then(|name| moved.iter().find(|(n, _)| n == name));
        match (name, taken) {
            (Some(_), Some((_, other))) if *other == from => {}
            (Some(name), None) => moved.push((name, from)),
            (Some(_), Some(_)) | (None, _) => ours.push((weight.path.clone(), old)),
        }
    }
    let mut targets = Vec::new();
    for (name, from) in &moved {
        targets.push(match &from[..] {
            [one] => stored(mapping, one, name)?,
            several => mean(mapping, several, name)?,
        });
    }
    let only_plan_names = !ours.is_empty();
    for (name, old) in ours
        .into_iter()
        .filter(|(_, old)| rows.contains_key(old.as_str()))
    {
        let weight = mapping.load(&old)?;
        let (shape, elements) = (weight.shape().to_vec(), 0..weight.len());
        let runs = vec![(weight.clone(), elements).into()];
        let undo = Vec::new();
        let content = move || {
            Ok(Content::Made {
                runs: runs.clone(),
                undo: undo.clone(),
            })
        };
        targets.push(Target::made(name, shape, weight.format(), content));
    }
    if !drawn.is_empty() {
        let values: Vec<_> = graph
            .weights()
            .into_iter()
            .filter(|w| !rows.contains_key(old_path(&w.path, &planned.plan).as_str()))
            .collect();
        notes.push(format!(
            "{} weights of new blocks are drawn with seed {seed}: {} to {}",
            values.len(),
            values.first().map_or("", |w| &w.path),
            values.last().map_or("", |w| &w.path),
        ));
        let known = |tensor: &str| known_shape(mapping, tensor);
        for (name, made) in published::assemble(&drawn, known) {
            let made = made.map_err(|why| Error::Input(format!("{name}: {why}")))?;
            let format = declared(mapping);
            targets.push(assembled(name, &made, format, |weight| {
                let weight = &values[weight];
                // As a run of the plan draws them.
                let path = old_path(&weight.path, &planned.plan);
                let draw = random_weights::draw(seed, new_plan.init_std, &path, &weight.spec);
                Ok(strata_kernels::HostTensor::from_f32(
                    &weight.spec.shape,
                    &draw,
                )?)
            })?);
        }
    }
    Ok(Edited {
        targets,
        only_plan_names,
    })
}

/// The path that the weight at `path` of a renumbered plan has in the plan before.
fn old_path(path: &str, plan: &Plan) -> String {
    let parts = path.strip_prefix("blocks.").and_then(|p| p.split_once('.'));
    let found = parts.and_then(|(place, rest)| {
        let place: usize = place.parse().ok()?;
        let weights = plan.stack.get(place)?.weights.path(place);
        Some(format!("blocks.{weights}.{rest}"))
    });
    found.unwrap_or_else(|| path.into())
}

/// The shape of a tensor like this one, of another block.
fn known_shape(mapping: &Mapping, tensor: &str) -> Option<Vec<usize>> {
    let same = |name: &str| {
        let parts = || name.split('.').zip(tensor.split('.'));
        name.split('.').count() == tensor.split('.').count()
            && parts()
                .all(|(a, b)| a == b || (a.parse::<usize>().is_ok() && b.parse::<usize>().is_ok()))
    };
    let mut tensors = mapping.checkpoint().tensors();
    let found = tensors.find(|(name, _)| same(name));
    found.map(|(_, info)| info.shape.clone())
}

/// The format of most of a checkpoint's matrices; f32 if that has blocks.
fn declared(mapping: &Mapping) -> Format {
    let format = super::stored::main_format(mapping);
    if format.dtype().is_some() {
        format
    } else {
        Format::F32
    }
}

/// A tensor that is put together from weights.
fn assembled(
    name: String,
    made: &Assembled,
    format: Format,
    weight: impl Fn(usize) -> Result<strata_kernels::HostTensor>,
) -> Result<Target> {
    let part = |run: &Run| {
        Ok(Part {
            tensor: weight(run.weight)?,
            elements: run.elements.clone(),
            change: Step::times(run.times),
        })
    };
    let runs: Vec<Part> = made.runs.iter().map(part).collect::<Result<_>>()?;
    let undo = made.undo.clone();
    Ok(Target::made(name, made.shape.clone(), format, move || {
        Ok(Content::Made {
            runs: runs.clone(),
            undo: undo.clone(),
        })
    }))
}

/// The mean of several tensors of the checkpoint.
fn mean(mapping: &Mapping, tensors: &[String], name: &str) -> Result<Target> {
    let checkpoint = mapping.checkpoint().clone();
    let first = checkpoint.tensor(&tensors[0])?;
    let format = match first.format().dtype() {
        Some(_) => first.format(),
        None => Format::F32,
    };
    let source = Source::Mean(tensors.to_vec());
    let shape = first.shape().to_vec();
    Ok(Target::made(name, shape, format, move || {
        let mean = source.load(&checkpoint)?;
        let elements = 0..mean.len();
        Ok(Content::Made {
            runs: vec![(mean, elements).into()],
            undo: Vec::new(),
        })
    }))
}

/// Gives the tensors that matrices and tables are made from another element type. Small weights keep theirs.
fn retype(targets: &mut [Target], graph: &Graph, mapping: &Mapping, dtype: DType) {
    let wide: Vec<String> = graph
        .weights()
        .into_iter()
        .filter(|w| w.spec.role == Role::Vector)
        .map(|w| w.path)
        .collect();
    let mut small: Vec<&str> = Vec::new();
    for row in mapping.rows() {
        if wide.binary_search(&row.path).is_ok() || wide.contains(&row.path) {
            small.extend(row.source.tensors());
        }
    }
    small.sort_unstable();
    for target in targets {
        if small.binary_search(&target.name.as_str()).is_ok() {
            continue;
        }
        let checkpoint = mapping.checkpoint().clone();
        let name = target.name.clone();
        let info = checkpoint.get(&name);
        let same = |i: &TensorInfo| i.wide.is_some() && i.runs_as() == Ok(dtype.into());
        if info.is_none_or(|info| info.runs_as().is_err() || same(info)) {
            continue;
        }
        let open = {
            let name = name.clone();
            move || {
                let tensor = checkpoint.tensor(&name)?;
                let elements = 0..tensor.len();
                Ok(Content::Made {
                    runs: vec![(tensor, elements).into()],
                    undo: Vec::new(),
                })
            }
        };
        *target = Target::made(name, target.shape.clone(), dtype.into(), open);
    }
}

/// What a converted folder needs beside tensors: everything small that is no list of shards.
fn text_files(files: &ModelFiles) -> Result<BTreeMap<String, Vec<u8>>> {
    const KEPT: [&str; 7] = [
        ".json",
        ".txt",
        ".model",
        ".jinja",
        ".md",
        ".py",
        ".tiktoken",
    ];
    let mut texts = BTreeMap::new();
    if files.gguf().is_some() {
        // What metadata stands for.
        for name in [
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
        ] {
            if let Some(text) = files.text(name)? {
                texts.insert(name.to_string(), text.into_bytes());
            }
        }
        return Ok(texts);
    }
    for name in files.list()? {
        let kept = KEPT.iter().any(|end| name.ends_with(end)) || name.starts_with("LICENSE");
        if kept && !name.ends_with(".index.json") && !name.starts_with('.') {
            texts.insert(name.clone(), files.map(&name)?.bytes().to_vec());
        }
    }
    Ok(texts)
}

/// Changes the element type that a config.json names, and nothing else of it.
pub(super) fn set_dtype(config: &mut Vec<u8>, dtype: DType) {
    let word = match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    };
    let Ok(text) = std::str::from_utf8(config) else {
        return;
    };
    let mut text = text.to_string();
    for key in ["\"torch_dtype\"", "\"dtype\""] {
        let Some(at) = text.find(key) else { continue };
        let rest = &text[at + key.len()..];
        let Some(open) = rest.find('"') else { continue };
        let only_colon = rest[..open].chars().all(|c| c == ':' || c.is_whitespace());
        let Some(close) = rest[open + 1..].find('"') else {
            continue;
        };
        if only_colon {
            let start = at + key.len() + open + 1;
            text.replace_range(start..start + close, word);
        }
    }
    *config = text.into_bytes();
}

/// Hashes the files that decide the elements that are written.
fn identity(files: &ModelFiles, mapping: &Mapping, hash: &mut Xxh3) -> Result<()> {
    hash.update(files.name().as_bytes());
    let mut seen = std::collections::BTreeSet::new();
    for (_, info) in mapping.checkpoint().tensors() {
        if seen.insert(&info.shard) {
            let (bytes, changed) = files.stamp(&info.shard)?;
            hash.update(info.shard.as_bytes());
            hash.update(&bytes.to_le_bytes());
            hash.update(&changed.to_le_bytes());
        }
    }
    Ok(())
}
