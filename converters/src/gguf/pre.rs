//! How byte-level tokenizers cut a text into words: `pre.yaml`, read.

use std::sync::LazyLock;

use serde_json::Value as Json;
use strata_layers::Faults;
use strata_layers::param::{Fields, list_of};
use strata_layers::yaml::{self, Value};

/// A way to cut a text into words.
#[derive(Debug)]
pub(super) struct Cut {
    names: Vec<String>,
    /// Expressions that cut out their matches, one after another.
    pub cuts: Vec<String>,
    /// A word that is a token is one, whatever the merges say.
    pub whole_words: bool,
    /// A text begins with the BOS token, unless the file says otherwise.
    pub bos: bool,
    /// What is done to a text before.
    pub normalizer: Option<String>,
}

static CUTS: LazyLock<Vec<Cut>> = LazyLock::new(|| {
    let read = || {
        let node = yaml::parse(include_str!("pre.yaml"), "pre.yaml")?;
        let mut faults = Faults::new("pre.yaml");
        let Value::List(list) = &node.value else {
            return Ok(Vec::new());
        };
        let cuts = list.iter().map(|node| {
            let mut fields = Fields::of(node, "a way to cut", &mut faults)?;
            let faults = &mut faults;
            let cut = Cut {
                names: fields.required("names", faults)?,
                cuts: fields.required("cuts", faults)?,
                whole_words: fields.optional("whole_words", false, faults)?,
                bos: fields.optional("bos", false, faults)?,
                normalizer: Some(fields.optional("normalizer", String::new(), faults)?)
                    .filter(|n| !n.is_empty()),
            };
            fields.finish(faults);
            Some(cut)
        });
        let cuts: Option<Vec<Cut>> = cuts.collect();
        faults.or(cuts)
    };
    read().unwrap_or_else(|faults: Faults| panic!("a table of this binary is faulty: {faults}"))
});

/// The way of this name, or which there are.
pub(super) fn named(name: &str) -> Result<&'static Cut, String> {
    let found = CUTS.iter().find(|c| c.names.iter().any(|n| n == name));
    found.ok_or_else(|| {
        let mut known: Vec<&str> = CUTS
            .iter()
            .flat_map(|c| c.names.iter().map(String::as_str))
            .collect();
        known.sort_unstable();
        format!(
            "tokenizer.ggml.pre is {name:?}, a way to cut a text into words that is not known; known are {}",
            list_of(known)
        )
    })
}

/// The name of the way that a tokenizer.json cuts words in. Where there are no merges, any is the same.
pub(super) fn of(pre_tokenizer: &Json, no_merges: bool) -> Result<&'static str, String> {
    let steps: Vec<&Json> = match pre_tokenizer["pretokenizers"].as_array() {
        Some(list) => list.iter().collect(),
        None => vec![pre_tokenizer],
    };
    let mut cuts: Vec<&str> = Vec::new();
    for step in steps {
        match step["type"].as_str() {
            Some("Split") if step["invert"] != true => {
                let regex = step["pattern"]["Regex"].as_str();
                cuts.push(regex.ok_or("it splits at a text")?);
            }
            Some("Digits") if step["individual_digits"] == true => cuts.push(r"\p{N}"),
            Some("ByteLevel") if step["use_regex"] == false => {}
            Some("ByteLevel") => cuts.push(WORDS),
            other => return Err(format!("it cuts words by {other:?}")),
        }
    }
    // What is left behind the last match is a piece of its own, said or not.
    let plain = |cut: &str| cut.trim_end_matches(r"|\s+").to_string();
    let same = |c: &&Cut| {
        let known = c.cuts.iter().map(|cut| plain(cut));
        known.eq(cuts.iter().map(|cut| plain(cut)))
    };
    match CUTS.iter().find(same) {
        Some(cut) => Ok(&cut.names[0]),
        None if no_merges => Ok(&CUTS[0].names[0]),
        None => Err(format!("no known way to cut words is {cuts:?}")),
    }
}

/// What byte-level tokenizers cut words by, unless they say otherwise.
const WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_stands_once() {
        let mut names: Vec<&String> = CUTS.iter().flat_map(|c| &c.names).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert!(count > 20 && names.len() == count);
        assert!(named("gpt-2").unwrap().cuts[0].ends_with(r"\s+(?!\S)|\s+"));
        let why = named("new").unwrap_err();
        assert!(why.contains("\"new\"") && why.contains("gpt-2"), "{why}");
    }
}
