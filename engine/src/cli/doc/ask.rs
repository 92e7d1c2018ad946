//! `strata doc ask`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Map, Value, json};

use crate::cli::generate::Sampling;
use crate::cli::output::{Terminal, rate};
use crate::cli::{Common, Environment, catch_interrupts, interrupted, read_text};
use crate::document::{self, Answer, Asking, Book, Placed, Worded};
use crate::generation::{self, Watch};
use crate::ids::TokenId;
use crate::load::Model;
use crate::prefix_cache::{Policy, thousands};
use crate::sampler::Sampled;
use crate::session::{Engine, EngineConfig, Request};

const AFTER: &str = "\
The model is the one that read the document, unless --model names it from elsewhere; plan and
weights are compared. Each question costs its own tokens only.
--questions takes a line of JSON for each question: a text, or an object with \"question\", whose
other keys are handed on. Answers come one line each, in the same order. With --output, a run that
was ended goes on behind the last answer that is there.

Examples:
  strata doc ask notes.state \"Where does Mara live?\"
  strata doc ask book.state --questions questions.jsonl --output answers.jsonl";

/// Ask about a document that was read
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct Ask {
    /// The document's state file
    state: PathBuf,
    /// What to ask; may be several questions
    #[arg(required_unless_present = "questions", conflicts_with = "questions")]
    question: Vec<String>,
    /// Lines of JSON with questions; - is standard input
    #[arg(long, value_name = "FILE")]
    questions: Option<PathBuf>,
    /// Where the answers of --questions go [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Most questions that are answered at once
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    at_once: u16,
    /// The model, if it is not where it was
    #[arg(long, value_name = "MODEL", help_heading = "Model")]
    model: Option<String>,
    /// Most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// End before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Most tokens of document, question and answer [default: what the model was made for]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    common: Common,
}

/// A question, and what is handed on with its answer.
struct Question {
    text: String,
    beside: Map<String, Value>,
}

impl Ask {
    pub fn run(self, environment: &Environment, terminal: &Terminal) -> Result<()> {
        // All that can be wrong is found before the model is loaded.
        let book = Book::open(&self.state)?;
        let mut questions = self.asked()?;
        let known = match &self.output {
            Some(path) => answered(path, &questions)?,
            None => Known::default(),
        };
        questions.drain(..known.lines);
        if questions.is_empty() {
            terminal.note("all questions are answered already");
            return Ok(());
        }
        let start = Instant::now();
        let mut options = self.common.load_options(self.model.as_deref(), environment);
        book.notes.source.fill(&mut options)?;
        let model = self.common.load_with(&options, terminal)?;
        let fingerprint = model.fingerprint()?;
        let activations = model.network.activations;
        book.file.belongs(activations, &fingerprint)?;
        let placed = book.placed(model.network.graph.prefix)?;
        let wording = Worded {
            model: &model,
            chat: book.notes.chat,
        };
        let prompts = self.prompts(&placed, &wording, &questions, known.lines)?;
        let mut engine = self.engine(&model, &placed, &prompts)?;
        engine.keep_states(Policy::default(), fingerprint);
        engine.attach(&book.file)?;
        let load_seconds = start.elapsed().as_secs_f64();
        catch_interrupts()?;
        let asked = Asked {
            questions: &questions,
            prompts: &prompts,
            model: &model,
            load_seconds,
        };
        if let (None, [_], false) = (&self.questions, &questions[..], self.common.source.json) {
            return self.stream(&mut engine, &asked, terminal);
        }
        let mut to: Box<dyn Write> = match &self.output {
            Some(path) => Box::new(known.open(path)?),
            None => Box::new(io::stdout()),
        };
        self.answer(&mut engine, &asked, &mut *to, terminal)
    }

