//! `strata perplexity`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Value, json};

use super::logits::write_beside;
use super::output::{Terminal, rate};
use super::{Common, Environment, read_text};
use crate::load::{LoadOptions, Model};
use crate::perplexity::{Comparison, Mean, Scored, Scorer, Summary, comparing, score, windows};
use crate::plot::{self, Line, Panel};
use crate::recipe::Recipe;
use crate::session::Engine;

const AFTER: &str = "\
The text is read in windows of --context tokens that begin every --stride tokens, as in transformers'
guide to perplexity: each token is scored once, in the first window that reaches it, with at least
context - stride tokens before it; of the first window, every token but the text's first is scored. Within
a window the state is carried and chunks change nothing. By default the window is all that the model was
made for, so that most texts are one unbroken pass; --context 0 makes it one whatever the model was made
for. The usual tool for GGUF files cuts the text into windows of 512 and scores the second half of each:
--context 512 --stride 256 comes nearest. A text gets the tokens that the tokenizer frames it with
(often a beginning-of-text token), once.

With --compare both models read the same tokens. KL is D(MODEL || MODEL2) in nats a token: how surprising
MODEL2's predictions are to MODEL. --plan, --card, --random, --quantize, --calibrate and --kv are MODEL's alone. Standard errors
take tokens as independent.

Examples:
  strata perplexity ./Jamba2-3B --file wiki.txt --context 2048 --stride 1024
  strata perplexity ./Jamba2-3B --file wiki.txt --compare ./Jamba2-3B-q4 --plot cost.svg
  strata perplexity ./Jamba2-3B --kv int8 --file wiki.txt --compare ./Jamba2-3B   what 8 bits cost";

