//! Safetensors files: the header, and how tensors are shared out among files.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::Target;
use crate::error::{Error, Result};

/// The largest file, if nobody says otherwise: what published checkpoints have.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// Tensors begin at multiples of so many bytes, as readers that map files like it.
const HEADER_ALIGN: usize = 8;

/// The files of a checkpoint: their names, and the targets of each. A tensor is never cut, so one that is
/// larger than `most` has a file for itself.
pub fn shards(targets: &[Target], most: u64) -> Result<Vec<(String, Vec<&Target>)>> {
    let mut files: Vec<Vec<&Target>> = vec![Vec::new()];
    let mut filled = 0;
    for target in targets {
        let bytes = target.bytes()?;
        if filled > 0 && filled + bytes > most {
            files.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(file) = files.last_mut() {
            file.push(target);
        }
    }
    let count = files.len();
    let name = |i: usize| match count {
        1 => "model.safetensors".to_string(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
    };
    Ok(files
        .into_iter()
        .enumerate()
        .map(|(i, targets)| (name(i), targets))
        .collect())
}

/// What comes before the tensors of a file.
pub fn header(targets: &[&Target]) -> Result<Vec<u8>> {
    let mut entries = Map::new();
    // What other libraries look for before they load weights.
    entries.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut at = 0u64;
    for target in targets {
        let dtype = target.dtype().ok_or_else(|| {
            let why = "safetensors has no block formats; write a GGUF file (--to gguf)";
            Error::file(&target.name, why)
        })?;
        let end = at + target.bytes()?;
        let entry = json!({"dtype": dtype, "shape": target.shape, "data_offsets": [at, end]});
        entries.insert(target.name.clone(), entry);
        at = end;
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(HEADER_ALIGN), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend(text);
    Ok(header)
}

/// `model.safetensors.index.json`: the file of each tensor.
pub fn index(shards: &[(String, Vec<&Target>)]) -> Result<String> {
    let mut total = 0;
    let mut files: BTreeMap<&str, &str> = BTreeMap::new();
    for (file, targets) in shards {
        for target in targets {
            total += target.bytes()?;
            files.insert(&target.name, file);
        }
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": files});
    Ok(format!("{index:#}\n"))
}
