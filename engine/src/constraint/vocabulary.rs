//! The tokens of a model as bytes, in the order in which forms are matched with them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use llguidance::ParserFactory;
use llguidance::api::ParserLimits;
use llguidance::earley::SlicedBiasComputer;
use toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};

use super::Error;
use crate::ids::TokenId;
use crate::text::Tokenizer;

/// Most bytes of a token that forms are matched with; longer ones are never chosen under a constraint.
const MOST_BYTES: usize = 1000;
/// Most tokens. The library stores ids in 24 bits, and places of its tree in 22.
const MOST_TOKENS: usize = 1 << 20;

/// The tokens of one model, ready for any number of constraints.
pub struct Vocabulary {
    pub(super) factory: ParserFactory,
    pub(super) eos: Vec<TokenId>,
    /// Tokens that are another text at the beginning of the output than within it, each with the token that is that
    /// text everywhere: decoders of some vocabularies take the space before a first word away.
    pub(super) first: Vec<(TokenId, Option<TokenId>)>,
}

impl Vocabulary {
    /// The tokens of `tokenizer`, any of `eos` being the end. Special tokens stand for no text: only a grammar that
    /// names them (`<|name|>` or `<[id]>`) allows them.
    pub fn new(tokenizer: &Tokenizer, eos: &[TokenId]) -> Result<Arc<Self>, Error> {
        let size = tokenizer.vocab_size();
        if size > MOST_TOKENS {
            return Err(Error::Vocabulary(format!(
                "it has {size} tokens, at most {MOST_TOKENS} are matched"
            )));
        }
        let mut eos: Vec<TokenId> = eos.to_vec();
        eos.retain(|id| (*id as usize) < size);
        if eos.is_empty() {
            return Err(Error::NoEnd);
        }
        let words: Vec<Vec<u8>> = (0..size as TokenId)
            .map(|id| {
                let special = tokenizer.is_special(id) || eos.contains(&id);
                let word = if special {
                    let name = tokenizer.token_text(id).unwrap_or_default();
                    let marked = [TokTrie::SPECIAL_TOKEN_MARKER].into_iter();
                    marked.chain(name.into_bytes()).collect()
                } else {
                    tokenizer.token_bytes(id)
                };
                // The mark is no byte of any text.
                let marked = word.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER);
                match word.len() <= MOST_BYTES && (special || !marked) {
                    true if word.len() > usize::from(special) => word,
                    true | false => Vec::new(),
                }
            })
            .collect();
        let first = first_tokens(tokenizer, &words);
        let ends = eos.clone();
        let factory = catch_unwind(AssertUnwindSafe(|| {
            let info = TokRxInfo::new(size as u32, ends[0]);
            let trie = TokTrie::from(&info, &words).with_eos_tokens(&ends);
            // Not canonical: the model chooses how to spell what the form prescribes.
            let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            let slices = SlicedBiasComputer::general_slices();
            ParserFactory::new(&tokens, InferenceCapabilities::default(), &slices)
        }));
        let mut factory = factory
            .map_err(|_| Error::Vocabulary("its tokens are too long or too many".into()))?
            .map_err(|error| Error::Vocabulary(error.to_string()))?;
        *factory.limits_mut() = ParserLimits {
            verbose_errors: false,
            ..ParserLimits::default()
        };
        factory.quiet();
        Ok(Arc::new(Vocabulary {
            factory,
            eos,
            first,
        }))
    }

    /// The tokens that end a text.
    pub fn eos(&self) -> &[TokenId] {
        &self.eos
    }
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tokens = self.factory.tok_env().tok_trie().vocab_size();
        f.debug_struct("Vocabulary")
            .field("tokens", &tokens)
            .finish()
    }
}

/// See [`Vocabulary::first`]. Only a leading space is ever taken away.
fn first_tokens(tokenizer: &Tokenizer, words: &[Vec<u8>]) -> Vec<(TokenId, Option<TokenId>)> {
    let spaced = words
        .iter()
        .enumerate()
        .filter(|(_, w)| w[..].starts_with(b" "));
    let differs = |id: TokenId, word: &[u8]| {
        tokenizer
            .decode(&[id], false)
            .is_ok_and(|text| text.as_bytes() == &word[1..])
    };
    // Decoders treat all such tokens alike.
    let mut some = spaced.clone().take(8);
    if !some.any(|(id, word)| differs(id as TokenId, word)) {
        return Vec::new();
    }
    let ids: std::collections::HashMap<&[u8], TokenId> = words
        .iter()
        .enumerate()
        .map(|(id, word)| (&word[..], id as TokenId))
        .collect();
    spaced
        .filter(|(id, word)| differs(*id as TokenId, word))
        .map(|(id, word)| {
            let rest = &word[1..];
            let twin = ids.get(rest).copied().filter(|_| !rest.is_empty());
            (id as TokenId, twin)
        })
        .collect()
}