/// Measure how well a model predicts a text, and how far another form of it is from that
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct Perplexity {
    /// Folder, Hub id (owner/name[@revision]) or bundled name [default: demo]
    model: Option<String>,
    /// The text; - is standard input
    #[arg(long, value_name = "TEXT", required_unless_present = "token_ids_file")]
    file: Option<PathBuf>,
    /// A file with token ids between commas or white space, instead of a text
    #[arg(long, value_name = "FILE", conflicts_with = "file")]
    token_ids_file: Option<PathBuf>,
    /// Another form of the model, to compare every prediction with
    #[arg(long, value_name = "MODEL2")]
    compare: Option<String>,
    /// Tokens of a window, 0 for the whole text [default: what the model was made for]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Tokens from one window's beginning to the next's [default: half of the context]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    stride: Option<u32>,
    /// Draw what was found over the position in the text, as SVG
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    plot: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

/// Ranges of positions in the table, and in the plot.
const RANGES: usize = 10;
const PLOTTED: usize = 60;

impl Perplexity {
    pub fn run(self, environment: &Environment, terminal: &Terminal) -> Result<()> {
        let file = self.file.as_deref().or(self.token_ids_file.as_deref());
        let file = file.unwrap_or(Path::new("-"));
        let content = read_text(file)?;
        let ids = self.token_ids_file.is_some().then(|| parse_ids(&content));
        let ids = ids
            .transpose()
            .with_context(|| format!("{}", file.display()))?;

        let model = self
            .common
            .load(self.model.as_deref(), environment, terminal)?;
        let second = match &self.compare {
            Some(name) => {
                let options = self.second(name, environment);
                let loaded = self.common.load_with(&options, terminal);
                Some(loaded.with_context(|| format!("--compare {name}"))?)
            }
            None => None,
        };
        let vocab = model.plan.vocab;
        if let Some(second) = &second
            && second.plan.vocab != vocab
        {
            bail!(
                "{} has a vocabulary of {vocab} tokens and {} one of {}: only equal ones compare",
                model.name,
                second.name,
                second.plan.vocab
            );
        }
        let tokens = match ids {
            Some(ids) => ids,
            None => tokens_of(&content, &model, second.as_ref(), terminal)?,
        };
        if tokens.len() < 2 {
            bail!(
                "{}: {} make nothing to predict; at least 2 tokens are needed",
                file.display(),
                counted(tokens.len(), "token")
            );
        }
        if let Some(at) = tokens.iter().position(|t| *t as usize >= vocab) {
            bail!(
                "{}: token id {} at position {at} is outside the vocabulary of {vocab}",
                file.display(),
                tokens[at]
            );
        }

        let made_for = [Some(&model), second.as_ref()].into_iter().flatten();
        let made_for = made_for.map(|m| m.plan.context).min().unwrap_or(0);
        let context = match self.context {
            Some(0) => tokens.len(),
            Some(context) => context,
            None => made_for,
        };
        if context < 2 {
            bail!("--context {context}: a window of fewer than 2 tokens predicts nothing");
        }
        let stride = self.stride.map_or(context / 2, |s| s as usize);
        if stride > context && context < tokens.len() {
            bail!(
                "--stride {stride} is more than the {context} tokens of a window: tokens between would not be scored"
            );
        }
        let list = windows(tokens.len(), context, stride.min(context));

        let longest = context.min(tokens.len());
        let scorer = |model: &Model| -> Result<Scorer> {
            let mut config = self.common.engine_config(model, longest, 1);
            if second.is_some() {
                config = comparing(config, vocab);
            }
            let engine = Engine::new(model.network.clone(), config)?;
            Ok(Scorer::new(&model.name, engine))
        };
        let mut first_scorer = scorer(&model)?;
        let mut second_scorer = second.as_ref().map(scorer).transpose()?;
        let bar = terminal.bar("perplexity", tokens.len(), "tok");
        let begun = Instant::now();
        let scored = score(
            &mut first_scorer,
            second_scorer.as_mut(),
            &tokens,
            &list,
            &mut |done| bar.set_position(done as u64),
        );
        let scored = scored.map_err(|error| {
            // Both may have a damaged checkpoint; the second is asked if the first is sound.
            let error = anyhow::Error::from(error);
            let plain = error.to_string();
            let told = model.explain(error);
            match &second {
                Some(second) if told.to_string() == plain => second.explain(told),
                _ => told,
            }
        })?;
        let time = begun.elapsed();
        bar.finish_and_clear();
        let verbose = self.common.source.verbose;
        let held = |model: &Model, engine: &Engine| {
            terminal.memory(model, engine.config(), engine.allocated(), verbose);
        };
        held(&model, first_scorer.engine());
        if let (Some(second), Some(scorer)) = (&second, &second_scorer) {
            held(second, scorer.engine());
        }

        let all = Summary::of(&scored).context("no token was scored")?;
        let text_bytes = self.file.as_ref().map(|_| content.len());
        let found = Found {
            names: names(&model, self.common.quantize.as_ref(), second.as_ref()),
            read: list.iter().map(|w| w.end - w.start - 1).sum(),
            bytes: scored_bytes(&model, text_bytes, &tokens, &scored),
            tokens: tokens.len(),
            windows: list.len(),
            context,
            stride,
            all,
            ranges: Summary::ranges(&scored, RANGES),
            time,
        };
        if let Some(path) = &self.plot {
            let text = found.plot(&Summary::ranges(&scored, PLOTTED));
            write_beside(path, |beside| Ok(std::fs::write(beside, &text)?))?;
        }
        let out = if self.common.source.json {
            format!("{}\n", found.json())
        } else {
            found.text()
        };
        io::stdout()
            .write_all(out.as_bytes())
            .context("standard output")
    }

    /// How the second model is loaded: on the same device, as its files are.
    fn second(&self, name: &str, environment: &Environment) -> LoadOptions {
        LoadOptions {
            plan: None,
            card: None,
            random: None,
            quantize: None,
            kv: None,
            calibrate: None,
            ..self.common.load_options(Some(name), environment)
        }
    }
}

/// The tokens of a text. Both models must read it alike; one without a tokenizer takes the other's word.
fn tokens_of(
    text: &str,
    model: &Model,
    second: Option<&Model>,
    terminal: &Terminal,
) -> Result<Vec<u32>> {
    let Some(second) = second else {
        return Ok(model.tokenizer()?.encode(text, true)?);
    };
    let (ours, theirs) = match (&model.tokenizer, &second.tokenizer) {
        (Some(ours), Some(theirs)) => (ours, theirs),
        (None, None) => {
            model.tokenizer()?;
            bail!("there is no tokenizer");
        }
        (one, other) => {
            let lacking = if one.is_none() { model } else { second };
            terminal.note(&format!(
                "{} has no tokenizer: it reads the other's tokens",
                lacking.name
            ));
            let has = one.as_ref().or(other.as_ref());
            let has = has.expect("one of them has a tokenizer");
            return Ok(has.encode(text, true)?);
        }
    };
    let (a, b) = (ours.encode(text, true)?, theirs.encode(text, true)?);
    if a == b {
        return Ok(a);
    }
    let at = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
    let said = |ids: &[u32]| {
        ids.get(at)
            .map_or("the text's end".into(), |id| format!("token {id}"))
    };
    bail!(
        "the tokenizers do not agree: at position {at} {} has {} and {} has {} ({} and {} tokens); models with different tokens cannot be compared",
        model.name,
        said(&a),
        second.name,
        said(&b),
        a.len(),
        b.len()
    );
}

/// Token ids between commas or white space.
fn parse_ids(text: &str) -> Result<Vec<u32>> {
    let parts = text.split(|c: char| c == ',' || c.is_whitespace());
    let mut ids = Vec::new();
    for part in parts.filter(|p| !p.is_empty()) {
        let id = part.parse().ok();
        ids.push(id.with_context(|| {
            let place = ids.len();
            let shown: String = part.chars().take(20).collect();
            format!("{shown:?} at position {place} is no token id; expected whole numbers between commas or white space")
        })?);
    }
    Ok(ids)
}

/// Bytes of text that the scored tokens stand for: those of the text, if there is one, less those of the
/// tokens that were not scored. None if nobody knows.
fn scored_bytes(
    model: &Model,
    text: Option<usize>,
    tokens: &[u32],
    scored: &[Scored],
) -> Option<usize> {
    let tokenizer = model.tokenizer.as_ref()?;
    let bytes = |id: u32| match tokenizer.is_special(id) {
        true => 0,
        false => tokenizer.token_bytes(id).len(),
    };
    let Some(text) = text else {
        return Some(scored.iter().map(|s| bytes(tokens[s.position])).sum());
    };
    let mut is_scored = vec![false; tokens.len()];
    scored.iter().for_each(|s| is_scored[s.position] = true);
    let others = tokens.iter().zip(&is_scored).filter(|(_, s)| !**s);
    let others: usize = others.map(|(id, _)| bytes(*id)).sum();
    Some(text.saturating_sub(others))
}

/// What the two models are called; a number tells namesakes apart.
fn names(
    model: &Model,
    recipe: Option<&Recipe>,
    second: Option<&Model>,
) -> (String, Option<String>) {
    let first = match recipe {
        Some(recipe) => format!("{} as {}", model.name, recipe.name),
        None => model.name.clone(),
    };
    let second = second.map(|s| match s.name == first {
        true => format!("{} (2)", s.name),
        false => s.name.clone(),
    });
    (first, second)
}

fn counted(count: usize, what: &str) -> String {
    let s = if count == 1 { "" } else { "s" };
    format!("{count} {what}{s}")
}

/// All that is printed.
struct Found {
    names: (String, Option<String>),
    /// Rows that each model computed.
    read: usize,
    bytes: Option<usize>,
    tokens: usize,
    windows: usize,
    context: usize,
    stride: usize,
    all: Summary,
    ranges: Vec<Summary>,
    time: Duration,
}

impl Found {
    fn bits_per_byte(&self) -> Option<f64> {
        let bits = self.all.nll.mean * self.all.tokens as f64 / std::f64::consts::LN_2;
        let bytes = self.bytes.filter(|b| *b > 0)?;
        Some(bits / bytes as f64)
    }

    fn json(&self) -> Value {
        let mean = |m: Mean| json!({"mean": m.mean, "standard_error": m.error});
        let comparison = |c: &Comparison| {
            json!({
                "nll": mean(c.nll),
                "perplexity": mean(c.nll.exp()),
                "perplexity_ratio": mean(c.log_ratio.exp()),
                "kl_divergence": {
                    "mean": c.kl.mean, "standard_error": c.kl.error, "median": c.kl_median,
                    "p99": c.kl_p99, "max": c.kl_max, "max_position": c.kl_max_position,
                },
                "reverse_kl_divergence": mean(c.reverse_kl),
                "top1_agreement": mean(c.agreement),
            })
        };
        let summary = |s: &Summary| {
            json!({
                "from": s.positions.start, "to": s.positions.end, "tokens": s.tokens,
                "nll": mean(s.nll), "perplexity": mean(s.nll.exp()),
                "compared": s.compared.as_ref().map(comparison),
            })
        };
        let all = &self.all;
        json!({
            "model": self.names.0,
            "compared_with": self.names.1,
            "tokens": self.tokens,
            "scored_tokens": all.tokens,
            "scored_bytes": self.bytes,
            "context": self.context,
            "stride": self.stride,
            "windows": self.windows,
            "nll": mean(all.nll),
            "perplexity": mean(all.nll.exp()),
            "bits_per_token": all.nll.mean / std::f64::consts::LN_2,
            "bits_per_byte": self.bits_per_byte(),
            "compared": all.compared.as_ref().map(comparison),
            "positions": self.ranges.iter().map(summary).collect::<Vec<_>>(),
            "seconds": self.time.as_secs_f64(),
            "tokens_per_second": rate(self.read, self.time),
        })
    }

    fn text(&self) -> String {
        let all = &self.all;
        let pm = |m: Mean| format!("{:.5} ± {:.5}", m.mean, m.error);
        let mut rows = vec![
            (
                "text".into(),
                format!(
                    "{}, {} scored, in {} of up to {} every {}",
                    counted(self.tokens, "token"),
                    all.tokens,
                    counted(self.windows, "window"),
                    self.context,
                    self.stride
                ),
            ),
            (format!("perplexity of {}", self.names.0), pm(all.nll.exp())),
        ];
        let mut row = |name: &str, value: String| rows.push((name.into(), value));
        let bits = all.nll.mean / std::f64::consts::LN_2;
        row("bits per token", format!("{bits:.5}"));
        if let Some(bits) = self.bits_per_byte() {
            row("bits per byte", format!("{bits:.5}"));
        }
        if let (Some(c), Some(name)) = (&all.compared, &self.names.1) {
            row(&format!("perplexity of {name}"), pm(c.nll.exp()));
            row("its ratio to the first", pm(c.log_ratio.exp()));
            row(
                "KL divergence, nats",
                format!("{:.3e} ± {:.1e}", c.kl.mean, c.kl.error),
            );
            row(
                "  median, 99th percentile",
                format!("{:.3e}, {:.3e}", c.kl_median, c.kl_p99),
            );
            row(
                "  largest",
                format!("{:.3e} at position {}", c.kl_max, c.kl_max_position),
            );
            row(
                "  the other way round",
                format!("{:.3e} ± {:.1e}", c.reverse_kl.mean, c.reverse_kl.error),
            );
            let percent = Mean {
                mean: 100.0 * c.agreement.mean,
                error: 100.0 * c.agreement.error,
            };
            row(
                "same likeliest token",
                format!("{:.3} ± {:.3} %", percent.mean, percent.error),
            );
        }
        row(
            "time",
            format!(
                "{:.2} s, {:.1} tok/s",
                self.time.as_secs_f64(),
                rate(self.read, self.time)
            ),
        );
        let wide = rows.iter().map(|r| r.0.chars().count()).max().unwrap_or(0);
        let mut out = String::new();
        for (name, value) in rows {
            out.push_str(&format!("{name:<wide$}  {value}\n"));
        }
        out.push_str(&self.table());
        out
    }

    /// The ranges of positions, a row each.
    fn table(&self) -> String {
        let mut out = format!("\n{:>17} {:>8} {:>12}", "positions", "tokens", "perplexity");
        if self.all.compared.is_some() {
            out.push_str(&format!(
                " {:>12} {:>11} {:>11} {:>8}",
                "the second's", "KL", "KL p99", "same top"
            ));
        }
        out.push('\n');
        for range in &self.ranges {
            let positions = format!("{}..{}", range.positions.start, range.positions.end);
            out.push_str(&format!(
                "{positions:>17} {:>8} {:>12.4}",
                range.tokens,
                range.nll.mean.exp()
            ));
            if let Some(c) = &range.compared {
                out.push_str(&format!(
                    " {:>12.4} {:>11.3e} {:>11.3e} {:>6.2} %",
                    c.nll.mean.exp(),
                    c.kl.mean,
                    c.kl_p99,
                    100.0 * c.agreement.mean
                ));
            }
            out.push('\n');
        }
        out
    }

    fn plot(&self, ranges: &[Summary]) -> String {
        let middle = |s: &Summary| (s.positions.start + s.positions.end) as f64 / 2.0;
        let line = |name: &str, value: &dyn Fn(&Summary) -> Option<f64>| Line {
            name: name.into(),
            points: ranges
                .iter()
                .map(|s| (middle(s), value(s).unwrap_or(f64::NAN)))
                .collect(),
        };
        let panel = |label: &str, lines, reach: &[f64]| Panel {
            label: label.into(),
            lines,
            reach: reach.to_vec(),
        };
        let of = |pick: fn(&Comparison) -> f64| move |s: &Summary| s.compared.as_ref().map(pick);
        let perplexity = |s: &Summary| Some(s.nll.mean.exp());
        let (first, second) = (&self.names.0, self.names.1.as_deref());
        let (title, panels) = match second {
            None => {
                let lines = vec![line(first, &perplexity)];
                let panels = vec![panel("perplexity", lines, &[])];
                (format!("Perplexity of {first}"), panels)
            }
            Some(second) => {
                let kl = vec![
                    line("mean", &of(|c| c.kl.mean)),
                    line("median", &of(|c| c.kl_median)),
                ];
                let same = vec![line("same", &of(|c| 100.0 * c.agreement.mean))];
                let both = vec![
                    line(first, &perplexity),
                    line(second, &of(|c| c.nll.mean.exp())),
                ];
                let panels = vec![
                    panel("KL divergence, nats a token", kl, &[0.0]),
                    panel("same likeliest token, % of tokens", same, &[100.0]),
                    panel("perplexity", both, &[]),
                ];
                (format!("{first} and {second}"), panels)
            }
        };
        let all = &self.all.positions;
        plot::svg(
            &title,
            "position in the text, tokens",
            (all.start as f64, all.end as f64),
            &panels,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_stand_between_commas_or_white_space() {
        assert_eq!(parse_ids(" 1, 2\n3\t4,,5 \n").unwrap(), [1, 2, 3, 4, 5]);
        assert!(parse_ids(" \n").unwrap().is_empty());
        let error = parse_ids("1 2 -3").unwrap_err().to_string();
        assert!(error.contains("\"-3\" at position 2"), "{error}");
    }
}
