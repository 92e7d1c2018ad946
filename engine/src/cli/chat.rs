//! `strata chat`.

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::generate::{LookingUp, Sampling};
use super::output::{Terminal, rate};
use super::{
    Common, Environment, catch_interrupts, clear_interrupt, describe, interrupted, read_text,
    text_of,
};
use crate::generation::{self, Watch};
use crate::ids::TokenId;
use crate::load::Model;
use crate::lookup::Guessed;
use crate::sampler::Sampled;
use crate::session::{Engine, Request, SnapshotId};
use crate::state_file;

/// Talk to a model, or ask questions about a document
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct Chat {
    /// Folder, Hub id (owner/name[@revision]) or bundled name [default: demo]
    model: Option<String>,
    /// The system message
    #[arg(long, value_name = "TEXT", conflicts_with = "document")]
    system: Option<String>,
    /// A file to talk about, as the system message
    #[arg(long, value_name = "FILE")]
    document: Option<PathBuf>,
    /// Most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_tokens: usize,
    /// Most tokens of the conversation [default: what the model was made for]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    #[command(flatten)]
    lookup: LookingUp,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    common: Common,
}

const AFTER: &str = "\
The state is kept between turns: each costs its own tokens only. With --document, the file is read
once and every message asks about it. Lines are read from standard input when that is no terminal.
Commands begin with a slash; /help lists them.

Examples:
  strata chat --document notes.md
  strata chat ./Jamba2-3B --system \"Answer in one sentence.\"";

const HELP: &str = "\
/help            this list
/system TEXT     start anew with this system message
/document FILE   start anew with this file as the system message
/reset           start anew with the same system message
/undo            take the last question and its answer back
/history         what was said so far
/save FILE       keep the model's state in a file
/load FILE       go on from a state file of this model
/stats           tokens, speed and memory of the conversation
/quit            leave";

impl Chat {
    pub fn run(self, environment: &Environment, terminal: &Terminal) -> Result<()> {
        let system = match &self.document {
            Some(path) => Some(read_text(path)?),
            None => self.system.clone(),
        };
        let model = self
            .common
            .load(self.model.as_deref(), environment, terminal)?;
        model.tokenizer()?;
        let context = self.context.unwrap_or(model.plan.context);
        let config = self.common.engine_config(&model, context, 1);
        let config = self.lookup.config(config, &model, terminal);
        catch_interrupts()?;
        let mut conversation = Conversation {
            engine: Engine::new(model.network.clone(), config)?,
            sampling: self.sampling.clone(),
            lookup: self.lookup.clone(),
            max_tokens: self.max_tokens,
            context,
            json: self.common.source.json,
            system,
            messages: Vec::new(),
            kept: Vec::new(),
            spent: Spent::default(),
            model,
            terminal,
        };
        // Fails early if the template cannot render what it will be asked to.
        conversation.render(&[json!({"role": "user", "content": "…"})])?;

        let interactive = io::stdin().is_terminal();
        if interactive {
            terminal.note(&format!(
                "{} is listening. /help lists commands.",
                conversation.model.name
            ));
        }
        let mut lines = io::stdin().lock().split(b'\n');
        loop {
            if interactive {
                let mut err = io::stderr();
                write!(err, "{} ", terminal.bold(">")).and_then(|()| err.flush())?;
            }
            clear_interrupt();
            let Some(line) = lines.next() else { break };
            let line = line.context("standard input")?;
            let line = text_of("standard input", line)?;
            let line = line.trim();
            let done = match line.strip_prefix('/') {
                _ if line.is_empty() => Ok(false),
                Some(command) => conversation.command(command),
                None => conversation.ask(line).map(|()| false),
            };
            match done {
                Ok(true) => break,
                Ok(false) => {}
                // A mistake of one line ends no conversation that a person is holding.
                Err(error) if interactive && error.downcast_ref::<io::Error>().is_none() => {
                    terminal.note(&describe(&error));
                }
                Err(error) => return Err(error),
            }
        }
        let verbose = self.common.source.verbose;
        let engine = &conversation.engine;
        terminal.memory(
            &conversation.model,
            engine.config(),
            engine.allocated(),
            verbose,
        );
        Ok(())
    }
}

/// The state after some tokens, from which the next turn goes on.
struct Kept {
    tokens: Vec<TokenId>,
    snapshot: SnapshotId,
    /// Messages that were said when it was taken.
    messages: usize,
}

#[derive(Default)]
struct Spent {
    read: usize,
    reused: usize,
    generated: usize,
    guessed: Guessed,
    reading: std::time::Duration,
    generating: std::time::Duration,
}

