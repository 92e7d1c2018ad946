//! What can go wrong in an engine.

use crate::ids::{SeqId, TokenId};
use crate::sampler::{SampleError, SamplingFaults};
use crate::scheduler::{BadConfig, ForkRefused, Refused};
use crate::session::SnapshotId;

/// What can go wrong in an engine.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum Error {
    #[error(transparent)]
    Kernel(#[from] strata_kernels::Error),
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error(transparent)]
    Fork(#[from] ForkRefused),
    #[error(transparent)]
    Sampling(#[from] SamplingFaults),
    #[error(transparent)]
    Sample(#[from] SampleError),
    #[error(transparent)]
    Config(#[from] BadConfig),
    #[error("token id {token} at position {position} is outside the vocabulary of {vocab}")]
    TokenOutside {
        token: TokenId,
        position: usize,
        vocab: usize,
    },
    #[error("this model reads images, not text; use `strata classify`")]
    ReadsImages,
    #[error("{what} need {bytes} bytes, more than this machine can address")]
    TooLarge { what: &'static str, bytes: u128 },
    #[error("sequence {0:?} has no state: it has not run yet, or its state was given to another")]
    NoState(SeqId),
    #[error("no state is kept after {tokens} tokens")]
    NotKept { tokens: usize },
    #[error("there is no snapshot {0:?}")]
    NoSnapshot(SnapshotId),
    #[error(
        "the prompt leaves the snapshot at token {position}: it has {found}, the snapshot {expected}"
    )]
    Diverged {
        position: usize,
        found: String,
        expected: TokenId,
    },
    #[error("no slot is free for a restored sequence: {running} sequences are running")]
    NoSlot { running: usize },
    #[error("no page is free for {tokens} restored tokens")]
    NoPages { tokens: usize },
}
