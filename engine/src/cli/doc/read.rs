//! `strata doc read`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use indicatif::ProgressBar;
use serde_json::json;

use crate::cli::output::{Terminal, bytes, rate};
use crate::cli::{Common, Environment, catch_interrupts, interrupted, read_text};
use crate::document::{self, Book, ModelSource, Notes, Part, Placed, Worded};
use crate::load::Model;
use crate::prefix_cache::{Policy, thousands};
use crate::session::Engine;
use crate::state_file::Fingerprint;

const AFTER: &str = "\
The files are read as one document, an empty line between them; - is standard input. If -o is a
folder, each file is a document with a state of its own there. MODEL may be left out: what names
no file is taken for it, if more than one thing is named.
Ctrl-C keeps what was read, and the same command goes on from there. A document that has changed
is read from where it changed.

Examples:
  strata doc read notes.md -o notes.state
  strata doc read ./Jamba2-3B part1.txt part2.txt -o book.state
  pdftotext paper.pdf - | strata doc read - -o paper.state";

/// Read a document and keep its state in a file
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct Read {
    /// What to read, perhaps behind the model: folder, GGUF file, Hub id or bundled name [default: demo]
    #[arg(value_name = "[MODEL] FILE", required = true)]
    inputs: Vec<String>,
    /// The model, wherever its name could be taken for a file
    #[arg(long, value_name = "MODEL", help_heading = "Model")]
    model: Option<String>,
    /// The state file, or a folder for one of each document
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Which states are kept on the way, such as "every=1024; budget=2GiB"
    #[arg(long, value_name = "POLICY", default_value = "every=2048")]
    snapshots: Policy,
    /// Read the text as it is, not under the chat template
    #[arg(long)]
    plain: bool,
    /// Most tokens of document, question and answer [default: what the model was made for]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    #[command(flatten)]
    common: Common,
}

/// One document: its files, and where its state goes.
struct Job {
    names: Vec<String>,
    texts: Vec<String>,
    output: PathBuf,
}

impl Read {
    pub fn run(self, environment: &Environment, terminal: &Terminal) -> Result<()> {
        let (model_name, files) = self.split();
        let jobs = self.jobs(&files)?;
        let options = self.common.load_options(model_name.as_deref(), environment);
        let model = self.common.load_with(&options, terminal)?;
        let chat = model.has_chat_template() && !self.plain;
        let wording = Worded {
            model: &model,
            chat,
        };
        let context = self.context.unwrap_or(model.plan.context);
        let mut placed = Vec::new();
        let mut faults = Vec::new();
        for job in &jobs {
            let texts: Vec<&str> = job.texts.iter().map(String::as_str).collect();
            let found = document::place(&wording, &texts)?;
            if found.tokens.len() >= context {
                faults.push(format!(
                    "{}: {} tokens and a question do not fit the context of {} tokens; --context raises it (the model was made for {})",
                    job.names.join(", "),
                    thousands(found.tokens.len()),
                    thousands(context),
                    thousands(model.plan.context)
                ));
            }
            placed.push(found);
        }
        if !faults.is_empty() {
            bail!("{}", faults.join("\n"));
        }
        let most = placed.iter().map(|p| p.tokens.len()).max().unwrap_or(1);
        // One sequence runs; what is kept of the documents before it gives way.
        let config = self.common.engine_config(&model, most + 1, 1);
        // A state in the middle of a page costs one more.
        let states = self.snapshots.every.map_or(0, |every| most / every);
        let parts = placed.iter().map(|p| p.ends.len()).max().unwrap_or(0);
        let pages = config.pages(model.network.graph.prefix) + states + parts + 2;
        let mut engine = Engine::with_pages(model.network.clone(), config, pages)?;
        let fingerprint = model.fingerprint()?;
        let source = ModelSource::of(&options, &model);
        catch_interrupts()?;
        for (job, placed) in jobs.iter().zip(&placed) {
            engine.keep_states(self.snapshots.clone(), fingerprint.clone());
            let notes = notes(job, placed, &model, &source, chat);
            let one = One {
                job,
                placed,
                notes,
                json: self.common.source.json,
            };
            one.read(&mut engine, &fingerprint, &model, terminal)?;
        }
        Ok(())
    }

    /// The model's name, if one was given, and the files.
    fn split(&self) -> (Option<String>, Vec<String>) {
        let (first, rest) = self.inputs.split_first().expect("clap wants one");
        let path = Path::new(first);
        let ending = path
            .extension()
            .and_then(|e| e.to_str())
            .unwrap_or_default();
        let weights = ["gguf", "safetensors", "bin", "pt", "pth", "ckpt"].contains(&ending);
        let plan = ["json", "yaml", "yml"].contains(&ending) && self.common.source.random.is_some();
        let is_model = path.is_dir() || weights || plan || !path.exists() && first != "-";
        if self.model.is_some() || rest.is_empty() || !is_model {
            return (self.model.clone(), self.inputs.clone());
        }
        (Some(first.clone()), rest.to_vec())
    }

