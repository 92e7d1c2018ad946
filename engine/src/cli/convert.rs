//! `strata convert`.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use serde_json::json;

use super::output::{Terminal, bytes};
use super::{Calibrating, DTypeChoice, Environment, Source, catch_interrupts, interrupted};
use crate::load::{self, ConvertOptions, LoadOptions, WriteProgress};
use crate::recipe::Recipe;

/// Write a checkpoint in another form
#[derive(Debug, Args)]
#[command(
    after_help = "The new folder appears when it is whole. A conversion that was stopped is gone on with by the \
same command.\n\nWith --plan the checkpoint is that of the plan: its blocks numbered by their places, `mamba@3+7` \
the mean of two, `mamba@new` drawn by --seed. The folder then holds plan.yaml too."
)]
pub struct Convert {
    /// What to read: folder, Hub id (owner/name[@revision]) or bundled name
    from: String,
    /// The folder to write, or the file where it ends with .gguf
    to: PathBuf,
    #[command(flatten)]
    source: Source,
    /// Element type of matrices; auto keeps what they have
    #[arg(long, value_enum, default_value_t = DTypeChoice::Auto)]
    dtype: DTypeChoice,
    /// The form to write [default: gguf if the name ends so, else safetensors]
    #[arg(long = "to", value_enum, value_name = "FORM", id = "form")]
    form: Option<Form>,
    /// Quantise matrices: of a GGUF file by a recipe (q8_0, q6_k, q5_k_m, q4_k_m, q4_0), to a block format, or by a
    /// file of a recipe; of a folder to int8 or fp8
    #[arg(long, value_name = "RECIPE", value_parser = Recipe::find)]
    quantize: Option<Recipe>,
    #[command(flatten)]
    calibrating: Calibrating,
    /// Largest file, such as 5GB or 500MB
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = size)]
    shard_size: u64,
    /// Seed of the weights of new blocks
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Replace what is there
    #[arg(long)]
    force: bool,
    /// Threads [default: the processors this process may use]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

/// What is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    Safetensors,
    Gguf,
}

/// `5GB`, `500MB`, or bytes.
fn size(text: &str) -> Result<u64, String> {
    let units = [
        ("GB", 1_000_000_000),
        ("MB", 1_000_000),
        ("kB", 1000),
        ("KB", 1000),
        ("B", 1),
    ];
    let found = units
        .iter()
        .find_map(|(unit, n)| Some((text.strip_suffix(unit)?, *n)));
    let (number, unit) = found.unwrap_or((text, 1));
    let number: f64 = number
        .trim()
        .parse()
        .map_err(|_| format!("{text:?} is no size, such as 5GB"))?;
    let bytes = number * unit as f64;
    if (1.0..1e18).contains(&bytes) {
        Ok(bytes as u64)
    } else {
        Err(format!("{text:?} is no size, such as 5GB"))
    }
}

impl Convert {
    pub fn run(self, environment: &Environment, terminal: &Terminal) -> Result<()> {
        catch_interrupts()?;
        let available = || std::thread::available_parallelism().map_or(1, usize::from);
        let options = ConvertOptions {
            from: LoadOptions {
                calibrate: self.calibrating.calibration(),
                ..self.source.load_options(Some(&self.from), environment)
            },
            to: self.to.clone(),
            gguf: match self.form {
                Some(form) => form == Form::Gguf,
                None => self.to.extension().is_some_and(|e| e == "gguf"),
            },
            quantize: self.quantize.clone(),
            dtype: self.dtype.chosen(),
            shard_bytes: self.shard_size,
            force: self.force,
            threads: self.threads.map_or_else(available, usize::from),
            seed: self.seed,
        };
        let start = Instant::now();
        let mut progress = Written {
            bar: terminal.byte_bar("writing"),
        };
        let converted = load::convert(&options, &mut terminal.load_progress(), &mut progress)?;
        progress.bar.finish_and_clear();
        for note in &converted.notes {
            terminal.note(note);
        }
        let time = start.elapsed();
        let mut out = io::stdout().lock();
        let said = if self.source.json {
            let object = json!({
                "path": self.to, "files": converted.files, "tensors": converted.tensors,
                "bytes": converted.bytes, "seconds": time.as_secs_f64(), "notes": converted.notes,
            });
            writeln!(out, "{object}")
        } else {
            writeln!(
                out,
                "{}: {} tensors, {} in {} file{}, {:.1} s, {}/s",
                self.to.display(),
                converted.tensors,
                bytes(converted.bytes),
                converted.files.len(),
                if converted.files.len() == 1 { "" } else { "s" },
                time.as_secs_f64(),
                bytes(rate(converted.bytes, time)),
            )
        };
        said.context("standard output")
    }
}

fn rate(bytes: u64, time: Duration) -> u64 {
    (bytes as f64 / time.as_secs_f64().max(1e-9)) as u64
}

/// A bar over the bytes that are written.
struct Written {
    bar: ProgressBar,
}

impl WriteProgress for Written {
    fn begin(&mut self, bytes: u64) {
        self.bar.set_length(bytes);
    }

    fn advance(&mut self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn stopped(&self) -> bool {
        interrupted()
    }
}
