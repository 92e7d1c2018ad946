//! One sequence from prompt to text: the loop that `generate` and `chat` share.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::ids::{SeqId, TokenId};
use crate::lookup::Guessed;
use crate::sampler::Sampled;
use crate::sequence::Reason;
use crate::session::{Engine, Error as EngineError, Output};
use crate::text::{self, Detokenizer, StopStrings, Tokenizer};

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// An end-of-sequence token.
    Eos,
    /// A stop string.
    Stop,
    /// The most tokens asked for.
    Length,
    /// The user.
    Interrupted,
}

impl StopReason {
    /// The word for scripts.
    pub fn word(self) -> &'static str {
        match self {
            StopReason::Eos => "eos",
            StopReason::Stop => "stop",
            StopReason::Length => "length",
            StopReason::Interrupted => "interrupted",
        }
    }
}

/// What came of a generation.
#[derive(Debug, Clone)]
pub struct Generated {
    /// The text, without stop string and without end token.
    pub text: String,
    /// The tokens, with the end token if there was one.
    pub tokens: Vec<Sampled>,
    /// Why it ended.
    pub reason: StopReason,
    /// From the first step to the first token.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
    /// Tokens guessed ahead, and how many were right; those behind a stop string among them.
    pub guessed: Guessed,
}

/// Something that ends a generation early.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum Error {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Text(#[from] text::Error),
    /// The reader of the output is gone.
    #[error("standard output")]
    Output(#[from] std::io::Error),
}

/// What watches a generation.
pub trait Watch {
    /// So many tokens of the prompt are computed.
    fn prompt(&mut self, _computed: usize) {}
    /// A token, and the text that it settled (often none, or that of earlier tokens).
    fn token(&mut self, _sampled: &Sampled, _text: &str) -> std::io::Result<()> {
        Ok(())
    }
    /// Text that was held back until the end.
    fn rest(&mut self, _text: &str) -> std::io::Result<()> {
        Ok(())
    }
    /// Whether to end here.
    fn interrupted(&mut self) -> bool {
        false
    }
}

/// The text of one sequence as its tokens come.
pub struct Assembly {
    detokenizer: Option<Detokenizer>,
    held: StopStrings,
    eos: Vec<TokenId>,
    stopped: bool,
    /// What is settled.
    pub text: String,
    /// The tokens, with the end token if there was one.
    pub tokens: Vec<Sampled>,
}

impl Assembly {
    /// Of a sequence that ends before any of `stops`, or at one of `eos`.
    pub fn new(
        tokenizer: Option<&Arc<Tokenizer>>,
        stops: &[String],
        eos: &[TokenId],
    ) -> Result<Self, Error> {
        Ok(Assembly {
            detokenizer: tokenizer.map(|t| Detokenizer::new(t.clone(), true)),
            held: StopStrings::new(stops.to_vec())?,
            eos: eos.to_vec(),
            stopped: false,
            text: String::new(),
            tokens: Vec::new(),
        })
    }

    /// The same with these tokens in the text, special or not.
    pub fn showing(self, tokens: &[TokenId]) -> Self {
        Assembly {
            detokenizer: self.detokenizer.map(|d| d.showing(tokens)),
            ..self
        }
    }

    /// Takes a token; the text that it settled. Whoever finds it [`Assembly::stopped`] then ends the sequence.
    /// Tokens of the same step that follow a stop string were not asked for, and are left out.
    pub fn push(&mut self, sampled: &Sampled) -> Result<String, Error> {
        if self.stopped {
            return Ok(String::new());
        }
        let ends = self.eos.contains(&sampled.token);
        let piece = match &mut self.detokenizer {
            Some(detokenizer) if !ends => detokenizer.push(sampled.token)?,
            _ => String::new(),
        };
        let passed = self.held.push(&piece);
        self.text.push_str(&passed.text);
        self.tokens.push(sampled.clone());
        self.stopped |= passed.stop.is_some();
        Ok(passed.text)
    }

    /// Whether a stop string came.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Why it ended, and the text that was held back until then.
    pub fn end(&mut self, why: Reason) -> Result<(StopReason, String), Error> {
        let reason = match why {
            _ if self.stopped => StopReason::Stop,
            Reason::Stop => StopReason::Eos,
            Reason::Length => StopReason::Length,
            Reason::Cancelled | Reason::Failed => StopReason::Interrupted,
        };
        if self.stopped {
            return Ok((reason, String::new()));
        }
        let tail = match &mut self.detokenizer {
            Some(detokenizer) => detokenizer.finish()?,
            None => String::new(),
        };
        let mut rest = self.held.push(&tail).text;
        rest.push_str(&self.held.finish());
        self.text.push_str(&rest);
        Ok((reason, rest))
    }
}

/// Runs a submitted sequence to its end.
pub fn generate(
    engine: &mut Engine,
    id: SeqId,
    tokenizer: Option<&Arc<Tokenizer>>,
    stops: &[String],
    eos: &[TokenId],
    watch: &mut dyn Watch,
) -> Result<Generated, Error> {
    let mut assembly = Assembly::new(tokenizer, stops, eos)?;
    let mut ended = None;
    let start = Instant::now();
    let mut first = None;
    let mut last = start;
    while ended.is_none() {
        if watch.interrupted() {
            engine.finish(id, Reason::Cancelled);
            break;
        }
        if !engine.advance()? {
            break;
        }
        if first.is_none() {
            watch.prompt(engine.computed(id));
        }
        for output in engine.outputs() {
            match output {
                Output::Token { id: of, sampled } if *of == id => {
                    last = Instant::now();
                    first.get_or_insert(last);
                    let text = assembly.push(sampled)?;
                    watch.token(sampled, &text)?;
                    if assembly.stopped() {
                        break; // tokens of the same step that follow were not asked for
                    }
                }
                Output::Finished { id: of, reason } if *of == id => ended = Some(*reason),
                Output::Token { .. } | Output::Finished { .. } => {}
            }
        }
        if assembly.stopped() {
            engine.finish(id, Reason::Stop);
            ended = Some(Reason::Stop);
        }
    }
    if let Some(failure) = engine.failure(id) {
        return Err(EngineError::from(failure.clone()).into());
    }
    let (reason, rest) = assembly.end(ended.unwrap_or(Reason::Cancelled))?;
    if reason != StopReason::Stop {
        watch.rest(&rest)?;
    }
    let first = first.unwrap_or_else(Instant::now);
    let decode = last.saturating_duration_since(first);
    Ok(Generated {
        text: assembly.text,
        tokens: assembly.tokens,
        reason,
        prefill: first - start,
        decode,
        guessed: engine.guessed(id),
    })
}
