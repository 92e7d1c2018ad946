//! Lists the model cards and the bundled models, so that a new one needs no line of Rust. The configs
//! of `model-cards/configs` are examples, and no part of the binary.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model-cards");
    println!("cargo::rerun-if-changed={}", folder.display());
    let out = env::var_os("OUT_DIR").expect("cargo sets it");
    let out = Path::new(&out);
    let (mut cards, mut models) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(&folder)? {
        let path = fs::canonicalize(entry?.path())?;
        if path.extension().is_some_and(|e| e == "yaml") {
            cards.push(path);
        } else if path.join("config.json").is_file() {
            models.push(path);
        }
    }
    cards.sort();
    models.sort();
    let mut list = String::from("[\n");
    for path in &cards {
        println!("cargo::rerun-if-changed={}", path.display());
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        list.push_str(&format!("    ({name:?}, include_str!({path:?})),\n"));
    }
    list.push(']');
    fs::write(out.join("cards.rs"), list)?;
    fs::write(out.join("bundled.rs"), bundled(&models)?)
}

/// A model is a folder with a config.json; what runs is taken along, what tells of it is not.
fn bundled(models: &[PathBuf]) -> io::Result<String> {
    let mut list = String::from("[\n");
    for model in models {
        let mut files = Vec::new();
        for entry in fs::read_dir(model)? {
            let path = entry?.path();
            let runs = path
                .extension()
                .is_some_and(|e| ["json", "safetensors", "jinja"].iter().any(|r| e == *r));
            if runs {
                files.push(path);
            }
        }
        files.sort();
        let name = model.file_name().unwrap_or_default().to_string_lossy();
        list.push_str(&format!("    ({name:?}, &[\n"));
        for path in &files {
            println!("cargo::rerun-if-changed={}", path.display());
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            list.push_str(&format!(
                "        ({name:?}, include_bytes!({path:?}) as &[u8]),\n"
            ));
        }
        list.push_str("    ]),\n");
    }
    list.push(']');
    Ok(list)
}
