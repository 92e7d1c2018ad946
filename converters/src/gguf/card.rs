//! The section `gguf` of a card: what its family's GGUF files say, in the words of config.json.

use std::collections::BTreeSet;

use strata_layers::graph::GraphWeight;
use strata_layers::param::Fields;
use strata_layers::yaml::{Entry, Value};
use strata_layers::{Faults, Mark, Node};

use super::Gguf;
use super::builder::Builder;
use crate::card::{Card, Resolver, expressions};
use crate::cards;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::expression::Scope;
use crate::tensor_map::TensorMap;

/// What a card says of GGUF files.
#[derive(Debug, Clone)]
pub struct Section {
    /// The values of `general.architecture` that the family's files have.
    pub(crate) architectures: Vec<String>,
    /// Expressions over the metadata of which one must be true; none asks nothing.
    matches: Vec<String>,
    /// Values that the section's expressions may name.
    lets: Vec<Entry>,
    /// What must be true of the metadata.
    require: Vec<Node>,
    /// The keys of config.json.
    config: Vec<Entry>,
    /// Our weights over theirs.
    pub(crate) tensors: TensorMap,
    /// The keys of a file that is written.
    metadata: Vec<Entry>,
    /// The names in a file that is written, where `tensors` has several: they may be computed.
    written: Option<Node>,
    /// Keys of config.json whose meaning the weights of a file that is written hold, and what is left to say.
    folded: Vec<Entry>,
    /// What is worth knowing of a file that is written.
    notes: Vec<Node>,
}

impl Section {
    /// Reads the section. `numbers` are the card's, which it may replace.
    pub(crate) fn read(node: &Node, numbers: Option<&Node>, faults: &mut Faults) -> Option<Self> {
        let mut fields = Fields::of(node, "`gguf`", faults)?;
        let architectures = fields.required("architecture", faults);
        let matches = fields.optional("match", Vec::new(), faults);
        let at = fields.at("match");
        let matches = matches.map(|list: Vec<String>| expressions(&list, at, faults));
        let [lets, config, metadata, folded] =
            ["let", "config", "metadata", "folded"].map(|key| match fields.node(key) {
                None => Some(Vec::new()),
                Some(found) => mapping(found, key, faults),
            });
        let [require, notes] = ["require", "notes"].map(|key| match fields.node(key) {
            None => Vec::new(),
            Some(Node {
                value: Value::List(list),
                ..
            }) => list.clone(),
            Some(one) => vec![one.clone()],
        });
        let numbers = fields.node("numbers").or(numbers);
        let (tensors, ignore) = (fields.node("tensors"), fields.node("ignore"));
        if tensors.is_none() {
            faults.add(node.at, "`gguf` needs `tensors`");
        }
        let written = fields.node("written").cloned();
        fields.finish(faults);
        Some(Section {
            architectures: architectures?,
            matches: matches?,
            lets: lets?,
            require,
            config: config?,
            tensors: TensorMap::read(tensors?, numbers, ignore, faults),
            metadata: metadata?,
            written,
            folded: folded?,
            notes,
        })
    }

    /// Whether the files are this family's.
    fn fits(&self, gguf: &Gguf, scope: &Scope) -> bool {
        let architecture = gguf.architecture().unwrap_or_default();
        let is_true = |e: &String| {
            scope
                .evaluate(e)
                .is_ok_and(|computed| computed.value == Value::Bool(true))
        };
        self.architectures.iter().any(|a| a == architecture)
            && (self.matches.is_empty() || self.matches.iter().any(is_true))
    }
}

fn mapping(node: &Node, key: &str, faults: &mut Faults) -> Option<Vec<Entry>> {
    match &node.value {
        Value::Map(entries) => Some(entries.clone()),
        other => {
            let found = other.describe();
            faults.add(
                node.at,
                format!("found {found}, expected a mapping for `{key}`"),
            );
            None
        }
    }
}

/// The kind of each block, by the first of its tensors that is there: `kinds(mamba='ssm_in.weight', …)`.
pub(crate) fn kinds_of(
    tensors: &BTreeSet<String>,
    blocks: usize,
    suffixes: &[(String, String)],
) -> Vec<Option<String>> {
    let kind = |i: usize| {
        let there =
            |(_, suffix): &&(String, String)| tensors.contains(&format!("blk.{i}.{suffix}"));
        suffixes.iter().find(there).map(|(kind, _)| kind.clone())
    };
    // Blocks that have no tensor are none.
    (0..blocks.min(tensors.len())).map(kind).collect()
}

