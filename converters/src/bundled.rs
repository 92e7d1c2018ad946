//! The models that the binary holds: the folders of `model-cards/`.

use crate::files::ModelFiles;

type Files = &'static [(&'static str, &'static [u8])];

/// Names and files, sorted by name; listed while building.
const MODELS: &[(&str, Files)] = &include!(concat!(env!("OUT_DIR"), "/bundled.rs"));

/// The names of all bundled models.
pub fn names() -> impl Iterator<Item = &'static str> {
    MODELS.iter().map(|(name, _)| *name)
}

/// The files of a bundled model.
pub fn find(name: &str) -> Option<ModelFiles> {
    let (name, files) = MODELS.iter().find(|(n, _)| *n == name)?;
    Some(ModelFiles::bundled(name, files))
}
