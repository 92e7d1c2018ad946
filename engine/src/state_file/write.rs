//! State files, written: whole, or not there.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use strata_kernels::{DType, Tensor};

use super::{Error, FORMAT, Fingerprint, Part, Source, StateFile, parts};
use crate::ids::{PageId, TokenId};
use crate::session::Engine;

/// What a file is to hold.
pub(crate) struct Content<'a> {
    /// All tokens, those of the model's prefix first.
    pub tokens: &'a [TokenId],
    /// Their pages.
    pub pages: &'a [PageId],
    /// Slots after so many tokens each, ascending; the last after all.
    pub states: Vec<(usize, Slots<'a>)>,
    /// What the file says of itself beside that.
    pub notes: &'a BTreeMap<String, String>,
}

/// Where the slot of a state is.
pub(crate) enum Slots<'a> {
    /// Parts that are kept.
    Memory(&'a [Tensor]),
    /// A snapshot of another file of the same model.
    File(&'a StateFile, usize),
}

/// Writes a file, beside its place first.
pub(crate) fn write(
    engine: &Engine,
    content: &Content<'_>,
    fingerprint: &Fingerprint,
    path: &Path,
) -> Result<(), Error> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}.part", std::process::id()));
    let beside = PathBuf::from(beside);
    let written = File::create(&beside)
        .and_then(|file| fill(engine, content, fingerprint, BufWriter::new(file)))
        .and_then(|()| std::fs::rename(&beside, path));
    written.map_err(|source| {
        let _ = std::fs::remove_file(&beside);
        Error::Io {
            path: path.into(),
            source,
        }
    })
}

fn header(
    engine: &Engine,
    content: &Content<'_>,
    fingerprint: &Fingerprint,
    parts: &[Part],
) -> Map<String, Value> {
    let (tokens, states) = (content.tokens.len(), content.states.len());
    let places: Vec<String> = content
        .states
        .iter()
        .map(|(at, _)| at.to_string())
        .collect();
    let mut metadata = json!({
        "format": FORMAT,
        "plan": fingerprint.plan,
        "weights": fingerprint.weights,
        "activations": engine.network().activations.to_string(),
        "snapshots": places.join(","),
    });
    for (key, value) in content.notes {
        metadata[key] = value.as_str().into();
    }
    let mut header = Map::from_iter([("__metadata__".to_string(), metadata)]);
    let mut end = 0;
    let mut entry = |name: &str, dtype: &str, shape: Vec<usize>, size: usize| {
        let start = end;
        end += shape.iter().product::<usize>() * size;
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
        header.insert(name.into(), entry);
    };
    let named = |part: &Part| {
        let shape = part.shape(tokens, states);
        (
            part.name.clone(),
            part.dtype.to_string(),
            shape,
            part.dtype.size(),
        )
    };
    let (slots, pages) = parts.split_at(parts.partition_point(Part::is_slot));
    // `U32` is a type of safetensors since 2023.
    let ids = ("tokens".into(), "U32".into(), vec![tokens], 4);
    let slots = slots.iter().map(named).chain([ids]);
    for (name, dtype, shape, size) in slots.chain(pages.iter().map(named)) {
        entry(&name, &dtype, shape, size);
    }
    header
}

fn fill(
    engine: &Engine,
    content: &Content<'_>,
    fingerprint: &Fingerprint,
    mut to: BufWriter<File>,
) -> io::Result<()> {
    let parts = parts(engine);
    let header = header(engine, content, fingerprint, &parts);
    let mut text = serde_json::to_vec(&header).map_err(io::Error::other)?;
    text.resize(text.len().next_multiple_of(8), b' ');
    to.write_all(&(text.len() as u64).to_le_bytes())?;
    to.write_all(&text)?;
    let (mut row, mut bytes) = (Vec::new(), Vec::new());
    let mut put = |part: &Part, tensor: &Tensor, to: &mut BufWriter<File>| -> io::Result<()> {
        row.resize(tensor.rows() * tensor.cols(), 0.0);
        part.backend
            .read(tensor, &mut row)
            .map_err(io::Error::other)?;
        bytes.clear();
        encode(&row, tensor.dtype(), &mut bytes);
        to.write_all(&bytes)
    };
    for part in &parts {
        let Source::Slot(i, _) = part.source else {
            continue;
        };
        for (_, slots) in &content.states {
            match slots {
                Slots::Memory(slot) => put(part, &slot[i], &mut to)?,
                Slots::File(file, snapshot) => {
                    to.write_all(file.slot_part(&part.name, *snapshot))?
                }
            }
        }
    }
    for token in content.tokens {
        to.write_all(&token.to_le_bytes())?;
    }
    let page_size = engine.config().page_size;
    for part in &parts {
        let Source::Pages(pages) = &part.source else {
            continue;
        };
        for (i, page) in content.pages.iter().enumerate() {
            let len = page_size.min(content.tokens.len() - i * page_size);
            if !page.is_there() {
                // Nothing sees these tokens: the file has zeros in their place.
                let bytes = len * pages.cols() * part.dtype.size();
                io::copy(&mut io::repeat(0).take(bytes as u64), &mut to)?;
                continue;
            }
            let first = page.0 as usize * page_size;
            put(part, &pages.row_range(first..first + len), &mut to)?;
        }
    }
    to.flush()?;
    to.into_inner()
        .map_err(io::IntoInnerError::into_error)?
        .sync_all()
}

fn encode(values: &[f32], dtype: DType, to: &mut Vec<u8>) {
    for value in values {
        match dtype {
            DType::F32 => to.extend(value.to_le_bytes()),
            DType::F16 => to.extend(half::f16::from_f32(*value).to_le_bytes()),
            DType::BF16 => to.extend(half::bf16::from_f32(*value).to_le_bytes()),
            DType::I32 => to.extend((*value as i32).to_le_bytes()),
            DType::U8 => to.push(*value as u8),
        }
    }
}
