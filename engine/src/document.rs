//! Documents that are read once and asked about for ever: how they stand before a question, and what their state
//! files say of themselves.
//!
//! A document is the system message of the model's chat template and a question its user message, as in
//! `strata generate --chat --prompt-file`; without a template it is the text, an empty line, the question. What
//! stands before the question is the same for all questions: those tokens are read and kept. What a question adds is
//! tokenised behind the last letters before it, so that it is cut as it would be within the whole text.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::json;
use strata_kernels::KvType;

use crate::generation::{self, Assembly, StopReason};
use crate::ids::{SeqId, TokenId};
use crate::load::{self, LoadOptions, Model};
use crate::prefix_cache::Reuse;
use crate::recipe::Recipe;
use crate::sampler::{Sampled, SamplingParams};
use crate::sequence::Reason;
use crate::session::{self, Engine, Output, Request};
use crate::state_file::{self, StateFile};
use crate::text;

/// Key of the notes among a state file's metadata.
const NOTES: &str = "document";
/// Letters before a question that are tokenised again with it.
const ANCHOR: usize = 256;
/// What stands for a question where none was asked yet.
const PROBE: &str = "Which";
/// Questions that begin otherwise: what all of them leave alone belongs to the document.
const PROBES: [&str; 7] = [PROBE, "7", "1", "a", "\"x", "étape", "日本"];

/// What can go wrong with a document.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum Error {
    #[error(transparent)]
    Load(#[from] load::Error),
    #[error(transparent)]
    Text(#[from] text::Error),
    #[error(transparent)]
    State(#[from] state_file::Error),
    #[error(transparent)]
    Engine(#[from] session::Error),
    #[error("{path}: it holds a state, but no document: it was not written by `strata doc read`")]
    NoDocument { path: PathBuf },
    #[error("{path}: what it says of its document cannot be read: {why}")]
    Notes { path: PathBuf, why: String },
    #[error(
        "{path}: {read} of {tokens} tokens are read; run the same `strata doc read` again to go on"
    )]
    Unfinished {
        path: PathBuf,
        read: usize,
        tokens: usize,
    },
    #[error(
        "the chat template writes what stands before a question otherwise for other questions; try --plain"
    )]
    Unsteady,
}

/// How text becomes tokens; a model, or what a test puts in its place.
pub trait Wording {
    /// A document and a question, as the model is to read them.
    fn text(&self, document: &str, question: &str) -> Result<String, Error>;
    /// Its tokens.
    fn encode(&self, text: &str) -> Result<Vec<TokenId>, Error>;
    /// The bytes of a token.
    fn bytes(&self, token: TokenId) -> Vec<u8>;
}

/// A model's wording: under its chat template, or plain.
pub struct Worded<'a> {
    /// The model.
    pub model: &'a Model,
    /// Whether the chat template is used.
    pub chat: bool,
}

impl Wording for Worded<'_> {
    fn text(&self, document: &str, question: &str) -> Result<String, Error> {
        if !self.chat {
            return Ok(format!("{}\n\n{question}", document.trim_end()));
        }
        let messages = [
            json!({"role": "system", "content": document}),
            json!({"role": "user", "content": question}),
        ];
        Ok(self.model.render_chat(&messages, true)?)
    }

    fn encode(&self, text: &str) -> Result<Vec<TokenId>, Error> {
        Ok(self.model.tokenizer()?.encode(text, !self.chat)?)
    }

    fn bytes(&self, token: TokenId) -> Vec<u8> {
        let tokenizer = self.model.tokenizer.as_ref();
        tokenizer.map_or(Vec::new(), |t| t.token_bytes(token))
    }
}

/// A document before its questions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// What is read.
    pub tokens: Vec<TokenId>,
    /// The last letters before a question.
    pub anchor: String,
    /// How many tokens of the anchor, tokenised with a question, are the document's.
    pub anchor_tokens: usize,
    /// After how many tokens each of its parts ends.
    pub ends: Vec<usize>,
}

