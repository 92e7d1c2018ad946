//! GGUF files of llama.cpp's own converter and quantiser: they say what the checkpoints say that they
//! were made from, and what llama.cpp says of them. `make_gguf_golden.py` made them.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::Value;
use strata::load::{LoadOptions, Model, Silent, load};
use strata::sampler::SamplingParams;
use strata::session::{Engine, EngineConfig, Output, Request};
use strata::text::Tokenizer;
use strata_converters::ModelFiles;
use strata_kernels::{DType, Format};
use strata_tests::models::{logits, on_cpu};

/// Largest error, in standard deviations of the logits.
const TOLERANCE: f32 = 1e-3;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

fn open(path: &Path, device: &str) -> Result<Model, String> {
    let options = LoadOptions {
        device: device.into(),
        dtype: Some(DType::F32),
        ..on_cpu(path)
    };
    load(&options, &mut Silent::default()).map_err(|e| format!("{}: {e}", path.display()))
}

fn greedy(model: &Model, prompt: &[u32], count: usize) -> Vec<u32> {
    let config = EngineConfig::new(256, 1, DType::F32);
    let mut engine = Engine::new(model.network.clone(), config).unwrap();
    engine
        .submit(Request {
            prompt: prompt.to_vec(),
            max_tokens: count,
            sampling: SamplingParams::greedy(),
            ..Request::default()
        })
        .unwrap();
    let mut tokens = Vec::new();
    while engine.step(&mut |_, _, _| {}).unwrap() {
        for output in engine.outputs() {
            if let Output::Token { sampled, .. } = output {
                tokens.push(sampled.token);
            }
        }
    }
    tokens
}

/// The largest difference, in standard deviations of what is expected.
fn error(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let mean = expected.iter().sum::<f32>() / expected.len() as f32;
    let variance = expected.iter().map(|v| (v - mean).powi(2)).sum::<f32>();
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    let worst = worst.fold(
        0.0,
        |a: f32, b| if b.is_nan() { f32::INFINITY } else { a.max(b) },
    );
    worst / (variance / expected.len() as f32).sqrt()
}

