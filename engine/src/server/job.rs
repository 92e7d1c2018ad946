//! What HTTP asks of the engine's thread, and what it is told: jobs, their choices, their events.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;
use strata_layers::Graph;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::Receiver;

use super::error::ApiError;
use super::reading::Reading;
use crate::beyond::Sight;
use crate::generation::StopReason;
use crate::ids::TokenId;
use crate::prefix_cache::Reuse;
use crate::sampler::{Sampled, SamplingParams};

/// Most events that wait for a client. One that reads so much too slowly is taken for gone.
pub const MOST_EVENTS: usize = 4096;

/// What the engine's thread is asked for.
pub enum Command {
    /// To answer.
    Run(Job),
    /// To forget a job, whatever it is doing.
    Cancel(u64),
    /// To read a document, as soon as those before it are read.
    Read(Arc<Reading>),
    /// To read a document no further, and to forget its file.
    Forget(Arc<Reading>),
    /// To read no more documents; what was read of one is kept.
    Drain,
    /// To end, whatever is running.
    Stop,
}

/// A request: one sequence for each choice.
pub struct Job {
    /// Its number.
    pub id: u64,
    /// Its name in the answer.
    pub name: String,
    /// What is to be generated.
    pub choices: Vec<Choice>,
    /// Where what happens is told. When it is closed or full, the job is over.
    pub events: tokio::sync::mpsc::Sender<Event>,
    /// When it came.
    pub received: Instant,
    /// A place among those that wait and run, for each choice: given back when the job is dropped.
    #[expect(dead_code, reason = "it is held, not read")]
    pub place: OwnedSemaphorePermit,
}

/// One sequence of a job.
#[derive(Debug, Clone)]
pub struct Choice {
    /// The tokens to begin with.
    pub prompt: Arc<Vec<TokenId>>,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Texts that end it.
    pub stops: Vec<String>,
    /// Tokens that end it.
    pub eos: Vec<TokenId>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// The log-probabilities of the prompt's tokens are wanted, with so many of the likeliest.
    pub score_prompt: Option<usize>,
    /// Special tokens that are part of the text.
    pub shown: Vec<TokenId>,
    /// The choice with the same prompt that reads it first.
    pub after: Option<usize>,
}

/// What happens to a job.
#[derive(Debug)]
pub enum Event {
    /// It is in the queue.
    Accepted,
    /// A choice has a token.
    Token {
        /// Which.
        choice: usize,
        /// The token.
        sampled: Sampled,
        /// The text that it settled: often none, or that of earlier tokens.
        text: String,
    },
    /// A choice is at its end.
    End {
        /// Which.
        choice: usize,
        /// How.
        end: End,
    },
    /// The job is over.
    Failed(ApiError),
}

/// The end of a choice.
#[derive(Debug)]
pub struct End {
    /// Why.
    pub reason: StopReason,
    /// Text that was held back until then.
    pub rest: String,
    /// Tokens that were generated, the end token among them.
    pub generated: usize,
    /// What of the prompt was known.
    pub cached: Cached,
    /// Log-probabilities of the prompt's tokens from the second, if they were asked for.
    pub prompt_scores: Vec<Sampled>,
}

/// What of a prompt was known, as answers tell it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Cached {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// How many of them begin like something known.
    pub matched: usize,
    /// How many of them were not computed again.
    pub resumed_at: usize,
    /// How many were known and computed again, for want of a state behind them.
    pub replayed: usize,
    /// Whether the state came from a file.
    pub from_file: bool,
    /// Why so much was computed.
    pub why: String,
    /// What attention still sees of all tokens, where that is not all: see [`Sight::json`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sight: Option<Value>,
}

impl Cached {
    /// The same with what is seen after `tokens` tokens.
    pub fn seeing(self, graph: &Graph, tokens: usize) -> Self {
        let sight = Sight::of(graph, tokens).filter(|s| !s.unseen().is_empty());
        Cached {
            sight: sight.map(|s| s.json()),
            ..self
        }
    }

    /// From what the cache says; `text` shows a token.
    pub fn new(prompt: usize, reuse: Option<&Reuse>, text: &dyn Fn(TokenId) -> String) -> Self {
        let Some(reuse) = reuse else {
            return Cached {
                prompt,
                why: "no states are kept".into(),
                ..Cached::default()
            };
        };
        Cached {
            prompt,
            matched: reuse.matched,
            resumed_at: reuse.resumed,
            replayed: reuse.replayed(),
            from_file: reuse.from_file,
            why: reuse.why(text),
            sight: None,
        }
    }
}

/// A client's hold on its job: dropping it cancels what is left.
pub struct Ticket {
    id: u64,
    events: Receiver<Event>,
    commands: Sender<Command>,
    deadline: tokio::time::Instant,
    allowed: Duration,
}

impl Ticket {
    /// For a job that may take until `allowed` from now.
    pub fn new(
        id: u64,
        events: Receiver<Event>,
        commands: Sender<Command>,
        allowed: Duration,
    ) -> Self {
        Ticket {
            id,
            events,
            commands,
            deadline: tokio::time::Instant::now() + allowed,
            allowed,
        }
    }

    /// When its time is over.
    pub fn deadline(&self) -> tokio::time::Instant {
        self.deadline
    }

    /// What the client is told then.
    pub fn late(&self) -> ApiError {
        let message = format!(
            "the request took longer than the {} seconds that are allowed (--request-timeout)",
            self.allowed.as_secs()
        );
        ApiError::new(axum::http::StatusCode::GATEWAY_TIMEOUT, message).with_code("timeout")
    }

    /// What the client is told when the engine's thread has dropped the job.
    pub fn dropped() -> ApiError {
        ApiError::unavailable(
            "stopped",
            "the request was dropped: the server is stopping, or its reader was too slow",
        )
    }

    /// The next event, or why there is none.
    pub async fn next(&mut self) -> Result<Event, ApiError> {
        match tokio::time::timeout_at(self.deadline, self.events.recv()).await {
            Ok(Some(Event::Failed(error))) => Err(error),
            Ok(Some(event)) => Ok(event),
            Ok(None) => Err(Ticket::dropped()),
            Err(_) => Err(self.late()),
        }
    }

    /// As [`Ticket::next`], for who polls; the time is the caller's care.
    pub fn poll(
        &mut self,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<Event, ApiError>> {
        self.events.poll_recv(context).map(|event| match event {
            Some(Event::Failed(error)) => Err(error),
            Some(event) => Ok(event),
            None => Err(Ticket::dropped()),
        })
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // Without an engine's thread there is nothing to cancel.
        let _ = self.commands.send(Command::Cancel(self.id));
    }
}
