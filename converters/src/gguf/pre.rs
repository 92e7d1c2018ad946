//! How byte-level tokenizers cut a text into words: `pre.yaml`, read.

use std::sync::LazyLock;

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
