//! Which of a folder's files hold the weights.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::files::ModelFiles;
use crate::pytorch;
use crate::report::Report;

/// The names under which a kind of file holds all weights, and an index of its shards. The first kind
/// that is there is read.
const KINDS: [(&str, &str); 2] = [
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
];

/// What a trainer leaves beside a model in PyTorch's files.
const OTHERS: [&str; 8] = [
    "training_args",
    "optimizer",
    "scheduler",
    "scaler",
    "rng_state",
    "random_states",
    "global_step",
    "trainer_state",
];

/// The files with the weights.
pub(crate) enum Selected {
    /// One.
    File(String),
    /// Several.
    Index(Index),
}

/// What an index of shards says.
#[derive(serde::Deserialize)]
pub(crate) struct Index {
    /// Its own name.
    #[serde(skip)]
    pub name: String,
    /// The file of each tensor.
    pub weight_map: BTreeMap<String, String>,
}

/// Finds them: the file that was named, else safetensors, else PyTorch's. What is there and not read is
/// noted.
pub(crate) fn select(files: &ModelFiles, report: &mut Report) -> Result<Selected> {
    if let Some(name) = files.weights() {
        return Ok(Selected::File(name.into()));
    }
    let names = files.list()?;
    let of_kind: [Vec<&String>; 2] = [
        names
            .iter()
            .filter(|n| n.ends_with(".safetensors"))
            .collect(),
        names.iter().filter(|n| is_weights(n)).collect(),
    ];
    for (place, (one, index)) in KINDS.iter().enumerate() {
        let selected = if files.exists(one) {
            Selected::File(one.to_string())
        } else if let Some(text) = files.text(index)? {
            let read: Index = serde_json::from_str(&text)
                .map_err(|e| Error::file(files.label(index), e.to_string()))?;
            let name = index.to_string();
            Selected::Index(Index { name, ..read })
        } else if let [only] = &of_kind[place][..] {
            Selected::File(only.to_string())
        } else {
            continue;
        };
        if let (0, [other, ..]) = (place, &of_kind[1][..]) {
            report.note(format!("safetensors are read; {other} beside them is not"));
        }
        return Ok(selected);
    }
    let list = |names: &[&String]| -> String {
        let shown: Vec<&str> = names.iter().take(8).map(|n| n.as_str()).collect();
        shown.join(", ")
    };
    let [(one, index), (bin, bin_index)] = KINDS;
    let why = match &of_kind {
        [several, _] if !several.is_empty() => format!(
            "there is neither {one} nor {index}, and more than one other: {}; name the one that is meant as the model",
            list(several)
        ),
        [_, pieces]
            if pieces.len() > 1 && pieces.iter().all(|n| n.starts_with("consolidated.")) =>
        {
            format!(
                "{} are the pieces of one model's tensors, which are not joined: convert them to one file",
                list(pieces)
            )
        }
        [_, several] if !several.is_empty() => format!(
            "there is neither {bin} nor {bin_index}, and more than one other: {}; name the one that is meant as the model",
            list(several)
        ),
        _ => format!(
            "there are no weights: neither {one} nor {index}, {bin}, {bin_index} or another file in .safetensors, .bin, .pt, .pth"
        ),
    };
    Err(Error::file(files.name(), why))
}

/// Whether a file of PyTorch's may be a model's weights.
fn is_weights(name: &str) -> bool {
    pytorch::is_named(name) && !OTHERS.iter().any(|other| name.starts_with(other))
}
