//! `strata generate`.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::constrained::Form;
use super::output::{Terminal, rate};
use super::trace::Tracing;
use super::{
    BeyondContext, Common, Environment, catch_interrupts, interrupted, parse_token_ids, read_text,
};
use crate::beyond::Sight;
use crate::generation::{self, Watch};
use crate::load::{LoadOptions, Model};
use crate::lookup::Guessed;
use crate::sampler::{Sampled, SamplingParams};
use crate::session::{Engine, EngineConfig, Request};

/// Tokens that are generated when nobody says how many.
const DEFAULT_TOKENS: usize = 256;

const AFTER: &str = "\
The prompt is --prompt, --prompt-file, both (the file, an empty line, the prompt), --token-ids, or
standard input. With --chat, the prompt is one message under the model's chat template, and the
file is the system message: the way to ask a question about a document.
The text is streamed to standard output, messages go to standard error. Ctrl-C ends it and keeps
what was printed.

Examples:
  strata generate --chat --prompt-file notes.md --prompt \"Where does Mara live?\"
  strata generate --chat --prompt-file notes.md --prompt \"Quote the second paragraph.\" --lookup 32
  strata generate ./Jamba2-3B --prompt \"Once\" --temperature 0.7 --top-p 0.9 --seed 1
  strata generate --prompt \"Where?\" --json-schema '{\"type\": \"object\", \"properties\": {\"place\": {\"type\": \"string\"}}}'
  strata generate ./Jamba2-3B --token-ids 1,2,3 --max-tokens 8 --json";

/// Continue a text
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct Generate {
    /// Folder, Hub id (owner/name[@revision]) or bundled name [default: demo]
    model: Option<String>,
    /// The text to continue
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// A file with the text to continue; - is standard input
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// The prompt as token ids, such as 1,2,3
    #[arg(long, value_name = "IDS", value_parser = parse_token_ids, allow_hyphen_values = true, conflicts_with_all = ["prompt", "prompt_file", "chat"])]
    token_ids: Option<std::vec::Vec<u32>>,
    /// Put the prompt under the model's chat template
    #[arg(long)]
    chat: bool,
    /// Most tokens to generate [default: 256, or what fits the context]
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// End before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on after an end-of-sequence token
    #[arg(long, conflicts_with = "form")]
    ignore_eos: bool,
    /// Feed the prompt so many tokens at a time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    chunk: Option<u32>,
    /// Most tokens of prompt and text [default: what the model was made for]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    #[command(flatten)]
    beyond: BeyondContext,
    #[command(flatten)]
    lookup: LookingUp,
    #[command(flatten)]
    tracing: Tracing,
    #[command(flatten)]
    form: Form,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    common: Common,
}

/// Guesses at what follows.
#[derive(Debug, Clone, Args)]
pub struct LookingUp {
    /// Guess up to N tokens ahead from what was said before, 32 for instance: the same tokens sooner where the text
    /// quotes the prompt
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(..=256))]
    lookup: u16,
}

impl LookingUp {
    /// The config with guesses; says what a device makes of them.
    pub fn config(&self, config: EngineConfig, model: &Model, terminal: &Terminal) -> EngineConfig {
        let network = &model.network;
        if self.lookup > 0
            && network
                .backend
                .tolerance(network.activations, strata_kernels::Format::F32)
                > 0.0
        {
            terminal.note(
                "--lookup: on this device sums depend on the rows beside them, so that of two tokens nearly as likely it may choose another than without",
            );
        }
        config.with_lookup(usize::from(self.lookup))
    }

    /// What came of guessing, if any was asked for.
    pub fn said(&self, guessed: Guessed) -> Option<String> {
        (self.lookup > 0).then(|| {
            format!(
                "{} of {} guessed tokens were right, in {} steps",
                guessed.right, guessed.tokens, guessed.steps
            )
        })
    }

    /// The same for scripts.
    pub fn json(&self, guessed: Guessed, object: &mut Value) {
        if self.lookup > 0 {
            object["lookup"] = json!({
                "most": self.lookup, "guessed_tokens": guessed.tokens, "right_tokens": guessed.right,
                "steps": guessed.steps,
            });
        }
    }
}

/// How tokens are chosen. What is not given comes from the model's generation_config.json.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Sampling")]
pub struct Sampling {
    /// 0 takes the likeliest token
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Choose among the K likeliest tokens; 0 for all
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Choose among the likeliest tokens that make up this mass
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Leave out tokens less likely than P times the likeliest
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f32>,
    /// Above 1 makes tokens less likely that occurred
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    repetition_penalty: Option<f32>,
    /// Subtracted from generated tokens
    #[arg(long, value_name = "A", allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Subtracted from generated tokens, for each time
    #[arg(long, value_name = "B", allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Added to a token's logit: ID=VALUE; may be given several times
    #[arg(long, value_name = "ID=VALUE", value_parser = parse_bias)]
    logit_bias: Vec<(u32, f32)>,
    /// Key of the random draws: the same seed gives the same text
    #[arg(long, value_name = "SEED")]
    seed: Option<u64>,
    /// Report log-probabilities, with the K likeliest tokens
    #[arg(long, value_name = "K")]
    logprobs: Option<usize>,
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let parts = text.split_once(['=', ':']);
    let bias = parts.and_then(|(id, value)| Some((id.parse().ok()?, value.parse().ok()?)));
    bias.ok_or_else(|| format!("{text:?} is not of the form ID=VALUE, such as 42=-1.5"))
}