    /// The questions, or all lines that are none.
    fn asked(&self) -> Result<Vec<Question>> {
        let plain = |text: &String| Question {
            text: text.clone(),
            beside: Map::new(),
        };
        let Some(path) = &self.questions else {
            if self.output.is_some() {
                bail!(
                    "--output is for the answers of --questions; redirect standard output instead"
                );
            }
            if self.question.iter().any(|q| q.trim().is_empty()) {
                bail!("the question is empty");
            }
            return Ok(self.question.iter().map(plain).collect());
        };
        let mut questions = Vec::new();
        let mut faults = Vec::new();
        let text = read_text(path)?;
        for (i, line) in text.lines().enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            let question = match serde_json::from_str(line) {
                Ok(Value::String(text)) => Ok((text, Map::new())),
                Ok(Value::Object(mut object)) => match object.remove("question") {
                    Some(Value::String(text)) => Ok((text, object)),
                    _ => Err("there is no text \"question\"".to_string()),
                },
                Ok(_) => Err("neither a text nor an object".into()),
                Err(error) => Err(format!("no JSON: {error}")),
            };
            match question {
                Ok((text, _)) if text.trim().is_empty() => {
                    faults.push(format!("line {}: the question is empty", i + 1));
                }
                Ok((text, beside)) => questions.push(Question { text, beside }),
                Err(why) => faults.push(format!("line {}: {why}", i + 1)),
            }
        }
        if !faults.is_empty() {
            bail!("{}: {}", path.display(), faults.join("\n"));
        }
        if questions.is_empty() {
            bail!("{}: there is no question", path.display());
        }
        Ok(questions)
    }

    /// The tokens of document and question of each, or all that do not fit.
    fn prompts(
        &self,
        placed: &Placed,
        wording: &Worded<'_>,
        questions: &[Question],
        before: usize,
    ) -> Result<Vec<Vec<TokenId>>> {
        let context = self.context.unwrap_or(wording.model.plan.context);
        let mut prompts = Vec::new();
        let mut faults = Vec::new();
        for (i, question) in questions.iter().enumerate() {
            let prompt = placed.prompt(wording, &question.text)?;
            let own = prompt.len().saturating_sub(placed.tokens.len());
            let total = prompt.len().saturating_add(self.max_tokens);
            if total > context {
                faults.push(format!(
                    "question {}: {} tokens of the document, {} of the question and {} to generate do not fit the context of {} tokens; lower --max-tokens, or raise --context (the model was made for {})",
                    before + i + 1,
                    thousands(placed.tokens.len()),
                    own,
                    self.max_tokens,
                    thousands(context),
                    thousands(wording.model.plan.context)
                ));
            }
            prompts.push(prompt);
        }
        if !faults.is_empty() {
            bail!("{}", faults.join("\n"));
        }
        Ok(prompts)
    }

    /// An engine whose sequences share the document's pages.
    fn engine(&self, model: &Model, placed: &Placed, prompts: &[Vec<TokenId>]) -> Result<Engine> {
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0) + self.max_tokens;
        let at_once = usize::from(self.at_once).min(prompts.len());
        let config: EngineConfig = self.common.engine_config(model, longest, at_once);
        let own = longest.saturating_sub(placed.tokens.len());
        let prefix = model.network.graph.prefix;
        let shared = (longest + prefix).div_ceil(config.page_size) + 2;
        let pages = shared + at_once * (own.div_ceil(config.page_size) + 3);
        Ok(Engine::with_pages(model.network.clone(), config, pages)?)
    }

    /// One question, its answer as it comes.
    fn stream(&self, engine: &mut Engine, asked: &Asked<'_>, terminal: &Terminal) -> Result<()> {
        let model = asked.model;
        let eos = model.eos();
        let id = engine.submit(Request {
            prompt: asked.prompts[0].clone(),
            max_tokens: self.max_tokens,
            stop: eos.clone(),
            sampling: self.sampling.params(model),
            ..Request::default()
        })?;
        let tokenizer = model.tokenizer.as_ref();
        let done = generation::generate(engine, id, tokenizer, &self.stop, &eos, &mut Printer)
            .map_err(|error| model.explain(error.into()))?;
        writeln!(io::stdout()).context("standard output")?;
        if terminal.is_interactive() || self.common.source.verbose {
            let reuse = engine.reuse(id).cloned().unwrap_or_default();
            terminal.note(&format!(
                "ready in {:.2} s; {} of {} tokens were known, {} read in {:.2} s ({}); {} generated at {:.1} tok/s, ended by {}",
                asked.load_seconds,
                thousands(reuse.resumed),
                thousands(reuse.prompt),
                reuse.prompt - reuse.resumed,
                done.prefill.as_secs_f64(),
                reuse.why(&|t| asked.token(t)),
                done.tokens.len(),
                rate(done.tokens.len().saturating_sub(1), done.decode),
                done.reason.word()
            ));
        }
        Ok(())
    }

    /// All questions, a line for each answer.
    fn answer(
        &self,
        engine: &mut Engine,
        asked: &Asked<'_>,
        to: &mut dyn Write,
        terminal: &Terminal,
    ) -> Result<()> {
        let eos = asked.model.eos();
        let asking = Asking {
            tokenizer: asked.model.tokenizer.as_ref(),
            stops: &self.stop,
            eos: &eos,
            max_tokens: self.max_tokens,
            sampling: self.sampling.params(asked.model),
            at_once: usize::from(self.at_once),
        };
        let plain = self.questions.is_none() && !self.common.source.json;
        let bar = terminal.bar("answering", asked.questions.len(), "questions");
        let mut count = 0;
        let done = document::answer(
            engine,
            asked.prompts,
            &asking,
            &mut || !interrupted(),
            &mut |i, answer| {
                count = i + 1;
                if plain {
                    writeln!(to, "{}", answer.text.trim())?;
                } else {
                    writeln!(to, "{}", asked.line(i, &answer))?;
                }
                to.flush()?;
                bar.set_position(count as u64);
                Ok(())
            },
        );
        bar.finish_and_clear();
        done.map_err(|error| asked.model.explain(error.into()))?;
        if count < asked.questions.len() {
            bail!(
                "interrupted: {count} of {} questions are answered",
                asked.questions.len()
            );
        }
        Ok(())
    }
}

