//! Weights in FP8, FP4 or whole numbers with scales beside them, shown as one tensor of floats.
//!
//! Published releases keep a matrix `x.weight` as small numbers q and scales s: w = q · s, where a scale
//! belongs to the whole tensor, to a row, or to a block of it. The layouts differ in names only:
//!
//! | release | numbers | scales |
//! | --- | --- | --- |
//! | compressed-tensors, FP8 or INT8 | `weight` | `weight_scale` |
//! | compressed-tensors, packed INT4 or INT8 | `weight_packed` I32, `weight_shape` | `weight_scale` |
//! | compressed-tensors, NVFP4 and MXFP4 | `weight_packed` U8 | `weight_scale`, ÷ `weight_global_scale` |
//! | ModelOpt, FP8 and MXFP8 | `weight` | `weight_scale` |
//! | ModelOpt, NVFP4 | `weight` U8 | `weight_scale`, × `weight_scale_2` |
//! | fine-grained FP8 | `weight` | `weight_scale_inv` |
//!
//! Here `x.weight` takes their place in the checkpoint. INT8 and FP8 (E4M3) with a scale for the tensor or a row are
//! the formats int8 and fp8: numbers and scale of a row are brought together when they are asked for. Other elements,
//! those of FP8 with scales for blocks or in E5M2 among them, are then computed in f32 and
//! rounded once, to BF16 unless f32 is wanted. What an engine would round activations with (`input_scale`,
//! `k_scale`, …) is left out, and told.
//!
//! Sources: the packages compressed-tensors and ModelOpt, transformers' `finegrained_fp8`.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use strata_kernels::Format;
use strata_kernels::tensor::HostBytes;
use strata_layers::Mark;
use strata_layers::param::list_of;
use strata_layers::yaml::Value;

use crate::checkpoint::{FILES, TENSORS, TensorInfo};
use crate::config::Config;
use crate::files::ModelFiles;
use crate::report::Report;
use crate::view;

/// The values of `quant_method` whose layouts are those above.
const METHODS: [&str; 4] = ["compressed-tensors", "fp8", "fbgemm_fp8", "modelopt"];
/// What belongs to activations, by the ends of names.
const ACTIVATIONS: [&str; 9] = [
    ".input_scale",
    ".input_global_scale",
    ".input_zero_point",
    ".output_scale",
    ".activation_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".kv_cache_scaling_factor",
];
/// Rows and columns of a block of fine-grained FP8, if no config says otherwise.
const BLOCK: usize = 128;

/// The files of a checkpoint.
type Shards = BTreeMap<String, Arc<dyn HostBytes>>;

/// A weight that is computed from numbers and scales.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wide {
    /// What it is stored as, for people: `FP8`, `FP4`, `INT4`.
    pub stored: &'static str,
    kind: Kind,
    scale: TensorInfo,
    /// For each dimension: how many entries share a scale, and how many scales there are.
    blocks: Vec<(usize, usize)>,
    global: Option<(Global, TensorInfo)>,
    /// Sizes of all dimensions but the last, and of the last.
    outer: Vec<usize>,
    columns: usize,
    /// Elements from row to row as they are stored: rows of whole words may be longer.
    row: usize,
}

