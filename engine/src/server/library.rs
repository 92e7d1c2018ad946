//! The documents of the server, and the folder that keeps them over restarts.
//!
//! A document is two files there: `ID.json` with its text, written before anything else is done, and `ID.MODEL.state`
//! with its state as far as it is read. Both are written beside their places and renamed. MODEL is the hash of plan and
//! weights, so that several models may share a folder. What is unfinished at the start is read on.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use super::error::ApiError;
use super::metrics::lock;
use super::reading::{Reading, Status};
use crate::document::{self, Book, ModelSource, Notes, Part, Placed, Worded};
use crate::load::Model;
use crate::prefix_cache::thousands;
use crate::state_file::{Fingerprint, StateFile};

/// Most documents.
const MOST_DOCUMENTS: usize = 1024;

/// The documents of the server.
pub struct Library {
    folder: Option<PathBuf>,
    source: ModelSource,
    fingerprint: Option<Fingerprint>,
    documents: Mutex<BTreeMap<String, Arc<Reading>>>,
}

/// A document's text, as it is kept.
#[derive(Serialize, Deserialize)]
struct Kept {
    name: String,
    created: u64,
    text: String,
}

impl Library {
    /// An empty one. With a folder, `fingerprint` is that of the model.
    pub fn new(
        folder: Option<PathBuf>,
        source: ModelSource,
        fingerprint: Option<Fingerprint>,
    ) -> Self {
        Library {
            folder,
            source,
            fingerprint,
            documents: Mutex::new(BTreeMap::new()),
        }
    }

    /// Finds what lies in the folder: the documents, and what is wrong with others.
    pub fn open(
        &self,
        model: &Model,
        context: usize,
    ) -> io::Result<(Vec<Arc<Reading>>, Vec<String>)> {
        let Some(folder) = &self.folder else {
            return Ok((Vec::new(), Vec::new()));
        };
        fs::create_dir_all(folder)?;
        let mut names: Vec<PathBuf> = fs::read_dir(folder)?
            .map(|entry| entry.map(|e| e.path()))
            .collect::<io::Result<_>>()?;
        names.retain(|path| path.extension().is_some_and(|e| e == "json"));
        names.sort();
        let (mut found, mut wrong) = (Vec::new(), Vec::new());
        for path in names {
            let read = || -> Result<Arc<Reading>, String> {
                let bytes = fs::read(&path).map_err(|e| e.to_string())?;
                let kept: Kept = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
                self.place(model, context, kept).map_err(|e| e.message)
            };
            match read() {
                Ok(reading) => {
                    lock(&self.documents).insert(reading.id.clone(), reading.clone());
                    found.push(reading);
                }
                Err(why) => wrong.push(format!("{}: {why}", path.display())),
            }
        }
        Ok((found, wrong))
    }

    /// Takes a document on; false if it is here already. It is kept before this returns, and then to be read.
    pub fn add(
        &self,
        model: &Model,
        context: usize,
        name: String,
        text: String,
        created: u64,
    ) -> Result<(Arc<Reading>, bool), ApiError> {
        let id = id_of(&text);
        if let Some(known) = lock(&self.documents).get(&id)
            && known.status() != Status::Failed
        {
            return Ok((known.clone(), false));
        }
        if lock(&self.documents).len() >= MOST_DOCUMENTS {
            let message = format!("there are {MOST_DOCUMENTS} documents; delete one first");
            return Err(ApiError::invalid(message).with_code("too_many_documents"));
        }
        let kept = Kept {
            name,
            created,
            text,
        };
        let written = match &self.folder {
            Some(folder) => serde_json::to_vec(&kept)
                .map_err(io::Error::other)
                .and_then(|bytes| write_whole(&folder.join(format!("{id}.json")), &bytes)),
            None => Ok(()),
        };
        let reading = self.place(model, context, kept)?;
        written.map_err(|e| ApiError::internal(format!("the document cannot be kept: {e}")))?;
        lock(&self.documents).insert(id, reading.clone());
        Ok((reading, true))
    }

