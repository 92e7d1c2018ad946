//! Text to token ids and back: a `tokenizer.json`, or plain bytes.
//!
//! `tokenizer.json` decides which tokens frame a text (its post-processor); `add_bos_token` and
//! `add_eos_token` of `tokenizer_config.json` count where it does not already put that token there.

mod config;

use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{OnceLock, RwLock};

use serde_json::{Map, Value};
use tokenizers::{AddedToken, Decoder, PostProcessor};

use super::{Error, TextFiles, read_object};
use config::{added_tokens, templates, wrong_type};

/// A vocabulary of bytes: token = byte + offset, the ids below `offset` being special.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes {
    /// Id of byte 0.
    pub offset: u32,
    /// Put before a text.
    pub bos: Option<u32>,
    /// Ends a text; never put there by encoding.
    pub eos: Option<u32>,
    /// Fills up batches.
    pub pad: Option<u32>,
}

/// The special tokens a model names, by their text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    named: BTreeMap<String, String>,
    unnamed: Vec<String>,
}

impl SpecialTokens {
    /// From an object such as `special_tokens_map.json`; `path` is for errors.
    pub fn from_object(path: &Path, object: &Map<String, Value>) -> Result<Self, Error> {
        let mut special = Self::default();
        special.read(path, object)?;
        Ok(special)
    }

    /// Text of `bos_token`, `eos_token`, `pad_token`, `unk_token` and their like.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.named.get(name).map(String::as_str)
    }

    /// The named ones as (name, text).
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.named
            .iter()
            .map(|(name, text)| (name.as_str(), text.as_str()))
    }
}

/// How a text is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Adds the tokens that frame a text, such as BOS. Off for what a chat template rendered: it writes its own.
    pub add_special: bool,
    /// Reads `<|special|>` in the text as the special token. Off, it is text like any other.
    pub parse_special: bool,
}

/// How tokens become text again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Streaming {
    /// Tokens are bytes, of which valid UTF-8 is text.
    Bytes,
    /// Text is settled at the end of a token, unless that is a byte of a `<0x..>` sequence.
    Tokens { byte_fallback: bool },
    /// Later tokens may change all earlier text.
    Whole,
}

/// Encodes and decodes for one model.
#[derive(Debug)]
pub struct Tokenizer {
    kind: Kind,
    special: SpecialTokens,
    templates: BTreeMap<String, String>,
    prefix: Option<u32>,
    suffix: Option<u32>,
}

#[derive(Debug)]
enum Kind {
    Bytes(Bytes),
    Json(Box<Json>),
}

#[derive(Debug)]
struct Json {
    // Behind a lock, as the switch for special tokens in a text is part of the library's tokenizer.
    inner: RwLock<tokenizers::Tokenizer>,
    pieces: Vec<Option<Piece>>,
    streaming: Streaming,
}

#[derive(Clone, Debug)]
struct Piece {
    text: String,
    special: bool,
}

impl Tokenizer {
    /// Opens the tokenizer of a model directory.
    ///
    /// Reads `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and
    /// `chat_template.jinja`. Without the first, the model reads `bytes`, if it is known to.
    pub fn open(files: &(impl TextFiles + ?Sized), bytes: Option<Bytes>) -> Result<Self, Error> {
        let config_path = files.path("tokenizer_config.json");
        let config = read_object(files, "tokenizer_config.json")?.unwrap_or_default();
        let mut special = SpecialTokens::default();
        // transformers lets the configuration override the older map.
        let map = read_object(files, "special_tokens_map.json")?.unwrap_or_default();
        special.read(&files.path("special_tokens_map.json"), &map)?;
        special.read(&config_path, &config)?;
        let templates = templates(files, &config_path, &config)?;
        let path = files.path("tokenizer.json");
        let (kind, prefix, suffix) = match (files.read("tokenizer.json")?, bytes) {
            (Some(text), _) => {
                let mut inner = load(&path, &text)?;
                add_tokens(&mut inner, &special, &added_tokens(&config_path, &config)?);
                let (prefix, suffix) = frame(&inner, &config_path, &config, &special)?;
                (Kind::Json(Box::new(Json::new(inner))), prefix, suffix)
            }
            (None, Some(bytes)) => (Kind::Bytes(bytes), bytes.bos, None),
            (None, None) => {
                return Err(Error::NoTokenizer {
                    directory: files.path(""),
                });
            }
        };
        Ok(Self {
            kind,
            special,
            templates,
            prefix,
            suffix,
        })
    }