struct Conversation<'a> {
    engine: Engine,
    model: Model,
    terminal: &'a Terminal,
    sampling: Sampling,
    lookup: LookingUp,
    max_tokens: usize,
    context: usize,
    json: bool,
    system: Option<String>,
    messages: Vec<Value>,
    /// From the oldest to the newest; each begins with the tokens of the one before.
    kept: Vec<Kept>,
    spent: Spent,
}

impl Conversation<'_> {
    /// The conversation with further messages, as the model reads it.
    fn render(&self, further: &[Value]) -> Result<Vec<TokenId>> {
        let system = self
            .system
            .iter()
            .map(|s| json!({"role": "system", "content": s}));
        let messages: Vec<Value> = system
            .chain(self.messages.iter().cloned())
            .chain(further.iter().cloned())
            .collect();
        let text = self.model.render_chat(&messages, true)?;
        Ok(self.model.tokenizer()?.encode(&text, false)?)
    }

    fn ask(&mut self, question: &str) -> Result<()> {
        let message = json!({"role": "user", "content": question});
        let prompt = self.render(std::slice::from_ref(&message))?;
        if prompt.len() + 1 > self.context {
            bail!(
                "the conversation has {} tokens and the context {}; /reset starts anew, --context raises it",
                prompt.len(),
                self.context
            );
        }
        // State whose tokens the prompt does not begin with is of no use any more: a template may
        // render earlier turns differently once they are past.
        while let Some(kept) = self.kept.last() {
            if prompt.len() > kept.tokens.len() && prompt.starts_with(&kept.tokens) {
                break;
            }
            let snapshot = kept.snapshot;
            self.kept.pop();
            self.engine.drop_snapshot(snapshot)?;
        }
        let reused = self.kept.last().map_or(0, |k| k.tokens.len());
        let max_tokens = self.max_tokens.min(self.context - prompt.len());

        // The prompt first, so that its state can be kept whatever the answer is.
        let read = Request {
            prompt: prompt.clone(),
            ..Request::default()
        };
        let from = self.kept.last().map(|k| k.snapshot);
        let eos = self.model.eos();
        let bar = self.terminal.bar("reading", prompt.len() - reused, "tok");
        let mut watch = Printer {
            bar,
            json: self.json,
            computed: reused,
        };
        let start = std::time::Instant::now();
        // All but the last token, which then gives the first of the answer.
        let head = Request {
            prompt: prompt[..prompt.len() - 1].to_vec(),
            ..read
        };
        if head.prompt.len() > reused {
            let id = match from {
                Some(snapshot) => self.engine.restore(snapshot, head)?,
                None => self.engine.submit(head)?,
            };
            while self
                .engine
                .advance()
                .map_err(|e| self.model.explain(e.into()))?
            {
                watch.prompt(self.engine.computed(id));
                if interrupted() {
                    self.engine.remove(id);
                    watch.bar.finish_and_clear();
                    self.terminal.note("interrupted");
                    return Ok(());
                }
            }
            let snapshot = self.engine.snapshot(id)?;
            self.engine.remove(id);
            let tokens = prompt[..prompt.len() - 1].to_vec();
            self.kept.push(Kept {
                tokens,
                snapshot,
                messages: self.messages.len(),
            });
        }
        let reading = start.elapsed();
        let request = Request {
            prompt: prompt.clone(),
            max_tokens,
            stop: eos.clone(),
            sampling: self.sampling.params(&self.model),
            ..Request::default()
        };
        let id = match self.kept.last() {
            Some(kept) => self.engine.restore(kept.snapshot, request)?,
            None => self.engine.submit(request)?,
        };
        let tokenizer = self.model.tokenizer.clone();
        let done = generation::generate(
            &mut self.engine,
            id,
            tokenizer.as_ref(),
            &[],
            &eos,
            &mut watch,
        )
        .map_err(|error| self.model.explain(error.into()))?;
        watch.bar.finish_and_clear();
        if let Ok(snapshot) = self.engine.snapshot(id) {
            let tokens = self.engine.snapshot_tokens(snapshot)?.to_vec();
            self.kept.push(Kept {
                tokens,
                snapshot,
                messages: self.messages.len() + 2,
            });
        }
        self.engine.remove(id);

        self.spent.read += prompt.len() - reused;
        self.spent.reused += reused;
        self.spent.generated += done.tokens.len();
        self.spent.guessed.tokens += done.guessed.tokens;
        self.spent.guessed.right += done.guessed.right;
        self.spent.guessed.steps += done.guessed.steps;
        self.spent.reading += reading;
        self.spent.generating += done.decode;
        let answer = done.text.trim().to_string();
        if self.json {
            let mut object = json!({
                "text": answer, "stop_reason": done.reason.word(), "prompt_tokens": prompt.len(),
                "reused_tokens": reused, "generated_tokens": done.tokens.len(),
            });
            self.lookup.json(done.guessed, &mut object);
            writeln!(io::stdout(), "{object}")?;
        } else {
            writeln!(io::stdout())?;
        }
        self.messages.push(message);
        self.messages
            .push(json!({"role": "assistant", "content": answer}));
        Ok(())
    }

    /// Runs a slash command. True ends the conversation.
    fn command(&mut self, line: &str) -> Result<bool> {
        let (command, argument) = line.split_once(' ').unwrap_or((line, ""));
        let argument = argument.trim();
        let needs = |what: &str| -> Result<()> {
            if argument.is_empty() {
                bail!("/{command} needs {what}");
            }
            Ok(())
        };
        match command {
            "quit" | "exit" | "q" => return Ok(true),
            "help" | "?" => self.terminal.note(HELP),
            "system" => {
                needs("a text")?;
                self.reset(Some(argument.into()))?;
            }
            "document" => {
                needs("a file")?;
                let text = read_text(Path::new(argument))?;
                self.reset(Some(text))?;
            }
            "reset" => {
                let system = self.system.take();
                self.reset(system)?;
            }
            "undo" => {
                if self.messages.is_empty() {
                    bail!("nothing was said yet");
                }
                self.messages.truncate(self.messages.len() - 2);
                let said = self.messages.len();
                while self.kept.last().is_some_and(|k| k.messages > said) {
                    let snapshot = self.kept.pop().expect("there is a last one").snapshot;
                    self.engine.drop_snapshot(snapshot)?;
                }
            }
            "history" => {
                for message in &self.messages {
                    let text = |key| message[key].as_str().unwrap_or_default();
                    self.terminal
                        .note(&format!("{}: {}", text("role"), text("content")));
                }
            }
            "save" => {
                needs("a file")?;
                let Some(kept) = self.kept.last() else {
                    bail!("nothing was read yet")
                };
                let fingerprint = self.model.fingerprint()?;
                state_file::save(
                    &self.engine,
                    kept.snapshot,
                    &fingerprint,
                    Path::new(argument),
                )?;
                self.terminal.note(&format!(
                    "{} tokens are kept in {argument}",
                    kept.tokens.len()
                ));
            }
            "load" => {
                needs("a file")?;
                let fingerprint = self.model.fingerprint()?;
                let path = Path::new(argument);
                let snapshot = state_file::load(&mut self.engine, &fingerprint, path)?;
                let tokens = self.engine.snapshot_tokens(snapshot)?.to_vec();
                let count = tokens.len();
                self.reset(self.system.clone())?;
                // It serves as soon as the conversation begins with its tokens.
                self.kept.push(Kept {
                    tokens,
                    snapshot,
                    messages: 0,
                });
                self.terminal.note(&format!(
                    "{count} tokens are known: what begins with them is not read again"
                ));
            }
            "stats" => {
                let Spent {
                    read,
                    reused,
                    generated,
                    guessed,
                    reading,
                    generating,
                } = &self.spent;
                self.terminal.note(&format!(
                    "{read} tokens read at {:.1} tok/s, {reused} not read again, {generated} generated at {:.1} tok/s; {}",
                    rate(*read, *reading),
                    rate(*generated, *generating),
                    self.model.summary(),
                ));
                if let Some(said) = self.lookup.said(*guessed) {
                    self.terminal.note(&said);
                }
            }
            other => bail!("there is no command /{other}; /help lists them"),
        }
        Ok(false)
    }

    fn reset(&mut self, system: Option<String>) -> Result<()> {
        for kept in self.kept.drain(..) {
            self.engine.drop_snapshot(kept.snapshot)?;
        }
        self.messages.clear();
        self.system = system;
        Ok(())
    }
}

/// Streams the answer.
struct Printer {
    bar: ProgressBar,
    json: bool,
    computed: usize,
}

impl Watch for Printer {
    fn prompt(&mut self, computed: usize) {
        self.bar
            .set_position(computed.saturating_sub(self.computed) as u64);
    }

    fn token(&mut self, _sampled: &Sampled, text: &str) -> io::Result<()> {
        self.bar.finish_and_clear();
        self.rest(text)
    }

    fn rest(&mut self, text: &str) -> io::Result<()> {
        if self.json {
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