    /// Places a text before its questions. What is known of it is used.
    fn place(&self, model: &Model, context: usize, kept: Kept) -> Result<Arc<Reading>, ApiError> {
        let id = id_of(&kept.text);
        let chat = model.has_chat_template();
        let path = self.folder.as_ref().zip(self.fingerprint.as_ref()).map(
            |(folder, Fingerprint { plan, weights })| {
                let of = xxh3_128(format!("{plan} {weights}").as_bytes()) >> 80;
                folder.join(format!("{id}.{of:012x}.state"))
            },
        );
        let known = path.as_deref().and_then(|path| self.known(path, model));
        if let Some((book, placed)) = &known
            && let Some(placed) = placed
            && placed.tokens.len() < context
        {
            let (placed, notes) = (placed.clone(), book.notes.clone());
            let file = Some(book.file.clone());
            let reading = Reading::new(id, kept.created, placed, notes, path, file);
            return Ok(Arc::new(reading));
        }
        let wording = Worded { model, chat };
        let placed = document::place(&wording, &[&kept.text])
            .map_err(|e| ApiError::invalid(e.to_string()))?;
        let tokens = placed.tokens.len();
        if tokens >= context {
            let message = format!(
                "the document has {} tokens and the context {}, in which a question and its answer must find room; start the server with a larger --context (the model was made for {})",
                thousands(tokens),
                thousands(context),
                thousands(model.plan.context)
            );
            return Err(ApiError::invalid(message).with_code("context_length_exceeded"));
        }
        let notes = Notes {
            parts: vec![Part {
                name: kept.name,
                bytes: kept.text.len() as u64,
                end: placed.ends.first().copied().unwrap_or(tokens),
            }],
            tokens,
            chat,
            anchor: placed.anchor.clone(),
            anchor_tokens: placed.anchor_tokens,
            name: model.name.clone(),
            source: self.source.clone(),
        };
        let file: Option<Arc<StateFile>> = known.map(|(book, _)| book.file);
        let reading = Reading::new(id, kept.created, placed, notes, path, file);
        Ok(Arc::new(reading))
    }

    /// A state file that is of use, and the document in it if it is whole.
    fn known(&self, path: &Path, model: &Model) -> Option<(Book, Option<Placed>)> {
        let book = Book::open(path).ok()?;
        let activations = model.network.activations;
        book.file
            .belongs(activations, self.fingerprint.as_ref()?)
            .ok()?;
        let placed = book.placed(model.network.graph.prefix).ok();
        Some((book, placed))
    }

    /// A document by its id.
    pub fn get(&self, id: &str) -> Result<Arc<Reading>, ApiError> {
        let found = lock(&self.documents).get(id).cloned();
        found.ok_or_else(|| {
            let id: String = id.chars().take(80).collect();
            ApiError::missing(format!("there is no document {id}")).with_code("document_not_found")
        })
    }

    /// All documents, oldest first.
    pub fn list(&self) -> Vec<Arc<Reading>> {
        let mut all: Vec<_> = lock(&self.documents).values().cloned().collect();
        all.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
        all
    }

    /// Forgets a document and its files.
    pub fn remove(&self, id: &str) -> Result<Arc<Reading>, ApiError> {
        let reading = self.get(id)?;
        if let Some(folder) = &self.folder {
            // The text first: without it, what is left is not found again.
            let gone = remove_file(&folder.join(format!("{id}.json")))
                .and_then(|()| reading.path.as_deref().map_or(Ok(()), remove_file));
            gone.map_err(|e| ApiError::internal(format!("{id} cannot be deleted: {e}")))?;
        }
        reading.deleted();
        lock(&self.documents).remove(id);
        Ok(reading)
    }
}

fn id_of(text: &str) -> String {
    format!("doc-{:024x}", xxh3_128(text.as_bytes()) >> 32)
}

fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Writes a file beside its place, then renames it.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("json.partial");
    let mut file = File::create(&beside)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    let done = written.and_then(|()| fs::rename(&beside, path));
    if done.is_err() {
        // What is half there is of no use to anybody.
        let _ = fs::remove_file(&beside);
    }
    done
}
