//! An engine holds what was estimated: weights, keys and values, state and buffers, each within one part
//! in a hundred.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use strata::estimate::{Work, estimate, multiplied, work};
use strata::footprint::Footprint;
use strata::load::{LoadOptions, Model, Silent, load};
use strata::session::{Engine, EngineConfig, Request};
use strata_converters::cards;
use strata_kernels::{DType, Format, KvType};
use strata_layers::Graph;

const TYPES: [(DType, KvType); 3] = [
    (DType::F32, KvType::F32),
    (DType::BF16, KvType::BF16),
    (DType::BF16, KvType::Int8),
];

fn open(model: &Path, (dtype, kv): (DType, KvType), random: Option<u64>) -> Model {
    let options = LoadOptions {
        model: Some(model.display().to_string()),
        device: "cpu".into(),
        dtype: Some(dtype),
        kv: Some(kv),
        random,
        threads: Some(2),
        ..LoadOptions::default()
    };
    load(&options, &mut Silent::default()).unwrap_or_else(|e| panic!("{}: {e}", model.display()))
}

/// Runs prompts of different lengths, `batch` at a time; says where the estimate is off.
fn off(model: &Model, batch: usize) -> Option<String> {
    const CONTEXT: usize = 200;
    let config =
        EngineConfig::new(CONTEXT, batch, model.kv_dtype).with_row_bytes(model.footprint.per_row());
    let mut engine = Engine::new(model.network.clone(), config.clone()).unwrap();
    let vocab = model.plan.vocab;
    for length in [1, 130, 37, 64] {
        let prompt = (0..length).map(|i| (i * 7 % vocab) as u32).collect();
        let request = Request {
            prompt,
            max_tokens: 3,
            ..Request::default()
        };
        engine.submit(request).unwrap();
    }
    while engine.step(&mut |_, _, _| {}).unwrap() {}
    let (allocated, rows) = engine.allocated();
    assert!(rows >= 130, "{rows} rows");
    let estimate = model.estimate(&config, rows);
    assert_eq!(allocated.kv, estimate.kv_bytes, "{}", model.name);
    allocated.beside(&estimate)
}

#[test]
fn every_card_runs_in_the_memory_that_was_estimated() {
    let mut wrong = Vec::new();
    for card in cards::all() {
        let plan = card.plan(card.tiny(), card.family()).unwrap();
        if plan.image.is_some() {
            // No engine runs these.
            continue;
        }
        let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}.yaml", card.family()));
        std::fs::write(&file, plan.print()).unwrap();
        for types @ (dtype, kv) in TYPES {
            let model = open(&file, types, Some(1));
            // Images are read one at a time, by no engine.
            let batches: &[usize] = if plan.image.is_some() { &[] } else { &[1, 3] };
            for &batch in batches {
                let found = off(&model, batch);
                let name = card.family();
                wrong.extend(found.map(|o| format!("{name}, {types:?}, {batch} at a time: {o}")));
            }
            // As `strata plan estimate` has it, before there is a model.
            let config = EngineConfig::new(200, 1, kv);
            let format = Format::from(dtype);
            let before = estimate(
                &model.network.graph,
                &config,
                &format.into(),
                &model.footprint,
                1,
            );
            assert_eq!(
                before.weight_bytes,
                model.weights_bytes,
                "{}",
                card.family()
            );
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What a trace adds up is what estimates say: of every card, for the first token and for a later one.
#[test]
fn the_work_of_all_nodes_is_the_work_of_the_plan() {
    for card in cards::all() {
        let plan = card.plan(card.tiny(), card.family()).unwrap();
        let graph = Graph::lower(&plan, "plan").unwrap();
        let footprint = Footprint::of(Graph::lower(&plan, "plan").unwrap()).unwrap();
        let config = EngineConfig::new(90, 1, DType::BF16);
        let told = estimate(&graph, &config, &Format::BF16.into(), &footprint, 1);
        let shapes: BTreeMap<String, u64> = graph
            .weights()
            .iter()
            .map(|w| (w.path.clone(), 2 * w.spec.elements() as u64))
            .collect();
        let bytes = |path: &str| shapes[path];
        let head = Work::product(1, graph.vocab * graph.d_model, 0);
        for (position, flops) in [(0, told.flops_per_token), (89, told.flops_at_context)] {
            let nodes = graph.nodes.iter();
            let all = nodes
                .map(|node| work(&graph, node, &[(position, 1)], &bytes, KvType::BF16))
                .fold(head, Work::and);
            let error = (all.flops / flops - 1.0).abs();
            assert!(error < 1e-9, "{}: {} and {flops}", card.family(), all.flops);
            if position == 89 {
                let read = all.bytes + (2 * graph.vocab * graph.d_model) as f64;
                let head = graph.vocab * graph.d_model;
                let matrices = 2.0 * (multiplied(&graph) + head as f64);
                let kept = 90 * told.kv_bytes_per_token + 2 * told.state_bytes_per_sequence;
                let expected = matrices + kept as f64;
                // Layers that read another's keys and values read them once more.
                let shared = graph.nodes.iter().any(|n| n.pages_of.is_some());
                let error = (read / expected - 1.0).abs();
                let family = card.family();
                assert!(shared || error < 1e-9, "{family}: {read} and {expected}");
            }
        }
    }
}

/// The folders of all goldens.
fn goldens() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let mut found = Vec::new();
    for card in cards::all() {
        let variants = std::fs::read_dir(root.join(card.family())).unwrap();
        found.extend(variants.map(|v| v.unwrap().path()));
    }
    found.retain(|v| v.join("golden.safetensors").is_file());
    found.sort();
    found
}

#[test]
fn a_scan_by_chunks_runs_in_the_memory_that_was_estimated() {
    let card = cards::all()
        .iter()
        .find(|c| c.family() == "mamba2")
        .unwrap();
    let plan = card.plan(card.tiny(), card.family()).unwrap().print();
    let edited = plan.replace("mamba2: {", "mamba2: {chunk_size: 48, ");
    let [recurrence, chunks] = [("recurrence", plan), ("chunks", edited)].map(|(name, plan)| {
        let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("scan-{name}.yaml"));
        std::fs::write(&file, plan).unwrap();
        let model = open(&file, TYPES[0], Some(1));
        for batch in [1, 3] {
            assert_eq!(off(&model, batch), None, "{name}, {batch} at a time");
        }
        model.network.graph.slot_bytes()
    });
    assert!(chunks > recurrence, "{chunks} and {recurrence} bytes");
}

#[test]
fn every_golden_runs_in_the_memory_that_was_estimated() {
    let mut wrong = Vec::new();
    for folder in goldens() {
        for types in TYPES {
            let model = open(&folder, types, None);
            for batch in [1, 3] {
                let found = off(&model, batch);
                let name = folder.display();
                wrong.extend(found.map(|o| format!("{name}, {types:?}, {batch} at a time: {o}")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