/// Parts as one document.
pub fn join(parts: &[&str]) -> String {
    match parts {
        [whole] => whole.to_string(),
        parts => {
            let parts: Vec<&str> = parts.iter().map(|p| p.trim_end()).collect();
            parts.join("\n\n")
        }
    }
}

/// What stands before the question in a text, and the question and what follows.
fn split<'a>(text: &'a str, question: &str) -> Result<(&'a str, &'a str), Error> {
    let at = text.rfind(question).ok_or(Error::Unsteady)?;
    Ok(text.split_at(at))
}

/// Places a document of several parts, between which stands an empty line.
pub fn place(wording: &dyn Wording, parts: &[&str]) -> Result<Placed, Error> {
    let document = join(parts);
    let whole = wording.text(&document, PROBE)?;
    let (head, rest) = split(&whole, PROBE)?;
    let mut from = head.len().saturating_sub(ANCHOR);
    while !head.is_char_boundary(from) {
        from -= 1;
    }
    let anchor = &head[from..];
    let probed: Vec<Vec<TokenId>> = PROBES
        .iter()
        .map(|probe| {
            let after = after(wording, probe)?;
            wording.encode(&format!("{anchor}{after}"))
        })
        .collect::<Result<_, _>>()?;
    let first = &probed[0];
    let alike = |other: &Vec<TokenId>| first.iter().zip(other).take_while(|(a, b)| a == b).count();
    let mut kept = probed[1..].iter().map(alike).min().unwrap_or(first.len());
    // Many tokenizers join a space to what follows it.
    while kept > 1 && wording.bytes(first[kept - 1]).trim_ascii().is_empty() {
        kept -= 1;
    }
    let full = wording.encode(&format!("{head}{rest}"))?;
    let tail = first.len() - kept;
    let near = kept.min(4);
    let mut placed = if full.ends_with(&first[kept - near..]) && full.len() > tail && kept > 0 {
        let tokens = full[..full.len() - tail].to_vec();
        Placed {
            tokens,
            anchor: anchor.into(),
            anchor_tokens: kept,
            ends: Vec::new(),
        }
    } else {
        // Where tokens depend on what stands far before them, the question is cut by itself.
        Placed {
            tokens: wording.encode(head)?,
            anchor: String::new(),
            anchor_tokens: 0,
            ends: Vec::new(),
        }
    };
    placed.ends = ends(wording, &placed.tokens, head, parts);
    Ok(placed)
}

/// What stands for a document in a text of which only the rest is of interest.
pub const STAND_IN: &str = "D";

/// What follows the document in the text of a question.
fn after(wording: &dyn Wording, question: &str) -> Result<String, Error> {
    behind(wording, &wording.text(STAND_IN, question)?)
}

/// What follows the document in a text in which [`STAND_IN`] stands for it: a conversation about it, for instance.
pub fn behind(wording: &dyn Wording, text: &str) -> Result<String, Error> {
    let probed = wording.text(STAND_IN, PROBE)?;
    let (head, _) = split(&probed, PROBE)?;
    text.strip_prefix(head)
        .map(Into::into)
        .ok_or(Error::Unsteady)
}

/// After how many tokens the parts end, by the bytes of tokens: some tokenizers change those, so at most near there.
fn ends(wording: &dyn Wording, tokens: &[TokenId], head: &str, parts: &[&str]) -> Vec<usize> {
    let mut at = 0;
    let mut places = Vec::new();
    for part in parts {
        let part = part.trim();
        let Some(found) = head[at..].find(part) else {
            return Vec::new();
        };
        at += found + part.len();
        places.push(at);
    }
    let (mut bytes, mut ends, mut places) = (0, Vec::new(), places.into_iter().peekable());
    for (i, token) in tokens.iter().enumerate() {
        bytes += wording.bytes(*token).len();
        while places.next_if(|at| *at <= bytes).is_some() {
            ends.push(i + 1);
        }
    }
    ends.extend(places.map(|_| tokens.len()));
    ends
}

