//! What a GGUF file that was written here says of the model that it was made from.
//!
//! Such a file keeps the model's config.json, and of elements that cannot be computed back exactly, as
//! A_log from A or a weight from its product with a factor, the place and the bits. llama.cpp ignores
//! such keys.

use std::collections::BTreeMap;
use std::ops::Range;

use strata_kernels::{Format, HostTensor};
use strata_layers::Plan;

use super::Gguf;
use super::builder::Builder;
use crate::card::Card;
use crate::config::Config;
use crate::error::Result;
use crate::mapping::{Mapping, Row};
use crate::published;
use crate::tensor_map::Source;
use crate::transforms::{Undo, over, times};

/// The key of the config.json.
pub(super) const CONFIG: &str = "strata.config";
/// Before the paths of weights with elements that are kept.
const KEPT: &str = "strata.kept";
/// Elements that are compared at a time.
const PIECE: usize = 1 << 20;

/// The model that a file was made from.
#[derive(Debug)]
pub struct Original {
    /// Its config.json.
    pub text: String,
    /// Its plan, which may have apart what the file's weights hold.
    pub plan: Plan,
    /// The names that the family publishes.
    pub published: Card,
    /// The names in the file.
    pub written: Card,
}

/// The model that a file was made from; none if the file was not written here, or is another model by now.
/// `card` is the family's.
pub fn of(gguf: &Gguf, card: &Card, name: &str) -> Option<Original> {
    let text = gguf.text(CONFIG)?.to_string();
    let config = Config::parse(&text, gguf.label()).ok()?;
    let mut plan = card.plan(&config, name).ok()?;
    let held = match card.folded(&config).ok()? {
        Some(folded) => card.plan(&folded, name).ok()?,
        None => plan.clone(),
    };
    let said = card.plan(&card.config_of(gguf).ok()?, name).ok()?;
    // What no file says, and nothing runs by.
    let mut said = Plan {
        init_std: held.init_std,
        context: held.context,
        ..said
    };
    if said.head.tie != held.head.tie {
        // The config said "tied" of a model that is not.
        plan.head.tie = said.head.tie;
        said.head.tie = held.head.tie;
    }
    (said == held).then_some(())?;
    Some(Original {
        published: card.bound(&config).ok()?,
        written: card.for_writing(&config).ok()?,
        text,
        plan,
    })
}

/// One step back: what it does, and its number.
type Back = (fn(f32, f64) -> f32, f64);

/// What a weight was computed by from its tensor, and the tensor as it was before. None if elements were
/// rearranged on the way: their places would be others.
fn steps(source: &Source) -> Option<(Vec<Back>, &Source)> {
    let mut steps: Vec<Back> = Vec::new();
    let mut at = source;
    while let Source::Call(transform, inner, numbers) = at {
        match transform.undo {
            Undo::Values(undo) => steps.push((undo, numbers.first().copied().unwrap_or(0.0))),
            Undo::Shape(_) => {}
            _ => return None,
        }
        at = inner;
    }
    (!steps.is_empty()).then_some((steps, at))
}

fn round(x: f32, format: Format) -> f32 {
    match format {
        Format::F16 => half::f16::from_f32(x).to_f32(),
        Format::BF16 => half::bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// Notes in the header, where an element of `mapping` cannot be computed back from the file, its place and
/// its bits. `written` has the names in the file, `formats` the format of each weight there; of weights
/// that somebody made coarser nothing is kept. The number of elements.
pub(super) fn keep(
    mapping: &Mapping,
    written: &Card,
    formats: &BTreeMap<String, Format>,
    header: &mut Builder,
) -> Result<usize> {
    let mut kept = 0;
    for row in mapping.rows() {
        let file = written.tensors().find(&row.path).sources.into_iter().next();
        let factors = file.and_then(|s| published::factors(&s, &row.shape));
        let format = formats.get(&row.path).copied().unwrap_or(Format::F32);
        let wrong = match (steps(&row.source), &factors) {
            (None, None) => continue,
            _ if format != Format::F32 && format != row.format => continue,
            (Some((steps, at)), factors) => {
                let (original, weight) = (at.load(mapping.checkpoint())?, mapping.load(&row.path)?);
                let mut values = weight.to_f32();
                for (range, factor) in factors.iter().flat_map(|f| &f.1) {
                    let back = |v: &mut f32| *v = over(round(times(*v, *factor), format), *factor);
                    values[range.clone()].iter_mut().for_each(back);
                }
                let values = undone(&values, &steps, original.format());
                differing(&original.to_f32(), &values, 0)
            }
            (None, Some((_, factors))) => scaled(mapping, row, factors, format)?,
        };
        kept += wrong.len() / 2;
        if !wrong.is_empty() {
            header.uints(&format!("{KEPT}.{}", row.path), &wrong);
        }
    }
    Ok(kept)
}

/// Of a weight whose product with factors is written: what does not come back.
fn scaled(
    mapping: &Mapping,
    row: &Row,
    factors: &[(Range<usize>, f64)],
    format: Format,
) -> Result<Vec<u32>> {
    let weight = mapping.load(&row.path)?;
    let mut wrong = Vec::new();
    let mut values = Vec::new();
    for (range, factor) in factors {
        let mut at = range.start;
        while at < range.end {
            let end = (at + PIECE).min(range.end);
            values.resize(end - at, 0.0);
            weight.widen(at..end, &mut values)?;
            let back = |v: &f32| {
                let back = over(round(times(*v, *factor), format), *factor);
                round(back, weight.format())
            };
            let back: Vec<f32> = values.iter().map(back).collect();
            wrong.extend(differing(&values, &back, at));
            weight.forget(at..end);
            at = end;
        }
    }
    Ok(wrong)
}

/// The places, counted from `first`, and bits of what differs.
fn differing(values: &[f32], back: &[f32], first: usize) -> Vec<u32> {
    let each = values.iter().zip(back).enumerate();
    each.filter(|(_, (a, b))| a.to_bits() != b.to_bits())
        .flat_map(|(i, (a, _))| [(first + i) as u32, a.to_bits()])
        .collect()
}

/// The values before some steps, rounded to the format they had.
fn undone(values: &[f32], steps: &[Back], format: Format) -> Vec<f32> {
    let back = |x: &f32| {
        round(
            steps.iter().fold(*x, |x, (undo, number)| undo(x, *number)),
            format,
        )
    };
    values.iter().map(back).collect()
}

/// Whether some elements of a weight are kept.
pub fn has_kept(gguf: &Gguf, path: &str) -> bool {
    gguf.value(&format!("{KEPT}.{path}")).is_some()
}

/// The tensor that a weight of a GGUF file was computed from when the file was written: `source` says how,
/// `format` what it had. The same bits as the original's, as what differs is kept in the file.
pub fn values(
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
    let mut values = undone(&weight.to_f32(), &steps, format);
    let Some((_, mut items)) = gguf.items(&format!("{KEPT}.{path}")) else {
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
