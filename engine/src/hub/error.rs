//! What can go wrong between a Hub id and its files.

use std::path::PathBuf;

use indicatif::HumanBytes;

/// Why a model cannot be had, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The id is none.
    #[error(
        "{id}: {reason}; expected owner/name or owner/name@revision, such as ai21labs/AI21-Jamba-Mini-1.7@main"
    )]
    Id {
        /// What was given.
        id: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Nobody says where the cache is.
    #[error("no place for downloads: HOME is not set; set HF_HOME or HF_HUB_CACHE to a directory")]
    NoCache,
    /// The proxy's address, the endpoint or the token cannot be used.
    #[error("{what} cannot be used: {reason}")]
    Option {
        /// Which one.
        what: &'static str,
        /// Why not.
        reason: String,
    },
    /// Not (all) in the cache, and offline.
    #[error(
        "{id} is not in {cache}: {missing}, and downloads are off. Run once without --offline and HF_HUB_OFFLINE, or copy the cache of a machine that has it"
    )]
    Offline {
        /// The model.
        id: String,
        /// The cache.
        cache: PathBuf,
        /// What it lacks.
        missing: String,
    },
    /// The Hub does not know it, or shows it to nobody without a token.
    #[error("{id}: {endpoint} has no such {what}{help}")]
    NotFound {
        /// The model.
        id: String,
        /// Who was asked.
        endpoint: String,
        /// "model" or "revision …".
        what: String,
        /// What to do.
        help: &'static str,
    },
    /// 401 or 403.
    #[error("{id}: {endpoint} refuses access (HTTP {status}). {help}")]
    Denied {
        /// The model.
        id: String,
        /// Who was asked.
        endpoint: String,
        /// 401 or 403.
        status: u16,
        /// What to do.
        help: &'static str,
    },
    /// The repository lacks a file we need.
    #[error("{id} has no {file}: {help}")]
    NoFile {
        /// The model.
        id: String,
        /// The file.
        file: String,
        /// What to do.
        help: &'static str,
    },
    /// An answer we cannot use.
    #[error(
        "{url}: {found}; expected {expected}. If HF_ENDPOINT is a mirror, it may not speak the Hub's language"
    )]
    Answer {
        /// What was asked for.
        url: String,
        /// What came.
        found: String,
        /// What should have come.
        expected: &'static str,
    },
    /// The network failed, again and again.
    #[error(
        "{url}: {reason}. Check the connection (and HTTPS_PROXY); what was downloaded is kept, run again to go on"
    )]
    Network {
        /// What was asked for.
        url: String,
        /// What the last attempt met.
        reason: String,
    },
    /// An index that names no proper files.
    #[error(
        "{id}: its index of shards: {found}; expected a weight_map from tensors to files beside it"
    )]
    Index {
        /// The model.
        id: String,
        /// What it holds.
        found: String,
    },
    /// The disk is too full.
    #[error("{path}: {} to download, {} free: free {} or set HF_HUB_CACHE to a larger disk", HumanBytes(*need), HumanBytes(*free), HumanBytes(need - free))]
    Space {
        /// The cache.
        path: PathBuf,
        /// Bytes to come.
        need: u64,
        /// Bytes there are.
        free: u64,
    },
    /// The cache cannot be read or written.
    #[error(
        "{path}: cannot {action}: {source}. Check who owns it, or set HF_HUB_CACHE to a directory you can write to"
    )]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
}