impl Placed {
    /// The tokens of this document and a question behind it. They begin with the document's, but for a question whose
    /// first letters are cut together with the last before it.
    pub fn prompt(&self, wording: &dyn Wording, question: &str) -> Result<Vec<TokenId>, Error> {
        self.followed_by(wording, &after(wording, question)?)
    }

    /// The tokens of this document and of what follows it: see [`behind`].
    pub fn followed_by(&self, wording: &dyn Wording, after: &str) -> Result<Vec<TokenId>, Error> {
        let cut = wording.encode(&format!("{}{after}", self.anchor))?;
        let near = self.anchor_tokens.min(4);
        // The last place before the question up to which both were cut alike.
        let alike = |end: &usize| {
            let back = self.anchor_tokens - end;
            let known = self.tokens.len().checked_sub(back + near);
            let known = known.map(|from| &self.tokens[from..from + near]);
            *end < cut.len() && known.is_some() && cut.get(end - near..*end) == known
        };
        let end = (near..=self.anchor_tokens).rev().find(alike);
        let (kept, more) = match end {
            Some(end) if near > 0 => (
                self.tokens.len() - (self.anchor_tokens - end),
                cut[end..].to_vec(),
            ),
            _ => (self.tokens.len(), wording.encode(after)?),
        };
        let mut prompt = self.tokens[..kept].to_vec();
        prompt.extend(more);
        Ok(prompt)
    }
}

/// A file that was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Its name, as it was given.
    pub name: String,
    /// Its bytes.
    pub bytes: u64,
    /// After how many tokens of the document it ends.
    pub end: usize,
}

/// What a document's state file says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notes {
    /// The files that were read.
    pub parts: Vec<Part>,
    /// Tokens of the whole document. As long as it is not read to its end, the file has fewer.
    pub tokens: usize,
    /// Whether it stands under the model's chat template.
    pub chat: bool,
    /// See [`Placed::anchor`].
    pub anchor: String,
    /// See [`Placed::anchor_tokens`].
    pub anchor_tokens: usize,
    /// The name of the model.
    pub name: String,
    /// How the model was loaded.
    pub source: ModelSource,
}

/// How to load a model again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelSource {
    /// As a user names it; paths are absolute.
    pub model: Option<String>,
    /// A plan run instead of the card's.
    pub plan: Option<PathBuf>,
    /// A card used instead of the built-in ones.
    pub card: Option<PathBuf>,
    /// The seed of random weights.
    pub random: Option<u64>,
    /// Compute type.
    pub dtype: String,
    /// How keys and values are kept; none in files of earlier versions, which had the compute type's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv: Option<String>,
    /// The recipe by which matrices were quantised while loading.
    pub quantize: Option<String>,
}

impl ModelSource {
    /// What these options load, `model` being what came of it.
    pub fn of(options: &LoadOptions, model: &Model) -> Self {
        let absolute = |path: &Path| std::fs::canonicalize(path).unwrap_or(path.into());
        let name = options.model.as_ref().map(|name| {
            let path = Path::new(name);
            if path.exists() {
                absolute(path).display().to_string()
            } else {
                name.clone()
            }
        });
        ModelSource {
            model: name,
            plan: options.plan.as_deref().map(absolute),
            card: options.card.as_deref().map(absolute),
            random: options.random,
            dtype: model.dtype_word().into(),
            kv: Some(model.kv_dtype.name().into()),
            quantize: options.quantize.as_ref().map(|recipe| recipe.name.clone()),
        }
    }

    /// Fills in what nobody asked for. If another model was named, it is loaded as it is.
    pub fn fill(&self, options: &mut LoadOptions) -> Result<(), Error> {
        if options.model.is_some() {
            return Ok(());
        }
        options.model = self.model.clone();
        options.plan = options.plan.take().or(self.plan.clone());
        options.card = options.card.take().or(self.card.clone());
        options.random = options.random.or(self.random);
        options.dtype = options.dtype.or(load::dtype_of_word(&self.dtype));
        let kv = self.kv.as_deref().and_then(KvType::named);
        options.kv = options.kv.or(kv);
        if let (None, Some(name)) = (&options.quantize, &self.quantize) {
            let recipe = Recipe::find(name).map_err(load::Error::Input)?;
            options.quantize = Some(recipe);
        }
        Ok(())
    }
}

