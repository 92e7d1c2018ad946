//! `strata verify`.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;

use super::against::against;
use super::output::Terminal;
use super::{Common, Environment};
use crate::estimate::Allocated;
use crate::load::backend;
use crate::verify::{Progress, VerifyOptions, tolerance, verify};

const AFTER: &str = "\
Chunked equals whole, batched equals single, preempted equals undisturbed, forked and restored equal
continuous, sampled sequences repeat by seed, and nothing depends on the number of threads: bit for
bit, on random prompts. On a GPU, whose sums depend on the batch: within a stated distance.

With --against, the tokens of a reference's run are run instead, and the stream is compared with the
reference's behind the embedding, every block and the final norm, and so are the logits. Differences are
root mean squares over all positions, each row in standard deviations of the reference's row; the first
block beyond --tolerance is named, with its worst position, and the status is 1. -v lists all blocks. The tensors
of FILE are token_ids, hidden.0 (what the first block reads), hidden.1 … (behind each block), final_norm and
logits, whichever there are; tests/make_reference.py writes them with transformers. The reference is F32
unless made otherwise: --dtype f32 compares most sharply.

Examples:
  strata verify ./Jamba2-3B
  strata verify ./Jamba2-3B --dtype f32 --against run.safetensors";

/// Check the exactness contract on this model, here and now
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct Verify {
    /// Folder, Hub id (owner/name[@revision]) or bundled name [default: demo]
    model: Option<String>,
    /// Tokens of the longest prompt [default: 96, or 32 for models above a gigabyte]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    prompt: Option<u32>,
    /// Tokens to generate after it
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    generate: u32,
    /// Seed of the prompts
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u64,
    /// Compare with a reference's run instead, block by block
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "generate", "seed"])]
    against: Option<PathBuf>,
    /// How far off is too far, in standard deviations of the reference's rows [default: 0.001 in f32, 0.1 in bf16 and f16]
    #[arg(long, value_name = "X", requires = "against", value_parser = positive)]
    tolerance: Option<f64>,
    #[command(flatten)]
    common: Common,
}

fn positive(text: &str) -> Result<f64, String> {
    let value = text
        .parse()
        .ok()
        .filter(|x: &f64| x.is_finite() && *x >= 0.0);
    value.ok_or_else(|| format!("{text:?} is no tolerance; expected a number such as 0.01"))
}

/// Weights above this make each step slow enough that a shorter prompt is the better default.
const LARGE: u64 = 1 << 30;

impl Verify {
    pub fn run(self, environment: &Environment, terminal: &Terminal) -> Result<()> {
        let model = self
            .common
            .load(self.model.as_deref(), environment, terminal)?;
        if let Some(path) = &self.against {
            return against(&model, path, self.tolerance, &self.common, terminal);
        }
        let large = model.weights_bytes > LARGE;
        let prompt = self.prompt.unwrap_or(if large { 32 } else { 96 }) as usize;
        let mut chunks = if large {
            vec![1, 7]
        } else {
            vec![1, 2, 3, 7, 16, 33]
        };
        chunks.retain(|c| *c < prompt);
        let options = VerifyOptions {
            prompt,
            generate: self.generate as usize,
            chunks,
            kv_dtype: model.kv_dtype,
            seed: self.seed,
        };
        let mut others = Vec::new();
        let counts = if model.uses_threads() {
            &[1, 2, 3][..]
        } else {
            &[]
        };
        for &threads in counts.iter().filter(|t| **t != model.threads) {
            others.push((threads, backend(&self.common.device, Some(threads))?.0));
        }
        let json = self.common.source.json;
        let mut closed = None;
        let mut held = Vec::new();
        let mut report = |progress: Progress<'_>| {
            let check = match progress {
                Progress::Checked(check) => check,
                Progress::Ran(engine) => {
                    held.push((engine.config().clone(), engine.allocated()));
                    return;
                }
            };
            let mut out = io::stdout().lock();
            let time = check.time.as_secs_f64();
            let written = if json {
                let object = json!({
                    "check": check.name, "passed": check.fault.is_none(), "fault": check.fault,
                    "logits_compared": check.compared, "rows_beyond": check.strays, "seconds": time,
                });
                writeln!(out, "{object}")
            } else {
                let verdict = if check.fault.is_some() {
                    terminal.bold("DIFFERS")
                } else {
                    "ok".into()
                };
                let fault = check
                    .fault
                    .as_ref()
                    .map_or(String::new(), |f| format!("\n      {f}"));
                writeln!(
                    out,
                    "{verdict:<7} {:<58} {:>10} logits {time:>7.2} s{fault}",
                    check.name, check.compared
                )
            };
            if let Err(error) = written {
                closed.get_or_insert(error);
            }
        };
        let folder = std::env::temp_dir();
        let network = Arc::clone(&model.network);
        let checks = verify(&network, &options, &others, &folder, &mut report)
            .map_err(|error| model.explain(error.into()))?;
        // Of many engines the first whose estimate was wrong, else the largest.
        let is_off = |(config, (allocated, rows)): &&(_, (Allocated, usize))| {
            let estimate = model.estimate(config, *rows);
            allocated.beside(&estimate).is_some()
        };
        let largest = held.iter().max_by_key(|(_, (held, _))| held.total());
        if let Some((config, held)) = held.iter().find(is_off).or(largest) {
            terminal.memory(&model, config, *held, self.common.source.verbose);
        }
        if let Some(error) = closed {
            return Err(error).context("standard output");
        }
        let failed = checks.iter().filter(|c| c.fault.is_some()).count();
        if failed > 0 {
            bail!("{failed} of {} checks differ", checks.len());
        }
        if !json {
            let how = match tolerance(&network) {
                0.0 => "bit for bit".into(),
                t => {
                    let largest = checks.iter().map(|c| c.distance).fold(0.0, f32::max);
                    let strays: usize = checks.iter().map(|c| c.strays).sum();
                    let but = match strays {
                        0 => String::new(),
                        n => format!(", but for {n} rows where a choice of experts turned"),
                    };
                    format!(
                        "within {t:.1e} standard deviations of the logits{but} (the largest distance is {largest:.1e})"
                    )
                }
            };
            writeln!(io::stdout(), "all {} checks hold, {how}", checks.len())
                .context("standard output")?;
        }
        Ok(())
    }
}