/// The checkpoint that a file was made from, with the keys of its config.json that were changed.
fn source(told: &Value) -> (PathBuf, Option<PathBuf>) {
    let folder = root().join(told["golden"].as_str().unwrap());
    let changed = told["changed"].as_object().unwrap();
    if changed.is_empty() {
        return (folder, None);
    }
    let name = told["golden"].as_str().unwrap().replace('/', "-");
    let copy = std::env::temp_dir().join(format!("strata-gguf-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&copy).unwrap();
    for entry in std::fs::read_dir(&folder).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    // Bare in what Python writes; the reader takes it as a text as well.
    let config = config.replace("{\"__float__\": \"Infinity\"}", "Infinity");
    let config = config
        .replace("\"Infinity\"", "Infinity")
        .replace("Infinity", "\"Infinity\"");
    let mut config: Value = serde_json::from_str(&config).unwrap();
    for (key, value) in changed {
        config[key] = value.clone();
    }
    std::fs::write(copy.join("config.json"), config.to_string()).unwrap();
    (copy.clone(), Some(copy))
}

fn token_ids(folder: &Path) -> Vec<u32> {
    let Ok(bytes) = std::fs::read(folder.join("golden.safetensors")) else {
        return (3..60).collect();
    };
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = file.tensor("token_ids").unwrap();
    let ids = tensor.data().as_chunks().0.iter();
    let ids = ids.map(|b| i64::from_le_bytes(*b) as u32);
    ids.take(tensor.shape()[1]).collect()
}

#[test]
fn converted_checkpoints_say_what_the_checkpoints_say() {
    let mut faults = Vec::new();
    let mut cases = 0;
    for entry in std::fs::read_dir(root().join("gguf")).unwrap() {
        let told = entry.unwrap().path();
        if told.extension().is_none_or(|e| e != "json") {
            continue;
        }
        cases += 1;
        let gguf = told.with_extension("gguf");
        let name = gguf.display().to_string();
        let told: Value = serde_json::from_str(&std::fs::read_to_string(&told).unwrap()).unwrap();
        let (folder, temporary) = source(&told);
        let tokens = token_ids(&folder);
        let models = open(&folder, "cpu").and_then(|a| Ok((a, open(&gguf, "cpu")?)));
        if let Some(temporary) = temporary {
            std::fs::remove_dir_all(temporary).ok();
        }
        let (of_folder, of_gguf) = match models {
            Ok(models) => models,
            Err(why) => {
                faults.push(why);
                continue;
            }
        };
        let expected = logits(&of_folder, &tokens);
        let found = logits(&of_gguf, &tokens);
        let worst = error(&found, &expected);
        let greedy = [&of_folder, &of_gguf].map(|m| greedy(m, &tokens[..8], 16));
        let same = greedy[0] == greedy[1];
        println!("{name}: within {worst:.1e} standard deviations of its checkpoint");
        let tolerance = told["tolerance"].as_f64().map_or(TOLERANCE, |t| t as f32);
        if worst >= tolerance || !same {
            faults.push(format!(
                "{name}: {worst:.2e} standard deviations, greedy tokens equal: {same}"
            ));
        }
        if let Some(theirs) = told["logits"].as_array() {
            let theirs: Vec<f32> = theirs.iter().map(|v| v.as_f64().unwrap() as f32).collect();
            let tokens: Vec<u32> = serde_json::from_value(told["tokens"].clone()).unwrap();
            let found = logits(&of_gguf, &tokens);
            let last = &found[found.len() - theirs.len()..];
            let worst = error(last, &theirs);
            println!("{name}: within {worst:.1e} standard deviations of llama.cpp");
            // It rounds keys and values to F16, and the inputs of BF16 products to BF16.
            if worst >= 0.05 {
                faults.push(format!(
                    "{name}: {worst:.2e} standard deviations from llama.cpp"
                ));
            }
        }
    }
    assert!(cases >= 10, "only {cases} cases");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn every_format_in_blocks_is_what_the_quantiser_meant() {
    let folder = root().join("gguf");
    let bytes = std::fs::read(folder.join("mixed.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = file.tensor("token_ids").unwrap();
    let length = ids.shape()[1];
    let ids: Vec<u32> = ids
        .data()
        .as_chunks()
        .0
        .iter()
        .map(|b| i64::from_le_bytes(*b) as u32)
        .collect();
    let expected = file.tensor("logits").unwrap();
    let expected: Vec<f32> = expected
        .data()
        .as_chunks()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect();
    let path = folder.join("mixed.gguf");
    let model = open(&path, "cpu").unwrap();
    let files = strata_converters::ModelFiles::gguf_file(&path).unwrap();
    let checkpoint = strata_converters::Checkpoint::open(&files).unwrap();
    for format in Format::ALL {
        let name = format.name().to_uppercase();
        let found = checkpoint.tensors().any(|(_, t)| t.dtype == name);
        let plain = format.dtype().is_some() && format != Format::F32;
        assert!(
            found || plain || format.scales_rows(),
            "the file has no {name}"
        );
    }
    for (tokens, expected) in ids.chunks(length).zip(expected.chunks(expected.len() / 2)) {
        let worst = error(&logits(&model, tokens), expected);
        println!("mixed: within {worst:.1e} standard deviations");
        assert!(worst < TOLERANCE, "{worst}");
    }
}

/// The tokenizer of a GGUF file, through the text files that it stands for.
fn tokenizer(path: &Path) -> Tokenizer {
    let files = ModelFiles::gguf_file(path).unwrap();
    let name = path.file_stem().unwrap().to_string_lossy();
    let folder = std::env::temp_dir().join(format!("strata-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let text = files.text(name).unwrap().expect("a tokenizer");
        std::fs::write(folder.join(name), text).unwrap();
    }
    let tokenizer = Tokenizer::open(folder.as_path(), None).unwrap();
    std::fs::remove_dir_all(folder).ok();
    tokenizer
}

#[test]
fn tokenizers_are_those_that_they_were_made_from() {
    for name in ["byte_level", "sentencepiece"] {
        let found = tokenizer(&root().join(format!("gguf/text-{name}.gguf")));
        let cases = root().join("text").join(name).join("cases.json");
        let cases: Value = serde_json::from_str(&std::fs::read_to_string(cases).unwrap()).unwrap();
        let ids = |v: &Value| -> Vec<u32> { serde_json::from_value(v.clone()).unwrap() };
        for case in cases["encoded"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            // Tokens that only the tokenizer_config.json adds are not in the file.
            let known = |v: &Value| ids(v).iter().all(|id| (*id as usize) < found.vocab_size());
            if !known(&case["plain"]) {
                continue;
            }
            let plain = found.encode(text, false).unwrap();
            assert_eq!(plain, ids(&case["plain"]), "{name}: {text:?}");
            let framed = found.encode(text, true).unwrap();
            assert_eq!(framed, ids(&case["framed"]), "{name}: {text:?}");
        }
        for case in cases["decoded"].as_array().unwrap() {
            let ids = ids(&case["ids"]);
            if ids.iter().any(|id| *id as usize >= found.vocab_size()) {
                continue;
            }
            let text = found.decode(&ids, true).unwrap();
            assert_eq!(text, case["bare"].as_str().unwrap(), "{name}: {ids:?}");
        }
    }
    let demo = open(Path::new("demo"), "cpu").unwrap().tokenizer.unwrap();
    let found = tokenizer(&root().join("gguf/text-demo.gguf"));
    for text in ["", "Q: 2 + 3?\nA:", "  žluť 👋 <eos> x", "it's\t12:30"] {
        let ids = demo.encode(text, true).unwrap();
        assert_eq!(found.encode(text, true).unwrap(), ids, "{text:?}");
        assert_eq!(
            found.decode(&ids, true).unwrap(),
            demo.decode(&ids, true).unwrap()
        );
    }
    assert_eq!(found.eos_id(), demo.eos_id());
    assert_eq!(
        found.chat_template(None, false),
        demo.chat_template(None, false)
    );
}
