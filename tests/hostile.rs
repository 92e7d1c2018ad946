//! What the fuzzers found, and what was thought of by hand: every file of `hostile/` is read again.
//!
//! `fuzz/README.md` tells how the fuzzers are run; what is checked is theirs, `fuzz/src/checks.rs`.

use std::path::Path;
use std::time::{Duration, Instant};

#[path = "fuzz/src/checks.rs"]
mod checks;
#[path = "fuzz/src/state.rs"]
mod state;

/// A hostile file may take this long to be refused. Most take milliseconds; a config of ten thousand
/// blocks is a plan in half a second, and there is one for every card.
const LIMIT: Duration = Duration::from_secs(60);

/// Gives `check` every file of `hostile/<parser>`, and each again with its end cut off.
fn replay(parser: &str, mut check: impl FnMut(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("hostile")
        .join(parser);
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} holds no file", folder.display());
    for file in files {
        let bytes = std::fs::read(&file).unwrap();
        // Shown when a check panics.
        println!("{}", file.display());
        let start = Instant::now();
        check(&bytes);
        check(&bytes[..bytes.len() / 2]);
        let took = start.elapsed();
        assert!(took < LIMIT, "{} takes {took:?}", file.display());
    }
}

fn in_a_folder(parser: &str, check: fn(&[u8], &Path)) {
    let folder = checks::folder(parser);
    replay(parser, |bytes| check(bytes, &folder));
    std::fs::remove_dir_all(folder).ok();
}

#[test]
fn hostile_pickles_are_refused_or_open() {
    in_a_folder("pickle", checks::pickle);
}

#[test]
fn hostile_pytorch_files_are_refused_or_open() {
    in_a_folder("pytorch", checks::pytorch);
}

#[test]
fn hostile_plans_are_refused_or_run() {
    replay("plan", checks::plan);
}

#[test]
fn hostile_cards_are_refused_or_make_plans() {
    replay("card", checks::card);
}

#[test]
fn hostile_configs_are_refused_or_make_plans() {
    replay("config", checks::config);
}

#[test]
fn hostile_safetensors_are_refused_or_open() {
    in_a_folder("safetensors", checks::safetensors);
}

#[test]
fn hostile_gguf_files_are_refused_or_open() {
    in_a_folder("gguf", checks::gguf);
}

#[test]
fn hostile_indices_are_refused_or_open() {
    in_a_folder("index", checks::index);
}

#[test]
fn hostile_state_files_are_refused_or_serve() {
    let mut states = state::States::new();
    replay("state", |bytes| states.check(bytes));
}

/// A file that was whole, with one byte of its first two thousand changed, one more time for each.
#[test]
fn a_state_file_with_any_byte_changed_breaks_nothing() {
    let mut states = state::States::new();
    let mut bytes = states.own.clone();
    states.check(&bytes);
    for i in 0..bytes.len().min(2000) {
        for change in [0x01, 0x80, b'"' ^ b'9'] {
            bytes[i] ^= change;
            states.check(&bytes);
            bytes[i] ^= change;
        }
    }
    for end in (0..bytes.len()).step_by(7) {
        states.check(&bytes[..end]);
    }
}