/// A document's state file.
pub struct Book {
    /// The file.
    pub file: Arc<StateFile>,
    /// What it says of itself.
    pub notes: Notes,
}

impl Book {
    /// Maps a document's file; it may be unfinished.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = StateFile::open(path)?;
        let text = file
            .says(NOTES)
            .ok_or_else(|| Error::NoDocument { path: path.into() })?;
        let wrong = |why: String| Error::Notes {
            path: path.into(),
            why,
        };
        let notes: Notes = serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?;
        if notes.anchor_tokens > notes.anchor.len() + 8 || notes.tokens < 1 {
            return Err(wrong(format!(
                "{} tokens of {} bytes before a question, {} in all",
                notes.anchor_tokens,
                notes.anchor.len(),
                notes.tokens
            )));
        }
        Ok(Book {
            file: Arc::new(file),
            notes,
        })
    }

    /// The document, if it was read to its end; `prefix` is the number of the model's own tokens before it.
    pub fn placed(&self, prefix: usize) -> Result<Placed, Error> {
        let mut tokens = self.file.tokens();
        tokens.drain(..prefix.min(tokens.len()));
        if tokens.len() < self.notes.tokens {
            return Err(Error::Unfinished {
                path: self.file.path().into(),
                read: tokens.len(),
                tokens: self.notes.tokens,
            });
        }
        Ok(Placed {
            tokens,
            anchor: self.notes.anchor.clone(),
            anchor_tokens: self.notes.anchor_tokens,
            ends: self.notes.parts.iter().map(|p| p.end).collect(),
        })
    }
}

/// How far a reading is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Tokens that were known before.
    pub resumed: usize,
    /// Tokens that are read, those among them.
    pub read: usize,
    /// All tokens.
    pub tokens: usize,
}

/// Reads a document with an engine that keeps states, until its end or until `go_on` says no. The state after what
/// was read, and those that the policy wants before it, are then kept.
pub fn read(
    engine: &mut Engine,
    placed: &Placed,
    go_on: &mut dyn FnMut(Progress) -> bool,
) -> Result<Progress, Error> {
    let tokens = placed.tokens.len();
    let id = engine.submit(Request {
        prompt: placed.tokens.clone(),
        marks: placed.ends.clone(),
        ..Request::default()
    })?;
    let done = advance(engine, id, tokens, go_on);
    if let Ok(Progress { read, .. }) = done
        && read > 0
    {
        engine.keep_state(id, true);
    }
    engine.remove(id);
    done
}

fn advance(
    engine: &mut Engine,
    id: SeqId,
    tokens: usize,
    go_on: &mut dyn FnMut(Progress) -> bool,
) -> Result<Progress, Error> {
    let mut progress = Progress {
        resumed: 0,
        read: 0,
        tokens,
    };
    while progress.read < tokens && go_on(progress) && engine.step(&mut |_, _, _| {})? {
        progress.resumed = engine.reuse(id).map_or(0, |reuse| reuse.resumed);
        progress.read = engine.computed(id);
    }
    Ok(progress)
}

/// Writes what was read of a document, beside its place first.
pub fn write(
    engine: &Engine,
    placed: &Placed,
    read: usize,
    notes: &Notes,
    path: &Path,
) -> Result<(), Error> {
    let text = serde_json::to_string(notes).map_err(|e| Error::Notes {
        path: path.into(),
        why: e.to_string(),
    })?;
    let notes = BTreeMap::from([(NOTES.to_string(), text)]);
    Ok(engine.write_states(&placed.tokens[..read], &notes, path)?)
}

