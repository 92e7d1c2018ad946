//! Every card on its own small config: what it lowers to, which weights it asks for, how much memory
//! lies between its nodes; and that a plan survives being printed.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use strata::random_weights::RandomWeights;
use strata::runner::{Network, Runner};
use strata::state_store::{StateSize, StateStore};
use strata_converters::{Card, Config, ModelFiles, cards};
use strata_kernels::DType;
use strata_kernels::reference::Reference;
use strata_layers::{Graph, Plan};

fn tests() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn tiny(card: &Card) -> (Plan, Graph) {
    let plan = card.plan(card.tiny(), card.family());
    let plan = plan.unwrap_or_else(|faults| panic!("{}'s `tiny`: {faults}", card.family()));
    let graph = Graph::lower(&plan, card.file()).unwrap_or_else(|faults| panic!("{faults}"));
    (plan, graph)
}

/// The lines that differ, by number.
fn difference(found: &str, expected: &str) -> String {
    let (found, expected): (Vec<_>, Vec<_>) = (found.lines().collect(), expected.lines().collect());
    let mut out = String::new();
    for i in 0..found.len().max(expected.len()) {
        let (new, old) = (found.get(i), expected.get(i));
        if new != old {
            let _ = writeln!(out, "line {}:", i + 1);
            old.iter().for_each(|l| _ = writeln!(out, "  - {l}"));
            new.iter().for_each(|l| _ = writeln!(out, "  + {l}"));
        }
    }
    out
}

#[test]
fn every_card_lowers_to_the_graph_that_was_reviewed() {
    let mut faults = Vec::new();
    for card in cards::all() {
        let (_, graph) = tiny(card);
        let found = graph.print();
        let kept = tests().join(format!("snapshots/{}.graph", card.family()));
        let expected = std::fs::read_to_string(&kept).unwrap_or_default();
        if found == expected {
            continue;
        }
        let new = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}.graph", card.family()));
        std::fs::write(&new, &found).unwrap();
        faults.push(format!(
            "{} lowers to another graph:\n{}If that is meant: cp {} {}",
            card.family(),
            difference(&found, &expected),
            new.display(),
            kept.display()
        ));
    }
    assert!(faults.is_empty(), "{}", faults.join("\n\n"));
}

#[test]
fn every_snapshot_belongs_to_a_card() {
    for entry in std::fs::read_dir(tests().join("snapshots")).unwrap() {
        let path = entry.unwrap().path();
        let family = path.file_stem().unwrap().to_str().unwrap();
        assert!(
            cards::named(family).is_some(),
            "{}: there is no card for {family}; delete it",
            path.display()
        );
    }
}

#[test]
fn every_weight_has_a_line_in_its_card() {
    for card in cards::all() {
        let (_, graph) = tiny(card);
        let card = card.bound(card.tiny()).unwrap();
        for weight in graph.weights() {
            let found = card.tensors().find(&weight.path);
            assert!(
                !found.sources.is_empty(),
                "{}: no line of `tensors` names {}",
                card.file(),
                weight.path
            );
            for source in found.sources {
                let back = card
                    .tensors()
                    .weight_of(source.tensor())
                    .map(|(path, _)| path);
                assert!(
                    back.is_some(),
                    "{}: {} is said to be {source}, which leads back to nothing",
                    card.file(),
                    weight.path
                );
            }
        }
    }
}

/// The folders of all goldens and of the bundled models.
fn configs() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for family in std::fs::read_dir(tests().join("golden")).unwrap() {
        let Ok(variants) = std::fs::read_dir(family.unwrap().path()) else {
            continue;
        };
        found.extend(variants.map(|v| v.unwrap().path()));
    }
    let cards = tests().join("../model-cards");
    found.extend(std::fs::read_dir(cards).unwrap().map(|m| m.unwrap().path()));
    found.retain(|f| f.join("config.json").is_file());
    found.sort();
    assert!(found.len() >= 10, "{found:?}");
    found
}

#[test]
fn a_printed_plan_reads_back_as_itself() {
    let mut plans: Vec<(String, Plan)> = cards::all()
        .iter()
        .map(|card| (card.family().to_string(), tiny(card).0))
        .collect();
    for folder in configs() {
        let config = Config::open(&ModelFiles::open(&folder).unwrap()).unwrap();
        let plan = cards::find(&config)
            .unwrap()
            .plan(&config, "golden")
            .unwrap();
        plans.push((folder.display().to_string(), plan));
    }
    for (name, plan) in plans {
        let printed = plan.print();
        let again =
            Plan::parse(&printed, "printed").unwrap_or_else(|f| panic!("{name}: {f}\n{printed}"));
        assert_eq!(again, plan, "{name}");
        assert_eq!(again.print(), printed, "{name}");
        let graphs = [&plan, &again].map(|p| Graph::lower(p, "printed").unwrap().print());
        assert_eq!(graphs[0], graphs[1], "{name}");
    }
}

/// Buffers between the nodes of a graph.
fn buffers(graph: Graph) -> usize {
    let backend = Arc::new(Reference);
    let weights = RandomWeights::new(1, 0.02, DType::F32, backend.clone());
    let network = Network::build(graph, &weights, backend.clone(), DType::F32).unwrap();
    let size = StateSize {
        page_size: 4,
        pages: 1,
        slots: 1,
        kv_dtype: DType::F32.into(),
    };
    let store = StateStore::new(&network, size).unwrap();
    Runner::new(Arc::new(network), store, 1).unwrap().buffers()
}

#[test]
fn depth_takes_no_further_buffers() {
    for card in cards::all() {
        let (mut plan, graph) = tiny(card);
        let shallow = buffers(graph);
        // Sixteen times the stack, over the same weights.
        plan.stack = plan
            .stack
            .iter()
            .cycle()
            .take(16 * plan.stack.len())
            .cloned()
            .collect();
        let deep = buffers(Graph::lower(&plan, "deep").unwrap());
        assert_eq!(deep, shallow, "{}", card.family());
        // A mixer of a layer or two takes four; one that is put together names its parts.
        assert!(deep <= 12, "{}: {deep} buffers", card.family());
    }
}