    /// A tokenizer of plain bytes, with no files.
    pub fn from_bytes(bytes: Bytes) -> Self {
        Self {
            kind: Kind::Bytes(bytes),
            special: SpecialTokens::default(),
            templates: BTreeMap::new(),
            prefix: bytes.bos,
            suffix: None,
        }
    }

    /// Token ids of `text`, special tokens in it being read as such.
    ///
    /// `add_special` adds the tokens that frame a text; leave it off for a rendered chat template.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, Error> {
        self.encode_with(
            text,
            EncodeOptions {
                add_special,
                parse_special: true,
            },
        )
    }

    /// Token ids of `text`. An error is the tokenizer's own failure, such as a missing unknown-token.
    pub fn encode_with(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>, Error> {
        let EncodeOptions {
            add_special,
            parse_special,
        } = options;
        let ids = match &self.kind {
            Kind::Bytes(bytes) => text
                .bytes()
                .map(|byte| u32::from(byte) + bytes.offset)
                .collect(),
            Kind::Json(json) => json.encode(text, add_special, parse_special)?,
        };
        let prefix = self.prefix.filter(|_| add_special);
        let suffix = self.suffix.filter(|_| add_special);
        Ok(prefix.into_iter().chain(ids).chain(suffix).collect())
    }

    /// Text of `ids`; bytes that are no UTF-8 become U+FFFD, unknown ids nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, Error> {
        match &self.kind {
            Kind::Bytes(_) => {
                let bytes: Vec<u8> = ids.iter().filter_map(|id| self.byte(*id)).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Kind::Json(_) => self.join(
                ids.iter()
                    .filter_map(|id| self.piece(*id, skip_special))
                    .map(str::to_owned)
                    .collect(),
            ),
        }
    }

    /// The bytes a token stands for within a text; empty for unknown and special ids of a byte vocabulary.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        match &self.kind {
            Kind::Bytes(_) => self.byte(id).into_iter().collect(),
            Kind::Json(json) => {
                let Some(piece) = self.piece(id, false) else {
                    return Vec::new();
                };
                match json.streaming {
                    Streaming::Bytes => byte_level(piece),
                    Streaming::Tokens {
                        byte_fallback: true,
                    } if fallback_byte(piece).is_some() => {
                        fallback_byte(piece).into_iter().collect()
                    }
                    Streaming::Tokens { .. } | Streaming::Whole => {
                        // After a letter, as decoders treat the first token of a text differently.
                        let text = self
                            .join(vec!["a".into(), piece.into()])
                            .unwrap_or_default();
                        text.strip_prefix('a').unwrap_or(&text).as_bytes().to_vec()
                    }
                }
            }
        }
    }

    /// The vocabulary's own spelling of a token, such as `▁the` or `Ġthe`.
    pub fn token_text(&self, id: u32) -> Option<String> {
        match &self.kind {
            Kind::Bytes(_) => self.byte(id).map(|byte| char::from(byte).to_string()),
            Kind::Json(_) => self.piece(id, false).map(str::to_owned),
        }
    }

    /// The id of a token by the vocabulary's own spelling.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        match &self.kind {
            Kind::Bytes(bytes) => match text.as_bytes() {
                [byte] => Some(u32::from(*byte) + bytes.offset),
                _ => None,
            },
            Kind::Json(json) => json.read().token_to_id(text),
        }
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        match &self.kind {
            Kind::Bytes(bytes) => bytes.offset as usize + 256,
            Kind::Json(json) => json.pieces.len(),
        }
    }

    /// Whether the token is special: skipped by decoding for people.
    pub fn is_special(&self, id: u32) -> bool {
        match &self.kind {
            Kind::Bytes(_) => self.byte(id).is_none(),
            Kind::Json(json) => json
                .pieces
                .get(id as usize)
                .and_then(Option::as_ref)
                .is_some_and(|piece| piece.special),
        }
    }

    /// The token that begins a text, if the model names one.
    pub fn bos_id(&self) -> Option<u32> {
        self.named("bos_token", |bytes| bytes.bos)
    }

    /// The token that ends a text, if the tokenizer names one. Generation configurations may name more.
    pub fn eos_id(&self) -> Option<u32> {
        self.named("eos_token", |bytes| bytes.eos)
    }

    /// The token that fills up batches, if the model names one.
    pub fn pad_id(&self) -> Option<u32> {
        self.named("pad_token", |bytes| bytes.pad)
    }

    /// The special tokens by name, as chat templates see them.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }

    /// Names of the chat templates there are; most models have "default" or none.
    pub fn chat_template_names(&self) -> impl Iterator<Item = &str> {
        self.templates.keys().map(String::as_str)
    }

    /// The source of a chat template: the named one, else `tool_use` where tools are given, else `default`.
    pub fn chat_template(&self, name: Option<&str>, tools: bool) -> Option<&str> {
        let found = match name {
            Some(name) => self.templates.get(name),
            None => self
                .templates
                .get("tool_use")
                .filter(|_| tools)
                .or_else(|| self.templates.get("default")),
        };
        found.map(String::as_str)
    }

    pub(super) fn streaming(&self) -> Streaming {
        match &self.kind {
            Kind::Bytes(_) => Streaming::Bytes,
            Kind::Json(json) => json.streaming,
        }
    }

    /// The vocabulary's spelling of a token, `None` where decoding leaves it out.
    pub(super) fn piece(&self, id: u32, skip_special: bool) -> Option<&str> {
        let Kind::Json(json) = &self.kind else {
            return None;
        };
        let piece = json.pieces.get(id as usize)?.as_ref()?;
        (!(skip_special && piece.special)).then_some(piece.text.as_str())
    }

    /// The bytes a token adds to a text where tokens are bytes.
    pub(super) fn streamed_bytes(&self, id: u32, skip_special: bool) -> Vec<u8> {
        match &self.kind {
            Kind::Bytes(_) => self.byte(id).into_iter().collect(),
            Kind::Json(_) => self
                .piece(id, skip_special)
                .map(byte_level)
                .unwrap_or_default(),
        }
    }

    /// The text of pieces.
    pub(super) fn join(&self, pieces: Vec<String>) -> Result<String, Error> {
        let Kind::Json(json) = &self.kind else {
            return Ok(pieces.concat());
        };
        if pieces.is_empty() {
            return Ok(String::new());
        }
        guard("decode", || match json.read().get_decoder() {
            Some(decoder) => decoder.decode(pieces).map_err(|error| error.to_string()),
            None => Ok(pieces.join(" ")),
        })
    }

    fn byte(&self, id: u32) -> Option<u8> {
        let Kind::Bytes(bytes) = &self.kind else {
            return None;
        };
        id.checked_sub(bytes.offset)
            .and_then(|byte| u8::try_from(byte).ok())
    }

    fn named(&self, name: &str, of_bytes: impl Fn(&Bytes) -> Option<u32>) -> Option<u32> {
        match &self.kind {
            Kind::Bytes(bytes) => of_bytes(bytes),
            Kind::Json(json) => json.read().token_to_id(self.special.get(name)?),
        }
    }
}

