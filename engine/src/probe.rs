//! How far a model finds things: facts at several depths of documents of several lengths (a needle test).
//!
//! A document is made of sentences about nothing, and among them facts about invented people, each of a first name
//! of its own. At every depth stands one more person's password; it is asked for, and the answer is right if the
//! number is in it. All of it follows from a seed. A document is read once for all its depths.

use std::fmt::Write as _;

use crate::document::{self, Error, Placed, Wording};
use crate::ids::TokenId;

/// Sentences that say nothing about anybody.
const FILLER: [&str; 10] = [
    "The tide was low, and the old crane creaked beside the quay.",
    "The clock struck 4.",
    "Some ducks ran across the courtyard before breakfast.",
    "Nobody could say why.",
    "In 1872 the mill burned down.",
    "A cart of barrels stood in the rain until the evening.",
    "The market opened late that week.",
    "Two boys threw stones into the water.",
    "The road to the hills was closed by snow.",
    "Somebody had painted the gate green.",
];
const ONSETS: [&str; 12] = ["B", "D", "F", "G", "H", "K", "L", "M", "N", "R", "T", "V"];
const VOWELS: [&str; 5] = ["a", "e", "i", "o", "u"];
const MIDDLES: [&str; 8] = ["l", "m", "n", "r", "s", "v", "d", "k"];
const ENDS: [&str; 6] = ["an", "en", "a", "o", "in", "us"];
const TRADES: [&str; 6] = [
    "clockmaker",
    "baker",
    "sailor",
    "bookbinder",
    "carpenter",
    "tailor",
];

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeOptions {
    /// Depths, evenly from the beginning to the end.
    pub depths: usize,
    /// The seed of all texts.
    pub seed: u64,
}

/// A document and what can be asked about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Haystack {
    /// Its text.
    pub text: String,
    /// Question and right answer, by depth.
    pub needles: Vec<(String, String)>,
}

fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Numbers from a seed.
struct Draw(u64);

impl Draw {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_add(1);
        (mix(self.0) % below as u64) as usize
    }

    fn of<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[self.next(words.len())]
    }

    fn password(&mut self) -> String {
        (10_000 + self.next(90_000)).to_string()
    }
}

/// First name number `i`; no two are alike below 2880.
fn first_name(i: usize) -> String {
    let (i, onset) = (i / 12, ONSETS[i % 12]);
    let (i, vowel) = (i / 5, VOWELS[i % 5]);
    let (i, middle) = (i / 8, MIDDLES[i % 8]);
    let more = match i / 6 {
        0 => String::new(),
        n => format!("{}{}", MIDDLES[n % 8], VOWELS[n / 8 % 5]),
    };
    format!("{onset}{vowel}{middle}{more}{}", ENDS[i % 6])
}

/// A document of about so many bytes.
pub fn haystack(bytes: usize, options: &ProbeOptions) -> Haystack {
    let depths = options.depths.max(1);
    let mut draw = Draw(mix(options.seed ^ mix(bytes as u64)));
    // Names are drawn without repetition: a walk through all of them.
    let (start, mut count) = (draw.next(2880), 0);
    let mut name = move || {
        count += 1;
        format!("{} {}", first_name((start + 7 * count) % 2880), "Holm")
    };
    let mut text = String::new();
    let mut needles = Vec::new();
    let mut sentences = 0;
    while text.len() < bytes || needles.len() < depths {
        let due = match depths {
            1 => bytes / 2,
            _ => bytes * needles.len() / (depths - 1),
        };
        if needles.len() < depths && text.len() + 40 >= due.min(bytes.saturating_sub(40)) {
            let (name, password) = (name(), draw.password());
            let _ = write!(text, "The password of {name} is {password}. ");
            needles.push((format!("What is the password of {name}?"), password));
        } else if sentences % 6 == 3 {
            let (name, trade) = (name(), draw.of(&TRADES));
            let _ = write!(text, "{name} works as a {trade}. ");
        } else {
            text.push_str(draw.of(&FILLER));
            text.push(' ');
        }
        sentences += 1;
        if sentences % 9 == 0 {
            text.truncate(text.trim_end().len());
            text.push_str("\n\n");
        }
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    Haystack { text, needles }
}

/// A document to be read, and its questions by depth.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// The document.
    pub placed: Placed,
    /// It and a question.
    pub prompts: Vec<Vec<TokenId>>,
    /// What a right answer holds.
    pub answers: Vec<String>,
}

/// A document of about `tokens` tokens with its questions.
pub fn prepare(
    wording: &dyn Wording,
    tokens: usize,
    options: &ProbeOptions,
) -> Result<Prepared, Error> {
    let sample = haystack(4096, options).text;
    let per_token = sample.len() as f64 / wording.encode(&sample)?.len().max(1) as f64;
    let bytes = (tokens as f64 * per_token) as usize;
    let Haystack { text, needles } = haystack(bytes, options);
    let placed = document::place(wording, &[&text])?;
    let ask = |(question, _): &(String, String)| placed.prompt(wording, question);
    let prompts = needles.iter().map(ask).collect::<Result<_, _>>()?;
    Ok(Prepared {
        placed,
        prompts,
        answers: needles.into_iter().map(|(_, answer)| answer).collect(),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_distinct() {
        let names: BTreeSet<String> = (0..2880).map(first_name).collect();
        assert_eq!(names.len(), 2880);
    }

    #[test]
    fn needles_stand_at_their_depths_and_nowhere_else() {
        for (bytes, depths) in [(2_000, 5), (20_000, 11), (5_000, 1), (100_000, 3)] {
            let options = ProbeOptions { depths, seed: 7 };
            let found = haystack(bytes, &options);
            assert_eq!(found, haystack(bytes, &options));
            assert_eq!(found.needles.len(), depths);
            assert!(
                found.text.len().abs_diff(bytes) < bytes / 10 + 100,
                "{}",
                found.text.len()
            );
            for (i, (question, password)) in found.needles.iter().enumerate() {
                let name = question
                    .trim_start_matches("What is the password of ")
                    .trim_end_matches('?');
                let places: Vec<usize> = found.text.match_indices(name).map(|(at, _)| at).collect();
                assert_eq!(places.len(), 1, "{name}");
                assert!(found.text[places[0]..].starts_with(&format!("{name} is {password}.")));
                let depth = places[0] as f64 / found.text.len() as f64;
                let expected = if depths == 1 {
                    0.5
                } else {
                    i as f64 / (depths - 1) as f64
                };
                assert!((depth - expected).abs() < 0.12, "{depth} of {expected}");
            }
        }
        let options = |seed| ProbeOptions { depths: 3, seed };
        assert_ne!(haystack(2_000, &options(1)), haystack(2_000, &options(2)));
    }
}
