//! See ARCHITECTURE.md.

pub mod batch;
pub mod ids;
pub mod pages;
mod pools;
pub mod scheduler;
pub mod sequence;
pub mod slots;
