//! How a model asks to be sampled: `generation_config.json`, and the token ids in `config.json`.

use std::path::PathBuf;

use serde_json::{Map, Value};

use crate::sampler::SamplingParams;
use crate::text::{self, TextFiles, describe, read_object};

/// A model's defaults. `None` is what the files leave open.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end a sequence; empty if neither file names one.
    pub eos_token_ids: Vec<u32>,
    /// The token that begins a sequence.
    pub bos_token_id: Option<u32>,
    /// The token that fills up batches.
    pub pad_token_id: Option<u32>,
    /// False is greedy. transformers' default is false; so is ours, if the file exists.
    pub do_sample: Option<bool>,
    /// See [`SamplingParams::temperature`].
    pub temperature: Option<f32>,
    /// See [`SamplingParams::top_k`].
    pub top_k: Option<usize>,
    /// See [`SamplingParams::top_p`].
    pub top_p: Option<f32>,
    /// See [`SamplingParams::min_p`].
    pub min_p: Option<f32>,
    /// See [`SamplingParams::repetition_penalty`].
    pub repetition_penalty: Option<f32>,
    /// Tokens to generate at most.
    pub max_new_tokens: Option<usize>,
    /// Tokens of prompt and output at most.
    pub max_length: Option<usize>,
}

/// Every value of the wrong type, or a file that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read or is no JSON object.
    #[error(transparent)]
    File(#[from] text::Error),
    /// Values of the wrong type, one line per fault.
    #[error("{}", .0.join("\n"))]
    Values(Vec<String>),
}

impl GenerationConfig {
    /// Reads `generation_config.json` and `config.json` of a model directory.
    ///
    /// Either may be missing. What the first says of a token comes before the second.
    pub fn open(files: &(impl TextFiles + ?Sized)) -> Result<Self, Error> {
        let mut faults = Vec::new();
        let mut read = |name: &str| -> Result<Self, Error> {
            let object = read_object(files, name)?.unwrap_or_default();
            Ok(Fields {
                path: files.path(name),
                object: &object,
                faults: &mut faults,
            }
            .read())
        };
        let mut config = read("generation_config.json")?;
        let model = read("config.json")?;
        if !faults.is_empty() {
            return Err(Error::Values(faults));
        }
        if config.eos_token_ids.is_empty() {
            config.eos_token_ids = model.eos_token_ids;
        }
        config.bos_token_id = config.bos_token_id.or(model.bos_token_id);
        config.pad_token_id = config.pad_token_id.or(model.pad_token_id);
        Ok(config)
    }

    /// The sampling the model asks for: greedy unless `do_sample` is true.
    ///
    /// Where the file names no top-k all tokens stay, as in vLLM; transformers would keep 50.
    pub fn sampling(&self) -> SamplingParams {
        let default = SamplingParams::default();
        let sample = self.do_sample.unwrap_or(false);
        SamplingParams {
            temperature: if sample {
                self.temperature.unwrap_or(default.temperature)
            } else {
                0.0
            },
            top_k: self.top_k.unwrap_or(default.top_k),
            top_p: self.top_p.unwrap_or(default.top_p),
            min_p: self.min_p.unwrap_or(default.min_p),
            repetition_penalty: self
                .repetition_penalty
                .unwrap_or(default.repetition_penalty),
            ..default
        }
    }
}

struct Fields<'a> {
    path: PathBuf,
    object: &'a Map<String, Value>,
    faults: &'a mut Vec<String>,
}

