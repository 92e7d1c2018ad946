//! Model cards: how one family's `config.json` becomes a plan, and what its tensors are called.
//!
//! A card is a plan whose values may be expressions over the config's keys (`=expand * hidden_size`),
//! whose stack may be computed, and which goes on with the names of tensors. See
//! `model-cards/README.md`.

use std::collections::{BTreeMap, BTreeSet};

use strata_layers::param::{Fields, Param, list_of};
use strata_layers::yaml::{self, Entry, Value};
use strata_layers::{Faults, Graph, Mark, Node, Plan};

use crate::config::Config;
use crate::expression::{self, Computed, Scope};
use crate::gguf::Section;
use crate::stack;
use crate::tensor_map::TensorMap;

/// The version of the card language.
const VERSION: usize = 1;

/// The keys of a card that become keys of the plan as they are.
const PLAN_KEYS: [&str; 7] = [
    "vocab", "d_model", "context", "init_std", "embed", "image", "head",
];

/// What expressions in blocks may name besides the config's keys: the block's number in the stack,
/// and how many blocks of its name came before.
const PLACE: [&str; 2] = ["i", "use"];

/// One family of models.
#[derive(Debug, Clone)]
pub struct Card {
    file: String,
    family: String,
    architectures: Vec<String>,
    model_types: Vec<String>,
    also: Option<String>,
    instead: Option<String>,
    matches: Vec<String>,
    defaults: Vec<Entry>,
    require: Vec<Node>,
    plan: Vec<Entry>,
    stack: Node,
    shared: Option<Node>,
    blocks: Vec<Entry>,
    tensors: TensorMap,
    unused: Option<Node>,
    gguf: Option<Section>,
    solved: Vec<Entry>,
    tiny: Config,
}

/// What a family's checkpoints hold and no plan of its card runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Unused {
    /// Elements of such tensors.
    pub parameters: u64,
    /// Their number.
    pub tensors: u64,
}

impl Card {
    /// Reads a card. `file` is its name for messages.
    pub fn parse(text: &str, file: &str) -> Result<Card, Faults> {
        let node = yaml::parse(text, file)?;
        let mut faults = Faults::new(file);
        let card = read_card(&node, file, &mut faults);
        faults.or(card)
    }

    /// Its file, for messages about plans that it made.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// What the family is called.
    pub fn family(&self) -> &str {
        &self.family
    }

    /// The classes whose checkpoints it opens.
    pub fn architectures(&self) -> &[String] {
        &self.architectures
    }

    /// The `model_type`s it opens when no card knows the architecture.
    pub fn model_types(&self) -> &[String] {
        &self.model_types
    }

    /// A file beside config.json in which its models have more keys.
    pub fn also(&self) -> Option<&str> {
        self.also.as_deref()
    }

    /// A file that its models have in place of config.json.
    pub fn instead(&self) -> Option<&str> {
        self.instead.as_deref()
    }

    /// Whether one of its `match` expressions is true of a config. One that needs a key which is not
    /// there is not.
    pub fn matches(&self, config: &Config) -> bool {
        let scope = Scope::new(config);
        let is_true = |e: &String| {
            scope
                .evaluate(e)
                .is_ok_and(|computed| computed.value == Value::Bool(true))
        };
        self.matches.iter().any(is_true)
    }

    /// A small config, for tests and demonstrations.
    pub fn tiny(&self) -> &Config {
        &self.tiny
    }

    /// What the family's tensors are called. Names with numbers that a config decides are known after
    /// [`Card::bound`].
    pub fn tensors(&self) -> &TensorMap {
        &self.tensors
    }

    /// What it says of GGUF files.
    pub fn gguf(&self) -> Option<&Section> {
        self.gguf.as_ref()
    }

    /// The card for checkpoints whose tensors are called otherwise.
    pub(crate) fn with_tensors(&self, tensors: TensorMap) -> Card {
        Card {
            tensors,
            ..self.clone()
        }
    }

    /// The card for checkpoints with this config: the numbers in its tensors' names are computed.
    pub fn bound(&self, config: &Config) -> Result<Card, Faults> {
        let mut resolver = Resolver::new(self, config);
        let mut tensors = self.tensors.clone();
        if tensors.has_numbers() {
            resolver.defaults();
            let blocks = resolver.names().len();
            tensors.compute_numbers(&mut resolver.scope, blocks, &mut resolver.faults);
        }
        let bound = Card {
            tensors,
            ..self.clone()
        };
        resolver.faults.or(Some(bound))
    }