/// How the numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// 1 sign, 4 exponent and 3 mantissa bits; no infinities.
    E4m3,
    /// 1, 5 and 2 bits.
    E5m2,
    I8,
    /// 1, 2 and 1 bits, two a byte, the lower half first.
    Fp4,
    /// Offset by half their range, the lowest bits of a 32-bit word first.
    Packed(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Global {
    Times,
    Divides,
}

/// What a config says of how a model is stored.
#[derive(Debug, Default)]
struct Scheme {
    /// Whether it says anything.
    found: bool,
    /// `quant_method`, and where it stands.
    method: Option<(String, String)>,
    /// Rows and columns that share a scale.
    block: Option<[usize; 2]>,
}

/// Puts the weights of a quantised release in the place of the tensors that they are stored as, and leaves
/// out what only concerns activations. What does not fit is reported.
pub(crate) fn present(
    tensors: &mut BTreeMap<String, TensorInfo>,
    shards: &Shards,
    files: &ModelFiles,
    report: &mut Report,
) {
    let float = |i: &TensorInfo| ["F32", "F16", "BF16"].contains(&i.dtype.as_str());
    let small = |name: &str, i: &TensorInfo| {
        i.dtype.starts_with("F8_")
            || name.ends_with("_packed")
            || !float(i) && name.ends_with("weight")
    };
    if !tensors.iter().any(|(name, info)| small(name, info)) {
        return;
    }
    let scheme = Scheme::read(files);
    if let Some((method, file)) = &scheme.method
        && !METHODS.contains(&method.as_str())
    {
        let known = list_of(METHODS);
        let message = format!(
            "{file} says that the weights are quantised by {method:?}, which is not read; read are {known}"
        );
        return report.add(FILES, Mark::default(), message);
    }
    let mut counts: BTreeMap<(&'static str, bool), usize> = BTreeMap::new();
    let names: Vec<String> = tensors.keys().cloned().collect();
    for name in names {
        // What was consumed with an earlier one is gone.
        let Some(info) = tensors.get(&name) else {
            continue;
        };
        match weight(&name, info, tensors, shards, &scheme) {
            None => {}
            Some(Ok(made)) => {
                made.consumed.iter().for_each(|n| {
                    tensors.remove(n);
                });
                if let Some(wide) = &made.info.wide {
                    let runs = wide.by_rows().is_some();
                    *counts.entry((wide.stored, runs)).or_default() += 1;
                }
                tensors.insert(made.name, made.info);
            }
            Some(Err(why)) => {
                let message = format!("{}: tensor {name:?}: {why}", info.shard);
                report.add(TENSORS, Mark::default(), message);
            }
        }
    }
    for ((stored, runs), count) in &counts {
        let plural = if *count == 1 {
            "matrix is"
        } else {
            "matrices are"
        };
        let how = match runs {
            true => "with a scale a row, as they run",
            false => "and widened while loading, to BF16 or with --dtype f32 to F32",
        };
        report.note(format!("{count} {plural} stored in {stored} {how}"));
    }
    if scheme.found || !counts.is_empty() {
        let before = tensors.len();
        tensors.retain(|name, _| !ACTIVATIONS.iter().any(|end| name.ends_with(end)));
        let dropped = before - tensors.len();
        if dropped > 0 {
            report.note(format!(
                "{dropped} scales of activations and of keys and values are not used: those are not rounded here"
            ));
        }
    }
}

/// A weight, and the tensors that it takes the place of.
struct Made {
    name: String,
    info: TensorInfo,
    consumed: Vec<String>,
}

/// The weight that a tensor's numbers are of; none if it holds no such numbers.
fn weight(
    name: &str,
    info: &TensorInfo,
    tensors: &BTreeMap<String, TensorInfo>,
    shards: &Shards,
    scheme: &Scheme,
) -> Option<Result<Made, String>> {
    let packed = name.strip_suffix("_packed");
    let base = packed.unwrap_or(name);
    let beside = |end: &str| {
        let name = format!("{base}{end}");
        tensors.get(&name).map(|info| (name, info))
    };
    let scale = beside("_scale").or_else(|| beside("_scale_inv"));
    // Whole numbers without scales are somebody else's, and so is what is no weight.
    let scaled = scale.is_some() || base.ends_with("weight");
    let kind = match (info.dtype.as_str(), packed) {
        ("F8_E4M3", None) if scaled => Kind::E4m3,
        ("F8_E5M2", None) if scaled => Kind::E5m2,
        ("I8", None) if scale.is_some() => Kind::I8,
        ("U8", None) if scale.is_some() => Kind::Fp4,
        ("U8", Some(_)) => Kind::Fp4,
        ("I32", Some(_)) => Kind::Packed(0),
        (other, Some(_)) => return Some(Err(format!("is packed in {other}; U8 and I32 are read"))),
        _ => return None,
    };
    let made = || -> Result<Made, String> {
        let mut consumed = vec![name.to_string()];
        let (scale_name, scale) = scale.clone().ok_or_else(|| {
            format!("its scales are not there, neither {base}_scale nor {base}_scale_inv")
        })?;
        consumed.push(scale_name.clone());
        for end in ["_zero_point", "_g_idx"] {
            if let Some((name, _)) = beside(end) {
                return Err(format!("{name} is beside it, which is not read"));
            }
        }
        if info.strides.is_some() || scale.strides.is_some() {
            return Err(
                "numbers and scales that do not lie one behind the other are not read".into(),
            );
        }
        let (mut shape, mut kind) = (info.shape.clone(), kind);
        let last = |shape: &mut Vec<usize>, by: usize| -> Result<usize, String> {
            let last = shape.last_mut().ok_or("a scalar is not packed")?;
            *last = last.checked_mul(by).ok_or("its shape overflows")?;
            Ok(*last)
        };
        let stored = match &mut kind {
            Kind::E4m3 | Kind::E5m2 => "FP8",
            Kind::I8 => "INT8",
            Kind::Fp4 => {
                last(&mut shape, 2)?;
                "FP4"
            }
            Kind::Packed(bits) => {
                let (from, sizes) =
                    beside("_shape").ok_or_else(|| format!("{base}_shape is not there"))?;
                let unpacked = numbers(sizes, shards).filter(|s| s.len() == shape.len());
                shape = unpacked.ok_or_else(|| format!("{from} holds no shape for {shape:?}"))?;
                consumed.push(from);
                let words = |bits: usize| {
                    let columns = shape.last().and_then(|c| c.checked_mul(bits));
                    columns.map(|c| c.div_ceil(32)) == info.shape.last().copied()
                };
                let same_rows = shape
                    .iter()
                    .rev()
                    .skip(1)
                    .eq(info.shape.iter().rev().skip(1));
                *bits = [4, 8]
                    .into_iter()
                    .find(|b| words(*b as usize))
                    .filter(|_| same_rows)
                    .ok_or_else(|| {
                        format!(
                            "{:?} words do not hold {shape:?} numbers of 4 or 8 bits",
                            info.shape
                        )
                    })?;
                match bits {
                    4 => "INT4",
                    _ => "INT8",
                }
            }
        };
        let row = match kind {
            Kind::Packed(bits) => info.shape.last().map_or(0, |w| w * 32 / bits as usize),
            _ => shape.last().copied().unwrap_or(1),
        };
        let blocks = blocks(&shape, &scale.shape, scheme).ok_or_else(|| {
            let block = scheme
                .block
                .map_or(String::new(), |[r, c]| format!(" in blocks of {r} × {c}"));
            format!(
                "its scales {scale_name} have the shape {:?}, which does not fit {shape:?}{block}",
                scale.shape
            )
        })?;
        if bytes_of_scale(&scale.dtype).is_none() {
            return Err(format!(
                "its scales {scale_name} are in {}, which is not read",
                scale.dtype
            ));
        }
        let global = match (beside("_scale_2"), beside("_global_scale")) {
            (Some(found), _) => Some((Global::Times, found)),
            (_, Some(found)) => Some((Global::Divides, found)),
            _ => None,
        };
        if let Some((_, (name, info))) = &global {
            if view::elements(&info.shape) != Some(1) || bytes_of_scale(&info.dtype).is_none() {
                return Err(format!(
                    "its scale {name} should be one number, and is {:?} of {}",
                    info.shape, info.dtype
                ));
            }
            consumed.push(name.clone());
        }
        let global = global.map(|(how, (_, info))| (how, info.clone()));
        let wide = Wide {
            stored,
            kind,
            scale: scale.clone(),
            blocks,
            global,
            outer: shape.iter().rev().skip(1).rev().copied().collect(),
            columns: shape.last().copied().unwrap_or(1),
            row,
        };
        let info = TensorInfo {
            dtype: wide.by_rows().map_or("BF16", |_| wide.stored).into(),
            shape,
            wide: Some(Arc::new(wide)),
            ..info.clone()
        };
        Ok(Made {
            name: base.into(),
            info,
            consumed,
        })
    };
    Some(made())
}

/// The whole numbers of a tensor, if they are sizes.
fn numbers(info: &TensorInfo, shards: &Shards) -> Option<Vec<usize>> {
    let bytes = shards.get(&info.shard)?.bytes().get(info.range.clone())?;
    let read = |b: &[u8]| match b.len() {
        8 => i64::from_le_bytes(b.try_into().ok()?).try_into().ok(),
        _ => i32::from_le_bytes(b.try_into().ok()?).try_into().ok(),
    };
    let size = match info.dtype.as_str() {
        "I64" => 8,
        "I32" => 4,
        _ => return None,
    };
    if info.strides.is_some() || bytes.len() > 16 * size {
        return None;
    }
    let sizes: Vec<usize> = bytes.chunks_exact(size).map(read).collect::<Option<_>>()?;
    view::elements(&sizes).map(|_| sizes)
}

/// Entries of each dimension that share a scale, and the scales that there are: of one size, or of blocks.
/// None if the scales have another shape.
fn blocks(shape: &[usize], scales: &[usize], scheme: &Scheme) -> Option<Vec<(usize, usize)>> {
    // One number, or a number a row, without the dimensions that it does not differ in.
    let mut all = scales.to_vec();
    if all.len() > shape.len() && all.iter().all(|n| *n == 1) {
        all.truncate(shape.len());
    }
    all.resize(shape.len().max(all.len()), 1);
    if all.len() != shape.len() || shape.is_empty() || shape.contains(&0) {
        return None;
    }
    let inner = shape.len().checked_sub(2);
    let block = |d: usize, size: usize, count: usize| {
        let told = match (inner, scheme.block) {
            (Some(inner), Some(block)) if d >= inner => Some(block[d - inner]),
            _ => None,
        };
        // A config's blocks count where there are several; rows and groups need none.
        let fits = |block: &usize| *block > 0 && size.div_ceil(*block) == count;
        match count {
            0 => None,
            1 => Some(size),
            _ if count == size => Some(1),
            _ => told
                .into_iter()
                .chain([BLOCK])
                .chain(size.is_multiple_of(count).then(|| size / count))
                .find(fits),
        }
    };
    let sizes = shape.iter().zip(&all).enumerate();
    sizes
        .map(|(d, (size, count))| Some((block(d, *size, *count)?, *count)))
        .collect()
}

/// Bytes of a scale.
fn bytes_of_scale(dtype: &str) -> Option<usize> {
    Some(match dtype {
        "F32" => 4,
        "F16" | "BF16" => 2,
        "F8_E4M3" | "F8_E8M0" | "U8" => 1,
        _ => return None,
    })
}

/// A scale; those in U8 are exponents of two, as F8_E8M0 has them.
fn scale_value(dtype: &str, bytes: &[u8]) -> f32 {
    match (dtype, bytes) {
        ("F32", &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
        ("F16", &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
        ("BF16", &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
        ("F8_E4M3", &[a]) => e4m3(a),
        (_, &[0xff]) => f32::NAN,
        (_, &[a]) => 2f32.powi(i32::from(a) - 127),
        _ => f32::NAN,
    }
}

/// F8_E4M3 as torch's float8_e4m3fn: exponents from −6, no infinities, NaN where all bits but the sign are
/// set.
fn e4m3(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let value = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if bits & 0x80 != 0 { -value } else { value }
}

/// F8_E5M2: the upper half of an F16.
fn e5m2(bits: u8) -> f32 {
    f16::from_bits(u16::from(bits) << 8).to_f32()
}

/// FP4: 0, ½, 1, 1½, 2, 3, 4, 6 and their negatives.
fn fp4(bits: u8) -> f32 {
    let value = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(bits & 7)];
    if bits & 8 != 0 { -value } else { value }
}

impl Scheme {
    /// What `quantization_config` of config.json says, or ModelOpt's hf_quant_config.json.
    fn read(files: &ModelFiles) -> Scheme {
        let mut scheme = Scheme::default();
        let files_and_keys = [
            ("config.json", "quantization_config"),
            ("config.json", "compression_config"),
            ("hf_quant_config.json", "quantization"),
        ];
        for (file, key) in files_and_keys {
            let label = files.label(file);
            // What is wrong with config.json itself is told where it is read for its own sake.
            let config = files.text(file).ok().flatten();
            let config = config.and_then(|text| Config::parse(&text, &label).ok());
            let Some(node) = config.as_ref().and_then(|c| c.get(key)) else {
                continue;
            };
            if !matches!(node.value, Value::Map(_)) {
                continue;
            }
            scheme.found = true;
            if let (None, Some(Value::Text(method))) =
                (&scheme.method, node.get("quant_method").map(|n| &n.value))
            {
                scheme.method = Some((method.clone(), label));
            }
            let groups = match node.get("config_groups").map(|n| &n.value) {
                Some(Value::Map(groups)) => groups.as_slice(),
                _ => &[],
            };
            let of_groups = groups
                .iter()
                .filter_map(|g| g.value.get("weights")?.get("block_structure"));
            let mut lists = node.get("weight_block_size").into_iter().chain(of_groups);
            let pair = lists.find_map(|n| match &n.value {
                Value::List(list) => match &list[..] {
                    [a, b] => match (&a.value, &b.value) {
                        (Value::Int(a), Value::Int(b)) => {
                            Some([usize::try_from(*a).ok()?, usize::try_from(*b).ok()?])
                        }
                        _ => None,
                    },
                    _ => None,
                },
                _ => None,
            });
            scheme.block = scheme.block.or(pair);
        }
        scheme
    }
}

impl Wide {
    /// The format of its rows, where those have a scale each and run as they are; its name is that of `stored`.
    pub(crate) fn by_rows(&self) -> Option<Format> {
        let format = match self.kind {
            Kind::I8 | Kind::Packed(8) => Format::Int8,
            Kind::E4m3 => Format::Fp8,
            Kind::E5m2 | Kind::Fp4 | Kind::Packed(_) => return None,
        };
        let whole = matches!(self.blocks.last(), Some((_, 1))) && !self.outer.is_empty();
        let fits = whole && self.global.is_none() && format.row_bytes(self.columns).is_some();
        fits.then_some(format)
    }

    /// Elements `range` of the weight, appended in `format`: BF16, F32, or where [`Wide::by_rows`] has one
    /// whole rows of that. `numbers` are the stored bytes, and `shards` the files of the scales.
    ///
    /// w = q · s, with s = scale · global or scale / global, each step in f32.
    pub(crate) fn widen(
        &self,
        numbers: &[u8],
        shards: &Shards,
        range: Range<usize>,
        format: Format,
        to: &mut Vec<u8>,
    ) -> Result<(), String> {
        let scale = self.scales(shards)?;
        let table: [f32; 256] = std::array::from_fn(|bits| match self.kind {
            Kind::E4m3 => e4m3(bits as u8),
            Kind::E5m2 => e5m2(bits as u8),
            Kind::I8 => f32::from(bits as u8 as i8),
            Kind::Packed(8) => bits as f32 - 128.0,
            Kind::Fp4 => fp4(bits as u8),
            Kind::Packed(_) => bits as f32 - 8.0,
        });
        let byte = |at: usize| usize::from(numbers.get(at).copied().unwrap_or(0));
        let value = |at: usize| match self.kind {
            Kind::Fp4 | Kind::Packed(4) => table[byte(at / 2) >> (4 * (at % 2)) & 15],
            _ => table[byte(at)],
        };
        let columns = self.columns;
        let (block, per_row) = self.blocks.last().copied().unwrap_or((1, 1));
        let whole = range.start.is_multiple_of(columns) && range.end.is_multiple_of(columns);
        if format.scales_rows() && !(whole && self.by_rows() == Some(format)) {
            return Err("its rows have no scale each".into());
        }
        to.reserve(format.bytes_of(&[range.len()]).unwrap_or(0));
        let mut at = range.start;
        while at < range.end {
            let (row, column) = (at / columns, at % columns);
            // Up to the end of the block, of the row or of what is wanted.
            let end = (column / block + 1).saturating_mul(block).min(columns);
            let count = (end - column).min(range.end - at);
            let scale = scale(self.scales_before(row) * per_row + column / block);
            let first = row * self.row + column;
            let values = (first..first + count).map(|n| value(n) * scale);
            match format {
                Format::Int8 | Format::Fp8 => {
                    let start = to.len();
                    match (&self.kind, numbers.get(first..first + count)) {
                        (Kind::I8 | Kind::E4m3, Some(codes)) => to.extend_from_slice(codes),
                        // Whole numbers of eight bits, exact in f32.
                        _ => to.extend(
                            (first..first + count).map(|n| (value(n) as i8).cast_unsigned()),
                        ),
                    }
                    to.resize(start + columns.next_multiple_of(4), 0);
                    to.extend(scale.to_le_bytes());
                }
                Format::F32 => to.extend(values.flat_map(f32::to_le_bytes)),
                _ => to.extend(values.flat_map(|v| bf16::from_f32(v).to_le_bytes())),
            }
            at += count;
        }
        Ok(())
    }

    /// The scale at each place.
    fn scales<'a>(&'a self, shards: &'a Shards) -> Result<impl Fn(usize) -> f32 + 'a, String> {
        let bytes_of = |info: &TensorInfo| {
            let shard = shards.get(&info.shard);
            shard
                .and_then(|s| s.bytes().get(info.range.clone()))
                .ok_or_else(|| "its scales lie outside their file".to_string())
        };
        let scales = bytes_of(&self.scale)?;
        let width = bytes_of_scale(&self.scale.dtype).unwrap_or(1);
        let global = match &self.global {
            Some((how, info)) => Some((*how, scale_value(&info.dtype, bytes_of(info)?))),
            None => None,
        };
        Ok(move |at: usize| {
            let bytes = scales.get(at * width..(at + 1) * width).unwrap_or_default();
            let scale = scale_value(&self.scale.dtype, bytes);
            match global {
                Some((Global::Times, global)) => scale * global,
                Some((Global::Divides, global)) => scale / global,
                None => scale,
            }
        })
    }

    /// Rows of scales before that of a row, over all dimensions but the last.
    fn scales_before(&self, mut row: usize) -> usize {
        let (mut at, mut step) = (0, 1);
        let outer = self.blocks.len().saturating_sub(1);
        for ((block, count), size) in self.blocks[..outer].iter().zip(&self.outer).rev() {
            at += row % size / block * step;
            row /= size;
            step *= count;
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_floats_are_what_their_bits_say() {
        let check = |found: f32, expected: f32| assert_eq!(found, expected);
        check(e4m3(0x7e), 448.0);
        check(e4m3(0x01), 2f32.powi(-9));
        check(e4m3(0x08), 2f32.powi(-6));
        check(e4m3(0xb8), -1.0);
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
        check(e5m2(0x3c), 1.0);
        check(e5m2(0x7b), 57344.0);
        check(fp4(0b1111), -6.0);
        check(fp4(0b0001), 0.5);
        check(scale_value("U8", &[130]), 8.0);
    }

    #[test]
    fn scales_have_the_shape_of_blocks() {
        let none = Scheme::default();
        let told = Scheme {
            block: Some([128, 128]),
            ..Scheme::default()
        };
        let check =
            |shape: &[usize], scales: &[usize], scheme, expected: Option<&[(usize, usize)]>| {
                let found = blocks(shape, scales, scheme);
                assert_eq!(found.as_deref(), expected, "{shape:?} {scales:?}");
            };
        check(&[6, 8], &[], &none, Some(&[(6, 1), (8, 1)]));
        check(&[6, 8], &[1], &none, Some(&[(6, 1), (8, 1)]));
        check(&[6, 8], &[6], &none, Some(&[(1, 6), (8, 1)]));
        check(&[6, 8], &[6, 1], &none, Some(&[(1, 6), (8, 1)]));
        check(&[6, 32], &[6, 2], &none, Some(&[(1, 6), (16, 2)]));
        check(&[200, 300], &[2, 3], &told, Some(&[(128, 2), (128, 3)]));
        check(&[200, 300], &[2, 3], &none, Some(&[(128, 2), (128, 3)]));
        check(
            &[3, 6, 8],
            &[3, 1, 1],
            &none,
            Some(&[(1, 3), (6, 1), (8, 1)]),
        );
        for bad in [&[5][..], &[8], &[6, 3], &[1, 6, 1], &[0, 1]] {
            check(&[6, 8], bad, &none, None);
        }
    }
}
