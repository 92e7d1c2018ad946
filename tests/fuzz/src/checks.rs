//! What is done to each input: the same for the fuzzers and for the test that replays their finds.
//!
//! A parser may refuse an input in any words it likes. It may not panic, and what it takes it must be
//! able to print, read back and lower.

use std::path::Path;

use strata_converters::{Card, Checkpoint, Config, ModelFiles, cards};
use strata_layers::{Graph, Plan};

/// A plan: what is read prints as a fixed point, and lowers or says why not.
pub fn plan(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    match Plan::parse(text, "plan.yaml") {
        Ok(plan) => lowered(&plan),
        Err(faults) => assert!(!faults.to_string().is_empty()),
    }
}

fn lowered(plan: &Plan) {
    let printed = plan.print();
    let again = Plan::parse(&printed, "printed.yaml")
        .unwrap_or_else(|faults| panic!("a printed plan is faulty: {faults}\n{printed}"));
    assert!(*plan == again, "a printed plan is another\n{printed}");
    assert_eq!(again.print(), printed);
    match Graph::lower(plan, "plan.yaml") {
        Ok(graph) => {
            graph.print();
            graph.slot_bytes();
            graph.page_elements_per_token();
            let sizes = graph.weights().into_iter();
            sizes.for_each(|w| assert!(w.spec.elements() < 1 << 62, "{w:?}"));
        }
        Err(faults) => assert!(!faults.to_string().is_empty()),
    }
}

/// A card: its own small config gives a plan, or faults.
pub fn card(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let Ok(card) = Card::parse(text, "card.yaml") else {
        return;
    };
    if let Ok(plan) = card.plan(card.tiny(), "tiny") {
        lowered(&plan);
        let graph = Graph::lower(&plan, "card.yaml").expect("a card's plan can be lowered");
        let Ok(card) = card.bound(card.tiny()) else {
            return;
        };
        for weight in graph.weights().iter().take(64) {
            let found = card.tensors().find(&weight.path);
            for source in found.sources {
                card.tensors().weight_of(source.tensor());
                card.tensors().block_of(source.tensor());
            }
        }
    }
}

/// A config.json: by every card it gives a plan, or faults.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let Ok(config) = Config::parse(text, "config.json") else {
        return;
    };
    cards::find(&config).ok();
    for card in cards::all() {
        if let Ok(plan) = card.plan(&config, "fuzzed") {
            lowered(&plan);
        }
    }
}

/// A safetensors file in a folder of its own: what opens has its tensors within the file.
pub fn safetensors(bytes: &[u8], folder: &Path) {
    std::fs::write(folder.join("model.safetensors"), bytes).expect("a folder to write to");
    let files = ModelFiles::open(folder).expect("a folder");
    let Ok(checkpoint) = Checkpoint::open(&files) else {
        return;
    };
    for (name, info) in checkpoint.tensors() {
        assert!(info.range.end <= bytes.len(), "{name}: {info:?}");
        if let Ok(tensor) = checkpoint.tensor(name) {
            assert_eq!(tensor.shape(), info.shape, "{name}");
        }
    }
}

/// A GGUF file in a folder of its own: what opens has its tensors within the file, and its metadata is a
/// config and a tokenizer, or says why not.
pub fn gguf(bytes: &[u8], folder: &Path) {
    std::fs::write(folder.join("x.gguf"), bytes).expect("a folder to write to");
    let Ok(files) = ModelFiles::open(folder) else {
        return;
    };
    let Some(gguf) = files.gguf() else {
        return;
    };
    gguf.tokenizer_fault();
    if let Ok(Some(text)) = files.text("tokenizer.json") {
        assert!(serde_json::from_str::<serde_json::Value>(&text).is_ok());
    }
    let checkpoint = Checkpoint::open(&files).expect("the header was read");
    for (name, info) in checkpoint.tensors() {
        assert!(info.range.end <= bytes.len(), "{name}: {info:?}");
        if let Ok(tensor) = checkpoint.tensor(name) {
            assert_eq!(tensor.shape(), info.shape, "{name}");
        }
    }
    if let Ok(config) = Config::open(&files)
        && let Ok(card) = cards::find(&config)
        && let Ok(plan) = card.plan(&config, "fuzzed")
    {
        lowered(&plan);
    }
}

/// A file of PyTorch's in a folder of its own: what opens has its tensors within the file.
pub fn pytorch(bytes: &[u8], folder: &Path) {
    std::fs::write(folder.join("model.pt"), bytes).expect("a folder to write to");
    let files = ModelFiles::beside(&folder.join("model.pt")).expect("a folder");
    let Ok(checkpoint) = Checkpoint::open(&files) else {
        return;
    };
    for (name, info) in checkpoint.tensors() {
        assert!(info.range.end <= bytes.len(), "{name}: {info:?}");
        let contents = checkpoint
            .contents(name)
            .expect("a tensor that was checked");
        let elements: usize = info.shape.iter().product();
        assert!(
            contents.bytes().len().is_multiple_of(elements.max(1)),
            "{name}: {info:?}"
        );
    }
}

/// A pickle, in an archive with some bytes for its storages.
pub fn pickle(bytes: &[u8], folder: &Path) {
    let entries: [(&str, &[u8]); 3] = [
        ("m/data.pkl", bytes),
        ("m/data/0", &[7; 256]),
        ("m/data/1", &[8; 64]),
    ];
    pytorch(&archive(&entries), folder);
}

/// A zip archive of stored entries.
pub fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in entries {
        let at = file.len() as u32;
        let sizes = [0, data.len() as u32, data.len() as u32];
        let sizes: Vec<u8> = sizes.iter().flat_map(|n| n.to_le_bytes()).collect();
        let length = (name.len() as u16).to_le_bytes();
        file.extend(b"PK\x03\x04\x14\0\0\0\0\0\0\0\0\0");
        file.extend([&sizes, &length[..], &[0, 0], name.as_bytes(), data].concat());
        directory.extend(b"PK\x01\x02\x14\0\x14\0\0\0\0\0\0\0\0\0");
        directory.extend(
            [
                &sizes,
                &length[..],
                &[0; 12],
                &at.to_le_bytes(),
                name.as_bytes(),
            ]
            .concat(),
        );
    }
    let count = (entries.len() as u16).to_le_bytes();
    let place = [directory.len() as u32, file.len() as u32];
    file.extend(&directory);
    file.extend([b"PK\x05\x06\0\0\0\0", &count[..], &count].concat());
    file.extend(place.iter().flat_map(|n| n.to_le_bytes()));
    file.extend([0, 0]);
    file
}

/// An index of shards in a folder of its own.
pub fn index(bytes: &[u8], folder: &Path) {
    std::fs::write(folder.join("model.safetensors.index.json"), bytes)
        .expect("a folder to write to");
    let files = ModelFiles::open(folder).expect("a folder");
    Checkpoint::open(&files).ok();
}

/// A new folder for one process, in memory where there is such a place.
pub fn folder(name: &str) -> std::path::PathBuf {
    let memory = Path::new("/dev/shm");
    let base = if memory.is_dir() {
        memory.to_path_buf()
    } else {
        std::env::temp_dir()
    };
    let folder = base.join(format!("strata-fuzz-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder to write to");
    folder
}
