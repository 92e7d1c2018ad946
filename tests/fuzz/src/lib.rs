//! The fuzzers' side of `checks`.

pub mod checks;
#[cfg(feature = "engine")]
pub mod state;