impl Card {
    /// What config.json would say of a GGUF file's model.
    pub fn config_of(&self, gguf: &Gguf) -> std::result::Result<Config, Faults> {
        let Some(section) = self.gguf() else {
            let mut faults = Faults::new(self.file());
            let message = format!("the card of {} has no section `gguf`", self.family());
            faults.add(Mark::default(), message);
            return Err(faults);
        };
        let metadata = Config::from_node(gguf.node(), gguf.label());
        let mut resolver = Resolver::new(self, &metadata);
        resolver.scope.add_kinds(gguf.names());
        for entry in &section.lets {
            let value = resolver.node(&entry.value);
            resolver.scope.set(&entry.key, &value.value, "of the card");
        }
        section.require.iter().for_each(|n| resolver.require(n));
        let text = |key: &str, value: Option<&String>| {
            let value = Value::Text(value?.clone()).into();
            Some(super::entry(key, value))
        };
        let list = |key: &str, value: Option<&String>| {
            let value = Value::List(vec![Value::Text(value?.clone()).into()]).into();
            Some(super::entry(key, value))
        };
        let mut entries: Vec<Entry> = Vec::new();
        entries.extend(list("architectures", self.architectures().first()));
        entries.extend(text("model_type", self.model_types().first()));
        let whole = Node {
            value: Value::Map(section.config.clone()),
            at: Mark::default(),
        };
        if let Value::Map(config) = resolver.node(&whole).value {
            for mut entry in config {
                // What is null is left to the defaults.
                if entry.value.value == Value::Null {
                    continue;
                }
                entry.at = Mark::default();
                unplaced(&mut entry.value);
                entries.retain(|e| e.key != entry.key);
                entries.push(entry);
            }
        }
        let root = Value::Map(entries).into();
        let config = Config::from_node(root, gguf.label());
        resolver.faults.or(Some(config))
    }

    /// The card by which a GGUF file of a model with this config is written.
    pub fn for_writing(&self, config: &Config) -> std::result::Result<Card, Faults> {
        let mut faults = Faults::new(self.file());
        let Some(section) = self.gguf().filter(|s| !s.metadata.is_empty()) else {
            let message = format!(
                "no GGUF file of {} can be written: the card's section `gguf` has no `metadata`",
                self.family()
            );
            faults.add(Mark::default(), message);
            return Err(faults);
        };
        let mut tensors = section.tensors.clone();
        if let Some(written) = &section.written {
            let mut resolver = Resolver::new(self, config);
            resolver.defaults();
            let written = resolver.node(written);
            faults.extend(resolver.faults);
            let first = TensorMap::read(&written, None, None, &mut faults);
            tensors.put_before(first);
        }
        if !faults.is_empty() {
            return Err(faults);
        }
        self.with_tensors(tensors).bound(config)
    }

    /// What the config of a file that is written says: less than the model's where the weights hold what its
    /// keys mean. None if it says the same.
    pub(crate) fn folded(&self, config: &Config) -> std::result::Result<Option<Config>, Faults> {
        let Some(section) = self.gguf().filter(|s| !s.folded.is_empty()) else {
            return Ok(None);
        };
        let mut resolver = Resolver::new(self, config);
        resolver.defaults();
        let mut entries = config.entries().to_vec();
        for entry in &section.folded {
            let value = resolver.node(&entry.value);
            entries.retain(|e| e.key != entry.key);
            entries.push(super::entry(&entry.key, value));
        }
        let root = Value::Map(entries).into();
        resolver
            .faults
            .or(Some(Some(Config::from_node(root, config.file()))))
    }

    /// What is worth knowing of a file that is written for this config.
    pub(crate) fn notes(&self, config: &Config) -> std::result::Result<Vec<String>, Faults> {
        let mut resolver = Resolver::new(self, config);
        resolver.defaults();
        let whole = Node {
            value: Value::List(self.gguf().map(|s| s.notes.clone()).unwrap_or_default()),
            at: Mark::default(),
        };
        let notes = match resolver.node(&whole).value {
            Value::List(list) => list.into_iter().filter_map(|n| match n.value {
                Value::Text(text) => Some(text),
                _ => None,
            }),
            _ => return resolver.faults.or(None),
        };
        let notes = notes.collect();
        resolver.faults.or(Some(notes))
    }

