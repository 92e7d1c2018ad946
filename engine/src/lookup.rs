//! Guesses at what follows, looked up in what was said: where the last tokens stood before, what followed them
//! there may follow them here. Answers that quote a document are mostly such tokens.
//!
//! The engine computes guesses together with the last token, in one step, and keeps those that are what the
//! sampler chooses (prompt lookup, a form of speculative decoding). As rows do not depend on the rows beside them,
//! the tokens are those of plain decoding, drawn with the same random numbers; a wrong guess costs time only.
//!
//! **Where a guess is looked for.** For n-grams of each of `GRAMS` a table of hashes holds where it stood last; the
//! longest that is found is taken. Tables hold positions only, so a find is compared with the tokens. Indexing a
//! token costs as many writes as there are tables.
//!
//! **How many tokens.** How often the first token of a guess was right is counted by how many tokens before it
//! agreed. Where that is less often than half, nothing is guessed; some guesses are made nevertheless, lest a bad
//! start be the end. Guesses that were right altogether double the next one, others cut it to what was right; none is
//! longer than twice what agreed before it.
//!
//! **What a wrong guess costs.** State of fixed size has seen all rows of the step. It is copied before a step with
//! guesses, and after a wrong one the copy is put back; the rows that were right are computed again together with the
//! token that came of them, in the next step. So two steps give at least two tokens whatever was guessed, no layer
//! knows of it, and a step of several rows reads each weight once. To keep the state behind every row instead would
//! write megabytes a row, in every layer's own way, also where the guess is right.

use crate::ids::TokenId;

/// Lengths of the n-grams that are looked up, the longest first.
const GRAMS: [usize; 3] = [8, 4, 2];
/// Agreeing tokens before a guess are counted up to here.
const AGREEING: usize = 16;
/// So many outcomes of a length count; older ones fade.
const OUTCOMES: u32 = 32;
/// Of so many guesses that seem too bad, one is made.
const RETRY: u32 = 16;
/// Tokens of a first guess.
const FIRST: usize = 8;

/// What came of guessing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Guessed {
    /// Tokens that were guessed and computed.
    pub tokens: u64,
    /// Those of them that were right.
    pub right: u64,
    /// Steps in which tokens were guessed.
    pub steps: u64,
}

/// The tokens of one sequence, ready to be looked up.
#[derive(Debug)]
pub struct Lookup {
    /// Most tokens of a guess.
    most: usize,
    /// For each of `GRAMS`, by hash: how many tokens stood before the end of the n-gram; 0 for none.
    tables: [Vec<u32>; GRAMS.len()],
    /// How many tokens are in the tables.
    indexed: usize,
    /// Tokens of the next guess.
    length: usize,
    /// By agreeing tokens: guesses whose first token was right, and all.
    outcomes: [(u32, u32); AGREEING + 1],
    /// Agreeing tokens before the guess under way.
    agreeing: usize,
    held_back: u32,
    guessed: Guessed,
}

impl Lookup {
    /// For guesses of up to `most` tokens in sequences of up to `tokens`, of which it takes 12 bytes each.
    pub fn new(most: usize, tokens: usize) -> Self {
        let size = tokens.clamp(64, 1 << 24).next_power_of_two();
        Lookup {
            most,
            tables: GRAMS.map(|_| vec![0; size]),
            indexed: 0,
            length: FIRST.min(most),
            outcomes: [(0, 0); AGREEING + 1],
            agreeing: 0,
            held_back: 0,
            guessed: Guessed::default(),
        }
    }

    /// Writes what may follow `tokens` into `guess`, up to `most` of them; nothing if nothing is likely. Calls see
    /// the tokens of the call before, and more.
    pub fn guess(&mut self, tokens: &[TokenId], most: usize, guess: &mut Vec<TokenId>) {
        guess.clear();
        self.index(tokens);
        let Some((end, agreeing)) = self.find(tokens) else {
            return;
        };
        let (right, all) = self.outcomes[agreeing];
        // With a half of a right one beforehand: long agreement is trusted at once.
        if 2 * right + 1 < all {
            self.held_back += 1;
            if self.held_back < RETRY {
                return;
            }
            self.held_back = 0;
        }
        self.agreeing = agreeing;
        // Little agreement is trusted for little.
        let trusted = if agreeing < AGREEING {
            2 * agreeing
        } else {
            most
        };
        let length = self.length.min(trusted).min(most);
        // What follows may reach into the guess itself: what repeats goes on repeating.
        for i in end..end + length {
            let token = tokens.get(i).unwrap_or_else(|| &guess[i - tokens.len()]);
            guess.push(*token);
        }
    }

    /// Takes note that the first `right` of `count` guessed tokens were.
    pub fn done(&mut self, count: usize, right: usize) {
        if count == 0 {
            return;
        }
        self.guessed.tokens += count as u64;
        self.guessed.right += right as u64;
        self.guessed.steps += 1;
        let (first_right, all) = &mut self.outcomes[self.agreeing];
        *first_right += u32::from(right > 0);
        *all += 1;
        if *all >= OUTCOMES {
            *first_right /= 2;
            *all /= 2;
        }
        if right < count {
            self.length = (right + 1).max(2).min(self.most);
        } else if count >= self.length {
            self.length = (2 * self.length).min(self.most);
        }
    }

    /// What came of it so far.
    pub fn guessed(&self) -> Guessed {
        self.guessed
    }

