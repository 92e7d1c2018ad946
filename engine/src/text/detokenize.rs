//! Text from tokens as they come.
//!
//! What is pushed and finished, put together, is what decoding all tokens at once gives. A character
//! whose bytes are not all there, and a run of `<0x..>` tokens that may grow, wait for what follows.

use std::sync::Arc;

use super::Error;
use super::tokenizer::{Streaming, Tokenizer, fallback_byte};

/// Turns one sequence's tokens into text.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    /// Special tokens that are not skipped.
    shown: Vec<u32>,
    /// Bytes of a character that is not complete, at most three.
    bytes: Vec<u8>,
    /// The first pieces of the text, to the first that gave any: decoders treat the beginning differently.
    head: Vec<String>,
    /// The pieces decoded last, as what follows may depend on them.
    last: Vec<String>,
    /// Pieces whose text is not settled.
    pending: Vec<String>,
}

impl Detokenizer {
    /// For one sequence; `skip_special` leaves special tokens out.
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        Self {
            tokenizer,
            skip_special,
            shown: vec![],
            bytes: vec![],
            head: vec![],
            last: vec![],
            pending: vec![],
        }
    }

    /// The same with these tokens shown, special or not: marks that a program reads, for instance.
    pub fn showing(self, tokens: &[u32]) -> Self {
        Self {
            shown: tokens.to_vec(),
            ..self
        }
    }

    /// The text that is settled by one more token; often one token late, never half a character.
    pub fn push(&mut self, id: u32) -> Result<String, Error> {
        let skip_special = self.skip_special && !self.shown.contains(&id);
        let byte_fallback = match self.tokenizer.streaming() {
            Streaming::Bytes => {
                self.bytes
                    .extend(self.tokenizer.streamed_bytes(id, skip_special));
                return Ok(take_complete(&mut self.bytes));
            }
            Streaming::Tokens { byte_fallback } => Some(byte_fallback),
            Streaming::Whole => None,
        };
        let Some(piece) = self.tokenizer.piece(id, skip_special) else {
            return Ok(String::new());
        };
        let settled =
            byte_fallback.is_some_and(|fallback| !(fallback && fallback_byte(piece).is_some()));
        self.pending.push(piece.to_owned());
        if settled {
            self.settle()
        } else {
            Ok(String::new())
        }
    }

    /// The rest of the text: bytes that never became a character are U+FFFD.
    pub fn finish(&mut self) -> Result<String, Error> {
        let rest = String::from_utf8_lossy(&std::mem::take(&mut self.bytes)).into_owned();
        Ok(if self.pending.is_empty() {
            rest
        } else {
            self.settle()?
        })
    }

    /// The text of the pending pieces: that of head, last and pending without that of head and last.
    fn settle(&mut self) -> Result<String, Error> {
        let before: Vec<String> = self.head.iter().chain(&self.last).cloned().collect();
        let all = before.iter().chain(&self.pending).cloned().collect();
        let before = self.tokenizer.join(before)?;
        let all = self.tokenizer.join(all)?;
        let text = match all.strip_prefix(before.as_str()) {
            Some(text) => text.to_owned(),
            // No decoder known does this; the longest common beginning then stands.
            None => {
                let common = before
                    .char_indices()
                    .zip(all.chars())
                    .find(|((_, a), b)| a != b);
                all[common.map_or(before.len().min(all.len()), |((at, _), _)| at)..].to_owned()
            }
        };
        if before.is_empty() {
            self.head.append(&mut self.pending);
        } else {
            self.last = std::mem::take(&mut self.pending);
        }
        Ok(text)
    }
}

/// Takes all but an incomplete character from the end of `bytes`.
fn take_complete(bytes: &mut Vec<u8>) -> String {
    let mut from = 0;
    let complete = loop {
        match std::str::from_utf8(&bytes[from..]) {
            Ok(_) => break bytes.len(),
            Err(error) => match error.error_len() {
                Some(wrong) => from += error.valid_up_to() + wrong,
                None => break from + error.valid_up_to(),
            },
        }
    };
    let rest = bytes.split_off(complete);
    String::from_utf8_lossy(&std::mem::replace(bytes, rest)).into_owned()
}
