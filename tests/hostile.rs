//! What the fuzzers found, and what was thought of by hand: every file of `hostile/` is read again.
//!
//! `fuzz/README.md` tells how the fuzzers are run; what is checked is theirs, `fuzz/src/checks.rs`.

use std::path::Path;
use std::time::{Duration, Instant};

use strata::state_file::StateFile;

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

/// The header of a state file, and what follows it.
fn parted(bytes: &[u8]) -> (serde_json::Value, &[u8]) {
    let (length, rest) = bytes.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    (serde_json::from_slice(header).unwrap(), data)
}

fn joined(header: &str, data: &[u8]) -> Vec<u8> {
    let length = (header.len() as u64).to_le_bytes();
    [&length, header.as_bytes(), data].concat()
}

/// A file that was whole, with each byte of its header changed in several ways, and each run of bytes gone to zeros,
/// to ones, or out of the file.
#[test]
fn a_state_file_with_any_part_of_its_header_changed_breaks_nothing() {
    let mut states = state::States::new();
    let own = states.own.clone();
    states.check(&own);
    let header = 8 + u64::from_le_bytes(*own.first_chunk().unwrap()) as usize;
    assert!((200..4000).contains(&header), "a header of {header} bytes");
    let mut bytes = own.clone();
    for i in 0..(header + 64).min(bytes.len()) {
        for change in [0x01, 0x80, b'"' ^ b'9'] {
            bytes[i] ^= change;
            states.check(&bytes);
            bytes[i] ^= change;
        }
    }
    for length in [2, 8, 61, 256] {
        for from in (0..header).step_by(length.min(8)) {
            let range = from..(from + length).min(own.len());
            for byte in [0, b' ', b'9', 0xff] {
                bytes[range.clone()].fill(byte);
                states.check(&bytes);
            }
            bytes.copy_from_slice(&own);
            let mut shorter = own.clone();
            shorter.drain(range.clone());
            states.check(&shorter);
            let mut longer = own.clone();
            longer.splice(from..from, own[range].iter().copied());
            states.check(&longer);
        }
    }
}

/// The same, cut off: at every seventh byte, and about every place where a part begins or ends.
#[test]
fn a_state_file_that_is_cut_off_is_refused() {
    let states = state::States::new();
    let own = &states.own;
    let (header, data) = parted(own);
    let start = own.len() - data.len();
    let mut ends: Vec<usize> = (0..own.len()).step_by(7).collect();
    ends.extend([7, 8, 9, start - 1, start, start + 1]);
    for (name, entry) in header.as_object().unwrap() {
        if name != "__metadata__" {
            let at = entry["data_offsets"].as_array().unwrap().iter();
            let at = at.map(|n| start + n.as_u64().unwrap() as usize);
            ends.extend(at.flat_map(|at| [at - 1, at, at + 1]));
        }
    }
    let folder = checks::folder("cut");
    let path = folder.join("state");
    for end in ends.into_iter().filter(|end| *end < own.len()) {
        std::fs::write(&path, &own[..end]).unwrap();
        assert!(StateFile::open(&path).is_err(), "{end} of {}", own.len());
    }
    std::fs::write(&path, [own, &b"more"[..]].concat()).unwrap();
    assert!(StateFile::open(&path).is_err(), "bytes behind the end");
    std::fs::remove_dir_all(folder).unwrap();
}

/// Headers whose numbers lie: each number of it, and its own length, has many other values.
#[test]
fn a_state_file_whose_sizes_lie_breaks_nothing() {
    let mut states = state::States::new();
    let own = states.own.clone();
    let (header, data) = parted(&own);
    let text = header.to_string();
    states.check(&joined(&text, data));
    // Where the numbers of shapes and places stand, and those of texts (`snapshots`), too.
    let digits = |at: usize| text.as_bytes()[at].is_ascii_digit();
    let begins = (1..text.len()).filter(|at| digits(*at) && !digits(*at - 1));
    let lies = [
        "0",
        "1",
        "-1",
        "1.5",
        "1e3",
        "null",
        "255",
        "65536",
        "4294967295",
        "4294967296",
        "9223372036854775807",
        "9223372036854775808",
        "18446744073709551615",
        "18446744073709551616",
        "1e308",
        "[]",
        "\"8\"",
    ];
    let mut count = 0;
    for from in begins {
        let end = (from..text.len()).find(|at| !digits(*at)).unwrap();
        let said: u64 = text[from..end].parse().unwrap_or(0);
        let near = [
            said.saturating_sub(1),
            said.saturating_add(1),
            said.saturating_mul(2),
        ];
        let near: Vec<String> = near.iter().map(u64::to_string).collect();
        for lie in lies.into_iter().chain(near.iter().map(String::as_str)) {
            let changed = format!("{}{lie}{}", &text[..from], &text[end..]);
            states.check(&joined(&changed, data));
            count += 1;
        }
    }
    assert!(count > 400, "{count} lies");
    let length = (own.len() - data.len() - 8) as u64;
    let lengths = [
        0,
        1,
        length - 1,
        length + 1,
        length + 8,
        own.len() as u64,
        4 << 20,
        (4 << 20) + 1,
    ];
    for lie in lengths
        .into_iter()
        .chain((3..64).map(|bit| 1 << bit))
        .chain([u64::MAX, u64::MAX - 7])
    {
        let mut bytes = own.clone();
        bytes[..8].copy_from_slice(&lie.to_le_bytes());
        states.check(&bytes);
    }
}
