#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use strata_fuzz::checks;

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| checks::folder("pytorch"));

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| checks::pytorch(bytes, &FOLDER));
