//! A model's text files: its tokenizer, and how it asks to be sampled.

use std::path::PathBuf;
use std::sync::Arc;

use strata_converters::ModelFiles;

use super::{Error, Result};
use crate::generation_config::GenerationConfig;
use crate::text::{self, Bytes, TextFiles, Tokenizer};

/// The files of a model, as those who read text see them.
struct Files<'a>(&'a ModelFiles);

impl TextFiles for Files<'_> {
    fn read(&self, name: &str) -> std::result::Result<Option<String>, text::Error> {
        self.0.text(name).map_err(|error| text::Error::File {
            path: self.path(name),
            found: error.to_string(),
            expected: "UTF-8 text".into(),
            help: "Fetch the file again.".into(),
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.label(name).into()
    }

    fn list(&self, folder: &str) -> Vec<String> {
        self.0
            .folder()
            .map(|f| TextFiles::list(f, folder))
            .unwrap_or_default()
    }
}

/// The tokenizer of a model with a vocabulary of `vocab`, if the files have one or it reads bytes, and
/// how the model asks to be sampled. A GGUF file's model runs without its tokenizer too: why that cannot be
/// used is told.
pub(super) fn text_of(
    files: &ModelFiles,
    vocab: usize,
) -> Result<(Option<Arc<Tokenizer>>, GenerationConfig, Option<String>)> {
    let gguf = files.gguf();
    let told = |why: &dyn std::fmt::Display| {
        let name = files.name();
        format!("{name}: its tokenizer cannot be used: {why}; --token-ids still can")
    };
    let files = Files(files);
    let generation = GenerationConfig::open(&files)?;
    let bytes = byte_offset(&files, vocab)?.map(|offset| Bytes {
        offset,
        bos: None,
        eos: generation.eos_token_ids.first().copied(),
        pad: generation.pad_token_id,
    });
    let fault = gguf.and_then(|g| g.tokenizer_fault());
    let (tokenizer, why) = match bytes {
        None if !files.0.exists("tokenizer.json") => (None, fault.map(|why| told(&why))),
        bytes => match Tokenizer::open(&files, bytes) {
            Ok(tokenizer) => (Some(Arc::new(tokenizer)), None),
            Err(why) if gguf.is_some() => (None, Some(told(&why))),
            Err(why) => return Err(why.into()),
        },
    };
    Ok((tokenizer, generation, why))
}

/// The id of byte 0 in a model that reads bytes: the `byte_offset` of tokenizer_config.json. Where there
/// is no file on tokens at all, 256 of them are the bytes themselves.
fn byte_offset(files: &Files<'_>, vocab: usize) -> Result<Option<u32>> {
    let name = "tokenizer_config.json";
    if vocab == 256 && !files.0.exists(name) && !files.0.exists("tokenizer.json") {
        return Ok(Some(0));
    }
    let config = text::read_object(files, name)?.unwrap_or_default();
    let Some(offset) = config.get("byte_offset") else {
        return Ok(None);
    };
    let narrow = offset
        .as_u64()
        .and_then(|o| u32::try_from(o).ok())
        .filter(|o| *o < 1 << 16);
    narrow.map(Some).ok_or_else(|| {
        let path = files.path(name);
        Error::Input(format!(
            "{}: byte_offset is {offset}, expected 0 to 65535",
            path.display()
        ))
    })
}
