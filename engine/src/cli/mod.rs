//! The `strata` command: one file a subcommand.

mod against;
mod bench;
mod chat;
mod classify;
mod constrained;
mod convert;
mod doc;
mod generate;
mod inspect;
mod logits;
mod output;
mod perplexity;
mod plan;
mod serve;
mod trace;
mod verify;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};
use strata_kernels::{DType, KvType};

use crate::hub::HubOptions;
use crate::load::{self, Beyond, Calibration, CudaPlaces, LoadOptions, Model};
use crate::placement::Parallel;
use crate::recipe::Recipe;
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
  strata serve ./Jamba2-3B                   for OpenAI's clients, at http://127.0.0.1:8080
  strata doc read notes.md -o notes.state    read once, then ask for ever:
  strata doc ask notes.state \"Where does Mara live?\"
  strata plan show ./Jamba2-3B > my.yaml     then edit it, and:
  strata generate ./Jamba2-3B --plan my.yaml --prompt \"Hello\"
  strata bench config.json --random 1        any size, without a checkpoint
  strata perplexity ./Jamba2-3B --file text.txt --compare ./Jamba2-3B-q4
  strata verify                              is every result exact, here and now?
  strata verify ./Jamba2-3B --against run.safetensors   where do we leave the reference?";

#[derive(Debug, Subcommand)]
enum Command {
    Generate(generate::Generate),
    Chat(chat::Chat),
    Serve(serve::Serve),
    #[command(subcommand)]
    Doc(doc::Doc),
    Logits(logits::Logits),
    Classify(classify::Classify),
    #[command(subcommand)]
    Plan(plan::Plan),
    Inspect(inspect::Inspect),
    Convert(convert::Convert),
    Bench(bench::Bench),
    Perplexity(perplexity::Perplexity),
    Verify(verify::Verify),
}

/// What the process's environment says; read once, by `main`.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// Where the Hub and its cache are; none if no home folder is known.
    pub hub: Option<HubOptions>,
    /// No colours, whatever the terminal.
    pub no_color: bool,
    /// A key that clients of `strata serve` must send.
    pub api_key: Option<String>,
    /// What to tell of a run: see `--trace`.
    pub log: Option<String>,
    /// Where a GPU's libraries may be, and where its kernels are kept.
    pub cuda: CudaPlaces,
    /// Folder of what can be computed again.
    pub cache: Option<PathBuf>,
}

/// Where a model comes from, and how to print.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub struct Source {
    /// Run this layer plan instead of the card's (see `strata plan show`)
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Use this model card instead of the built-in ones
    #[arg(long, value_name = "FILE")]
    card: Option<PathBuf>,
    /// Draw the weights at random by this seed; MODEL may then be a config.json or a plan
    #[arg(long, value_name = "SEED")]
    random: Option<u64>,
    /// Use only what is on disk
    #[arg(long)]
    offline: bool,
    /// Print for scripts
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// Say more
    #[arg(short, long, help_heading = "Output")]
    verbose: bool,
}

/// Options of commands that compute.
#[derive(Debug, Clone, Args)]
pub struct Common {
    #[command(flatten)]
    source: Source,
    /// Where to run: cpu, cuda (a GPU; cuda:1 is the second), or reference (plain loops, to settle arguments);
    /// several with commas between share the model: cuda:0,cuda:1
    #[arg(
        long,
        value_name = "DEVICE",
        default_value = "cpu",
        help_heading = "Computing"
    )]
    device: String,
    /// How several devices share the model: blocks one behind the other (pipeline), parts of every layer (tensor),
    /// or those with experts whole (expert)
    #[arg(long, value_enum, default_value_t = ParallelChoice::Auto, help_heading = "Computing")]
    parallel: ParallelChoice,
    /// Keep experts in the host's memory and multiply with them there; the rest is the device's
    #[arg(long, value_enum, value_name = "WHERE", help_heading = "Computing")]
    experts: Option<ExpertsChoice>,
    /// Compute type; auto is the checkpoint's
    #[arg(long, value_enum, default_value_t = DTypeChoice::Auto, help_heading = "Computing")]
    dtype: DTypeChoice,
    /// Quantise matrices while loading: a recipe (q8_0, q6_k, q5_k_m, q4_k_m, q4_0), a block format, int8
    /// or fp8 (bytes with a scale a row), or a file of a recipe
    #[arg(long, value_name = "RECIPE", value_parser = Recipe::find, help_heading = "Computing")]
    quantize: Option<Recipe>,
    /// How keys and values are kept: in a floating-point type, or as bytes with a scale for each head of each token
    /// (int8); auto is the compute type
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = KvChoice::Auto, help_heading = "Computing")]
    kv: KvChoice,
    #[command(flatten)]
    calibrating: Calibrating,
    /// Threads to compute with [default: the processors this process may use]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=MAX_THREADS), help_heading = "Computing")]
    threads: Option<u16>,
}

