//! Matrices in int8 or fp8 in a folder of safetensors, as releases of compressed-tensors have them.
//!
//! A matrix `x.weight` is its codes (I8, F8_E4M3) and `x.weight_scale`, F32 of (rows, 1). config.json's
//! `quantization_config` says so to other programs, and names the modules that stay as they are.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;
use strata_converters::checkpoint::TensorInfo;
use strata_converters::mapping::Mapping;
use strata_converters::write::{Content, Target};
use strata_converters::{Card, Config};
use strata_kernels::Format;
use strata_layers::Role;
use strata_layers::graph::GraphWeight;

use super::{Error, Result};
use crate::recipe::Recipe;

/// What a module's matrix is called, and what its scales add to that.
const WEIGHT: &str = ".weight";
const SCALE: &str = "_scale";
/// The path of the output matrix.
const HEAD: &str = "head";

/// Says why a recipe cannot be written to safetensors.
pub(super) fn refusal(recipe: &Recipe) -> Option<Error> {
    let format = format(recipe);
    if let Some(other) = recipe.formats().find(|f| !f.scales_rows()) {
        return Some(Error::Input(format!(
            "safetensors has no blocks of {other}: write a GGUF file (--to gguf), or quantise while loading; of what is quantised, int8 and fp8 are written to a folder"
        )));
    }
    let other = recipe.formats().find(|f| *f != format)?;
    Some(Error::Input(format!(
        "{} has matrices in {format} and in {other}, and a folder is written in one of them",
        recipe.name
    )))
}

/// The format with a scale a row that a recipe has.
pub(super) fn format(recipe: &Recipe) -> Format {
    let mut formats = recipe.formats();
    formats.find(|f| f.scales_rows()).unwrap_or(Format::Int8)
}

/// The targets with the matrices that the recipe chooses in its format, and the names of the modules that are not.
///
/// Those are matrices of (rows, columns) that only products read: what other programs know as linear layers.
pub(super) fn by_rows(
    targets: Vec<Target>,
    weights: &[GraphWeight],
    card: Option<&Card>,
    mapping: &Mapping,
    recipe: &Recipe,
    notes: &mut Vec<String>,
) -> Result<(Vec<Target>, Vec<String>)> {
    let format = format(recipe);
    let by_path: BTreeMap<&str, &GraphWeight> =
        weights.iter().map(|w| (w.path.as_str(), w)).collect();
    // The weights that each tensor is read for.
    let mut readers: BTreeMap<&str, Vec<&GraphWeight>> = BTreeMap::new();
    for row in mapping.rows() {
        for tensor in row.source.tensors() {
            let weight = by_path.get(row.path.as_str()).copied();
            readers.entry(tensor).or_default().extend(weight);
        }
    }
    let checkpoint = mapping.checkpoint();
    let wanted = |w: &&GraphWeight| w.spec.role != Role::Vector && recipe.choose(w).is_some();
    let is_float = |info: &TensorInfo| info.runs_as().is_ok_and(|format| format.dtype().is_some());
    let (mut made, mut ignored, mut kept) = (Vec::new(), BTreeSet::new(), 0);
    let mut count = 0;
    for target in targets {
        let of = readers.get(target.name.as_str()).map_or(&[][..], |of| of);
        let asked = !of.is_empty() && of.iter().all(wanted);
        let module = target.name.strip_suffix(WEIGHT);
        let info = checkpoint.get(&target.name).filter(|info| is_float(info));
        let linear = of.iter().all(|w| w.spec.role == Role::Matrix);
        match (module, info, &target.shape[..]) {
            (Some(_), Some(_), &[rows, columns]) if asked && linear => {
                let (checkpoint, name) = (checkpoint.clone(), target.name.clone());
                let names = [name.clone(), format!("{name}{SCALE}")];
                made.extend(Target::by_rows(format, names, [rows, columns], move || {
                    let tensor = checkpoint.tensor(&name)?;
                    let elements = 0..tensor.len();
                    Ok(Content::Made {
                        runs: vec![(tensor, elements).into()],
                        undo: Vec::new(),
                    })
                }));
                count += 1;
            }
            (module, _, shape) => {
                kept += usize::from(asked);
                if let (Some(module), [_, _]) = (module, shape) {
                    ignored.insert(module.to_string());
                }
                made.push(target);
            }
        }
    }
    if count == 0 {
        return Err(Error::Input(format!(
            "no matrix of this model is written in {format}: none is read as a linear layer of its own"
        )));
    }
    // A head that is the embedding again is a module without a tensor.
    let head = card.map(|card| card.tensors().find(HEAD).sources);
    for source in head.iter().flatten() {
        let module = source.tensor().strip_suffix(WEIGHT);
        if !readers.contains_key(source.tensor()) {
            ignored.extend(module.map(ToString::to_string));
        }
    }
    notes.push(format!(
        "{count} matrices are written in {format}, a scale a row"
    ));
    if kept > 0 {
        let (these, stay) = match kept {
            1 => ("tensor that is", "stays as it is"),
            _ => ("tensors that are", "stay as they are"),
        };
        notes.push(format!(
            "{kept} {these} no linear layer (a table, a stack of experts) {stay}, where --quantize while loading takes all"
        ));
    }
    Ok((made, ignored.into_iter().collect()))
}

/// Says in a config how the matrices are stored: a scale a row, and inputs as they run here, of int8 rounded row by
/// row.
pub(super) fn declare(config: &mut Config, format: Format, ignored: &[String]) -> Result<()> {
    let (kind, layout) = match format {
        Format::Fp8 => ("float", "float-quantized"),
        _ => ("int", "int-quantized"),
    };
    let scheme = |strategy: &str, dynamic: bool| {
        json!({
            "num_bits": 8, "type": kind, "symmetric": true, "strategy": strategy, "dynamic": dynamic,
            "group_size": null, "block_structure": null, "actorder": null,
        })
    };
    let said = json!({
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": scheme("channel", false),
                "input_activations": format.rounds_inputs().then(|| scheme("token", true)),
                "output_activations": null,
            },
        },
        "ignore": ignored,
        "kv_cache_scheme": null,
    });
    config.set("quantization_config", &said.to_string())?;
    Ok(())
}