/// Whether a file may be replaced by a state file: it is none yet, or one of whatever version.
pub fn may_replace(path: &Path) -> bool {
    use std::io::Read;
    let mut start = [0; 9];
    match std::fs::File::open(path).and_then(|mut f| f.read_exact(&mut start)) {
        Ok(()) => start[8] == b'{',
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => true,
        Err(_) => std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() == 0),
    }
}

/// How questions are answered.
pub struct Asking<'a> {
    /// What tokens are in letters.
    pub tokenizer: Option<&'a Arc<text::Tokenizer>>,
    /// Texts that end an answer.
    pub stops: &'a [String],
    /// Tokens that end it.
    pub eos: &'a [TokenId],
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Most questions at once.
    pub at_once: usize,
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// Its tokens, with the end token if there was one.
    pub tokens: Vec<Sampled>,
    /// Why it ended.
    pub reason: StopReason,
    /// What of the prompt was known.
    pub reuse: Reuse,
    /// From its turn to its first token.
    pub first_token: Duration,
    /// From its turn to its last.
    pub whole: Duration,
}

/// Answers many prompts, several at once. `done` gets the answers in the order of the prompts, each as soon as those
/// before it are there; `go_on` ends all of it by saying no.
pub fn answer(
    engine: &mut Engine,
    prompts: &[Vec<TokenId>],
    asking: &Asking<'_>,
    go_on: &mut dyn FnMut() -> bool,
    done: &mut dyn FnMut(usize, Answer) -> Result<(), generation::Error>,
) -> Result<(), generation::Error> {
    let mut open: BTreeMap<SeqId, Open> = BTreeMap::new();
    let mut ready: BTreeMap<usize, Answer> = BTreeMap::new();
    let (mut next, mut told) = (0, 0);
    while told < prompts.len() && go_on() {
        while open.len() < asking.at_once.max(1) && next < prompts.len() {
            let id = engine.submit(Request {
                prompt: prompts[next].clone(),
                max_tokens: asking.max_tokens,
                stop: asking.eos.to_vec(),
                sampling: asking.sampling.clone(),
                ..Request::default()
            })?;
            let assembly = Assembly::new(asking.tokenizer, asking.stops, asking.eos)?;
            open.insert(id, Open::new(next, assembly));
            next += 1;
        }
        if !engine.step(&mut |_, _, _| {})? {
            break;
        }
        let mut ended = Vec::new();
        for output in engine.outputs() {
            match output {
                Output::Token { id, sampled } => {
                    let Some(open) = open.get_mut(id) else {
                        continue;
                    };
                    open.first.get_or_insert_with(|| open.start.elapsed());
                    open.assembly.push(sampled)?;
                    if open.assembly.stopped() {
                        ended.push((*id, Reason::Stop));
                    }
                }
                Output::Finished { id, reason } => ended.push((*id, *reason)),
            }
        }
        for (id, reason) in ended {
            engine.finish(id, reason);
            let reuse = engine.reuse(id).cloned().unwrap_or_default();
            engine.remove(id);
            if let Some(open) = open.remove(&id) {
                ready.insert(open.index, open.end(reason, reuse)?);
            }
        }
        while let Some(answer) = ready.remove(&told) {
            done(told, answer)?;
            told += 1;
        }
    }
    open.keys().for_each(|id| {
        engine.remove(*id);
    });
    Ok(())
}

/// A question that is being answered.
struct Open {
    index: usize,
    assembly: Assembly,
    start: Instant,
    first: Option<Duration>,
}

impl Open {
    fn new(index: usize, assembly: Assembly) -> Self {
        Open {
            index,
            assembly,
            start: Instant::now(),
            first: None,
        }
    }

    fn end(mut self, reason: Reason, reuse: Reuse) -> Result<Answer, generation::Error> {
        let (reason, _) = self.assembly.end(reason)?;
        let whole = self.start.elapsed();
        Ok(Answer {
            text: self.assembly.text,
            tokens: self.assembly.tokens,
            reason,
            reuse,
            first_token: self.first.unwrap_or(whole),
            whole,
        })
    }
}
