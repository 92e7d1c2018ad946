//! Every golden checkpoint opens through its card, and every tensor has its place.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use strata_converters::published::assemble;
use strata_converters::transforms::non_finite;
use strata_converters::{Checkpoint, Config, Mapping, ModelFiles, Origin, cards};
use strata_layers::Graph;

fn goldens() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let folders = |path: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(path).unwrap().map(|e| e.unwrap().path());
        entries.filter(|p| p.is_dir()).collect()
    };
    // Those of tokenizers hold no model.
    let mut found: Vec<PathBuf> = folders(&root).iter().flat_map(|f| folders(f)).collect();
    found.retain(|f| f.join("config.json").is_file());
    found
}

fn open(files: &ModelFiles) -> (Graph, Mapping) {
    let config = Config::open(files).unwrap();
    let card = cards::find(&config).unwrap();
    let checkpoint = Arc::new(Checkpoint::open(files).unwrap());
    let plan = card
        .plan(&config, "golden")
        .unwrap_or_else(|f| panic!("{f}"));
    let graph = Graph::lower(&plan, card.file()).unwrap();
    let card = card.bound(&config).unwrap();
    let mapping = Mapping::resolve(Some(&card), &graph.weights(), checkpoint, Origin::Card);
    let mapping = mapping.unwrap_or_else(|f| panic!("{}: {f}", files.name()));
    (graph, mapping)
}

#[test]
fn every_tensor_has_its_place() {
    let goldens = goldens();
    assert!(goldens.len() >= 29);
    for folder in goldens {
        let (graph, mapping) = open(&ModelFiles::open(&folder).unwrap());
        let wanted = graph.weights();
        assert_eq!(mapping.rows().len(), wanted.len());
        for want in &wanted {
            let tensor = mapping.load(&want.path).unwrap();
            assert_eq!(tensor.shape(), want.spec.shape, "{}", want.path);
            assert_eq!(non_finite(&tensor), 0, "{}", want.path);
        }
        for row in mapping.rows() {
            let tensor = mapping.load(&row.path).unwrap();
            assert_eq!(
                (tensor.format(), tensor.bytes().len()),
                (row.format, row.bytes)
            );
        }
        let used: BTreeSet<&str> = mapping.rows().iter().map(|r| r.source.tensor()).collect();
        let config = Config::open(&ModelFiles::open(&folder).unwrap()).unwrap();
        let ignored = |name: &str| cards::find(&config).unwrap().tensors().ignores(name);
        let all = mapping.checkpoint().tensors().map(|(n, _)| n);
        // A tied matrix may be stored twice, which is told.
        const TWICE: &str = " equals the embedding, and is not used";
        let copies = mapping.notes().iter();
        let copies: Vec<&str> = copies.filter_map(|n| n.strip_suffix(TWICE)).collect();
        let unused = |name: &str| ignored(name) || copies.contains(&name);
        let all: BTreeSet<&str> = all.filter(|n| !unused(n)).collect();
        assert_eq!(used, all, "{}", folder.display());
        assert_eq!(mapping.notes().len(), copies.len());
    }
}

#[test]
fn weights_lead_back_to_the_tensors_that_they_were_made_from() {
    for folder in goldens() {
        let files = ModelFiles::open(&folder).unwrap();
        let (_, mapping) = open(&files);
        let checkpoint = mapping.checkpoint();
        let weights: Vec<_> = mapping
            .rows()
            .iter()
            .map(|row| (row.source.clone(), row.shape.clone()))
            .collect();
        let known = |name: &str| checkpoint.get(name).map(|i| i.shape.clone());
        for (name, made) in assemble(&weights, known) {
            let place = format!("{}, {name}", folder.display());
            let made = made.unwrap_or_else(|why| panic!("{place}: {why}"));
            let original = checkpoint.tensor(&name).unwrap();
            assert_eq!(made.shape, original.shape(), "{place}");
            let mut values = Vec::new();
            for run in &made.runs {
                let weight = mapping.load(&mapping.rows()[run.weight].path).unwrap();
                values.extend_from_slice(&weight.to_f32()[run.elements.clone()]);
            }
            for value in &mut values {
                *value = made.undo.iter().rev().fold(*value, |v, step| step.apply(v));
            }
            for (found, expected) in values.iter().zip(original.to_f32()) {
                // Where nothing is computed there is nothing to round.
                let room = if made.undo.is_empty() {
                    0.0
                } else {
                    2e-6 * expected.abs().max(1.0)
                };
                assert!(
                    (found - expected).abs() <= room,
                    "{place}: {found}, not {expected}"
                );
            }
            assert_eq!(values.len(), original.len(), "{place}");
        }
    }
}

#[test]
fn a_model_inside_the_binary_opens_as_one_on_disk() {
    static FILES: [(&str, &[u8]); 2] = [
        (
            "config.json",
            include_bytes!("../../../tests/golden/mamba/tied/config.json"),
        ),
        (
            "model.safetensors",
            include_bytes!("../../../tests/golden/mamba/tied/model.safetensors"),
        ),
    ];
    let (graph, mapping) = open(&ModelFiles::bundled("tied", &FILES));
    let (_, on_disk) = open(&crate::common::golden("mamba/tied"));
    for want in graph.weights() {
        let (a, b) = (mapping.load(&want.path), on_disk.load(&want.path));
        assert_eq!(a.unwrap().bytes(), b.unwrap().bytes(), "{}", want.path);
    }
}