    /// Puts n-grams into the tables that end before the last token: what follows them is known.
    fn index(&mut self, tokens: &[TokenId]) {
        for end in self.indexed + 1..tokens.len() {
            for (table, n) in self.tables.iter_mut().zip(GRAMS) {
                if end >= n {
                    let size = table.len();
                    table[hash(&tokens[end - n..end], size)] = end as u32;
                }
            }
        }
        self.indexed = tokens.len().saturating_sub(1).max(self.indexed);
    }

    /// Where the longest n-gram of the last tokens ended before, and how many tokens up to there agree.
    fn find(&self, tokens: &[TokenId]) -> Option<(usize, usize)> {
        let count = tokens.len();
        for (table, n) in self.tables.iter().zip(GRAMS) {
            if count <= n {
                continue;
            }
            let end = table[hash(&tokens[count - n..], table.len())] as usize;
            let before = tokens[..end].iter().rev();
            let agreeing = before
                .zip(tokens.iter().rev())
                .take(AGREEING)
                .take_while(|(a, b)| a == b)
                .count();
            if agreeing >= n {
                return Some((end, agreeing));
            }
        }
        None
    }
}

/// A place in a table whose size is a power of two.
fn hash(gram: &[TokenId], size: usize) -> usize {
    let mix = |h: u64, token: &TokenId| {
        (h ^ u64::from(*token)).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (h >> 29)
    };
    let mixed = gram.iter().fold(0x51_7c_c1_b7, mix);
    (mixed >> 32) as usize & (size - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guess(lookup: &mut Lookup, tokens: &[TokenId], most: usize) -> Vec<TokenId> {
        let mut found = Vec::new();
        lookup.guess(tokens, most, &mut found);
        found
    }

    #[test]
    fn what_followed_the_longest_n_gram_last_is_guessed() {
        let cases: [(&[TokenId], &[TokenId]); 7] = [
            (&[], &[]),
            (&[1, 2, 3, 4], &[]),
            // The later of two places.
            (&[1, 2, 3, 1, 2, 4, 1, 2], &[4, 1, 2, 4]),
            // Four that agree before two that do, though these stand later.
            (
                &[5, 6, 1, 2, 7, 9, 1, 2, 8, 5, 6, 1, 2],
                &[7, 9, 1, 2, 8, 5, 6, 1],
            ),
            // One token in common is not enough.
            (&[1, 2, 3, 4, 5, 1], &[]),
            // What repeats itself goes on so.
            (&[9, 9, 9, 9], &[9; 6]),
            (&[3, 1, 2, 3, 1, 2], &[3, 1, 2, 3, 1, 2]),
        ];
        for (tokens, expected) in cases {
            let mut lookup = Lookup::new(16, tokens.len());
            assert_eq!(guess(&mut lookup, tokens, 16), expected, "{tokens:?}");
            assert_eq!(
                guess(&mut lookup, tokens, 1),
                &expected[..expected.len().min(1)],
                "{tokens:?}, one at most"
            );
        }
    }

    #[test]
    fn tokens_that_come_later_are_indexed_too() {
        let tokens: Vec<TokenId> = (0..200).map(|i| i % 50).collect();
        let mut lookup = Lookup::new(4, 200);
        for end in 1..=tokens.len() {
            let found = guess(&mut lookup, &tokens[..end], 4);
            let expected = if end < 52 {
                vec![]
            } else {
                (0..4).map(|i| (end as u32 + i) % 50).collect()
            };
            assert_eq!(found, expected, "after {end}");
            lookup.done(found.len(), found.len());
        }
        let guessed = lookup.guessed();
        assert_eq!((guessed.steps, guessed.right), (149, 4 * 149));
    }

    #[test]
    fn guesses_grow_while_right_and_stop_while_wrong() {
        let tokens: Vec<TokenId> = (0..400).map(|i| i % 100).collect();
        let mut lookup = Lookup::new(64, 400);
        let mut lengths = Vec::new();
        for right in [true, true, true, false, true] {
            let found = guess(&mut lookup, &tokens[..250], 64);
            lengths.push(found.len());
            lookup.done(found.len(), if right { found.len() } else { 3 });
        }
        assert_eq!(lengths, [8, 16, 32, 64, 4]);
        let made = (0..320).filter(|_| {
            let found = guess(&mut lookup, &tokens[..250], 64);
            lookup.done(found.len(), 0);
            !found.is_empty()
        });
        let made = made.count();
        assert!(
            (10..60).contains(&made),
            "{made} of 320 wrong guesses were made"
        );
    }

    #[test]
    fn places_of_other_tokens_are_told_apart() {
        // Tables far too small: nearly every place is taken by another n-gram.
        let tokens: Vec<TokenId> = (0..5000u32)
            .map(|i| i.wrapping_mul(2_654_435_761) >> 20)
            .collect();
        let mut lookup = Lookup::new(8, 0);
        for end in (2..tokens.len()).step_by(97) {
            let found = guess(&mut lookup, &tokens[..end], 8);
            if !found.is_empty() {
                let last = &tokens[end - 2..end];
                let stood = (2..end - 1)
                    .any(|e| &tokens[e - 2..e] == last && tokens[e..].starts_with(&found));
                assert!(stood, "after {end}: {found:?} never followed {last:?}");
            }
        }
    }
}
