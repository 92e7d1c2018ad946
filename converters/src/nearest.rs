//! Which families are like a config that no card opens: by what it is called, and by its keys.

use std::collections::{BTreeMap, BTreeSet};

use strata_layers::param::list_of;

use crate::card::Card;
use crate::config::Config;

/// Most families that are named.
const SHOWN: usize = 3;
/// Most keys that are named of each.
const KEYS: usize = 4;
/// Names this much alike, from 0 to 1, are worth telling.
const LIKE: f64 = 0.7;
/// A family that knows this share of the keys is worth telling.
const SHARE: f64 = 0.4;

/// The families that a config is like, best first, each with the reason; empty if it is like none.
pub(crate) fn families(config: &Config, cards: &[Card]) -> Vec<String> {
    let known: Vec<BTreeSet<&str>> = cards.iter().map(|c| c.keys().collect()).collect();
    let mut holders: BTreeMap<&str, usize> = BTreeMap::new();
    for key in known.iter().flatten() {
        *holders.entry(key).or_default() += 1;
    }
    // A key that every card knows tells nothing; one of a single card tells most.
    let weight = |key: &str| {
        let holders = holders.get(key)?;
        Some(((1 + cards.len()) as f64 / *holders as f64).ln())
    };
    let keys: Vec<(&str, f64)> = config
        .entries()
        .iter()
        .filter_map(|e| Some((e.key.as_str(), weight(&e.key)?)))
        .collect();
    let all: f64 = keys.iter().map(|(_, weight)| weight).sum();
    let mut names = config.texts("architectures");
    names.extend(config.texts("model_type"));
    let mut found: Vec<(f64, &str, String)> = Vec::new();
    for (card, known) in cards.iter().zip(&known) {
        let theirs = card.architectures().iter().chain(card.model_types());
        let named = theirs.flat_map(|t| names.iter().map(move |n| (alike(n, t), t)));
        let named = named.max_by(|a, b| a.0.total_cmp(&b.0));
        let mut shared: Vec<(&str, f64)> = keys.clone();
        shared.retain(|(key, _)| known.contains(key));
        let share = shared.iter().map(|(_, weight)| weight).sum::<f64>() / all.max(1.0);
        let named = named.filter(|(alike, _)| *alike >= LIKE);
        let score = share + named.map_or(0.0, |(alike, _)| alike);
        let mut why = Vec::new();
        if let Some((_, name)) = named {
            why.push(format!("its name is like {name}"));
        }
        if share >= SHARE {
            shared.sort_by(|a, b| b.1.total_cmp(&a.1));
            let most = shared.iter().take(KEYS).map(|(key, _)| *key);
            why.push(format!("it has the keys {}", list_of(most)));
        }
        if !why.is_empty() {
            found.push((score, card.family(), why.join(", and ")));
        }
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0));
    let shown = found.into_iter().take(SHOWN);
    shown
        .map(|(_, family, why)| format!("{family} ({why})"))
        .collect()
}

/// How alike two names are, from 0 to 1: one less the share of letters to change.
fn alike(a: &str, b: &str) -> f64 {
    let [a, b] = [a, b].map(stem);
    let longest = a.len().max(b.len());
    if a.is_empty() || b.is_empty() {
        return 0.0;
    }
    1.0 - edits(&a, &b) as f64 / longest as f64
}

/// What tells one name from another: small letters and digits, without what all classes end with.
fn stem(name: &str) -> Vec<char> {
    // Longer names are no names, and comparing takes the product of the lengths.
    const MOST: usize = 100;
    let letters = name.chars().filter(|c| c.is_alphanumeric()).take(MOST);
    let name: String = letters.flat_map(char::to_lowercase).collect();
    let endings = ["forcausallm", "lmheadmodel", "forconditionalgeneration"];
    let ending = endings.iter().find_map(|e| name.strip_suffix(e));
    ending.unwrap_or(&name).chars().collect()
}

/// Letters to insert, drop or change to make one of the other.
fn edits(a: &[char], b: &[char]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_alike_by_their_letters() {
        let edits = |a: &str, b: &str| super::edits(&stem(a), &stem(b));
        assert_eq!(edits("", "abc"), 3);
        assert_eq!(edits("kitten", "sitting"), 3);
        assert_eq!(edits("flaw", "lawn"), 2);
        assert_eq!(edits("Mamba4ForCausalLM", "mamba_2"), 1);
        assert!(alike("Mamba2LMHeadModel", "mamba2") == 1.0);
        assert!(alike("GPT2LMHeadModel", "MambaForCausalLM") < LIKE);
        assert_eq!(alike("", "a"), 0.0);
        assert!(alike("ForCausalLM", "ForCausalLM") == 0.0);
    }
}
