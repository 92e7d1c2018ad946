//! Conversions to and from GGUF files.

use std::collections::BTreeMap;

use strata_converters::gguf::original;
use strata_converters::gguf::write::{self as gguf_write, Input};
use strata_converters::mapping::Mapping;
use strata_converters::published::{self, Step};
use strata_converters::tensor_map::Source;
use strata_converters::write::{Content, Part, Progress, Target};
use strata_converters::{Gguf, ModelFiles};
use strata_kernels::{DType, Format, HostTensor};
use strata_layers::graph::GraphWeight;
use strata_layers::{Graph, Role};

use super::convert::{ConvertOptions, Converted, check_space};
use super::locate::Planned;
use super::{Error, Result};
use crate::importance::Importance;

/// Writes a GGUF file.
pub(super) fn to_gguf(
    options: &ConvertOptions,
    planned: &Planned,
    files: &ModelFiles,
    mapping: &Mapping,
    importance: Option<&Importance>,
    mut converted: Converted,
    progress: &mut dyn Progress,
) -> Result<Converted> {
    let (Some(card), Some(config)) = (&planned.published, &planned.config) else {
        return Err(Error::Input(
            "a GGUF file needs a config.json, whose card says how the family is written there"
                .into(),
        ));
    };
    let input = Input {
        files,
        card,
        config,
        plan: &planned.plan,
        mapping,
    };
    let choose = |weight: &GraphWeight| {
        let chosen = options.quantize.as_ref().and_then(|r| r.choose(weight));
        chosen.or(options.dtype.map(Format::from))
    };
    // What the tensors will take: the header and F32 vectors beside them are small.
    let stored: BTreeMap<&str, usize> = mapping
        .rows()
        .iter()
        .map(|row| (row.path.as_str(), row.bytes))
        .collect();
    let bytes = |weight: &GraphWeight| {
        let made = choose(weight).and_then(|f| f.bytes_of(&weight.spec.shape));
        made.or(stored.get(weight.path.as_str()).copied())
            .unwrap_or(0) as u64
    };
    check_space(&options.to, planned.graph.weights().iter().map(bytes).sum())?;
    let weigh = |path: &str| importance.and_then(|i| i.of(path));
    let how = gguf_write::Options {
        choose: &choose,
        weigh: &weigh,
        threads: options.threads,
        force: options.force,
    };
    let written = gguf_write::write(&options.to, &input, &how, progress)?;
    converted.tensors = written.tensors;
    converted.bytes = written.bytes;
    let name = options.to.file_name().unwrap_or_default();
    converted.files = vec![name.to_string_lossy().into_owned()];
    converted.notes.extend(written.notes);
    Ok(converted)
}

/// The tensors of a GGUF file under the names that the family publishes, in the types that they had before;
/// and the config.json that the file keeps.
pub(super) fn from_gguf(
    planned: &Planned,
    gguf: &Gguf,
    mapping: &Mapping,
    dtype: Option<DType>,
) -> Result<(Vec<Target>, Option<String>)> {
    let (Some(family), Some(file)) = (&planned.published, &planned.card) else {
        return Err(Error::Input(
            "the file's family has no card, which would name its tensors".into(),
        ));
    };
    let original = original::of(gguf, family, &planned.plan.name);
    let (weights, card, file) = match &original {
        Some(o) => {
            let graph = Graph::lower(&o.plan, &planned.label)?;
            (graph.weights(), &o.published, &o.written)
        }
        None => (planned.graph.weights(), family, file),
    };
    let mut sources: Vec<(Source, Vec<usize>)> = Vec::new();
    for weight in &weights {
        let found = card.tensors().find(&weight.path).sources.into_iter().next();
        let source = found
            .ok_or_else(|| Error::Input(format!("{}: the card has no name for it", weight.path)))?;
        sources.push((source, weight.spec.shape.clone()));
    }
    let checkpoint = mapping.checkpoint();
    // What a weight is in the file.
    let stored = |path: &str| {
        let found = file.tensors().find(path).sources;
        let there = |s: &Source| checkpoint.get(s.tensor()).is_some();
        found
            .into_iter()
            .find(there)
            .ok_or_else(|| Error::Input(format!("{path}: the file has no tensor for it")))
    };
    let before: BTreeMap<String, String> = gguf
        .text(gguf_write::DTYPES)
        .and_then(|text| serde_json::from_str(text).ok())
        .unwrap_or_default();
    let mut targets = Vec::new();
    for (name, made) in published::assemble(&sources, |_| None) {
        let made = made.map_err(|why| Error::Input(format!("{name}: {why}")))?;
        let was = before
            .get(&name)
            .and_then(|d| Format::named(&d.to_lowercase()));
        let mut runs: Vec<Part> = Vec::new();
        let mut format = was;
        for run in &made.runs {
            let weight = &weights[run.weight];
            let found = stored(&weight.path)?;
            let factors = published::factors(&found, &weight.spec.shape);
            let bare = factors.as_ref().map_or(&found, |f| &f.0);
            let tensor = bare.load(checkpoint)?;
            let matrix = weight.spec.role != Role::Vector;
            let in_blocks = tensor.format().dtype().is_none();
            let chosen = match (matrix, dtype) {
                (true, Some(dtype)) => dtype.into(),
                (true, None) if in_blocks => Format::BF16,
                _ => was.unwrap_or(tensor.format()),
            };
            format = Some(chosen);
            if !made.undo.is_empty() || original::has_kept(gguf, &weight.path) {
                // What cannot be computed back lies in the file.
                let source = &sources[run.weight].0;
                let tensor = found.load(checkpoint)?;
                let values = original::values(gguf, &weight.path, &tensor, source, chosen);
                let tensor = HostTensor::from_f32(&weight.spec.shape, &values)?;
                runs.push((tensor, run.elements.clone()).into());
                continue;
            }
            let whole = vec![(run.elements.clone(), 1.0)];
            for (range, factor) in factors.map_or(whole, |f| f.1) {
                let from = range.start.max(run.elements.start);
                let to = range.end.min(run.elements.end);
                if from < to {
                    runs.push(Part {
                        tensor: tensor.clone(),
                        elements: from..to,
                        change: Step::over(factor),
                    });
                }
            }
        }
        let format = format.unwrap_or(Format::F32);
        targets.push(Target::made(name, made.shape, format, move || {
            Ok(Content::Made {
                runs: runs.clone(),
                undo: Vec::new(),
            })
        }));
    }
    Ok((targets, original.map(|o| o.text)))
}
