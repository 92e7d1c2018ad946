//! `strata doc probe`.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;

use crate::cli::output::Terminal;
use crate::cli::{Common, Environment, catch_interrupts, interrupted};
use crate::document::{self, Asking, Worded};
use crate::load::Model;
use crate::plot;
use crate::prefix_cache::{Policy, thousands};
use crate::probe::{self, Prepared, ProbeOptions};
use crate::sampler::SamplingParams;
use crate::session::Engine;

/// Tokens of a question and its place that a length does not count.
const BESIDE: usize = 256;

const AFTER: &str = "\
Documents of invented facts among sentences about nothing are drawn from --seed. In each, one
password stands at every depth; it is asked for, and an answer is right if the number is in it.
A document is read once for all its depths.

Examples:
  strata doc probe --lengths 1K,4K,16K --svg map.svg
  strata doc probe ./Jamba2-3B --lengths 8K,32K,128K --depths 9 --trials 4";

/// Measure how far a model finds facts, over depth and length (a needle test)
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct Probe {
    /// Folder, GGUF file, Hub id or bundled name [default: demo]
    model: Option<String>,
    /// Tokens of documents, such as 1K,8K,32768
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', value_parser = length, default_value = "1K,2K,4K,8K")]
    lengths: Vec<usize>,
    /// Depths, from the beginning to the end
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=64))]
    depths: u16,
    /// Documents of each length
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1024))]
    trials: u16,
    /// Seed of the documents
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    seed: u64,
    /// Most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 32)]
    max_tokens: usize,
    /// Put documents and questions as they are, not under the chat template
    #[arg(long)]
    plain: bool,
    /// Draw the map
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

/// `8K`: tokens.
fn length(text: &str) -> Result<usize, String> {
    let (digits, unit) = match text.trim().strip_suffix(['K', 'k']) {
        Some(digits) => (digits, 1024),
        None => (text.trim(), 1),
    };
    let tokens = digits
        .parse::<usize>()
        .ok()
        .and_then(|n| n.checked_mul(unit));
    let found = tokens.filter(|n| (256..=1 << 24).contains(n));
    found.ok_or_else(|| format!("{text:?} is no length; expected 256 or more tokens, such as 8K"))
}

/// The answers to documents of one length.
struct Row {
    length: usize,
    /// Tokens of the documents, on average.
    tokens: usize,
    /// Right answers by depth.
    right: Vec<usize>,
    asked: usize,
    seconds: f64,
}

impl Probe {
    pub fn run(self, environment: &Environment, terminal: &Terminal) -> Result<()> {
        let model = self
            .common
            .load(self.model.as_deref(), environment, terminal)?;
        model.tokenizer()?;
        let longest = self.lengths.iter().max().copied().unwrap_or(0);
        let context = longest + longest / 8 + BESIDE + self.max_tokens;
        if longest > model.plan.context {
            terminal.note(&format!(
                "{} tokens are more than the {} that the model was made for",
                thousands(longest),
                thousands(model.plan.context)
            ));
        }
        // The document's own pages, and a little for each question.
        let config = self.common.engine_config(&model, context, 1);
        let pages = config.pages(model.network.graph.prefix) + 64;
        let mut engine = Engine::with_pages(model.network.clone(), config, pages)?;
        let fingerprint = model.fingerprint()?;
        catch_interrupts()?;
        let bar = terminal.bar(
            "probing",
            self.lengths.len() * usize::from(self.trials),
            "documents",
        );
        let mut rows = Vec::new();
        for length in &self.lengths {
            let mut row = Row {
                length: *length,
                tokens: 0,
                right: vec![0; usize::from(self.depths)],
                asked: 0,
                seconds: 0.0,
            };
            for trial in 0..self.trials {
                engine.keep_states(Policy::default(), fingerprint.clone());
                self.probe(&mut engine, &model, trial, &mut row)?;
                bar.inc(1);
            }
            row.tokens /= usize::from(self.trials);
            rows.push(row);
        }
        bar.finish_and_clear();
        if let Some(path) = &self.svg {
            std::fs::write(path, self.draw(&model, &rows))
                .with_context(|| path.display().to_string())?;
        }
        let text = if self.common.source.json {
            rows.iter().map(|row| format!("{}\n", row.json())).collect()
        } else {
            self.table(&rows)
        };
        io::stdout()
            .write_all(text.as_bytes())
            .context("standard output")
    }

