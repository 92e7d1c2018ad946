//! From a plan back to a config.json: which values of its keys give this very stack.
//!
//! The card's `solved` computes the keys that say which blocks there are, from the names of the
//! plan's blocks. Whether they say it is not believed but tried: the plan is made again from the changed
//! config, and must be the same.

use std::collections::BTreeMap;

use strata_layers::plan::Named;
use strata_layers::yaml::{Entry, Value};
use strata_layers::{Mark, Node, Plan};

use crate::card::{Card, Resolver};
use crate::config::Config;

/// A config that says what a plan says.
#[derive(Debug, Clone, PartialEq)]
pub struct Solved {
    /// The config.
    pub config: Config,
    /// The keys whose values are others than before.
    pub changed: Vec<String>,
}

/// What expressions call the names of the blocks.
const STACK: &str = "stack";

impl Card {
    /// The config, with other values of the keys that say which blocks there are, that gives this plan, whose
    /// blocks are numbered by their places; none if there is none.
    pub fn solve(&self, config: &Config, plan: &Plan) -> Option<Solved> {
        let gives = |config: &Config| {
            let made = self.plan(config, &plan.name);
            made.is_ok_and(|made| same(&made, plan))
        };
        if gives(config) {
            return Some(Solved {
                config: config.clone(),
                changed: Vec::new(),
            });
        }
        let mut resolver = Resolver::new(self, config);
        resolver.defaults();
        let name = |name: &str| Value::Text(self.block_of(name).into()).into();
        let names = plan.stack.iter().map(|p| name(&p.block)).collect();
        let scope = &mut resolver.scope;
        scope.set(STACK, &Value::List(names), "of the plan");
        let mut entries: Vec<Entry> = config.entries().to_vec();
        let mut changed = Vec::new();
        for solved in self.solved() {
            let mut value = resolver.node(&solved.value);
            if value.value == Value::Null {
                continue;
            }
            value.at = Mark::default();
            match entries.iter_mut().find(|e| e.key == solved.key) {
                Some(entry) if entry.value.value == value.value => continue,
                Some(entry) => entry.value = value,
                None => entries.push(Entry {
                    key: solved.key.clone(),
                    at: Mark::default(),
                    value,
                }),
            }
            changed.push(solved.key.clone());
        }
        if !resolver.faults.is_empty() {
            return None;
        }
        let root: Node = Value::Map(entries).into();
        let config = Config::from_node(root, config.file());
        gives(&config).then_some(Solved { config, changed })
    }
}

/// Whether two plans run the same steps at every place, whatever their blocks are called.
fn same(a: &Plan, b: &Plan) -> bool {
    let rest = |plan: &Plan| Plan {
        blocks: Vec::new(),
        stack: Vec::new(),
        ..plan.clone()
    };
    let blocks = |plan: &Plan| -> BTreeMap<String, Named> {
        let named = plan.blocks.iter().map(|b| (b.name.clone(), b.clone()));
        named.collect()
    };
    let (of_a, of_b) = (blocks(a), blocks(b));
    let mut equal: BTreeMap<(&str, &str), bool> = BTreeMap::new();
    let mut places = a.stack.iter().zip(&b.stack);
    a.stack.len() == b.stack.len()
        && places.all(|(a, b)| {
            a.weights == b.weights
                && *equal.entry((&a.block, &b.block)).or_insert_with(|| {
                    match (of_a.get(&a.block), of_b.get(&b.block)) {
                        (Some(a), Some(b)) => a.steps == b.steps,
                        _ => false,
                    }
                })
        })
        && rest(a) == rest(b)
}
