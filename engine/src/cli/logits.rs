//! `strata logits`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;

use super::output::Terminal;
use super::{Common, Environment, parse_token_ids, read_text};
use crate::session::{Engine, Request};

const AFTER: &str = "\
The file is safetensors with one tensor, `logits`: F32 (tokens, vocab), a row a position. It takes
its place when it is whole: a failure leaves what was there before.

Example:
  strata logits ./Jamba2-3B --token-ids 1,2,3 --output logits.safetensors";

/// Write the logits of every position to a file
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct Logits {
    /// Folder, Hub id (owner/name[@revision]) or bundled name
    model: String,
    /// The tokens, such as 1,2,3
    #[arg(long, value_name = "IDS", value_parser = parse_token_ids, allow_hyphen_values = true, required_unless_present = "prompt_file")]
    token_ids: Option<std::vec::Vec<u32>>,
    /// A file with a text, instead of token ids
    #[arg(long, value_name = "FILE", conflicts_with = "token_ids")]
    prompt_file: Option<PathBuf>,
    /// Where to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Feed so many tokens at a time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    chunk: Option<u32>,
    /// Most tokens [default: what the model was made for]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    #[command(flatten)]
    common: Common,
}

impl Logits {
    pub fn run(self, environment: &Environment, terminal: &Terminal) -> Result<()> {
        let text = self.prompt_file.as_deref().map(read_text).transpose()?;
        let model = self.common.load(Some(&self.model), environment, terminal)?;
        let tokens = match (&self.token_ids, text) {
            (Some(ids), _) => ids.clone(),
            (None, Some(text)) => model.tokenizer()?.encode(&text, true)?,
            (None, None) => bail!("there are no tokens: give --token-ids or --prompt-file"),
        };
        let (count, vocab) = (tokens.len(), model.plan.vocab);
        let context = self.context.unwrap_or(model.plan.context);
        if count == 0 || count > context {
            bail!(
                "{count} tokens do not fit a context of {context}; --context raises it (the model was made for {}), and at least one is needed",
                model.plan.context
            );
        }
        let mut config = self.common.engine_config(&model, count, 1);
        if let Some(chunk) = self.chunk {
            config = config.with_chunk(chunk as usize);
        }
        let mut engine = Engine::new(model.network.clone(), config)?;
        engine.submit(Request {
            prompt: tokens,
            prompt_logits: true,
            ..Request::default()
        })?;

        let bar = terminal.bar("logits", count, "tok");
        let write = |beside: &Path| -> Result<()> {
            let mut out = BufWriter::new(File::create(beside)?);
            out.write_all(&header(count, vocab))?;
            let mut rows = 0;
            let mut failed = None;
            while engine
                .step(&mut |_, position, logits| {
                    // Rows come in order, as the sequence is alone.
                    debug_assert_eq!(position, rows);
                    rows += 1;
                    let bytes: Vec<u8> = logits.iter().flat_map(|l| l.to_le_bytes()).collect();
                    if let Err(error) = out.write_all(&bytes) {
                        failed.get_or_insert(error);
                    }
                    bar.set_position(rows as u64);
                })
                .map_err(|error| model.explain(error.into()))?
            {
                if let Some(error) = failed {
                    return Err(error.into());
                }
            }
            if rows != count {
                bail!("{rows} rows of logits came for {count} tokens");
            }
            out.flush()?;
            let file = out
                .into_inner()
                .map_err(std::io::IntoInnerError::into_error)?;
            // A pipe or a device has nothing to sync.
            if file.metadata()?.is_file() {
                file.sync_all()?;
            }
            Ok(())
        };
        write_beside(&self.output, write)?;
        bar.finish_and_clear();
        terminal.memory(
            &model,
            engine.config(),
            engine.allocated(),
            self.common.source.verbose,
        );
        if self.common.source.json {
            let object = json!({"output": self.output, "tokens": count, "vocab": vocab});
            writeln!(std::io::stdout(), "{object}").context("standard output")?;
        }
        Ok(())
    }
}

fn header(tokens: usize, vocab: usize) -> Vec<u8> {
    let bytes = tokens * vocab * 4;
    let entry = json!({"dtype": "F32", "shape": [tokens, vocab], "data_offsets": [0, bytes]});
    let mut text = json!({"logits": entry}).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend(text);
    header
}

/// Has a file written beside its place, then moves it there: a failure leaves nothing behind.
pub(super) fn write_beside(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let named = |error: anyhow::Error| error.context(format!("{}", path.display()));
    // What is there already and is no file cannot be replaced: a pipe, `/dev/stdout`.
    let target = path.canonicalize().unwrap_or_else(|_| path.into());
    if target.exists() && !target.is_file() {
        return write(&target).map_err(named);
    }
    let mut beside = target.as_os_str().to_owned();
    beside.push(format!(".{}.part", std::process::id()));
    let beside = PathBuf::from(beside);
    let moved = write(&beside).and_then(|()| Ok(std::fs::rename(&beside, &target)?));
    moved.map_err(|error| {
        let _ = std::fs::remove_file(&beside);
        named(error)
    })
}
