#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use strata_fuzz::checks;

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| checks::folder("pickle"));

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| checks::pickle(bytes, &FOLDER));