impl Sampling {
    /// Over the model's own defaults. Asking for a truncation asks for sampling.
    pub fn params(&self, model: &Model) -> SamplingParams {
        let defaults = model.generation.sampling();
        let truncates = self.top_k.is_some() || self.top_p.is_some() || self.min_p.is_some();
        let temperature = match self.temperature {
            Some(temperature) => temperature,
            None if truncates && defaults.temperature == 0.0 => {
                model.generation.temperature.unwrap_or(1.0)
            }
            None => defaults.temperature,
        };
        SamplingParams {
            temperature,
            top_k: self.top_k.unwrap_or(defaults.top_k),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self
                .repetition_penalty
                .unwrap_or(defaults.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(defaults.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(defaults.frequency_penalty),
            logit_bias: self.logit_bias.clone(),
            seed: self.seed.unwrap_or(defaults.seed),
            logprobs: self.logprobs,
            constraint: None,
        }
    }
}

impl Generate {
    pub fn run(self, environment: &Environment, terminal: &Terminal) -> Result<()> {
        // Read before loading: a mistake here should not cost a minute.
        let form = self.form.source()?;
        let file = self.prompt_file.as_deref().map(read_text).transpose()?;
        let mut prompt = self.prompt.clone();
        if prompt.is_none() && file.is_none() && self.token_ids.is_none() {
            if io::stdin().is_terminal() {
                bail!("there is no prompt: give --prompt, --prompt-file or --token-ids");
            }
            prompt = Some(read_text("-".as_ref())?);
        }

        let start = Instant::now();
        let options = LoadOptions {
            beyond: self.beyond.chosen(self.context),
            ..self.common.load_options(self.model.as_deref(), environment)
        };
        let model = self.common.load_with(&options, terminal)?;
        let load_seconds = start.elapsed().as_secs_f64();
        let beyond = self.beyond.attends_last();

        let tokens = match &self.token_ids {
            Some(ids) => ids.clone(),
            None => self.encode(&model, file, prompt)?,
        };
        let context = self.context.unwrap_or(model.plan.context);
        let max_tokens = self.max_tokens.unwrap_or_else(|| {
            let wanted = model.generation.max_new_tokens.unwrap_or(DEFAULT_TOKENS);
            match beyond {
                true => wanted,
                false => wanted.min(context.saturating_sub(tokens.len())).max(1),
            }
        });
        let total = tokens.len().saturating_add(max_tokens);
        if total > context && !beyond {
            bail!(
                "{} prompt tokens and {max_tokens} to generate do not fit the context of {context} tokens; shorten the prompt, lower --max-tokens, raise --context (the model was made for {}), or let attention see the last tokens only by --beyond-context attend-last",
                tokens.len(),
                model.plan.context
            );
        }
        let graph = &model.network.graph;
        let mut config = self.common.engine_config(&model, total, 1);
        if beyond {
            config = config.giving_back(graph);
            let sight = Sight::of(graph, tokens.len()).filter(|_| total > context);
            if let Some(sight) = sight {
                terminal.note(&sight.text());
            }
        }
        if let Some(chunk) = self.chunk {
            config = config.with_chunk(chunk as usize);
        }
        let config = self.lookup.config(config, &model, terminal);
        let mut sampling = self.sampling.params(&model);
        sampling.constraint = Form::constraint(form.as_ref(), &model, terminal)?;
        if self.sampling.seed.is_some() && sampling.temperature == 0.0 {
            terminal.note("greedy decoding: --seed has no effect without --temperature");
        }
        let eos = if self.ignore_eos {
            Vec::new()
        } else {
            model.eos()
        };
        let mut engine = Engine::new(model.network.clone(), config)?;
        self.tracing.begin(environment, &model, &mut engine)?;
        let prompt_tokens = tokens.len();
        let id = engine.submit(Request {
            prompt: tokens,
            max_tokens,
            stop: eos.clone(),
            sampling,
            ..Request::default()
        })?;

        catch_interrupts()?;
        let mut watch = Printer {
            bar: terminal.bar("reading", prompt_tokens, "tok"),
            ids: model.tokenizer.is_none(),
            quiet: self.common.source.json,
            printed: 0,
        };
        let done = generation::generate(
            &mut engine,
            id,
            model.tokenizer.as_ref(),
            &self.stop,
            &eos,
            &mut watch,
        )
        .map_err(|error| model.explain(error.into()))?;
        watch.bar.finish_and_clear();

        terminal.memory(
            &model,
            engine.config(),
            engine.allocated(),
            self.common.source.verbose,
        );
        let generated = done.tokens.len();
        // Ctrl-C may have come before the end of the prompt.
        let read = engine.computed(id);
        let prefill_rate = rate(read.min(prompt_tokens), done.prefill);
        let decode_rate = rate(generated.saturating_sub(1), done.decode);
        if self.common.source.json {
            let ids: Vec<u32> = done.tokens.iter().map(|t| t.token).collect();
            let mut object = json!({
                "text": done.text,
                "token_ids": ids,
                "stop_reason": done.reason.word(),
                "prompt_tokens": prompt_tokens,
                "generated_tokens": generated,
                "load_seconds": load_seconds,
                "prefill_seconds": done.prefill.as_secs_f64(),
                "decode_seconds": done.decode.as_secs_f64(),
                "prefill_tokens_per_second": prefill_rate,
                "decode_tokens_per_second": decode_rate,
            });
            if self.sampling.logprobs.is_some() {
                object["logprobs"] = done.tokens.iter().map(|t| logprobs(t, &model)).collect();
            }
            self.lookup.json(done.guessed, &mut object);
            if let Some(sight) = Sight::of(graph, engine.computed(id)).filter(|_| beyond) {
                object["attention"] = sight.json();
            }
            if engine.traced().is_some() {
                object["trace"] = Tracing::json(&engine, || model.limits());
            }
            writeln!(io::stdout(), "{object}").context("standard output")?;
        } else {
            writeln!(io::stdout()).context("standard output")?;
            if self.sampling.logprobs.is_some() {
                for token in &done.tokens {
                    terminal.note(&logprobs(token, &model).to_string());
                }
            }
            if terminal.is_interactive() || self.common.source.verbose {
                terminal.note(&format!(
                    "{} tokens read at {prefill_rate:.1} tok/s, {generated} generated at {decode_rate:.1} tok/s, ended by {}",
                    read.min(prompt_tokens),
                    done.reason.word()
                ));
                if let Some(said) = self.lookup.said(done.guessed) {
                    terminal.note(&said);
                }
            }
            let verbose = self.common.source.verbose;
            Tracing::print(&engine, terminal, verbose, || model.limits());
        }
        Ok(())
    }

    fn encode(
        &self,
        model: &Model,
        file: Option<String>,
        prompt: Option<String>,
    ) -> Result<Vec<u32>> {
        let tokenizer = model.tokenizer()?;
        let tokens = if self.chat {
            let mut messages = Vec::new();
            match (file, prompt) {
                (Some(file), Some(prompt)) => {
                    messages.push(json!({"role": "system", "content": file}));
                    messages.push(json!({"role": "user", "content": prompt}));
                }
                (Some(text), None) | (None, Some(text)) => {
                    messages.push(json!({"role": "user", "content": text}));
                }
                (None, None) => unreachable!("one of them was given or read"),
            }
            let text = model.render_chat(&messages, true)?;
            tokenizer.encode(&text, false)?
        } else {
            let text = match (file, prompt) {
                (Some(file), Some(prompt)) => format!("{}\n\n{prompt}", file.trim_end()),
                (Some(text), None) | (None, Some(text)) => text,
                (None, None) => unreachable!("one of them was given or read"),
            };
            tokenizer.encode(&text, true)?
        };
        if tokens.is_empty() {
            bail!("the prompt is empty; give at least one token");
        }
        Ok(tokens)
    }
}

/// One token's log-probability, its text and the likeliest tokens.
fn logprobs(sampled: &Sampled, model: &Model) -> Value {
    let text = |id| model.tokenizer.as_ref().and_then(|t| t.token_text(id));
    let top: Vec<Value> = sampled
        .top
        .iter()
        .map(|(id, logprob)| json!({"token_id": id, "token": text(*id), "logprob": logprob}))
        .collect();
    json!({
        "token_id": sampled.token,
        "token": text(sampled.token),
        "logprob": sampled.logprob,
        "top_logprobs": top,
    })
}

/// Streams text to standard output; token ids where there is no tokenizer.
struct Printer {
    bar: ProgressBar,
    ids: bool,
    quiet: bool,
    printed: usize,
}

impl Watch for Printer {
    fn prompt(&mut self, computed: usize) {
        self.bar.set_position(computed as u64);
    }

    fn token(&mut self, sampled: &Sampled, text: &str) -> io::Result<()> {
        self.bar.finish_and_clear();
        if self.quiet {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        if self.ids {
            let comma = if self.printed > 0 { "," } else { "" };
            write!(out, "{comma}{}", sampled.token)?;
        }
        self.printed += 1;
        out.write_all(text.as_bytes())?;
        out.flush()
    }

    fn rest(&mut self, text: &str) -> io::Result<()> {
        if self.quiet {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }

    fn interrupted(&mut self) -> bool {
        interrupted()
    }
}