    /// What checkpoints with this config hold and the plan does not run; nothing, as most cards say.
    pub fn unused(&self, config: &Config) -> Result<Unused, Faults> {
        let Some(node) = &self.unused else {
            return Ok(Unused::default());
        };
        let mut resolver = Resolver::new(self, config);
        resolver.defaults();
        let node = resolver.node(node);
        let unused = match node.value {
            Value::Null => Some(Unused::default()),
            _ => read_unused(&node, &mut resolver),
        };
        resolver.faults.or(unused)
    }

    /// The keys of config.json that say which blocks there are, computed from the names of a plan's.
    pub(crate) fn solved(&self) -> &[Entry] {
        &self.solved
    }

    /// Its block that a plan's block was made from, by the name.
    pub(crate) fn block_of<'a>(&self, name: &'a str) -> &'a str {
        let known = |name: &str| self.blocks.iter().any(|b| b.key == name);
        match name.rsplit_once('.') {
            Some((first, _)) if !known(name) && known(first) => first,
            _ => name,
        }
    }

    /// The keys of config.json that it knows.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        let entries = self.defaults.iter().chain(self.tiny.entries());
        entries.map(|e| e.key.as_str())
    }

    /// The plan of a model with this config. Faults stand at the card's lines, and say which keys of
    /// config.json they come from. A plan that is returned can be lowered.
    pub fn plan(&self, config: &Config, name: &str) -> Result<Plan, Faults> {
        let mut resolver = Resolver::new(self, config);
        let node = resolver.plan(name);
        let plan = Plan::from_node(&node, &self.file)
            .and_then(|plan| Graph::lower(&plan, &self.file).map(|_| plan));
        let Resolver {
            mut faults,
            told,
            failed,
            ..
        } = resolver;
        let whole = match plan {
            Ok(plan) => Some(plan),
            Err(found) => {
                // What could not be computed has its fault already.
                for fault in found.list().iter().filter(|f| !failed.contains(&f.at)) {
                    match told.get(&fault.at) {
                        Some(told) => faults.add(fault.at, format!("{}: {told}", fault.message)),
                        None => faults.add(fault.at, fault.message.clone()),
                    }
                }
                None
            }
        };
        faults.or(whole)
    }
}

fn read_card(node: &Node, file: &str, faults: &mut Faults) -> Option<Card> {
    let mut fields = Fields::of(node, "a card", faults)?;
    let version = fields.required::<usize>("card", faults);
    if let Some(version) = version.filter(|v| *v != VERSION) {
        let message = format!("card version {version}; this program reads version {VERSION}");
        faults.add(fields.at("card"), message);
    }
    let family = fields.required("family", faults);
    let architectures = fields.optional("architectures", Vec::new(), faults);
    let model_types = fields.optional("model_types", Vec::new(), faults);
    let mut file_name = |key: &'static str, faults: &mut Faults| match fields.node(key) {
        Some(node) => String::read(node, faults).map(Some),
        None => Some(None),
    };
    let also = file_name("also", faults)?;
    let instead = file_name("instead", faults)?;
    let matches = fields.optional("match", Vec::new(), faults);
    let ways = [&architectures, &model_types, &matches];
    if ways
        .iter()
        .all(|way| way.as_ref().is_some_and(Vec::is_empty))
    {
        let message =
            "no model finds this card: it needs `architectures`, `model_types` or `match`";
        faults.add(node.at, message);
    }
    let at = fields.at("match");
    let matches = matches.map(|list: Vec<String>| expressions(&list, at, faults));
    let mut mapping = |key: &'static str, faults: &mut Faults| match fields.node(key) {
        None => Some(Vec::new()),
        Some(Node {
            value: Value::Map(entries),
            ..
        }) => Some(entries.clone()),
        Some(other) => {
            let found = other.value.describe();
            faults.add(
                other.at,
                format!("found {found}, expected a mapping for `{key}`"),
            );
            None
        }
    };
    let defaults = mapping("defaults", faults);
    let blocks = mapping("blocks", faults);
    let tiny = mapping("tiny", faults);
    let solved = mapping("solved", faults);
    let require = match fields.node("require") {
        None => Vec::new(),
        Some(Node {
            value: Value::List(list),
            ..
        }) => list.clone(),
        Some(one) => vec![one.clone()],
    };
    let mut plan = Vec::new();
    for key in PLAN_KEYS {
        if let Some(value) = fields.node(key) {
            let (key, at, value) = (key.to_string(), value.at, value.clone());
            plan.push(Entry { key, at, value });
        }
    }
    let stack = fields.node("stack").cloned();
    let shared = fields.node("shared").cloned();
    let tensors = fields.node("tensors");
    let ignore = fields.node("ignore");
    let numbers = fields.node("numbers");
    let unused = fields.node("unused").cloned();
    let gguf = fields.node("gguf");
    for (key, there) in [("stack", stack.is_some()), ("tensors", tensors.is_some())] {
        if !there {
            faults.add(node.at, format!("a card needs `{key}`"));
        }
    }
    fields.finish(faults);
    let tensors = TensorMap::read(tensors?, numbers, ignore, faults);
    let gguf = match gguf {
        Some(node) => Some(Section::read(node, numbers, faults)?),
        None => None,
    };
    let tiny = Node {
        value: Value::Map(tiny?),
        at: fields.at("tiny"),
    };
    Some(Card {
        file: file.into(),
        family: family?,
        architectures: architectures?,
        model_types: model_types?,
        also,
        instead,
        matches: matches?,
        defaults: defaults?,
        require,
        plan,
        stack: stack?,
        shared,
        blocks: blocks?,
        tensors,
        unused,
        gguf,
        solved: solved?,
        tiny: Config::from_node(tiny, file),
    })
}

