//! Names: of a model on a Hub, and of the files that a Hub or an index speaks of.

use std::collections::BTreeSet;
use std::path::{Component, Path};

use super::Error;

/// `owner/name` and a branch, tag or commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubId {
    /// `owner/name`.
    pub repository: String,
    /// "main" unless given.
    pub revision: String,
}

impl HubId {
    /// Reads `owner/name[@revision]`.
    pub fn parse(id: &str) -> Result<Self, Error> {
        let wrong = |reason| {
            Err(Error::Id {
                id: id.into(),
                reason,
            })
        };
        let (repository, revision) = id.split_once('@').unwrap_or((id, "main"));
        let plain = |text: &str, more: &[u8]| {
            let known = |byte: &u8| {
                byte.is_ascii_alphanumeric() || b"-_.".contains(byte) || more.contains(byte)
            };
            text.as_bytes().iter().all(known)
                && !text.contains("..")
                && !text.starts_with(['.', '-', '/'])
        };
        let Some((owner, name)) = repository.split_once('/') else {
            return wrong("there is no owner");
        };
        if owner.is_empty() || name.is_empty() || name.contains('/') {
            return wrong("it is not of two parts");
        }
        if !plain(owner, b"") || !plain(name, b"") || repository.len() > 140 {
            return wrong("its characters are not those of a model's name");
        }
        if revision.is_empty() || !plain(revision, b"/+") || revision.ends_with('/') {
            return wrong("its revision is no branch, tag or commit");
        }
        Ok(Self {
            repository: repository.into(),
            revision: revision.into(),
        })
    }

    pub(super) fn is_commit(&self) -> bool {
        is_commit(&self.revision)
    }
}

pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether a server's word can be a file's name.
pub(super) fn plain(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 128
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
}

/// The files an index names, each a plain name within the repository.
pub(super) fn shards(index: &[u8]) -> Result<BTreeSet<String>, String> {
    let index: serde_json::Value =
        serde_json::from_slice(index).map_err(|error| error.to_string())?;
    let map = index
        .get("weight_map")
        .and_then(serde_json::Value::as_object)
        .ok_or("there is no weight_map")?;
    let within = |name: &str| {
        let parts = || Path::new(name).components();
        !name.contains(['\\', '\0', ':'])
            && parts().count() > 0
            && parts().all(|part| matches!(part, Component::Normal(_)))
    };
    let weights = |name: &str| name.ends_with(".safetensors") || name.ends_with(".bin");
    let name = |(tensor, name): (&String, &serde_json::Value)| match name.as_str() {
        Some(name) if within(name) && weights(name) => Ok(name.to_owned()),
        _ => Err(format!(
            "{tensor} is in {name}, which is no .safetensors or .bin file of the repository"
        )),
    };
    let shards: BTreeSet<String> = map.iter().map(name).collect::<Result<_, _>>()?;
    if shards.is_empty() {
        Err("it names no files".into())
    } else {
        Ok(shards)
    }
}