    /// Reads all files; all that cannot be read are told together.
    fn jobs(&self, files: &[String]) -> Result<Vec<Job>> {
        let named = self.output.as_os_str().to_string_lossy();
        let folder = self.output.is_dir() || named.ends_with('/');
        if files.iter().filter(|f| *f == "-").count() > 1 {
            bail!("standard input can be read once only");
        }
        let mut faults = Vec::new();
        let mut texts = Vec::new();
        for file in files {
            match read_text(Path::new(file)) {
                Ok(text) if text.trim().is_empty() => faults.push(format!("{file}: is empty")),
                Ok(text) => texts.push(text),
                Err(error) => faults.push(crate::cli::describe(&error)),
            }
        }
        let job = |names: &[String], texts: Vec<String>, output| Job {
            names: names.to_vec(),
            texts,
            output,
        };
        let jobs = if folder {
            let each = files.iter().zip(texts).map(|(file, text)| {
                let stem = match file.as_str() {
                    "-" => "stdin".as_ref(),
                    file => Path::new(file).file_stem().unwrap_or_default(),
                };
                let mut name = stem.to_owned();
                name.push(".state");
                job(
                    std::slice::from_ref(file),
                    vec![text],
                    self.output.join(name),
                )
            });
            each.collect()
        } else {
            vec![job(files, texts, self.output.clone())]
        };
        for (i, job) in jobs.iter().enumerate() {
            let output = job.output.display();
            if jobs[..i].iter().any(|other| other.output == job.output) {
                faults.push(format!("{output}: two documents would be written there"));
            }
            if !document::may_replace(&job.output) {
                faults.push(format!(
                    "{output}: exists and is no state file; name another"
                ));
            }
        }
        if !faults.is_empty() {
            bail!("{}", faults.join("\n"));
        }
        if folder {
            std::fs::create_dir_all(&self.output).with_context(|| named.to_string())?;
        }
        Ok(jobs)
    }
}

fn notes(job: &Job, placed: &Placed, model: &Model, source: &ModelSource, chat: bool) -> Notes {
    let parts = job.names.iter().zip(&job.texts).enumerate();
    let part = |(i, (name, text)): (usize, (&String, &String))| Part {
        name: name.clone(),
        bytes: text.len() as u64,
        end: placed.ends.get(i).copied().unwrap_or(placed.tokens.len()),
    };
    Notes {
        parts: parts.map(part).collect(),
        tokens: placed.tokens.len(),
        chat,
        anchor: placed.anchor.clone(),
        anchor_tokens: placed.anchor_tokens,
        name: model.name.clone(),
        source: source.clone(),
    }
}

/// One document on its way into its file.
struct One<'a> {
    job: &'a Job,
    placed: &'a Placed,
    notes: Notes,
    json: bool,
}

impl One<'_> {
    fn read(
        &self,
        engine: &mut Engine,
        fingerprint: &Fingerprint,
        model: &Model,
        terminal: &Terminal,
    ) -> Result<()> {
        let output = &self.job.output;
        let tokens = self.placed.tokens.len();
        if let Some(book) = known(output, terminal) {
            let prefix = model.network.graph.prefix;
            let same = |t: Vec<u32>| t.get(prefix..) == Some(&self.placed.tokens[..]);
            match book.file.fits(engine, fingerprint) {
                Ok(()) if book.notes == self.notes && same(book.file.tokens()) => {
                    terminal.note(&format!("{} is read already", output.display()));
                    return self.tell(tokens, tokens, Duration::ZERO);
                }
                Ok(()) => engine.attach(&book.file)?,
                Err(error) => terminal.note(&format!("{error}; it is read anew")),
            }
        }
        let start = Instant::now();
        let mut bar: Option<ProgressBar> = None;
        let done = document::read(engine, self.placed, &mut |progress| {
            if progress.read > 0 {
                let rest = progress.tokens - progress.resumed;
                let bar = bar.get_or_insert_with(|| terminal.bar("reading", rest, "tok"));
                bar.set_position((progress.read - progress.resumed) as u64);
            }
            !interrupted()
        });
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
        let done = done.map_err(|error| model.explain(error.into()))?;
        let took = start.elapsed();
        if done.read > 0 {
            document::write(engine, self.placed, done.read, &self.notes, output)?;
        }
        if done.read < tokens {
            bail!(
                "interrupted: {} of {} tokens are kept in {}; the same command goes on from there",
                thousands(done.read),
                thousands(tokens),
                output.display()
            );
        }
        terminal.note(&format!(
            "{}: {} tokens, {} of them known already, read at {:.1} tok/s; {} in {}",
            self.job.names.join(", "),
            thousands(tokens),
            thousands(done.resumed),
            rate(done.read - done.resumed, took),
            bytes(std::fs::metadata(output).map_or(0, |m| m.len())),
            output.display(),
        ));
        self.tell(tokens, done.resumed, took)
    }

    fn tell(&self, tokens: usize, resumed: usize, took: Duration) -> Result<()> {
        if self.json {
            let object = json!({
                "state": self.job.output.display().to_string(),
                "documents": self.job.names,
                "tokens": tokens,
                "resumed_at": resumed,
                "read_seconds": took.as_secs_f64(),
                "tokens_per_second": rate(tokens - resumed, took),
                "bytes": std::fs::metadata(&self.job.output).map_or(0, |m| m.len()),
            });
            writeln!(io::stdout(), "{object}").context("standard output")?;
        }
        Ok(())
    }
}

/// What lies where a state is to be written, if it is of use.
fn known(path: &Path, terminal: &Terminal) -> Option<Arc<Book>> {
    if !path.exists() {
        return None;
    }
    match Book::open(path) {
        Ok(book) => Some(Arc::new(book)),
        Err(error) => {
            terminal.note(&format!("{error}; it is replaced"));
            None
        }
    }
}
