//! What can be wrong with a model's files.

use std::io;

use strata_layers::Faults;

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a model cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("{file}: {source}")]
    Read {
        /// The file.
        file: String,
        /// Its reason.
        source: io::Error,
    },
    /// The operating system refused to write.
    #[error("{file} cannot be written: {source}")]
    Write {
        /// The file.
        file: String,
        /// Its reason.
        source: io::Error,
    },
    /// Somebody asked to stop. What is written stays, and the same command goes on from there.
    #[error("stopped; the same command goes on from here")]
    Stopped,
    /// A file is not what it should be.
    #[error("{file}: {why}")]
    File {
        /// The file.
        file: String,
        /// What was found and what was expected.
        why: String,
    },
    /// All that is wrong with a config, a card, a checkpoint, or how they fit together.
    #[error(transparent)]
    Faults(#[from] Faults),
    /// A tensor that cannot be viewed as asked.
    #[error(transparent)]
    Tensor(#[from] strata_kernels::Error),
}

impl Error {
    /// A file is not what it should be.
    pub(crate) fn file(file: impl Into<String>, why: impl Into<String>) -> Self {
        Error::File {
            file: file.into(),
            why: why.into(),
        }
    }
}
