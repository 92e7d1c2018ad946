//! What can go wrong in an operation.

use crate::tensor::DType;

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A fault found before an operation starts. Nothing has been written when one is returned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Two sizes that must agree do not. This is a fault of the caller, not of a user's input.
    #[error("{op}: {what} is {found}, expected {expected}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The argument and what about it.
        what: &'static str,
        /// What was given.
        found: usize,
        /// What the other arguments ask for.
        expected: usize,
    },
    /// An argument has an element type that the operation cannot take.
    #[error("{op}: {what} has type {found}, expected {expected}")]
    Type {
        /// The operation.
        op: &'static str,
        /// The argument.
        what: &'static str,
        /// Its element type.
        found: DType,
        /// What the operation takes.
        expected: &'static str,
    },
    /// An output shares memory with an input that is still to be read.
    #[error("{op}: output {what} overlaps an input")]
    Overlap {
        /// The operation.
        op: &'static str,
        /// The output.
        what: &'static str,
    },
    /// A value that the operation cannot work with.
    #[error("{op}: {why}")]
    Value {
        /// The operation.
        op: &'static str,
        /// What was found and what was expected.
        why: String,
    },
    /// The backend lacks the operation in this form. There is never a quiet substitute.
    #[error("the {backend} backend cannot run {op}: {why}")]
    Unsupported {
        /// The operation.
        op: &'static str,
        /// The backend.
        backend: &'static str,
        /// Which form, and what would work.
        why: String,
    },
    /// A device, its driver or a library of it cannot be used, or failed.
    #[error("{backend}: {why}")]
    Device {
        /// The backend.
        backend: &'static str,
        /// What failed, what was found, and what to do.
        why: String,
    },
    /// The device refused an allocation.
    #[error("the {backend} backend could not allocate {bytes} bytes")]
    OutOfMemory {
        /// The backend.
        backend: &'static str,
        /// The size asked for.
        bytes: usize,
    },
}