    /// One document, asked at all depths.
    fn probe(&self, engine: &mut Engine, model: &Model, trial: u16, row: &mut Row) -> Result<()> {
        let start = Instant::now();
        let options = ProbeOptions {
            depths: usize::from(self.depths),
            seed: self.seed.wrapping_add(u64::from(trial)),
        };
        let wording = Worded {
            model,
            chat: model.has_chat_template() && !self.plain,
        };
        let Prepared {
            placed,
            prompts,
            answers,
        } = probe::prepare(&wording, row.length, &options)?;
        let done = document::read(engine, &placed, &mut |_| !interrupted())
            .map_err(|error| model.explain(error.into()))?;
        let eos = model.eos();
        let asking = Asking {
            tokenizer: model.tokenizer.as_ref(),
            stops: &[],
            eos: &eos,
            max_tokens: self.max_tokens,
            sampling: SamplingParams::default(),
            at_once: 1,
        };
        let mut answered = 0;
        document::answer(
            engine,
            &prompts,
            &asking,
            &mut || !interrupted(),
            &mut |i, answer| {
                row.right[i] += usize::from(answer.text.contains(&answers[i]));
                answered += 1;
                Ok(())
            },
        )
        .map_err(|error| model.explain(error.into()))?;
        if answered < prompts.len() {
            bail!("interrupted");
        }
        row.tokens += done.tokens;
        row.asked += 1;
        row.seconds += start.elapsed().as_secs_f64();
        Ok(())
    }

    /// `25 %`, a depth.
    fn depth(&self, i: usize) -> String {
        match self.depths {
            1 => "50 %".into(),
            n => format!("{:.0} %", 100.0 * i as f64 / f64::from(n - 1)),
        }
    }

    fn table(&self, rows: &[Row]) -> String {
        let depths: Vec<String> = (0..usize::from(self.depths))
            .map(|i| format!("{:>7}", self.depth(i)))
            .collect();
        let mut out = format!(
            "  tokens{}  found at this depth of the document\n",
            depths.concat()
        );
        for row in rows {
            let cells: Vec<String> = row
                .parts()
                .map(|part| format!("{:>7}", format!("{:.0} %", 100.0 * part)))
                .collect();
            out.push_str(&format!("{:>8}{}\n", thousands(row.tokens), cells.concat()));
        }
        out
    }

    fn draw(&self, model: &Model, rows: &[Row]) -> String {
        let lengths: Vec<String> = rows.iter().map(|row| thousands(row.tokens)).collect();
        let depths: Vec<String> = (0..usize::from(self.depths))
            .map(|i| self.depth(i))
            .collect();
        let parts: Vec<Vec<f64>> = rows.iter().map(|row| row.parts().collect()).collect();
        plot::map(
            &format!(
                "{}: facts found, {} documents a length",
                model.name, self.trials
            ),
            ("tokens of the document", &lengths),
            ("depth", &depths),
            &|depth, length| parts[length][depth],
        )
    }
}

impl Row {
    fn parts(&self) -> impl Iterator<Item = f64> {
        let asked = self.asked.max(1) as f64;
        self.right.iter().map(move |right| *right as f64 / asked)
    }

    fn json(&self) -> serde_json::Value {
        json!({
            "length": self.length,
            "tokens": self.tokens,
            "documents": self.asked,
            "found": self.parts().collect::<Vec<f64>>(),
            "seconds": self.seconds,
        })
    }
}