/// What was asked, and of whom.
struct Asked<'a> {
    questions: &'a [Question],
    prompts: &'a [Vec<TokenId>],
    model: &'a Model,
    load_seconds: f64,
}

impl Asked<'_> {
    fn token(&self, id: TokenId) -> String {
        let tokenizer = self.model.tokenizer.as_ref();
        tokenizer
            .and_then(|t| t.token_text(id))
            .unwrap_or_else(|| id.to_string())
    }

    /// The answer to question `i` for scripts.
    fn line(&self, i: usize, answer: &Answer) -> Value {
        let mut object = self.questions[i].beside.clone();
        let reuse = &answer.reuse;
        let ids: Vec<TokenId> = answer.tokens.iter().map(|t| t.token).collect();
        let said = json!({
            "question": self.questions[i].text,
            "answer": answer.text.trim(),
            "token_ids": ids,
            "stop_reason": answer.reason.word(),
            "prompt_tokens": self.prompts[i].len(),
            "generated_tokens": answer.tokens.len(),
            "matched_tokens": reuse.matched,
            "resumed_at": reuse.resumed,
            "replayed_tokens": reuse.replayed(),
            "why": reuse.why(&|t| self.token(t)),
            "load_seconds": self.load_seconds,
            "first_token_seconds": answer.first_token.as_secs_f64(),
            "seconds": answer.whole.as_secs_f64(),
        });
        if let Value::Object(said) = said {
            object.extend(said);
        }
        object.into()
    }
}

/// What a file of answers holds already.
#[derive(Default)]
struct Known {
    lines: usize,
    /// Bytes of the whole lines; what follows was cut off while it was written.
    bytes: u64,
}

impl Known {
    fn open(&self, path: &Path) -> Result<File> {
        let name = || path.display().to_string();
        let mut options = OpenOptions::new();
        let file = options.create(true).truncate(false).write(true).open(path);
        let mut file = file.with_context(name)?;
        file.set_len(self.bytes).with_context(name)?;
        io::Seek::seek(&mut file, io::SeekFrom::End(0)).with_context(name)?;
        Ok(file)
    }
}

/// How many of the questions are answered in a file. One that answers others is refused.
fn answered(path: &Path, questions: &[Question]) -> Result<Known> {
    let text = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Known::default()),
        Err(error) => return Err(error).with_context(|| path.display().to_string()),
    };
    let mut known = Known::default();
    for line in text.split_inclusive(|b| *b == b'\n') {
        if !line.ends_with(b"\n") && line.starts_with(b"{") {
            break;
        }
        let answer: Option<Value> = serde_json::from_slice(line).ok();
        let said = answer.as_ref().and_then(|a| a["question"].as_str());
        let asked = questions.get(known.lines).map(|q| q.text.as_str());
        if said.is_none() || said != asked {
            bail!(
                "{}: line {} does not answer question {} of this run; name another --output",
                path.display(),
                known.lines + 1,
                known.lines + 1
            );
        }
        known.lines += 1;
        known.bytes += line.len() as u64;
    }
    Ok(known)
}

/// Streams the answer.
struct Printer;

impl Watch for Printer {
    fn token(&mut self, _sampled: &Sampled, text: &str) -> io::Result<()> {
        self.rest(text)
    }

    fn rest(&mut self, text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }

    fn interrupted(&mut self) -> bool {
        interrupted()
    }
}
