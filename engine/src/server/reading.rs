//! A document of the server: its text placed before its questions, and how far it is read.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::metrics::lock;
use crate::document::{Notes, Placed};
use crate::state_file::StateFile;

/// A document of the server.
pub struct Reading {
    /// Its name among documents, from its text.
    pub id: String,
    /// What its sender called it.
    pub name: String,
    /// Bytes of its text.
    pub bytes: u64,
    /// When it came, in seconds since 1970.
    pub created: u64,
    /// Its tokens.
    pub placed: Placed,
    /// What its state file says.
    pub notes: Notes,
    /// Its state file; none if documents are not kept.
    pub path: Option<PathBuf>,
    /// What lay there at the start, whole or not.
    pub known: Option<Arc<StateFile>>,
    state: Mutex<State>,
}

#[derive(Debug, Clone)]
struct State {
    status: Status,
    resumed: usize,
    read: usize,
    seconds: f64,
    error: Option<String>,
}

/// How far a document is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Others are read before it.
    Queued,
    /// It is being read.
    Reading,
    /// It can be asked, at the cost of the question.
    Ready,
    /// It could not be read.
    Failed,
    /// It was deleted.
    Deleted,
}

impl Status {
    fn word(self) -> &'static str {
        match self {
            Status::Queued => "queued",
            Status::Reading => "reading",
            Status::Ready => "ready",
            Status::Failed => "failed",
            Status::Deleted => "deleted",
        }
    }
}

impl Reading {
    /// A document that nobody has begun to read.
    pub fn new(
        id: String,
        created: u64,
        placed: Placed,
        notes: Notes,
        path: Option<PathBuf>,
        known: Option<Arc<StateFile>>,
    ) -> Self {
        let first = notes.parts.first();
        Reading {
            id,
            name: first.map_or(String::new(), |part| part.name.clone()),
            bytes: first.map_or(0, |part| part.bytes),
            created,
            placed,
            notes,
            path,
            known,
            state: Mutex::new(State {
                status: Status::Queued,
                resumed: 0,
                read: 0,
                seconds: 0.0,
                error: None,
            }),
        }
    }

    /// How far it is.
    pub fn status(&self) -> Status {
        lock(&self.state).status
    }

    /// So many tokens are read, after so many seconds; `resumed` of them were known before.
    pub fn progress(&self, resumed: usize, read: usize, seconds: f64) {
        let mut state = lock(&self.state);
        if state.status != Status::Deleted {
            state.status = Status::Reading;
        }
        (state.resumed, state.read, state.seconds) = (resumed, read, seconds);
    }

    /// It is read to its end. An error is that of keeping it, which takes nothing from answers.
    pub fn ready(&self, error: Option<String>) {
        let mut state = lock(&self.state);
        if state.status != Status::Deleted {
            state.status = Status::Ready;
        }
        state.read = self.placed.tokens.len();
        state.error = error;
    }

    /// It could not be read.
    pub fn failed(&self, error: String) {
        let mut state = lock(&self.state);
        if state.status != Status::Deleted {
            state.status = Status::Failed;
        }
        state.error = Some(error);
    }

    /// It is gone.
    pub fn deleted(&self) {
        lock(&self.state).status = Status::Deleted;
    }

    /// As a resource.
    pub fn json(&self) -> Value {
        let state = lock(&self.state).clone();
        let computed = state.read.saturating_sub(state.resumed);
        let rate = if state.seconds > 0.0 {
            computed as f64 / state.seconds
        } else {
            0.0
        };
        let tokens = self.placed.tokens.len();
        let file = self.path.as_ref().and_then(|p| std::fs::metadata(p).ok());
        json!({
            "id": self.id,
            "object": "document",
            "name": self.name,
            "created_at": self.created,
            "bytes": self.bytes,
            "status": state.status.word(),
            "tokens": tokens,
            "read_tokens": state.read,
            "resumed_at": state.resumed,
            "progress": if tokens == 0 { 1.0 } else { state.read as f64 / tokens as f64 },
            "seconds": state.seconds,
            "tokens_per_second": rate,
            "kept": self.path.is_some(),
            "cached_bytes": file.map(|f| f.len()),
            "error": state.error,
        })
    }
}
