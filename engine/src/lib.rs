//! See ARCHITECTURE.md.

pub mod generation_config;
pub mod hub;
pub mod sampler;
pub mod text;

#[cfg(test)]
pub(crate) mod testing;
