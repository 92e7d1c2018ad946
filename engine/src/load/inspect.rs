//! What a checkpoint holds, and what of it a plan wants.

use std::collections::BTreeSet;

use strata_converters::Checkpoint;
use strata_converters::checkpoint::TensorInfo;

use super::locate::{Located, locate, mapped, planned};
use super::{Error, LoadOptions, LoadProgress, Result};

/// One tensor of a checkpoint and what it feeds.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The weight of the plan; none for a tensor that feeds none.
    pub weight: Option<String>,
    /// The tensor.
    pub tensor: String,
    /// What is done to it, if anything.
    pub how: Option<String>,
    /// Element type in the file; `FP8 as BF16` where numbers with scales are widened.
    pub dtype: String,
    /// Shape in the file.
    pub shape: Vec<usize>,
    /// Bytes in the file.
    pub bytes: u64,
    /// The file.
    pub shard: String,
}

/// What a checkpoint holds.
pub struct Inspected {
    /// A row for each weight, then one for each tensor that feeds none.
    pub rows: Vec<Row>,
    /// What is worth knowing.
    pub notes: Vec<String>,
    /// Why it would not load.
    pub fault: Option<Error>,
}

/// Lists a checkpoint's tensors and the weights they feed, without loading any.
pub fn inspect(options: &LoadOptions, progress: &mut dyn LoadProgress) -> Result<Inspected> {
    let Located::Files(files) = locate(options, progress)? else {
        return Err(Error::Input(
            "inspect needs a checkpoint, not a config or a plan alone".into(),
        ));
    };
    let checkpoint = Checkpoint::open(&files)?;
    let mut rows = Vec::new();
    let mut notes = Vec::new();
    let mut used = BTreeSet::new();
    let mut planned = planned(options, &Located::Files(files.clone()));
    let mapping = match &mut planned {
        Ok(planned) => mapped(planned, Checkpoint::open(&files)?),
        Err(_) => Err(Error::Input(String::new())),
    };
    if let Ok(mapping) = &mapping {
        notes.extend(mapping.notes().iter().cloned());
        notes.extend(checkpoint.widening().iter().cloned());
        for row in mapping.rows() {
            let tensor = row.source.tensor().to_string();
            let expression = row.source.to_string();
            let info = checkpoint.get(&tensor);
            used.insert(tensor.clone());
            rows.push(Row {
                weight: Some(row.path.clone()),
                how: (expression != tensor).then_some(expression),
                dtype: info.map_or(String::new(), dtype),
                shape: info.map_or(Vec::new(), |i| i.shape.clone()),
                bytes: info.map_or(0, |i| bytes(i, row.bytes)),
                shard: row.shard.clone(),
                tensor,
            });
        }
    }
    for (name, info) in checkpoint
        .tensors()
        .filter(|(name, _)| !used.contains(*name))
    {
        rows.push(Row {
            weight: None,
            tensor: name.to_string(),
            how: None,
            dtype: dtype(info),
            shape: info.shape.clone(),
            bytes: info.range.len() as u64,
            shard: info.shard.clone(),
        });
    }
    let fault = match (planned, mapping) {
        (Err(fault), _) | (Ok(_), Err(fault)) => Some(fault),
        (Ok(_), Ok(_)) => None,
    };
    Ok(Inspected { rows, notes, fault })
}

fn dtype(info: &TensorInfo) -> String {
    match &info.wide {
        Some(wide) if wide.stored != info.dtype => format!("{} as {}", wide.stored, info.dtype),
        _ => info.dtype.clone(),
    }
}

/// What a weight of `wide` bytes in memory takes in the file, scales not counted.
fn bytes(info: &TensorInfo, wide: usize) -> u64 {
    match (&info.wide, info.runs_as()) {
        (Some(_), Ok(format)) => {
            let all = format.bytes_of(&info.shape).unwrap_or(0).max(1);
            (wide as u128 * info.range.len() as u128 / all as u128) as u64
        }
        _ => wide as u64,
    }
}
