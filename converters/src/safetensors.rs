//! The tensors of safetensors files, checked.
//!
//! A file is the length of its header (u64, little endian), the header (JSON: for each tensor its type,
//! shape and range of bytes), and the bytes. Opening reads headers only; all that is wrong with them is
//! reported together.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;

use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use strata_layers::Mark;

use crate::checkpoint::{FILES, TENSORS, TensorInfo};
use crate::report::Report;

/// Most bytes of a header, as the format says.
const MAX_HEADER: usize = 100_000_000;
/// Longest name of a tensor.
const MAX_NAME: usize = 1024;
/// Most dimensions of a tensor.
const MAX_RANK: usize = 16;

/// The tensors of one file, by their names; none if something is wrong with it, which is reported.
pub(crate) fn read(
    shard: &str,
    file: &[u8],
    report: &mut Report,
) -> Option<Vec<(String, TensorInfo)>> {
    match read_header(file) {
        Ok(header) => check_ranges(shard, &header, report).then_some(header.tensors),
        Err(why) => {
            report.add(FILES, Mark::default(), format!("{shard}: {why}"));
            None
        }
    }
}

/// Bits of one element.
fn bits(dtype: &str) -> Option<usize> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "I8" | "U8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" | "F8_E4M3FNUZ"
        | "F8_E5M2FNUZ" => 8,
        "I16" | "U16" | "F16" | "BF16" => 16,
        "I32" | "U32" | "F32" => 32,
        "I64" | "U64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

struct Header {
    /// Where the tensors' bytes begin and end in the file.
    data: Range<usize>,
    /// In the order of the header; ranges are within the file.
    tensors: Vec<(String, TensorInfo)>,
}

fn read_header(file: &[u8]) -> std::result::Result<Header, String> {
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(format!(
            "the file has {} bytes; a safetensors file has at least 8",
            file.len()
        ));
    };
    let length = u64::from_le_bytes(*length);
    if length > rest.len().min(MAX_HEADER) as u64 {
        return Err(format!(
            "the header should have {length} bytes, but {} follow and {MAX_HEADER} are allowed: this is no safetensors file, or only a part of one",
            rest.len()
        ));
    }
    let (header, _) = rest.split_at(length as usize);
    let text = std::str::from_utf8(header)
        .map_err(|e| format!("byte {} of the header is not UTF-8", e.valid_up_to()))?;
    let RawHeader(entries) = serde_json::from_str(text).map_err(|e| format!("header: {e}"))?;
    let start = 8 + header.len();
    let tensors = entries.into_iter().map(|(name, raw)| {
        // Offsets beyond the address space are beyond the file, too.
        let place = |offset: u64| {
            usize::try_from(offset)
                .unwrap_or(usize::MAX)
                .saturating_add(start)
        };
        let info = TensorInfo {
            dtype: raw.dtype,
            shape: raw.shape,
            shard: String::new(),
            range: place(raw.offsets.0)..place(raw.offsets.1),
            strides: None,
        };
        (name, info)
    });
    Ok(Header {
        data: start..file.len(),
        tensors: tensors.collect(),
    })
}

/// Every tensor has the bytes that its shape asks for, and together they fill the file. Whether the
/// file may be used.
fn check_ranges(shard: &str, header: &Header, report: &mut Report) -> bool {
    let mut fine = true;
    let mut fault = |name: &str, why: String| {
        let message = format!("{shard}: tensor {name:?}: {why}");
        report.add(TENSORS, Mark::default(), message);
        fine = false;
    };
    let mut names = BTreeSet::new();
    for (name, info) in &header.tensors {
        let TensorInfo {
            dtype,
            shape,
            range,
            ..
        } = info;
        if !names.insert(name) {
            fault(name, "stands in the header twice".into());
        }
        let Some(bits) = bits(dtype) else {
            fault(name, format!("the format has no element type {dtype:?}"));
            continue;
        };
        let total = shape.iter().try_fold(bits, |a, &n| a.checked_mul(n));
        let from = header.data.start;
        let shown = |place: usize| place.saturating_sub(from);
        if range.start > range.end || range.end > header.data.end {
            let (a, b, all) = (shown(range.start), shown(range.end), header.data.len());
            fault(
                name,
                format!("bytes {a} to {b} lie outside the {all} that follow the header"),
            );
        } else if total.is_none() {
            fault(name, format!("the shape {shape:?} overflows"));
        } else if total != range.len().checked_mul(8) {
            let wanted = total.unwrap_or(0).div_ceil(8);
            fault(
                name,
                format!(
                    "has {} bytes; {shape:?} of {dtype} takes {wanted}",
                    range.len()
                ),
            );
        }
    }
    if !fine {
        // Gaps and overlaps would only repeat it.
        return false;
    }
    let mut sorted: Vec<_> = header.tensors.iter().collect();
    sorted.sort_by_key(|(_, info)| (info.range.start, info.range.end));
    let mut end = header.data.start;
    let mut fault = |message: String| {
        report.add(TENSORS, Mark::default(), format!("{shard}: {message}"));
        fine = false;
    };
    for (name, info) in sorted {
        if info.range.start < end {
            fault(format!("the bytes of tensor {name:?} overlap another's"));
        } else if info.range.start > end {
            let gap = info.range.start - end;
            fault(format!(
                "{gap} bytes before tensor {name:?} belong to no tensor"
            ));
        }
        end = end.max(info.range.end);
    }
    if end < header.data.end {
        let rest = header.data.end - end;
        fault(format!("the last {rest} bytes belong to no tensor"));
    }
    fine
}

struct RawHeader(Vec<(String, RawTensor)>);

struct RawTensor {
    dtype: String,
    shape: Vec<usize>,
    offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a mapping of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<RawHeader, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    if name.len() > MAX_NAME {
                        let start: String = name.chars().take(40).collect();
                        return Err(A::Error::custom(format!(
                            "the name {start:?}… has more than {MAX_NAME} bytes"
                        )));
                    }
                    let tensor = map
                        .next_value::<RawTensor>()
                        .map_err(|e| A::Error::custom(format!("tensor {name:?}: {e}")))?;
                    entries.push((name, tensor));
                }
                Ok(RawHeader(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl<'de> Deserialize<'de> for RawTensor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Fields {
            dtype: String,
            shape: Shape,
            data_offsets: (u64, u64),
        }
        let fields = Fields::deserialize(deserializer)?;
        Ok(RawTensor {
            dtype: fields.dtype,
            shape: fields.shape.0,
            offsets: fields.data_offsets,
        })
    }
}

struct Shape(Vec<usize>);

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Sizes;
        impl<'de> Visitor<'de> for Sizes {
            type Value = Shape;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of sizes")
            }
            fn visit_seq<A: SeqAccess<'de>>(
                self,
                mut seq: A,
            ) -> std::result::Result<Shape, A::Error> {
                let mut sizes = Vec::new();
                while let Some(size) = seq.next_element()? {
                    sizes.push(size);
                    if sizes.len() > MAX_RANK {
                        return Err(A::Error::custom(format!(
                            "the shape has more than {MAX_RANK} dimensions"
                        )));
                    }
                }
                Ok(Shape(sizes))
            }
        }
        deserializer.deserialize_seq(Sizes)
    }
}
