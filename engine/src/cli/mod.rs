//! The `strata` command: one file a subcommand.

mod bench;
mod chat;
mod generate;
mod inspect;
mod logits;
mod output;
mod plan;
mod verify;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};
use strata_kernels::DType;

use crate::hub::HubOptions;
use crate::load::{self, LoadOptions, Model};
use crate::session::EngineConfig;
use output::Terminal;

/// Runs hybrid transformer–Mamba models.
#[derive(Debug, Parser)]
#[command(name = "strata", version, propagate_version = true, after_help = EXAMPLES, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
MODEL is a folder in Hugging Face form, a Hub id such as ai21labs/AI21-Jamba2-3B, or the name of a
bundled model. Left out, it is `demo`: a small model that answers questions about a document.

Examples:
  strata generate --chat --prompt-file notes.md --prompt \"Where does Mara live?\"
  strata generate ./Jamba2-3B --prompt \"The capital of France is\" --max-tokens 20
  strata chat ai21labs/AI21-Jamba2-3B
  strata plan show ./Jamba2-3B > my.yaml     then edit it, and:
  strata generate ./Jamba2-3B --plan my.yaml --prompt \"Hello\"
  strata bench config.json --random 1        any size, without a checkpoint
  strata verify                              is every result exact, here and now?";

#[derive(Debug, Subcommand)]
enum Command {
    /// Continue a text
    Generate(generate::Generate),
    /// Talk to a model, or ask questions about a document
    Chat(chat::Chat),
    /// Write the logits of every position to a file
    Logits(logits::Logits),
    /// Show, check and print layer plans
    #[command(subcommand)]
    Plan(plan::Plan),
    /// List the tensors of a checkpoint and the weights they feed
    Inspect(inspect::Inspect),
    /// Measure prefill and decode speed beside the machine's limits
    Bench(bench::Bench),
    /// Check the exactness contract on this model, here and now
    Verify(verify::Verify),
}

/// What the process's environment says; read once, by `main`.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// Where the Hub and its cache are; none if no home folder is known.
    pub hub: Option<HubOptions>,
    /// No colours, whatever the terminal.
    pub no_color: bool,
}

/// Options that most commands take.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// Run this layer plan instead of the card's (see `strata plan show`)
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Use this model card instead of the built-in ones
    #[arg(long, value_name = "FILE")]
    card: Option<PathBuf>,
    /// Draw the weights at random by this seed; MODEL may then be a config.json or a plan
    #[arg(long, value_name = "SEED")]
    random: Option<u64>,
    /// Where to run: cpu, or reference (plain loops, to settle arguments)
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Compute type; auto is the checkpoint's
    #[arg(long, value_enum, default_value_t = DTypeChoice::Auto)]
    dtype: DTypeChoice,
    /// Threads to compute with [default: the processors this process may use]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Most tokens of a sequence [default: what the model was made for]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Use only what is on disk
    #[arg(long)]
    offline: bool,
    /// Print for scripts
    #[arg(long)]
    json: bool,
    /// Say more
    #[arg(short, long)]
    verbose: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DTypeChoice {
    Auto,
    F32,
    Bf16,
    F16,
}

impl Common {
    fn load_options(&self, model: Option<&str>, environment: &Environment) -> LoadOptions {
        let mut hub = environment.hub.clone();
        if let Some(hub) = &mut hub {
            hub.offline |= self.offline;
        }
        LoadOptions {
            model: model.map(Into::into),
            plan: self.plan.clone(),
            card: self.card.clone(),
            random: self.random,
            device: self.device.clone(),
            dtype: match self.dtype {
                DTypeChoice::Auto => None,
                DTypeChoice::F32 => Some(DType::F32),
                DTypeChoice::Bf16 => Some(DType::BF16),
                DTypeChoice::F16 => Some(DType::F16),
            },
            threads: self.threads.map(usize::from),
            hub,
        }
    }

    /// Loads the model and says what is worth knowing.
    fn load(
        &self,
        model: Option<&str>,
        environment: &Environment,
        terminal: &Terminal,
    ) -> Result<Model> {
        let options = self.load_options(model, environment);
        let model = load::load(&options, &mut terminal.load_progress())?;
        for note in &model.notes {
            terminal.note(note);
        }
        if self.verbose {
            terminal.note(&model.summary());
        }
        Ok(model)
    }

    /// Most tokens of a sequence.
    fn context(&self, model: &Model) -> usize {
        self.context.unwrap_or(model.plan.context)
    }

    /// Sizes for one sequence of up to `tokens`.
    fn engine_config(&self, model: &Model, tokens: usize, sequences: usize) -> EngineConfig {
        EngineConfig::new(tokens.max(1), sequences, model.kv_dtype)
    }
}

/// Runs the command line. Errors are for a person to read; a closed output is an error like others.
pub fn run(cli: Cli, environment: &Environment) -> Result<()> {
    let terminal = Terminal::new(environment.no_color);
    match cli.command {
        Command::Generate(command) => command.run(environment, &terminal),
        Command::Chat(command) => command.run(environment, &terminal),
        Command::Logits(command) => command.run(environment, &terminal),
        Command::Plan(command) => command.run(environment, &terminal),
        Command::Inspect(command) => command.run(environment, &terminal),
        Command::Bench(command) => command.run(environment, &terminal),
        Command::Verify(command) => command.run(environment, &terminal),
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From here on Ctrl-C sets a flag; pressed again before anyone looked, it ends the process.
fn catch_interrupts() -> Result<()> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(1);
        }
    })
    .context("Ctrl-C cannot be caught")
}

/// Whether Ctrl-C was pressed.
fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Forgets that Ctrl-C was pressed.
fn clear_interrupt() {
    INTERRUPTED.store(false, Ordering::SeqCst);
}

/// Token ids as users write them: `1,2,3`.
fn parse_token_ids(text: &str) -> Result<Vec<u32>, String> {
    let ids: Result<Vec<u32>, String> = text
        .split([',', ' '])
        .filter(|part| !part.is_empty())
        .map(|part| part.parse().map_err(|_| format!("{part:?} is no token id")))
        .collect();
    ids.and_then(|ids| {
        if ids.is_empty() {
            Err("there is no token id".into())
        } else {
            Ok(ids)
        }
    })
}

/// The text of a file that a user named; `-` is standard input.
fn read_text(path: &std::path::Path) -> Result<String> {
    let bytes = if path.as_os_str() == "-" {
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut io::stdin(), &mut bytes).context("standard input")?;
        bytes
    } else {
        std::fs::read(path).with_context(|| format!("{}", path.display()))?
    };
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        anyhow::anyhow!(
            "{}: byte {at} is no UTF-8 text; convert the file to UTF-8 first",
            path.display()
        )
    })
}