fn read_unused(node: &Node, resolver: &mut Resolver<'_>) -> Option<Unused> {
    let faults = &mut resolver.faults;
    let mut fields = Fields::of(node, "`unused`", faults)?;
    let nodes = ["parameters", "tensors"].map(|key| (key, fields.node(key)));
    fields.finish(faults);
    let [parameters, tensors] = nodes.map(|(key, found)| match found.map(|n| (n.at, &n.value)) {
        Some((_, Value::Int(count))) if *count >= 0 => Some(*count as u64),
        Some((at, _)) if resolver.failed.contains(&at) => None,
        Some((at, other)) => {
            let told = resolver.told.get(&at).map(|t| format!(": {t}"));
            let found = other.describe();
            let message = format!(
                "found {found}, expected a count for `{key}`{}",
                told.unwrap_or_default()
            );
            faults.add(at, message);
            None
        }
        None => {
            faults.add(node.at, format!("`unused` needs `{key}`"));
            None
        }
    });
    Some(Unused {
        parameters: parameters?,
        tensors: tensors?,
    })
}

/// Expressions without their `=`.
pub(crate) fn expressions(list: &[String], at: Mark, faults: &mut Faults) -> Vec<String> {
    let mut found = Vec::new();
    for text in list {
        match text.strip_prefix('=') {
            Some(expression) => match expression::check(expression) {
                Ok(()) => found.push(expression.into()),
                Err(why) => faults.add(at, why),
            },
            None => faults.add(at, format!("{text:?} is no expression: it begins with `=`")),
        }
    }
    found
}

/// A card and a config, on their way to a plan.
pub(crate) struct Resolver<'a> {
    card: &'a Card,
    pub scope: Scope,
    pub faults: Faults,
    /// How the values of expressions came about, by the expressions' places.
    told: BTreeMap<Mark, String>,
    /// The places of expressions that have no value.
    failed: BTreeSet<Mark>,
    /// Of the expressions in blocks, those that are the same at every place; none for the others.
    constant: BTreeMap<String, Option<Computed>>,
}

impl<'a> Resolver<'a> {
    pub fn new(card: &'a Card, config: &Config) -> Self {
        Resolver {
            card,
            scope: Scope::new(config),
            faults: Faults::new(&card.file),
            told: BTreeMap::new(),
            failed: BTreeSet::new(),
            constant: BTreeMap::new(),
        }
    }

    fn plan(&mut self, name: &str) -> Node {
        let card = self.card;
        self.defaults();
        card.require.iter().for_each(|n| self.require(n));
        let at = Mark { line: 1, column: 1 };
        let entry = |key: &str, at: Mark, value: Node| Entry {
            key: key.into(),
            at,
            value,
        };
        let mut plan = vec![
            entry("plan", at, VERSION.write().into()),
            entry("name", at, Value::Text(name.into()).into()),
        ];
        for e in &card.plan {
            let value = self.node(&e.value);
            plan.push(entry(&e.key, e.at, value));
        }
        if let Some(shared) = &card.shared {
            let value = self.node(shared);
            plan.push(entry("shared", shared.at, value));
        }
        let (blocks, stack) = self.blocks();
        plan.push(entry(
            "blocks",
            card.stack.at,
            Node {
                value: Value::Map(blocks),
                at: card.stack.at,
            },
        ));
        plan.push(entry(
            "stack",
            card.stack.at,
            Node {
                value: Value::List(stack),
                at: card.stack.at,
            },
        ));
        Node {
            value: Value::Map(plan),
            at,
        }
    }

