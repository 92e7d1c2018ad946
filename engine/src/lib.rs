//! See ARCHITECTURE.md.

pub mod ids;
pub mod pages;
pub mod slots;