impl Json {
    fn new(inner: tokenizers::Tokenizer) -> Self {
        let added = inner.get_added_tokens_decoder();
        let vocabulary = inner.get_vocab(true);
        // Ids far beyond the number of tokens come from a damaged file: they would only waste memory.
        let limit = vocabulary.len().saturating_mul(16) + 1024;
        let size = vocabulary
            .values()
            .map(|id| *id as usize + 1)
            .filter(|size| *size <= limit)
            .max()
            .unwrap_or(0);
        let mut pieces = vec![None; size];
        for (text, id) in vocabulary {
            if let Some(piece) = pieces.get_mut(id as usize) {
                *piece = Some(Piece {
                    text,
                    special: false,
                });
            }
        }
        let special: std::collections::HashSet<&str> = added
            .values()
            .filter(|token| token.special)
            .map(|token| token.content.as_str())
            .collect();
        for piece in pieces.iter_mut().flatten() {
            piece.special = special.contains(piece.text.as_str());
        }
        let streaming = streaming(&inner);
        Self {
            inner: RwLock::new(inner),
            pieces,
            streaming,
        }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, tokenizers::Tokenizer> {
        self.inner
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn encode(
        &self,
        text: &str,
        add_special: bool,
        parse_special: bool,
    ) -> Result<Vec<u32>, Error> {
        let encode = |tokenizer: &tokenizers::Tokenizer| {
            guard("encode", || {
                let encoding = tokenizer
                    .encode_fast(text, add_special)
                    .map_err(|error| error.to_string())?;
                Ok(encoding.get_ids().to_vec())
            })
        };
        if parse_special {
            return encode(&self.read());
        }
        let mut tokenizer = self
            .inner
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        tokenizer.set_encode_special_tokens(true);
        let ids = encode(&tokenizer);
        tokenizer.set_encode_special_tokens(false);
        ids
    }
}

/// The library can panic on files its own programs never write; here that is an error like any other.
fn guard<T>(action: &'static str, run: impl FnOnce() -> Result<T, String>) -> Result<T, Error> {
    let panicked = |_| Err("it panicked; tokenizer.json is damaged or for another version".into());
    catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(panicked)
        .map_err(|reason| Error::Tokenizer { action, reason })
}

fn load(path: &Path, text: &str) -> Result<tokenizers::Tokenizer, Error> {
    let load = || {
        text.parse::<tokenizers::Tokenizer>()
            .map_err(|error| error.to_string())
    };
    let mut tokenizer = guard("load", load).map_err(|error| Error::File {
        path: path.into(),
        found: match error {
            Error::Tokenizer { reason, .. } => reason,
            other => other.to_string(),
        },
        expected: "a tokenizer as the tokenizers library writes it".into(),
        help:
            "Fetch the file again; if it is intact, this release cannot read its kind of tokenizer."
                .into(),
    })?;
    // Saved training settings, which would cut prompts short or fill them up.
    tokenizer.with_padding(None);
    let untruncated = tokenizer.with_truncation(None).map(|_| ());
    untruncated.map_err(|error| Error::Tokenizer {
        action: "load",
        reason: error.to_string(),
    })?;
    Ok(tokenizer)
}

/// Marks the tokens the other files call special, and adds those that `tokenizer.json` lacks.
fn add_tokens(
    tokenizer: &mut tokenizers::Tokenizer,
    special: &SpecialTokens,
    declared: &[(u32, AddedToken)],
) {
    let mut declared = declared.to_vec();
    declared.sort_by_key(|(id, _)| *id);
    for (id, token) in declared {
        // A token that would get another id than declared is one the model never saw.
        let id_now = tokenizer.token_to_id(&token.content);
        let next = tokenizer.get_vocab_size(true) as u32;
        if id_now == Some(id) || (id_now.is_none() && id == next) {
            let known = tokenizer
                .get_added_tokens_decoder()
                .get(&id)
                .is_some_and(|known| *known == token);
            if !known {
                let added = if token.special {
                    tokenizer.add_special_tokens([token])
                } else {
                    tokenizer.add_tokens([token])
                };
                added.ok(); // refuses only what is there already
            }
        }
    }
    for text in special.named.values().chain(&special.unnamed) {
        let is_special = |token: &AddedToken| token.special && token.content == *text;
        if tokenizer.token_to_id(text).is_some()
            && !tokenizer
                .get_added_tokens_decoder()
                .values()
                .any(is_special)
        {
            tokenizer
                .add_special_tokens([AddedToken::from(text.as_str(), true)])
                .ok();
        }
    }
}

/// The tokens to put around a text that the post-processor does not.
fn frame(
    tokenizer: &tokenizers::Tokenizer,
    path: &Path,
    config: &Map<String, Value>,
    special: &SpecialTokens,
) -> Result<(Option<u32>, Option<u32>), Error> {
    let framed = guard("encode", || {
        let Some(processor) = tokenizer.get_post_processor() else {
            return Ok(Vec::new());
        };
        let empty = processor
            .process(tokenizers::Encoding::default(), None, true)
            .map_err(|error| error.to_string())?;
        Ok(empty.get_ids().to_vec())
    })?;
    let wanted = |flag: &str, name: &str| -> Result<Option<u32>, Error> {
        let add = match config.get(flag) {
            None | Some(Value::Null) => false,
            Some(Value::Bool(add)) => *add,
            Some(other) => return Err(wrong_type(path, flag, other, "true or false")),
        };
        let id = special
            .get(name)
            .and_then(|text| tokenizer.token_to_id(text));
        Ok(id.filter(|id| add && !framed.contains(id)))
    };
    Ok((
        wanted("add_bos_token", "bos_token")?,
        wanted("add_eos_token", "eos_token")?,
    ))
}

/// Where the text of a token is settled, from what the decoder is made of.
fn streaming(tokenizer: &tokenizers::Tokenizer) -> Streaming {
    let Some(decoder) = tokenizer.get_decoder() else {
        return Streaming::Tokens {
            byte_fallback: false,
        };
    };
    let Ok(decoder) = serde_json::to_value(decoder) else {
        return Streaming::Whole;
    };
    let mut steps = Vec::new();
    flatten(&decoder, &mut steps);
    if let [step] = steps[..]
        && step["type"] == "ByteLevel"
    {
        return Streaming::Bytes;
    }
    let (mut fused, mut byte_fallback) = (false, false);
    for step in steps {
        match step["type"].as_str().unwrap_or_default() {
            "Fuse" => fused = true,
            "ByteFallback" => byte_fallback |= !fused,
            "Metaspace" | "BPEDecoder" => {}
            "WordPiece" if !fused => {}
            // Across tokens a pattern of one character is still within one of them.
            "Replace"
                if !fused
                    || step["pattern"]["String"]
                        .as_str()
                        .is_some_and(|p| p.chars().count() == 1) => {}
            "Strip" if !fused || step["stop"] == 0 => {}
            _ => return Streaming::Whole,
        }
    }
    Streaming::Tokens { byte_fallback }
}

fn flatten<'a>(decoder: &'a Value, steps: &mut Vec<&'a Value>) {
    match decoder["decoders"].as_array() {
        Some(decoders) if decoder["type"] == "Sequence" => {
            decoders.iter().for_each(|step| flatten(step, steps))
        }
        _ => steps.push(decoder),
    }
}

/// The byte of a token such as `<0x0A>`, read exactly as the library reads it.
pub(super) fn fallback_byte(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2)
        .then(|| u8::from_str_radix(digits, 16).ok())
        .flatten()
}