/// How much columns count when matrices are quantised.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Computing")]
struct Calibrating {
    /// Quantise so that what this text lets the model compute changes least: a text (- is standard input), which is
    /// run first, or what --save-importance wrote (.safetensors)
    #[arg(long, value_name = "TEXT", requires = "quantize")]
    calibrate: Option<PathBuf>,
    /// Keep what --calibrate found, the mean square of each input column of each matrix
    #[arg(long, value_name = "FILE", requires = "calibrate", value_parser = importance_file)]
    save_importance: Option<PathBuf>,
}

/// A name that is known again as that of an importance matrix.
fn importance_file(name: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(name);
    match path.extension() {
        Some(e) if e.eq_ignore_ascii_case("safetensors") => Ok(path),
        _ => Err("the name should end with .safetensors, by which --calibrate knows it".into()),
    }
}

impl Calibrating {
    fn calibration(&self) -> Option<Calibration> {
        self.calibrate.clone().map(|file| Calibration {
            file,
            save: self.save_importance.clone(),
        })
    }
}

/// Most threads: more than any machine has processors.
const MAX_THREADS: i64 = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DTypeChoice {
    Auto,
    F32,
    Bf16,
    F16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ParallelChoice {
    Auto,
    Pipeline,
    Tensor,
    Expert,
}

impl ParallelChoice {
    fn chosen(self) -> Parallel {
        match self {
            ParallelChoice::Auto => Parallel::Auto,
            ParallelChoice::Pipeline => Parallel::Pipeline,
            ParallelChoice::Tensor => Parallel::Tensor,
            ParallelChoice::Expert => Parallel::Expert,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ExpertsChoice {
    Cpu,
}

impl DTypeChoice {
    fn chosen(self) -> Option<DType> {
        match self {
            DTypeChoice::Auto => None,
            DTypeChoice::F32 => Some(DType::F32),
            DTypeChoice::Bf16 => Some(DType::BF16),
            DTypeChoice::F16 => Some(DType::F16),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KvChoice {
    Auto,
    F32,
    Bf16,
    F16,
    Int8,
}

impl KvChoice {
    fn chosen(self) -> Option<KvType> {
        match self {
            KvChoice::Auto => None,
            KvChoice::F32 => Some(KvType::F32),
            KvChoice::Bf16 => Some(KvType::BF16),
            KvChoice::F16 => Some(KvType::F16),
            KvChoice::Int8 => Some(KvType::Int8),
        }
    }
}

/// What to do with more tokens than the context.
#[derive(Debug, Clone, Copy, Args)]
struct BeyondContext {
    /// What becomes of more tokens than the context: refuse them, or attend-last: attention sees the last ones of the
    /// context's number only (a window), while states of fixed size have seen all; what is seen is told. Rotary
    /// positions go on, as distances stay within the context
    #[arg(long, value_enum, value_name = "POLICY", default_value_t = BeyondChoice::Refuse)]
    beyond_context: BeyondChoice,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum BeyondChoice {
    Refuse,
    AttendLast,
}

impl BeyondContext {
    fn attends_last(self) -> bool {
        self.beyond_context == BeyondChoice::AttendLast
    }

    /// For a context that was asked for, or the model's.
    fn chosen(self, context: Option<usize>) -> Beyond {
        match self.beyond_context {
            BeyondChoice::Refuse => Beyond::Refuse,
            BeyondChoice::AttendLast => Beyond::AttendLast(context),
        }
    }
}

impl Source {
    /// What is loaded without computing anything.
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
            device: "cpu".into(),
            parallel: Parallel::Auto,
            experts_on_host: false,
            workload: None,
            dtype: None,
            kv: None,
            beyond: Beyond::Refuse,
            quantize: None,
            calibrate: None,
            threads: None,
            cuda: environment.cuda.clone(),
            hashes: environment.cache.as_ref().map(|c| c.join("weights")),
            hub,
        }
    }
}

impl Common {
    fn load_options(&self, model: Option<&str>, environment: &Environment) -> LoadOptions {
        LoadOptions {
            device: self.device.clone(),
            parallel: self.parallel.chosen(),
            experts_on_host: self.experts == Some(ExpertsChoice::Cpu),
            dtype: self.dtype.chosen(),
            kv: self.kv.chosen(),
            quantize: self.quantize.clone(),
            calibrate: self.calibrating.calibration(),
            threads: self.threads.map(usize::from),
            ..self.source.load_options(model, environment)
        }
    }

    /// Loads the model and says what is worth knowing.
    fn load(
        &self,
        model: Option<&str>,
        environment: &Environment,
        terminal: &Terminal,
    ) -> Result<Model> {
        self.load_with(&self.load_options(model, environment), terminal)
    }

    /// The same, otherwise than the command line says.
    fn load_with(&self, options: &LoadOptions, terminal: &Terminal) -> Result<Model> {
        let model = load::load(options, &mut terminal.load_progress())?;
        for note in &model.notes {
            terminal.note(note);
        }
        if self.source.verbose {
            terminal.note(&model.summary());
        }
        Ok(model)
    }

    /// Sizes for one sequence of up to `tokens`.
    fn engine_config(&self, model: &Model, tokens: usize, sequences: usize) -> EngineConfig {
        EngineConfig::new(tokens.max(1), sequences, model.kv_dtype)
            .for_device(&*model.network.backend, model.footprint.per_row())
    }
}

/// Runs the command line. Errors are for a person to read; a closed output is an error like others.
pub fn run(cli: Cli, environment: &Environment) -> Result<()> {
    let terminal = Terminal::new(environment.no_color);
    match cli.command {
        Command::Generate(command) => command.run(environment, &terminal),
        Command::Chat(command) => command.run(environment, &terminal),
        Command::Serve(command) => command.run(environment, &terminal),
        Command::Doc(command) => command.run(environment, &terminal),
        Command::Logits(command) => command.run(environment, &terminal),
        Command::Classify(command) => command.run(environment, &terminal),
        Command::Plan(command) => command.run(environment, &terminal),
        Command::Inspect(command) => command.run(environment, &terminal),
        Command::Convert(command) => command.run(environment, &terminal),
        Command::Bench(command) => command.run(environment, &terminal),
        Command::Perplexity(command) => command.run(environment, &terminal),
        Command::Verify(command) => command.run(environment, &terminal),
    }
}

/// An error and its causes on one line; a cause that the message before it ends with is said once.
pub fn describe(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
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
    if text.trim().is_empty() {
        return Err("there is no token id".into());
    }
    let id = |part: &str| -> Result<u32, String> {
        let part = part.trim();
        part.parse()
            .map_err(|_| format!("{part:?} is no token id; expected whole numbers, such as 1,2,3"))
    };
    text.split(',').map(id).collect()
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
    let name = match path.display().to_string() {
        name if name == "-" => "standard input".into(),
        name => name,
    };
    text_of(&name, bytes)
}

/// Bytes as the text that they should be.
fn text_of(name: &str, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        anyhow::anyhow!("{name}: byte {at} is no UTF-8 text; convert it to UTF-8 first")
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    /// Two options of one name, for instance, which the compiler does not see.
    #[test]
    fn the_command_line_is_sound() {
        super::Cli::command().debug_assert();
    }
}