    /// Gives absent keys the values that the family's reference gives them.
    pub fn defaults(&mut self) {
        for entry in &self.card.defaults {
            if !self.scope.has(&entry.key) {
                let value = self.node(&entry.value);
                if !self.failed.contains(&entry.value.at) {
                    self.scope.set(&entry.key, &value.value, "by default");
                }
            }
        }
    }

    pub fn require(&mut self, node: &Node) {
        let before = self.faults.list().len();
        let value = self.node(node).value;
        if value != Value::Bool(true) && self.faults.list().len() == before {
            let told = self
                .told
                .get(&node.at)
                .cloned()
                .unwrap_or_else(|| value.describe());
            self.faults
                .add(node.at, format!("this model cannot be run: {told}"));
        }
    }

    /// The tree with every expression computed and every choice made. Expressions without a value are
    /// null, and have failed.
    pub fn node(&mut self, node: &Node) -> Node {
        let value = match &node.value {
            Value::Text(text) => match text.strip_prefix('=') {
                Some(expression) if self.scope.has(PLACE[1]) => {
                    self.compute_placed(expression, node.at)
                }
                Some(expression) => self.compute(expression, node.at),
                None => node.value.clone(),
            },
            Value::List(list) => Value::List(list.iter().flat_map(|n| self.items(n)).collect()),
            Value::Map(_) if is_choice(node) => {
                return self.chosen(node).unwrap_or(Node {
                    value: Value::Null,
                    at: node.at,
                });
            }
            Value::Map(entries) => {
                let entry = |e: &Entry| {
                    let value = match is_choice(&e.value) {
                        true => self.chosen(&e.value)?,
                        false => self.node(&e.value),
                    };
                    Some(Entry { value, ..e.clone() })
                };
                Value::Map(entries.iter().filter_map(entry).collect())
            }
            plain => plain.clone(),
        };
        Node { value, at: node.at }
    }

    /// What an item of a list becomes: itself, or the items of the list that it chooses.
    fn items(&mut self, node: &Node) -> Vec<Node> {
        if !is_choice(node) {
            return vec![self.node(node)];
        }
        match self.chosen(node) {
            Some(Node {
                value: Value::List(list),
                ..
            }) => list,
            one => one.into_iter().collect(),
        }
    }

    /// The branch of a choice, computed; the other one is not looked at.
    fn chosen(&mut self, node: &Node) -> Option<Node> {
        let mut fields = Fields::of(node, "a choice", &mut self.faults)?;
        let (condition, then) = (fields.node("if"), fields.node("then"));
        let other = fields.node("else");
        fields.finish(&mut self.faults);
        let Some(condition) = condition else {
            self.faults.add(node.at, "a choice needs a condition");
            return None;
        };
        let value = self.node(condition).value;
        let branch = match value {
            Value::Bool(true) => then,
            Value::Bool(false) => other,
            _ if self.failed.contains(&condition.at) => None,
            other => {
                let told = self.told.get(&condition.at).cloned();
                let told = told.unwrap_or_else(|| other.describe());
                let message = format!("a condition must be true or false: {told}");
                self.faults.add(condition.at, message);
                None
            }
        };
        branch.map(|b| self.node(b))
    }

    fn compute(&mut self, expression: &str, at: Mark) -> Value {
        match self.scope.evaluate(expression) {
            Ok(computed) => {
                self.told.insert(at, computed.told);
                placed(computed.value, at)
            }
            Err(why) => {
                self.failed.insert(at);
                self.faults.add(at, why);
                Value::Null
            }
        }
    }

    /// The same of an expression in a block. A stack may have ten thousand blocks with a hundred each.
    fn compute_placed(&mut self, expression: &str, at: Mark) -> Value {
        match self.constant.get(expression) {
            Some(Some(known)) => {
                self.told.insert(at, known.told.clone());
                return placed(known.value.clone(), at);
            }
            Some(None) => return self.compute(expression, at),
            None => {}
        }
        let reads = self.scope.reads(expression);
        let varies = PLACE.iter().any(|p| reads.iter().any(|r| r == p));
        let known = self.scope.evaluate(expression).ok().filter(|_| !varies);
        self.constant.insert(expression.into(), known);
        self.compute(expression, at)
    }

