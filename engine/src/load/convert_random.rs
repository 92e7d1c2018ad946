//! A checkpoint of random weights from a config.json alone, so that other programs can run a shape too.

use std::collections::BTreeMap;
use std::path::Path;

use strata_converters::published::{self, Assembled, Step};
use strata_converters::tensor_map::Source;
use strata_converters::write::{Content, Part, Progress, Target};
use strata_kernels::{DType, Format, HostTensor};
use strata_layers::Role;
use strata_layers::graph::GraphWeight;

use super::convert::{CONFIG, ConvertOptions, Converted, set_dtype, write_folder};
use super::locate::{Located, Planned, planned};
use super::{Error, Result};
use crate::random_weights;

/// Writes a folder whose weights are drawn as `--random SEED` draws them for a run, under the names that the family
/// publishes: matrices in the type asked for, or that the config names, or in BF16; what is small in F32.
pub(super) fn convert_random(
    options: &ConvertOptions,
    located: &Located,
    seed: u64,
    progress: &mut dyn Progress,
) -> Result<Converted> {
    if options.gguf || options.quantize.is_some() {
        return Err(Error::Input(
            "--random writes a folder of safetensors; convert that folder to GGUF, or with --quantize".into(),
        ));
    }
    let text = match located {
        Located::Config(path) => bytes_of(path)?,
        Located::Files(files) => files.map(CONFIG)?.bytes().to_vec(),
        Located::Plan(path) => {
            return Err(Error::Input(format!(
                "{}: a plan has no names for tensors of a checkpoint; --random needs a config.json here",
                path.display()
            )));
        }
    };
    let planned = planned(&options.from, located)?;
    let dtype = options.dtype.or(planned.declared_dtype());
    let dtype = dtype.unwrap_or(DType::BF16);
    let targets = targets(&planned, seed, dtype)?;
    let mut texts = BTreeMap::from([(CONFIG.to_string(), text)]);
    if let Some(config) = texts.get_mut(CONFIG) {
        set_dtype(config, dtype);
    }
    let converted = Converted {
        notes: vec![format!(
            "weights are drawn with seed {seed}: they know nothing"
        )],
        ..Converted::default()
    };
    let plan = planned.plan.print();
    write_folder(
        options,
        &targets,
        texts,
        &|hash| {
            hash.update(&seed.to_le_bytes());
            hash.update(plan.as_bytes());
            Ok(())
        },
        converted,
        progress,
    )
}

fn bytes_of(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| Error::Io {
        path: path.into(),
        source,
    })
}

/// Every tensor of the family's checkpoint, drawn when it is written.
fn targets(planned: &Planned, seed: u64, dtype: DType) -> Result<Vec<Target>> {
    let Some(card) = &planned.published else {
        return Err(Error::Input(
            "--random needs a config.json whose family has a card, which names the tensors".into(),
        ));
    };
    let weights = planned.graph.weights();
    let mut sources: Vec<(Source, Vec<usize>)> = Vec::new();
    for weight in &weights {
        let source = card.tensors().find(&weight.path).sources.into_iter().next();
        let unnamed = || Error::Input(format!("{}: the card has no name for it", weight.path));
        sources.push((source.ok_or_else(unnamed)?, weight.spec.shape.clone()));
    }
    let init_std = planned.plan.init_std;
    let target = |(name, made): (String, std::result::Result<Assembled, String>)| {
        let made = made.map_err(|why| Error::Input(format!("{name}: {why}")))?;
        let of: BTreeMap<usize, GraphWeight> = made
            .runs
            .iter()
            .map(|run| (run.weight, weights[run.weight].clone()))
            .collect();
        let small = of.values().all(|w| w.spec.role == Role::Vector);
        let format = Format::from(if small { DType::F32 } else { dtype });
        let shape = made.shape.clone();
        Ok(Target::made(name, shape, format, move || {
            let mut drawn: BTreeMap<usize, HostTensor> = BTreeMap::new();
            for (i, weight) in &of {
                let values = random_weights::draw(seed, init_std, &weight.path, &weight.spec);
                let tensor = HostTensor::from_f32(&weight.spec.shape, &values)?;
                drawn.insert(*i, tensor);
            }
            let part = |run: &published::Run| Part {
                tensor: drawn[&run.weight].clone(),
                elements: run.elements.clone(),
                change: Step::times(run.times),
            };
            Ok(Content::Made {
                runs: made.runs.iter().map(part).collect(),
                undo: made.undo.clone(),
            })
        }))
    };
    published::assemble(&sources, |_| None)
        .into_iter()
        .map(target)
        .collect()
}