    /// Writes the keys of a model with this config. The architecture.
    pub(crate) fn metadata(
        &self,
        config: &Config,
        weights: &[GraphWeight],
        header: &mut Builder,
    ) -> std::result::Result<String, Faults> {
        let mut resolver = Resolver::new(self, config);
        resolver.defaults();
        resolver
            .scope
            .add_blocks(weights.iter().map(|w| w.path.clone()).collect());
        let section = self.gguf();
        let whole = Node {
            value: Value::Map(section.map(|s| s.metadata.clone()).unwrap_or_default()),
            at: Mark::default(),
        };
        let Value::Map(entries) = resolver.node(&whole).value else {
            return resolver.faults.or(None);
        };
        const ARCHITECTURE: &str = "general.architecture";
        let said = entries.iter().find(|e| e.key == ARCHITECTURE);
        let architecture = match said.map(|e| &e.value.value) {
            Some(Value::Text(name)) => name.clone(),
            _ => section
                .and_then(|s| s.architectures.first())
                .cloned()
                .unwrap_or_default(),
        };
        header.text(ARCHITECTURE, &architecture);
        for entry in entries {
            let key = match entry.key.starts_with("general.") {
                true => entry.key.clone(),
                false => format!("{architecture}.{}", entry.key),
            };
            if let Err(why) = put(header, &key, &entry.value.value) {
                resolver.faults.add(entry.at, format!("{key}: {why}"));
            }
        }
        resolver.faults.or(Some(architecture))
    }

    /// The card for GGUF files: its tensors are called as theirs. None if it knows no such files.
    pub fn for_gguf(&self) -> Option<Card> {
        let tensors = self.gguf()?.tensors.clone();
        Some(self.with_tensors(tensors))
    }
}

/// A key and its value: whole numbers as u32, `{f32: …}` and fractions as f32, lists of numbers as i32.
fn put(header: &mut Builder, key: &str, value: &Value) -> std::result::Result<(), String> {
    let uint = |n: i64| u32::try_from(n).map_err(|_| format!("{n} is no u32"));
    match value {
        Value::Null => {}
        Value::Bool(b) => header.truth(key, *b),
        Value::Int(n) => header.uint(key, uint(*n)?),
        Value::Float(f) => header.float(key, *f as f32),
        Value::Text(t) => header.text(key, t),
        Value::Map(entries) => match entries.first().map(|e| (e.key.as_str(), &e.value.value)) {
            Some(("f32", Value::Int(n))) => header.float(key, *n as f32),
            Some(("f32", Value::Float(f))) => header.float(key, *f as f32),
            // A number that the config leaves out.
            Some(("f32", Value::Null)) | None => {}
            Some(_) => return Err("a mapping here is {f32: a number}".into()),
        },
        Value::List(list) => {
            let int = |n: &Node| match &n.value {
                Value::Int(n) => i32::try_from(*n).ok(),
                _ => None,
            };
            let ints: Option<Vec<i32>> = list.iter().map(int).collect();
            header.ints(key, &ints.ok_or("a list here holds whole numbers")?);
        }
    }
    Ok(())
}

/// The places of expressions mean nothing in the file that the values came from.
fn unplaced(node: &mut Node) {
    node.at = Mark::default();
    match &mut node.value {
        Value::List(list) => list.iter_mut().for_each(unplaced),
        Value::Map(entries) => entries.iter_mut().for_each(|e| unplaced(&mut e.value)),
        _ => {}
    }
}

/// The card whose section `gguf` knows a file.
pub(crate) fn find(gguf: &Gguf) -> Result<&'static Card> {
    let metadata = Config::from_node(gguf.node(), gguf.label());
    let mut scope = Scope::new(&metadata);
    scope.add_kinds(gguf.names());
    let with = || cards::all().iter().filter_map(|c| Some((c, c.gguf()?)));
    let found = with().find(|(_, section)| section.fits(gguf, &scope));
    found.map(|(card, _)| card).ok_or_else(|| {
        let mut known: Vec<&str> = with()
            .flat_map(|(_, s)| s.architectures.iter().map(String::as_str))
            .collect();
        known.sort_unstable();
        known.dedup();
        let found = match gguf.architecture() {
            Some(name) => format!("no model card is for the architecture {name:?}"),
            None => "the metadata has no general.architecture".into(),
        };
        Error::file(
            gguf.label(),
            format!(
                "{found}; there are cards for {}; a card of one's own is given with --card FILE",
                known.join(", ")
            ),
        )
    })
}
