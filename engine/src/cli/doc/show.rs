//! `strata doc show`.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;
use strata_kernels::KvType;

use crate::cli::output::bytes;
use crate::document::{Book, Error, Notes};
use crate::prefix_cache::thousands;
use crate::state_file::StateFile;

const AFTER: &str = "\
Only the file's header is read; no model is needed.

Example:
  strata doc show notes.state";

/// Say what a state file holds
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct Show {
    /// A state file
    state: PathBuf,
    /// Print for scripts
    #[arg(long)]
    json: bool,
}

impl Show {
    pub fn run(self) -> Result<()> {
        let (file, notes) = match Book::open(&self.state) {
            Ok(book) => (book.file, Some(book.notes)),
            // States of conversations have no document.
            Err(Error::NoDocument { path }) => (StateFile::open(&path)?.into(), None),
            Err(error) => return Err(error.into()),
        };
        let text = if self.json {
            format!("{}\n", as_json(&file, notes.as_ref()))
        } else {
            as_text(&file, notes.as_ref())
        };
        io::stdout()
            .write_all(text.as_bytes())
            .context("standard output")
    }
}

fn as_json(file: &StateFile, notes: Option<&Notes>) -> serde_json::Value {
    let (slots, pages) = file.parts_bytes();
    let fingerprint = file.fingerprint();
    json!({
        "tokens": file.len(),
        "snapshots": file.snapshots(),
        "bytes": file.bytes(),
        "slot_bytes": slots,
        "kv_bytes": pages,
        "kv_dtype": file.kv_type().map(KvType::name),
        "activations": file.says("activations"),
        "plan_hash": fingerprint.plan,
        "weights_hash": fingerprint.weights,
        "document": notes,
        "complete": notes.map(|n| file.len() >= n.tokens),
    })
}

fn as_text(file: &StateFile, notes: Option<&Notes>) -> String {
    let (slots, pages) = file.parts_bytes();
    let mut lines = Vec::new();
    let mut line = |what: &str, text: String| lines.push(format!("{what:<12}{text}\n"));
    let tokens = thousands(file.len());
    match notes {
        Some(notes) if file.len() < notes.tokens => line(
            "tokens",
            format!(
                "{tokens} of {}: not read to its end",
                thousands(notes.tokens)
            ),
        ),
        _ => line("tokens", tokens),
    }
    if let Some(notes) = notes {
        for part in &notes.parts {
            line(
                "document",
                format!(
                    "{} ({}), to token {}",
                    part.name.escape_debug(),
                    bytes(part.bytes),
                    thousands(part.end)
                ),
            );
        }
        let placed = if notes.chat {
            "the system message of the model's chat template"
        } else {
            "plain text before the question"
        };
        line("placed as", placed.into());
        let source = &notes.source;
        let named = source.model.as_deref().unwrap_or(&notes.name);
        let mut model = format!(
            "{} in {}",
            named.escape_debug(),
            source.dtype.escape_debug()
        );
        if let Some(recipe) = &source.quantize {
            model.push_str(&format!(", quantised by {}", recipe.escape_debug()));
        }
        if let Some(seed) = source.random {
            model.push_str(&format!(", random weights of seed {seed}"));
        }
        if let Some(plan) = &source.plan {
            model.push_str(&format!(
                ", plan {}",
                plan.display().to_string().escape_debug()
            ));
        }
        line("model", model);
    }
    let fingerprint = file.fingerprint();
    line("plan", fingerprint.plan.escape_debug().to_string());
    line("weights", fingerprint.weights.escape_debug().to_string());
    let places = file.snapshots();
    let shown: Vec<String> = places.iter().take(8).map(|n| thousands(*n)).collect();
    let more = if places.len() > shown.len() {
        format!(", … {}", thousands(file.len()))
    } else {
        String::new()
    };
    line(
        "snapshots",
        format!("{}, after {}{more} tokens", places.len(), shown.join("; ")),
    );
    line(
        "bytes",
        format!(
            "{}: {} of keys and values{}, {} of snapshots",
            bytes(file.bytes()),
            bytes(pages),
            file.kv_type()
                .map_or(String::new(), |kv| format!(" in {kv}")),
            bytes(slots)
        ),
    );
    lines.concat()
}