    /// The names of the stack's blocks in order, and the places in the card that put them there.
    fn names(&mut self) -> Vec<stack::Name> {
        let card = self.card;
        let node = self.node(&card.stack);
        let mut found = Faults::new(&card.file);
        let names = stack::read(&node, &mut found);
        for fault in found.list().iter().filter(|f| !self.failed.contains(&f.at)) {
            let told = self
                .told
                .get(&fault.at)
                .map(|t| format!(": {t}"))
                .unwrap_or_default();
            self.faults
                .add(fault.at, format!("{}{told}", fault.message));
        }
        // Without a stack every block is checked once.
        names.unwrap_or_else(|| card.blocks.iter().map(|e| (e.key.clone(), e.at)).collect())
    }

    /// The blocks that the stack uses, and the stack.
    fn blocks(&mut self) -> (Vec<Entry>, Vec<Node>) {
        let card = self.card;
        let names = self.names();
        let known: BTreeMap<&str, &Entry> =
            card.blocks.iter().map(|e| (e.key.as_str(), e)).collect();
        let mut blocks = Variants::default();
        let mut stack = Vec::new();
        // How often each name was used, and whether its block differs from place to place.
        let mut uses: BTreeMap<String, (usize, bool)> = BTreeMap::new();
        for (i, (name, at)) in names.into_iter().enumerate() {
            let Some(block) = known.get(name.as_str()) else {
                let known = list_of(card.blocks.iter().map(|e| e.key.as_str()));
                self.faults
                    .add(at, format!("there is no block `{name}`; there are {known}"));
                continue;
            };
            let first = || (0, self.varies(&block.value));
            let (uses, varies) = uses.entry(name.clone()).or_insert_with(first);
            let key = if *uses == 0 || *varies {
                for (key, value) in PLACE.iter().zip([i, *uses]) {
                    self.scope
                        .set(key, &Value::Int(value as i64), "of this block");
                }
                let value = self.node(&block.value);
                blocks.key(block, value)
            } else {
                name
            };
            *uses += 1;
            let value = Value::Text(key);
            stack.push(Node { value, at });
        }
        (blocks.entries, stack)
    }

    /// Whether a block differs from place to place.
    fn varies(&self, node: &Node) -> bool {
        match &node.value {
            Value::Text(text) => text.strip_prefix('=').is_some_and(|expression| {
                let reads = self.scope.reads(expression);
                PLACE.iter().any(|p| reads.iter().any(|r| r == p))
            }),
            Value::List(list) => list.iter().any(|n| self.varies(n)),
            Value::Map(entries) => entries.iter().any(|e| self.varies(&e.value)),
            _ => false,
        }
    }
}

/// Computed blocks. A stack may have ten thousand, all different, so that none is looked for in a list.
#[derive(Default)]
struct Variants {
    entries: Vec<Entry>,
    /// The key of each block by its name in the card and its value.
    keys: BTreeMap<(String, String), String>,
    /// How many values each name has so far.
    counts: BTreeMap<String, usize>,
    taken: BTreeSet<String>,
}

impl Variants {
    /// The name under which a computed block is kept: its own, or with a number when one of that name
    /// is different.
    fn key(&mut self, block: &Entry, value: Node) -> String {
        let found = (block.key.clone(), yaml::print(&value));
        if let Some(key) = self.keys.get(&found) {
            return key.clone();
        }
        let count = self.counts.entry(block.key.clone()).or_insert(0);
        let key = loop {
            *count += 1;
            let key = match *count {
                1 => block.key.clone(),
                number => format!("{}.{number}", block.key),
            };
            // The card itself may have a block `b.2`.
            if self.taken.insert(key.clone()) {
                break key;
            }
        };
        self.keys.insert(found, key.clone());
        let at = block.at;
        self.entries.push(Entry {
            key: key.clone(),
            at,
            value,
        });
        key
    }
}

/// `{if: =…, then: …, else: …}` stands for one of its branches.
fn is_choice(node: &Node) -> bool {
    matches!(&node.value, Value::Map(entries) if entries.iter().any(|e| e.key == "if"))
}

/// A computed value stands where its expression does, with all that is in it.
fn placed(value: Value, at: Mark) -> Value {
    match value {
        Value::List(list) => {
            let item = |n: Node| Node {
                value: placed(n.value, at),
                at,
            };
            Value::List(list.into_iter().map(item).collect())
        }
        other => other,
    }
}