/// The bytes that GPT-2's printable alphabet spells, or the text itself where it is not in that alphabet.
fn byte_level(piece: &str) -> Vec<u8> {
    static BYTES: OnceLock<HashMap<char, u8>> = OnceLock::new();
    let bytes = BYTES.get_or_init(|| {
        let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let mut next = 256;
        let spell = |byte: u8| match printable(byte) {
            true => (char::from(byte), byte),
            false => {
                let code = next;
                next += 1;
                (char::from_u32(code).unwrap_or_default(), byte)
            }
        };
        (0..=255).map(spell).collect()
    });
    piece
        .chars()
        .map(|c| bytes.get(&c).copied())
        .collect::<Option<_>>()
        .unwrap_or_else(|| piece.as_bytes().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use crate::testing::directory;
    use crate::text::Detokenizer;

    const NAMES: [&str; 6] = [
        "byte_level",
        "byte_level_bos",
        "sentencepiece",
        "metaspace",
        "unigram",
        "word_piece",
    ];

    fn golden(name: &str) -> (Arc<Tokenizer>, Value) {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/golden/text")
            .join(name);
        let cases = std::fs::read_to_string(directory.join("cases.json")).expect("golden cases");
        let tokenizer = Tokenizer::open(directory.as_path(), None).expect("a golden tokenizer");
        (
            Arc::new(tokenizer),
            serde_json::from_str(&cases).expect("JSON"),
        )
    }

    fn ids(value: &Value) -> Vec<u32> {
        serde_json::from_value(value.clone()).expect("ids")
    }

    fn streamed(tokenizer: &Arc<Tokenizer>, ids: &[u32], skip_special: bool) -> String {
        let mut stream = Detokenizer::new(tokenizer.clone(), skip_special);
        let mut pieces: Vec<String> = ids
            .iter()
            .map(|id| stream.push(*id).expect("decodes"))
            .collect();
        pieces.push(stream.finish().expect("decodes"));
        pieces.concat()
    }

    #[test]
    fn texts_encode_as_in_transformers() {
        for name in NAMES {
            let (tokenizer, cases) = golden(name);
            for case in cases["encoded"].as_array().expect("cases") {
                let text = case["text"].as_str().expect("a text");
                let encode = |add_special, parse_special| {
                    tokenizer
                        .encode_with(
                            text,
                            EncodeOptions {
                                add_special,
                                parse_special,
                            },
                        )
                        .expect("encodes")
                };
                assert_eq!(encode(false, true), ids(&case["plain"]), "{name}: {text:?}");
                assert_eq!(
                    encode(true, true),
                    ids(&case["framed"]),
                    "{name}: {text:?} framed"
                );
                assert_eq!(
                    encode(false, false),
                    ids(&case["unparsed"]),
                    "{name}: {text:?} unparsed"
                );
            }
        }
    }

    #[test]
    fn ids_decode_as_in_transformers_at_once_and_streamed() {
        for name in NAMES {
            let (tokenizer, cases) = golden(name);
            for case in cases["decoded"].as_array().expect("cases") {
                let ids = ids(&case["ids"]);
                for (skip, key) in [(false, "text"), (true, "bare")] {
                    let expected = case[key].as_str().expect("a text");
                    assert_eq!(
                        tokenizer.decode(&ids, skip).expect("decodes"),
                        expected,
                        "{name}: {ids:?}"
                    );
                    assert_eq!(
                        streamed(&tokenizer, &ids, skip),
                        expected,
                        "{name} streamed: {ids:?}"
                    );
                }
            }
        }
    }

    const DEMO: Bytes = Bytes {
        offset: 3,
        bos: None,
        eos: Some(2),
        pad: Some(0),
    };

    #[test]
    fn bytes_are_tokens() {
        let tokenizer = Arc::new(Tokenizer::from_bytes(DEMO));
        let ids = tokenizer.encode("é\n", true).expect("encodes");
        assert_eq!(ids, [0xc3 + 3, 0xa9 + 3, 13]);
        assert_eq!(tokenizer.decode(&ids, true).expect("decodes"), "é\n");
        assert_eq!(
            (
                tokenizer.vocab_size(),
                tokenizer.eos_id(),
                tokenizer.bos_id()
            ),
            (259, Some(2), None)
        );
        assert_eq!(
            (
                tokenizer.token_bytes(2),
                tokenizer.token_bytes(258),
                tokenizer.token_bytes(999)
            ),
            (vec![], vec![255], vec![])
        );
        assert!(tokenizer.is_special(2) && !tokenizer.is_special(3));
        let with_bos = Tokenizer::from_bytes(Bytes {
            offset: 0,
            bos: Some(256),
            eos: None,
            pad: None,
        });
        assert_eq!(with_bos.encode("a", true).expect("encodes"), [256, 97]);
        assert_eq!(with_bos.encode("a", false).expect("encodes"), [97]);
    }

    #[test]
    fn a_character_comes_when_its_last_byte_does() {
        let tokenizer = Arc::new(Tokenizer::from_bytes(DEMO));
        let check = |bytes: &[u8], expected: &[&str]| {
            let mut stream = Detokenizer::new(tokenizer.clone(), true);
            let mut found: Vec<String> = bytes
                .iter()
                .map(|byte| stream.push(u32::from(*byte) + 3).expect("decodes"))
                .collect();
            found.push(stream.finish().expect("decodes"));
            assert_eq!(found, expected, "{bytes:x?}");
        };
        check("aé".as_bytes(), &["a", "", "é", ""]);
        check("👋".as_bytes(), &["", "", "", "👋", ""]);
        check(&[0xf0, 0x9f, 0x91], &["", "", "", "\u{fffd}"]);
        check(
            &[0xff, b'a', 0xc3, b'b'],
            &["\u{fffd}", "a", "", "\u{fffd}b", ""],
        );
        check(
            &[0xe5, 0xe5, 0xe5],
            &["", "\u{fffd}", "\u{fffd}", "\u{fffd}"],
        );
    }

    #[test]
    fn a_byte_run_waits_for_its_end() {
        let (tokenizer, _) = golden("sentencepiece");
        let id = |text: &str| tokenizer.token_id(text).expect(text);
        let mut stream = Detokenizer::new(tokenizer.clone(), true);
        let mut push = |text: &str| stream.push(id(text)).expect("decodes");
        assert_eq!(push("▁the"), "the");
        assert_eq!(push("<0xC3>"), "");
        assert_eq!(push("<0xA9>"), "");
        assert_eq!(push("▁the"), "é the");
        assert_eq!(push("<0xC3>"), "");
        assert_eq!(stream.finish().expect("decodes"), "\u{fffd}");
        assert_eq!(tokenizer.token_bytes(id("<0xC3>")), [0xc3]);
        assert_eq!(tokenizer.token_bytes(id("▁the")), b" the");
    }

    #[test]
    fn tokens_have_bytes() {
        for name in ["byte_level", "sentencepiece", "metaspace"] {
            let (tokenizer, _) = golden(name);
            let text = "hello žluť 👋 <|turn|>";
            let ids = tokenizer.encode(text, false).expect("encodes");
            let bytes: Vec<u8> = ids
                .iter()
                .flat_map(|id| tokenizer.token_bytes(*id))
                .collect();
            assert_eq!(String::from_utf8_lossy(&bytes).trim_start(), text, "{name}");
        }
    }

    /// A small tokenizer.json of words with the given post-processor.
    fn words(post_processor: &str) -> String {
        format!(
            r#"{{"version":"1.0","truncation":{{"direction":"Right","max_length":1,"strategy":"LongestFirst","stride":0}},
            "padding":null,"added_tokens":[],"normalizer":null,"pre_tokenizer":{{"type":"WhitespaceSplit"}},
            "post_processor":{post_processor},"decoder":null,
            "model":{{"type":"WordLevel","vocab":{{"<s>":0,"</s>":1,"a":2,"b":3,"<unk>":4}},"unk_token":"<unk>"}}}}"#
        )
    }

    #[test]
    fn a_text_gets_one_bos_from_whoever_asks_for_it() {
        let template = r#"{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],"pair":[],"special_tokens":{"<s>":{"id":"<s>","ids":[0],"tokens":["<s>"]}}}"#;
        let check = |post_processor: &str, config: &str, expected: &[u32]| {
            let files = directory(&[
                ("tokenizer.json", &words(post_processor)),
                ("tokenizer_config.json", config),
            ]);
            let tokenizer = Tokenizer::open(files.path(), None).expect("a tokenizer");
            assert_eq!(
                tokenizer.encode("a b", true).expect("encodes"),
                expected,
                "{post_processor} {config}"
            );
            assert_eq!(
                tokenizer.encode("<s> a b", false).expect("encodes"),
                [0, 2, 3]
            );
        };
        check("null", r#"{"bos_token": "<s>"}"#, &[2, 3]);
        check(
            "null",
            r#"{"bos_token": "<s>", "add_bos_token": true}"#,
            &[0, 2, 3],
        );
        check(
            "null",
            r#"{"eos_token": {"content": "</s>"}, "bos_token": "<s>", "add_eos_token": true}"#,
            &[2, 3, 1],
        );
        check(
            template,
            r#"{"bos_token": "<s>", "add_bos_token": true}"#,
            &[0, 2, 3],
        );
        check(
            template,
            r#"{"bos_token": "<s>", "add_bos_token": false}"#,
            &[0, 2, 3],
        );
        check(
            "null",
            r#"{"add_bos_token": true, "bos_token": null}"#,
            &[2, 3],
        );
    }

    #[test]
    fn templates_are_found_wherever_they_are() {
        let check = |files: &[(&str, &str)], expected: (Option<&str>, Option<&str>)| {
            let files = directory(files);
            let tokenizer = Tokenizer::open(files.path(), Some(DEMO)).expect("a tokenizer");
            assert_eq!(
                (
                    tokenizer.chat_template(None, false),
                    tokenizer.chat_template(None, true)
                ),
                expected
            );
        };
        check(&[], (None, None));
        check(
            &[("tokenizer_config.json", r#"{"chat_template": "x"}"#)],
            (Some("x"), Some("x")),
        );
        let list = r#"{"chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]}"#;
        check(&[("tokenizer_config.json", list)], (Some("d"), Some("t")));
        check(
            &[
                ("tokenizer_config.json", list),
                ("chat_template.jinja", "file"),
            ],
            (Some("file"), Some("file")),
        );
    }

    #[test]
    fn damaged_files_are_named_and_never_panic() {
        let check = |name: &str, text: &str, expected: &str| {
            let mut files = vec![("tokenizer_config.json", "{}"), ("tokenizer.json", text)];
            if name != "tokenizer.json" {
                files = vec![("tokenizer.json", r#"{"version": "1.0"}"#), (name, text)];
            }
            let files = directory(&files);
            let error = Tokenizer::open(files.path(), None)
                .expect_err(text)
                .to_string();
            assert!(error.contains(name) && error.contains(expected), "{error}");
        };
        check("tokenizer.json", "", "EOF");
        check("tokenizer.json", "[]", "expected a tokenizer");
        check(
            "tokenizer.json",
            &words("null")[..200],
            "expected a tokenizer",
        );
        check(
            "tokenizer.json",
            &words(r#"{"type":"Magic"}"#),
            "expected a tokenizer",
        );
        check(
            "tokenizer_config.json",
            "[1, 2]",
            "holds a list of 2; expected a JSON object",
        );
        check(
            "tokenizer_config.json",
            r#"{"bos_token": 5}"#,
            "bos_token is 5",
        );
        check(
            "tokenizer_config.json",
            r#"{"eos_token": {"text": "x"}}"#,
            "eos_token is an object",
        );
        check(
            "tokenizer_config.json",
            r#"{"chat_template": 5}"#,
            "chat_template is 5",
        );
        check(
            "tokenizer_config.json",
            r#"{"chat_template": [{"name": "x"}]}"#,
            "an entry of chat_template",
        );
        check("special_tokens_map.json", "{", "expected a JSON object");
        let nothing = directory(&[]);
        let error = Tokenizer::open(nothing.path(), None)
            .expect_err("no tokenizer")
            .to_string();
        assert!(
            error.contains("no tokenizer.json; expected one beside config.json"),
            "{error}"
        );
        // Decoders that make the library panic.
        let strip = words("null").replace(
            r#""decoder":null"#,
            r#""decoder":{"type":"Strip","content":"a","start":0,"stop":9}"#,
        );
        let files = directory(&[("tokenizer.json", &strip)]);
        let tokenizer = Tokenizer::open(files.path(), None).expect("it parses");
        assert!(tokenizer.decode(&[2, 3], false).is_err());
    }

    #[test]
    fn any_cut_of_a_tokenizer_file_is_an_error_and_no_panic() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/golden/text/sentencepiece/tokenizer.json");
        let text = std::fs::read_to_string(path).expect("a golden tokenizer");
        for cut in (0..text.len())
            .step_by(997)
            .filter(|cut| text.is_char_boundary(*cut))
        {
            assert!(
                load(Path::new("tokenizer.json"), &text[..cut]).is_err(),
                "cut at {cut}"
            );
        }
    }
}
