//! `strata bench`.

use std::io::{self, Write};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;

use super::output::{Terminal, bytes};
use super::trace::Tracing;
use super::{Common, Environment};
use crate::bench::{BenchOptions, Figure, bench};
use crate::load::LoadOptions;
use crate::session::Engine;

const AFTER: &str = "\
The limits are taken in the same run: what the machine reads from memory, and what it multiplies.
With --random SEED, MODEL may be a config.json or a plan: any size can be timed without a checkpoint.

Examples:
  strata bench
  strata bench config.json --random 1 --dtype bf16 --prompt 1024 --depth 8192 --json";

/// Measure prefill and decode speed beside the machine's limits
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct Bench {
    /// Folder, Hub id, bundled name, config.json or plan [default: demo]
    model: Option<String>,
    /// Prompt tokens to time
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    prompt: u32,
    /// Tokens to generate after the prompt
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    generate: u32,
    /// Tokens that were read before, untimed
    #[arg(long, value_name = "N", default_value_t = 0)]
    depth: u32,
    /// Sequences that run together
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    /// Timed runs, of which the median counts
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    repeat: u16,
    /// Leave out the untimed run before the timed ones, for prompts that take minutes
    #[arg(long)]
    cold: bool,
    /// Most tokens of a sequence [default: what the model was made for]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    #[command(flatten)]
    tracing: Tracing,
    #[command(flatten)]
    common: Common,
}

impl Bench {
    pub fn run(self, environment: &Environment, terminal: &Terminal) -> Result<()> {
        let tokens = [self.depth, self.prompt, self.generate, 1];
        let tokens: usize = tokens.iter().map(|n| *n as usize).sum();
        let options = LoadOptions {
            workload: Some((tokens, usize::from(self.batch))),
            ..self.common.load_options(self.model.as_deref(), environment)
        };
        let model = self.common.load_with(&options, terminal)?;
        let options = BenchOptions {
            prompt: self.prompt as usize,
            generate: self.generate as usize,
            depth: self.depth as usize,
            batch: usize::from(self.batch),
            repeat: usize::from(self.repeat),
            cold: self.cold,
            kv_dtype: model.kv_dtype,
            bytes_per_row: model.footprint.per_row(),
            device: model.network.backend.clone(),
        };
        let context = self.context.unwrap_or(model.plan.context);
        let tokens = options.depth + options.prompt + options.generate;
        if tokens > context {
            bail!(
                "{tokens} tokens (depth, prompt and generated) do not fit the context of {context} tokens; lower them, or raise --context (the model was made for {})",
                model.plan.context
            );
        }
        let limits = model.limits();
        let bar = terminal.bar("timing", options.repeat, "runs");
        let mut engine = Engine::new(model.network.clone(), options.config())?;
        self.tracing.begin(environment, &model, &mut engine)?;
        let benched = bench(&mut engine, &options, &mut |done, _| {
            bar.set_position(done as u64)
        })
        .map_err(|error| model.explain(error.into()))?;
        bar.finish_and_clear();
        terminal.memory(
            &model,
            engine.config(),
            engine.allocated(),
            self.common.source.verbose,
        );

        // One step of decoding reads every weight it multiplies once, however many rows it has.
        let steps = benched.decode.median / options.batch as f64;
        let read = model.decode_bytes() as f64 * steps;
        let flops = model.flops_per_token() * benched.prefill.median;
        let slot = model.network.graph.slot_bytes();
        let kv = model.network.graph.page_bytes_per_token(model.kv_dtype);
        let figure = |f: Figure| json!({"median": f.median, "min": f.min, "max": f.max});
        let mut out = io::stdout().lock();
        if self.common.source.json {
            let mut object = json!({
                "model": model.name,
                "device": self.common.device,
                "dtype": model.dtype_word(),
                "kv": model.kv_dtype.name(),
                "threads": model.threads,
                "weights_bytes": model.weights_bytes,
                "state_bytes_per_sequence": slot,
                "kv_bytes_per_token": kv,
                "prompt": options.prompt,
                "generate": options.generate,
                "depth": options.depth,
                "batch": options.batch,
                "prefill_tokens_per_second": figure(benched.prefill),
                "decode_tokens_per_second": figure(benched.decode),
                "decode_bytes_per_second": read,
                "prefill_flops_per_second": flops,
                "limit": {
                    "bytes_per_second": limits.bytes_per_second,
                    "flops_per_second": limits.flops_per_second,
                },
            });
            if engine.traced().is_some() {
                object["trace"] = Tracing::json(&engine, || limits);
            }
            return writeln!(out, "{object}").context("standard output");
        }
        let percent = |of: f64, limit: f64| if limit > 0.0 { 100.0 * of / limit } else { 0.0 };
        writeln!(
            out,
            "{}\nprefill {:>9.1} tok/s ({:.1} to {:.1}), {:.0} GFLOP/s: {:.0} % of {:.0} GFLOP/s\ndecode  {:>9.1} tok/s ({:.1} to {:.1}), {:.1} GB/s: {:.0} % of {:.1} GB/s\nstate {} a sequence, keys and values {} a token",
            model.summary(),
            benched.prefill.median,
            benched.prefill.min,
            benched.prefill.max,
            flops / 1e9,
            percent(flops, limits.flops_per_second),
            limits.flops_per_second / 1e9,
            benched.decode.median,
            benched.decode.min,
            benched.decode.max,
            read / 1e9,
            percent(read, limits.bytes_per_second),
            limits.bytes_per_second / 1e9,
            bytes(slot as u64),
            bytes(kv as u64),
        )
        .context("standard output")?;
        let verbose = self.common.source.verbose;
        Tracing::print(&engine, terminal, verbose, || limits);
        Ok(())
    }
}
