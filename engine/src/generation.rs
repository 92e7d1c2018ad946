//! One sequence from prompt to text: the loop that `generate` and `chat` share.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::ids::{SeqId, TokenId};
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

/// Runs a submitted sequence to its end.
pub fn generate(
    engine: &mut Engine,
    id: SeqId,
    tokenizer: Option<&Arc<Tokenizer>>,
    stops: &[String],
    eos: &[TokenId],
    watch: &mut dyn Watch,
) -> Result<Generated, Error> {
    let mut detokenizer = tokenizer.map(|t| Detokenizer::new(t.clone(), true));
    let mut held = StopStrings::new(stops.to_vec())?;
    let mut text = String::new();
    let mut tokens: Vec<Sampled> = Vec::new();
    let mut reason = None;
    let start = Instant::now();
    let mut first = None;
    let mut last = start;
    while reason.is_none() {
        if watch.interrupted() {
            engine.finish(id, Reason::Cancelled);
            reason = Some(StopReason::Interrupted);
            break;
        }
        if !engine.advance()? {
            break;
        }
        if first.is_none() {
            watch.prompt(engine.computed(id));
        }
        let mut stopped = false;
        for output in engine.outputs() {
            match output {
                Output::Token { id: of, sampled } if *of == id => {
                    last = Instant::now();
                    first.get_or_insert(last);
                    let ends = eos.contains(&sampled.token);
                    let piece = match &mut detokenizer {
                        Some(detokenizer) if !ends => detokenizer.push(sampled.token)?,
                        _ => String::new(),
                    };
                    let passed = held.push(&piece);
                    text.push_str(&passed.text);
                    watch.token(sampled, &passed.text)?;
                    tokens.push(sampled.clone());
                    stopped = passed.stop.is_some();
                }
                Output::Finished {
                    id: of,
                    reason: why,
                } if *of == id => {
                    reason = Some(match why {
                        Reason::Stop => StopReason::Eos,
                        Reason::Cancelled | Reason::Failed => StopReason::Interrupted,
                        Reason::Length => StopReason::Length,
                    });
                }
                Output::Token { .. } | Output::Finished { .. } => {}
            }
        }
        if stopped {
            engine.finish(id, Reason::Stop);
            reason = Some(StopReason::Stop);
        }
    }
    let reason = reason.unwrap_or(StopReason::Interrupted);
    if reason != StopReason::Stop {
        let tail = match &mut detokenizer {
            Some(detokenizer) => detokenizer.finish()?,
            None => String::new(),
        };
        let mut rest = held.push(&tail).text;
        rest.push_str(&held.finish());
        text.push_str(&rest);
        watch.rest(&rest)?;
    }
    let first = first.unwrap_or_else(Instant::now);
    let decode = last.saturating_duration_since(first);
    Ok(Generated {
        text,
        tokens,
        reason,
        prefill: first - start,
        decode,
    })
}