impl Fields<'_> {
    fn read(mut self) -> GenerationConfig {
        GenerationConfig {
            eos_token_ids: self.token_ids("eos_token_id"),
            bos_token_id: self.token_ids("bos_token_id").first().copied(),
            pad_token_id: self.token_ids("pad_token_id").first().copied(),
            do_sample: self.field("do_sample", "true or false", Value::as_bool),
            temperature: self.number("temperature"),
            top_k: self.count("top_k"),
            top_p: self.number("top_p"),
            min_p: self.number("min_p"),
            repetition_penalty: self.number("repetition_penalty"),
            max_new_tokens: self.count("max_new_tokens"),
            max_length: self.count("max_length"),
        }
    }

    /// `None` for a missing or null value, and for a wrong one, which becomes a fault.
    fn field<T>(
        &mut self,
        key: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Option<T> {
        let value = self.object.get(key).filter(|value| !value.is_null())?;
        let read = read(value);
        if read.is_none() {
            self.faults.push(format!(
                "{}: {key}: expected {expected}, found {}",
                self.path.display(),
                describe(value)
            ));
        }
        read
    }

    fn number(&mut self, key: &str) -> Option<f32> {
        self.field(key, "a number", |value| {
            value.as_f64().map(|number| number as f32)
        })
    }

    fn count(&mut self, key: &str) -> Option<usize> {
        self.field(key, "a whole number, 0 or more", |value| {
            value.as_u64().and_then(|n| usize::try_from(n).ok())
        })
    }

    fn token_ids(&mut self, key: &str) -> Vec<u32> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        // -1 is how older configurations say "none".
        if self.object.get(key).and_then(Value::as_i64) == Some(-1) {
            return Vec::new();
        }
        self.field(key, "a token id or a list of them", |value| match value {
            Value::Array(ids) => ids.iter().map(id).collect(),
            _ => id(value).map(|id| vec![id]),
        })
        .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(files: &[(&str, &str)]) -> Result<GenerationConfig, Error> {
        let directory = crate::testing::directory(files);
        GenerationConfig::open(directory.path())
    }

    #[test]
    fn the_generation_config_comes_before_the_config() {
        let config = open(&[
            (
                "generation_config.json",
                r#"{"eos_token_id": [2, 11], "do_sample": true, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "transformers_version": "5.0"}"#,
            ),
            ("config.json", r#"{"eos_token_id": 7, "bos_token_id": 1, "pad_token_id": null, "temperature": 0.5}"#),
        ])
        .expect("a good pair");
        assert_eq!(config.eos_token_ids, [2, 11]);
        assert_eq!((config.bos_token_id, config.pad_token_id), (Some(1), None));
        let sampling = config.sampling();
        assert_eq!(
            (sampling.temperature, sampling.top_p, sampling.top_k),
            (0.6, 0.95, 20)
        );
    }

    #[test]
    fn missing_files_and_do_sample_false_are_greedy() {
        assert_eq!(
            open(&[]).expect("nothing asked"),
            GenerationConfig::default()
        );
        let config = open(&[
            (
                "generation_config.json",
                r#"{"do_sample": false, "temperature": 0.6}"#,
            ),
            ("config.json", r#"{"eos_token_id": 7, "pad_token_id": -1}"#),
        ])
        .expect("a good pair");
        assert_eq!(
            (config.eos_token_ids.as_slice(), config.pad_token_id),
            (&[7][..], None)
        );
        assert_eq!(config.sampling().temperature, 0.0);
    }

    #[test]
    fn wrong_types_are_named_together() {
        let error = open(&[
            (
                "generation_config.json",
                r#"{"temperature": "hot", "top_k": -4, "eos_token_id": [1, "x"]}"#,
            ),
            ("config.json", r#"{"bos_token_id": 5000000000}"#),
        ])
        .expect_err("four faults")
        .to_string();
        let lines: Vec<&str> = error.lines().collect();
        assert_eq!(lines.len(), 4, "{error}");
        assert!(lines[0].ends_with("generation_config.json: eos_token_id: expected a token id or a list of them, found a list of 2"));
        assert!(
            lines[1].ends_with("temperature: expected a number, found \"hot\""),
            "{error}"
        );
        assert!(lines[3].ends_with(
            "config.json: bos_token_id: expected a token id or a list of them, found 5000000000"
        ));
    }

    #[test]
    fn a_damaged_file_is_named() {
        for text in ["", "[1]", "{\"a\": ", "\u{0}"] {
            let error = open(&[("generation_config.json", text)])
                .expect_err(text)
                .to_string();
            assert!(
                error.contains("generation_config.json: ")
                    && error.contains("expected a JSON object"),
                "{error}"
            );
        }
    }
}
